// kv4_attention, kv4_paged_attention: one pass over blocks of 64 slots for a tile of query rows, on integer dot products (codes.h).
//
// A row's result depends on its own query and on the slots start .. its last one, taken in blocks of 64 counted from `start`: a block's scores
// are exact integers times scales; the running maximum is updated and what was summed before is multiplied by e^(old - new); sixteen lanes sum
// the exponentials and exponentials times middles (codes.h); exponentials times scales become fixed point, so the block's part of the output is exact
// integers again, added by one fused multiply-add per dim.
#pragma once

#include <cstdint>

#include "codes.h"
#include "elementwise.h"
#include "quota/kernels.h"

namespace {

// Lanes of vector v that hold slots before `count`.
inline int64_t lanes_of(int64_t count, int64_t v) {
  const int64_t left = count - v * kLanes;
  return left < 0 ? 0 : left < kLanes ? left : kLanes;
}

// What a row has summed so far.
struct RowState {
  float best;
  float total[kLanes], middles[kLanes];
};

// A block of up to 64 slots of one (batch, KV head), sixteen by sixteen.
struct SlotBlock {
  CodeRows codes;
  const float *scale[kParts], *zero[kParts];
};

template <class V>
inline void load_scales(const SlotBlock& slots, int64_t count, BlockScales& block) {
  for (int64_t v = 0; v < kParts; ++v) {
    const auto scale = V::load(slots.scale[v], lanes_of(count, v)), zero = V::load(slots.zero[v], lanes_of(count, v));
    V::store(block.scale + v * kLanes, scale);
    V::store(block.middle + v * kLanes, V::add(zero, V::mul(V::set1(float{kMiddle}), scale)));
  }
}

// Where the slots of one (batch, KV head) lie: in one row, or on pages, whose blocks begin at slot 0. Pages that are no multiple of sixteen slots are put
// one after the other first.
struct Slots {
  const quota::Kv4<const uint8_t, const float>& kv;
  const quota::Pages& pages;
  int64_t batch, head, row_bytes;
  bool copied;
  Scratch<uint8_t> codes;
  Scratch<float> scales;  // and zeros

  Slots(const quota::Kv4<const uint8_t, const float>& kv, const quota::Pages& pages, int64_t batch, int64_t head, int64_t row_bytes)
      : kv(kv), pages(pages), batch(batch), head(head), row_bytes(row_bytes), copied(pages.table && pages.places % kLanes),
        codes(copied ? kSlots * row_bytes : 0), scales(copied ? 2 * kSlots : 0) {}

  Kv4Head at(int64_t slot) const {
    if (!pages.table) return head_of(kv, batch, head, slot, row_bytes);
    return head_of(kv, pages.table[batch * pages.width + slot / pages.places], head, slot % pages.places, row_bytes);
  }

  SlotBlock block(int64_t slot, int64_t count) const {
    if (copied) copy(slot, count);
    SlotBlock out{{{}, row_bytes}, {}, {}};
    for (int64_t v = 0; v < kParts; ++v) {
      const int64_t begin = v * kLanes < count ? v * kLanes : 0;  // a part without slots is not read, but points at some
      const Kv4Head from = copied ? Kv4Head{codes + begin * row_bytes, scales + begin, scales + kSlots + begin} : at(slot + begin);
      out.codes.part[v] = from.q, out.scale[v] = from.scale, out.zero[v] = from.zero;
    }
    return out;
  }

  // Ask for the slots of the next block. Pages lie anywhere, so no hardware foresees them, and a decoding row takes every slot once.
  void prefetch(int64_t slot, int64_t count) const {
    for (int64_t begin = 0; begin < count && begin < kSlots; begin += kLanes) {
      const Kv4Head from = at(slot + begin);
      for (int64_t byte = 0; byte < kLanes * row_bytes; byte += 64) __builtin_prefetch(from.q + byte);
      __builtin_prefetch(from.scale), __builtin_prefetch(from.zero);
    }
  }

 private:
  void copy(int64_t slot, int64_t count) const {
    for (int64_t done = 0, some; done < count; done += some) {
      const int64_t left = pages.places - (slot + done) % pages.places;
      some = count - done < left ? count - done : left;
      const Kv4Head from = at(slot + done);
      __builtin_memcpy(codes + done * row_bytes, from.q, static_cast<size_t>(some * row_bytes));
      __builtin_memcpy(scales + done, from.scale, static_cast<size_t>(some) * sizeof(float));
      __builtin_memcpy(scales + kSlots + done, from.zero, static_cast<size_t>(some) * sizeof(float));
    }
  }
};

// One row on its way through a block. The steps below each take all rows at hand before the next one starts: within a row every step waits
// for the one before, and only other rows can fill that time.
struct RowBlock {
  alignas(64) float x[kSlots];  // scores, then weights
  float correction;
  LimbRow weights;
};

// Scores of the channels that are not packed (AttentionArgs::shared), one block of slots at a time: chains over the channels.
struct SharedScores {
  int64_t extra, stride;
  const float* keys;        // from slot `start` on
  Scratch<float> queries;   // [rows][extra]
  Scratch<float> products;  // [rows][64]

  SharedScores(const quota::AttentionArgs& args, int64_t batch, int64_t start, int64_t rows)
      : extra(args.extra), stride(args.shared_slots), keys(args.shared ? args.shared + batch * extra * stride + start : nullptr), queries(rows * extra),
        products(extra ? rows * kSlots : 0) {
    if (extra) __builtin_memset(products.data, 0, static_cast<size_t>(rows * kSlots) * sizeof(float));
  }
  void set(int64_t i, const float* q) const { __builtin_memcpy(queries + i * extra, q, static_cast<size_t>(extra) * sizeof(float)); }
  const float* row(int64_t i) const { return extra ? products + i * kSlots : nullptr; }

  template <class V>
  void score(int64_t from, int64_t rows, int64_t slot, int64_t count) const {
    if (extra) chain_matmul<V>({queries + from * extra, extra, 1, keys + slot, stride, products + from * kSlots, kSlots}, rows - from, count, extra);
  }
};

// Sums [3][64], and products [64] of shared channels or null -> scores, -inf where the row does not see the slot (it sees `seen` of the block),
// and the row's new maximum. `correction` is what the row's sums up to now have to be multiplied by.
template <class V>
inline void score_block(const int32_t* sums, const BlockScales& keys, const float* shared, int64_t seen, const LimbRow& query, float scaling, RowState& row,
                        RowBlock& block) {
  const float factor = query.unit * scaling;
  auto best = V::set1(row.best);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    auto s = score_lanes<V>(sums, keys, v * kLanes, query, factor);
    if (shared) s = V::add(s, V::mul(V::load(shared + v * kLanes), V::set1(scaling)));
    if (seen < kSlots) s = V::first(s, lanes_of(seen, v), V::set1(-__builtin_inff()));
    V::store(block.x + v * kLanes, s);
    best = V::max(best, s);
  }
  const float largest = V::largest(best);
  block.correction = 1.0f;
  if (largest != row.best) {
    float lanes[kLanes];
    V::store(lanes, exponential<V>(V::set1(row.best - largest)));
    block.correction = lanes[0];
    row.best = largest;
  }
}

// Scores -> weights e^(score - maximum) * scale, and the sums of the row.
template <class V>
inline void weigh_block(const BlockScales& values, int64_t seen, RowState& row, RowBlock& block) {
  const auto top = V::set1(row.best), correction = V::set1(block.correction);
  auto total = V::mul(V::load(row.total), correction), middles = V::mul(V::load(row.middles), correction);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    float* x = block.x + v * kLanes;
    const int64_t lanes = lanes_of(seen, v);  // what a row does not see must not reach it, not even as 0 * NaN
    const auto p = exponential<V>(V::sub(V::load(x), top));  // unseen lanes: e^-inf = 0
    total = V::add(total, p);
    middles = V::fma(p, V::load(values.middle + v * kLanes, lanes), middles);
    V::store(x, V::mul(p, V::load(values.scale + v * kLanes, lanes)));
  }
  V::store(row.total, total), V::store(row.middles, middles);
}

// acc [64] = acc * correction + sums [3][64] * unit.
template <class V>
inline void add_block(const int32_t* sums, const RowBlock& block, float* acc) {
  const auto old = V::set1(block.correction), scale = V::set1(block.weights.unit);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    float* at = acc + v * kLanes;
    V::store(at, V::fma(centred<V>(sums + v * kLanes, block.weights), scale, V::mul(V::load(at), old)));
  }
}

// Query rows tile * 64 .. of one (batch, KV head); row i is query i / group of head kv_head * group + i % group.
template <class V, class Dot>
void attention_tile(const quota::AttentionArgs& args, const quota::Pages& pages, int64_t batch, int64_t kv_head, int64_t tile) {
  const int64_t group = args.heads / args.kv_heads, d = args.dim, wide = d + args.extra, padded = round_up(d, kDims), row_bytes = d / 2;
  const int64_t first_row = tile * quota::kQueryTile;
  const int64_t rows = args.tokens * group - first_row < quota::kQueryTile ? args.tokens * group - first_row : quota::kQueryTile;
  const int64_t start = args.start ? args.start[batch] : 0, length = pages.length ? pages.length[batch] : args.length;
  const auto query_of = [&](int64_t i) { return (first_row + i) / group; };
  const auto head_index = [&](int64_t i) { return kv_head * group + (first_row + i) % group; };
  const auto flat_row = [&](int64_t i) { return (batch * args.heads + head_index(i)) * args.tokens + query_of(i); };
  const auto seen_by = [&](int64_t i) { return length - args.tokens + query_of(i) + 1 - start; };  // number of slots
  const int64_t seen = seen_by(rows - 1) > 0 ? seen_by(rows - 1) : 0;

  const QueryRows queries(rows, d);
  const SharedScores shared(args, batch, start, rows);
  const Scratch<float> acc(rows * padded);
  const Scratch<RowState> states(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const float* q = args.q + flat_row(i) * wide;
    queries.set<V>(i, q), shared.set(i, q + d);
    states[i] = {-__builtin_inff(), {}, {}};
  }
  __builtin_memset(acc.data, 0, static_cast<size_t>(rows * padded) * sizeof(float));

  const Scratch<uint8_t> keys(kSlots * padded), values(kSlots * padded), staging(kSlots * padded / 2);
  const Slots all_keys(args.k, pages, batch, kv_head, row_bytes), all_values(args.v, pages, batch, kv_head, row_bytes);
  BlockScales scales[2];  // of keys and of values
  RowBlock block[Dot::kRows];
  alignas(64) int32_t sums[Dot::kRows * kLimbs * kSlots];
  alignas(64) int8_t limbs[Dot::kRows * kLimbs * kSlots];
  int64_t from = 0;  // rows before it see nothing of the block
  for (int64_t j = 0; j < seen; j += kSlots) {
    const int64_t count = seen - j < kSlots ? seen - j : kSlots;
    while (seen_by(from) <= j) ++from;
    const SlotBlock k = all_keys.block(start + j, count), v = all_values.block(start + j, count);
    all_keys.prefetch(start + j + kSlots, seen - j - kSlots), all_values.prefetch(start + j + kSlots, seen - j - kSlots);
    key_panel<V>(whole_rows(k.codes, count, padded, staging), padded, keys);
    value_panels<V>(whole_rows(v.codes, count, padded, staging), padded, values);
    load_scales<V>(k, count, scales[0]), load_scales<V>(v, count, scales[1]);
    shared.score<V>(from, rows, j, count);
    for (int64_t i = from; i < rows; i += Dot::kRows) {
      const int64_t some = rows - i < Dot::kRows ? rows - i : Dot::kRows;
      Dot::run(some, queries.row(i), padded, keys, padded / 4, sums);
      const auto seen_of = [&](int64_t r) { return seen_by(i + r) - j < kSlots ? seen_by(i + r) - j : kSlots; };
      for (int64_t r = 0; r < some; ++r)
        score_block<V>(sums + r * kLimbs * kSlots, scales[0], shared.row(i + r), seen_of(r), queries.rows[i + r], args.scaling, states[i + r], block[r]);
      for (int64_t r = 0; r < some; ++r) weigh_block<V>(scales[1], seen_of(r), states[i + r], block[r]);
      for (int64_t r = 0; r < some; ++r) block[r].weights = to_limbs<V>(block[r].x, kSlots, limbs + r * kLimbs * kSlots, kSlots);
      for (int64_t column = 0; column < padded; column += kDims) {
        Dot::run(some, limbs, kSlots, values + column * kSlots, kSlots / 4, sums);
        for (int64_t r = 0; r < some; ++r) add_block<V>(sums + r * kLimbs * kSlots, block[r], acc + (i + r) * padded + column);
      }
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    const bool blind = seen_by(i) <= 0;
    const float total = blind ? 1.0f : sum_of_lanes<V>(V::load(states[i].total));
    args.lse[flat_row(i)] = blind ? -__builtin_inff() : states[i].best + __builtin_logf(total);
    const auto offset = V::set1(sum_of_lanes<V>(V::load(states[i].middles))), divisor = V::set1(total);
    for (float* x = acc + i * padded; x < acc + (i + 1) * padded; x += kLanes) V::store(x, V::div(V::add(V::load(x), offset), divisor));
  }
  const Scratch<int32_t> column_of(padded);
  for (int64_t c = 0; c < padded; ++c) column_of[value_dim(c, padded)] = static_cast<int32_t>(c);
  for (int64_t i = 0; i < rows; ++i) {
    float* out = args.out + ((batch * args.tokens + query_of(i)) * args.heads + head_index(i)) * d;
    for (int64_t c = 0; c < d; ++c) out[c] = acc[i * padded + column_of[c]];
  }
}

}  // namespace
