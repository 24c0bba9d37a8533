// kv4_attention: one pass over blocks of 64 slots for a tile of query rows, on integer dot products (codes.h).
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

inline void load_scales(const Kv4Head& kv, int64_t first, int64_t count, BlockScales& block) {
  for (int64_t i = 0; i < kSlots; ++i) block.set(i, i < count ? kv.scale[first + i] : 0.0f, i < count ? kv.zero[first + i] : 0.0f);
}

// Sums [3][64] of one row -> its weights of the block as limbs [3][64]. `seen`: slots of the block that the row sees, at least one.
// Returns the unit of the limbs; `correction` is what the row's sums up to now were multiplied by.
template <class V>
inline float softmax_block(const int32_t* sums, const BlockScales (&block)[2], int64_t seen, const LimbSums& query, float factor, RowState& row,
                           int8_t* limbs, float& correction) {
  const auto lowest = V::set1(-__builtin_inff());
  typename V::F s[4];
  auto best = V::set1(row.best);
  const float query_sum = query.value();
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    s[v] = score_lanes<V>(sums, block[0], v * kLanes, query, query_sum, factor);
    if (seen < kSlots) s[v] = V::first(s[v], lanes_of(seen, v), lowest);
    best = V::max(best, s[v]);
  }
  const float largest = V::largest(best);
  auto total = V::load(row.total), middles = V::load(row.middles);
  correction = 1.0f;
  if (largest != row.best) {
    float lanes[kLanes];
    V::store(lanes, exponential<V>(V::set1(row.best - largest)));
    correction = lanes[0];
    total = V::mul(total, V::set1(correction)), middles = V::mul(middles, V::set1(correction));
    row.best = largest;
  }
  alignas(64) float weights[kSlots];
  const auto top = V::set1(largest);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const auto p = exponential<V>(V::sub(s[v], top));  // unseen lanes: e^-inf = 0
    total = V::add(total, p);
    const int64_t lanes = lanes_of(seen, v);  // what a row does not see must not reach it, not even as 0 * NaN
    middles = V::fma(p, V::load(block[1].middle + v * kLanes, lanes), middles);
    V::store(weights + v * kLanes, V::mul(p, V::load(block[1].scale + v * kLanes, lanes)));
  }
  V::store(row.total, total), V::store(row.middles, middles);
  return to_limbs<V>(weights, kSlots, limbs, kSlots);
}

// acc [64] = acc * correction + sums [3][64] * unit.
template <class V>
inline void add_block(const int32_t* sums, const LimbSums& weights, float unit, float correction, float* acc) {
  const auto old = V::set1(correction), scale = V::set1(unit);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    float* at = acc + v * kLanes;
    V::store(at, V::fma(centred<V>(sums + v * kLanes, weights), scale, V::mul(V::load(at), old)));
  }
}

// Query rows tile * 64 .. of one (batch, KV head); row i is query i / group of head kv_head * group + i % group.
template <class V, class Dot>
void attention_tile(const quota::AttentionArgs& args, int64_t batch, int64_t kv_head, int64_t tile) {
  const int64_t group = args.heads / args.kv_heads, d = args.dim, padded = round_up(d, kDims), row_bytes = d / 2;
  const int64_t first_row = tile * quota::kQueryTile;
  const int64_t rows = args.tokens * group - first_row < quota::kQueryTile ? args.tokens * group - first_row : quota::kQueryTile;
  const int64_t start = args.start ? args.start[batch] : 0;
  const auto query_of = [&](int64_t i) { return (first_row + i) / group; };
  const auto head_index = [&](int64_t i) { return kv_head * group + (first_row + i) % group; };
  const auto flat_row = [&](int64_t i) { return (batch * args.heads + head_index(i)) * args.tokens + query_of(i); };
  const auto seen_by = [&](int64_t i) { return args.length - args.tokens + query_of(i) + 1 - start; };  // number of slots
  const int64_t seen = seen_by(rows - 1) > 0 ? seen_by(rows - 1) : 0;

  const QueryRows queries(rows, d);
  const Scratch<float> acc(rows * padded), ordered(padded);
  const Scratch<RowState> states(rows);
  for (int64_t i = 0; i < rows; ++i) {
    queries.set<V>(i, args.q + flat_row(i) * d, d, ordered);
    states[i] = {-__builtin_inff(), {}, {}};
  }
  __builtin_memset(acc.data, 0, static_cast<size_t>(rows * padded) * sizeof(float));

  const Scratch<uint8_t> keys(kSlots * padded), values(kSlots * padded), staging(kSlots * padded / 2);
  const Kv4Head k = head_of(args.k, batch, kv_head, start, row_bytes), v = head_of(args.v, batch, kv_head, start, row_bytes);
  BlockScales block[2];  // of keys and of values
  alignas(64) int32_t sums[Dot::kRows * kLimbs * kSlots];
  alignas(64) int8_t limbs[Dot::kRows * kLimbs * kSlots];
  float unit[Dot::kRows], correction[Dot::kRows];
  LimbSums weights[Dot::kRows];
  int64_t from = 0;  // rows before it see nothing of the block
  for (int64_t j = 0; j < seen; j += kSlots) {
    const int64_t count = seen - j < kSlots ? seen - j : kSlots;
    while (seen_by(from) <= j) ++from;
    key_panel<V>(whole_rows(k.q + j * row_bytes, count, row_bytes, padded, staging), padded, keys);
    value_panels<V>(whole_rows(v.q + j * row_bytes, count, row_bytes, padded, staging), padded, values);
    load_scales(k, j, count, block[0]), load_scales(v, j, count, block[1]);
    for (int64_t i = from; i < rows; i += Dot::kRows) {
      const int64_t some = rows - i < Dot::kRows ? rows - i : Dot::kRows;
      Dot::run(some, queries.row(i), padded, keys, padded / 4, sums);
      for (int64_t r = 0; r < some; ++r) {
        int8_t* to = limbs + r * kLimbs * kSlots;
        unit[r] = softmax_block<V>(sums + r * kLimbs * kSlots, block, seen_by(i + r) - j < kSlots ? seen_by(i + r) - j : kSlots, queries.sums[i + r],
                                   queries.unit[i + r] * args.scaling, states[i + r], to, correction[r]);
        weights[r] = sum_limbs<V>(to, kSlots, kSlots);
      }
      for (int64_t column = 0; column < padded; column += kDims) {
        Dot::run(some, limbs, kSlots, values + column * kSlots, kSlots / 4, sums);
        for (int64_t r = 0; r < some; ++r) add_block<V>(sums + r * kLimbs * kSlots, weights[r], unit[r], correction[r], acc + (i + r) * padded + column);
      }
    }
  }

  const Scratch<int32_t> column_of(padded);
  for (int64_t c = 0; c < padded; ++c) column_of[value_dim(c, padded)] = static_cast<int32_t>(c);
  for (int64_t i = 0; i < rows; ++i) {
    float* out = args.out + ((batch * args.tokens + query_of(i)) * args.heads + head_index(i)) * d;
    const bool blind = seen_by(i) <= 0;
    const float total = blind ? 1.0f : sum_of_lanes<V>(V::load(states[i].total)), middle = sum_of_lanes<V>(V::load(states[i].middles));
    args.lse[flat_row(i)] = blind ? -__builtin_inff() : states[i].best + __builtin_logf(total);
    const auto offset = V::set1(middle), divisor = V::set1(total);
    for (int64_t c = 0; c < padded; c += kLanes) V::store(ordered + c, V::div(V::add(V::load(acc + i * padded + c), offset), divisor));
    for (int64_t c = 0; c < d; ++c) out[c] = ordered[column_of[c]];
  }
}

}  // namespace
