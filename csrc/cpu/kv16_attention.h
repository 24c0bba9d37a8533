// kv16_attention, kv16_paged_attention: one pass over blocks of 64 slots for a tile of query rows, in float32.
//
// A row's result depends on its own query and on the slots start .. its last one, taken in blocks of 64 counted from `start`: a score is an ascending chain of
// fused multiply-adds over the channels; the running maximum is updated and what was summed before is multiplied by e^(old - new); sixteen lanes sum the
// exponentials; a block's part of the output is an ascending chain over its slots, added by one fused multiply-add per channel.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "kv4_attention.h"
#include "quota/kernels.h"

namespace {

// Slots slot .. slot + count of one (batch, KV head) -> to [count][padded], zero past d.
template <class V>
void widen_slots(const quota::Kv16& kv, const quota::Pages& pages, int64_t batch, int64_t head, int64_t slot, int64_t count, int64_t d, int64_t padded, float* to) {
  const int64_t places = pages.table ? pages.places : slot + count;
  for (int64_t done = 0; done < count;) {
    const int64_t at = (slot + done) % places, left = places - at, some = count - done < left ? count - done : left;
    const int64_t unit = pages.table ? pages.table[batch * pages.width + (slot + done) / places] : batch;
    const quota::Float16* from = kv.x + unit * kv.batch + head * kv.head + at * d;
    for (int64_t i = 0; i < some; ++i, from += d, to += padded)
      for (int64_t c = 0; c < d; c += kLanes) V::store(to + c, d - c < kLanes ? V::load(from + c, d - c) : V::load(from + c));
    done += some;
  }
}

// x [64][padded] -> [padded][64].
template <class V>
void transpose_slots(const float* x, int64_t d, int64_t padded, float* to) {
  for (int64_t v = 0; v < kParts; ++v)
    for (int64_t c = 0; c < d; c += 4) {
      typename V::I fours[4];
      V::transpose_fours(reinterpret_cast<const uint8_t*>(x + v * kLanes * padded + c), padded * int64_t{sizeof(float)}, fours);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) V::store_block(reinterpret_cast<uint8_t*>(to + (c + i) * kSlots + v * kLanes), fours[i]);
    }
}

// Products x [64] of a query with the block's keys -> weights e^(score - maximum), 0 where the row does not see the slot. Returns what the row's sums up to now
// have to be multiplied by.
template <class V>
float weigh_scores(float* x, int64_t seen, float scaling, RowState& row) {
  auto best = V::set1(row.best);
#pragma GCC unroll 4
  for (int v = 0; v < kParts; ++v) {
    const auto s = V::first(V::mul(V::load(x + v * kLanes), V::set1(scaling)), lanes_of(seen, v), V::set1(-__builtin_inff()));
    V::store(x + v * kLanes, s);
    best = V::max(best, s);
  }
  const float largest = V::largest(best);
  float lanes[kLanes] = {1.0f};
  if (largest != row.best) {
    V::store(lanes, exponential<V>(V::set1(row.best - largest)));
    row.best = largest;
  }
  auto total = V::mul(V::load(row.total), V::set1(lanes[0]));
#pragma GCC unroll 4
  for (int v = 0; v < kParts; ++v) {
    const auto p = exponential<V>(V::sub(V::load(x + v * kLanes), V::set1(largest)));
    V::store(x + v * kLanes, p);
    total = V::add(total, p);
  }
  V::store(row.total, total);
  return lanes[0];
}

// Query rows tile * 64 .. of one (batch, KV head), as attention_tile.
template <class V>
void attention16_tile(const quota::Attention16Args& args, const quota::Pages& pages, int64_t batch, int64_t kv_head, int64_t tile) {
  const int64_t group = args.heads / args.kv_heads, d = args.dim, padded = round_up(d, kLanes);
  const int64_t first_row = tile * quota::kQueryTile;
  const int64_t rows = args.tokens * group - first_row < quota::kQueryTile ? args.tokens * group - first_row : quota::kQueryTile;
  const int64_t start = args.start ? args.start[batch] : 0, length = pages.length ? pages.length[batch] : args.length;
  const auto query_of = [&](int64_t i) { return (first_row + i) / group; };
  const auto head_index = [&](int64_t i) { return kv_head * group + (first_row + i) % group; };
  const auto flat_row = [&](int64_t i) { return (batch * args.heads + head_index(i)) * args.tokens + query_of(i); };
  const auto seen_by = [&](int64_t i) { return length - args.tokens + query_of(i) + 1 - start; };  // number of slots
  const int64_t seen = seen_by(rows - 1);

  const Scratch<float> queries(rows * d), wide(kSlots * padded), keys(padded * kSlots), values(kSlots * padded);
  const Scratch<float> weights(rows * kSlots), products(rows * padded), acc(rows * padded);
  const Scratch<RowState> states(rows);
  for (int64_t i = 0; i < rows; ++i) {
    __builtin_memcpy(queries + i * d, args.q + flat_row(i) * d, static_cast<size_t>(d) * sizeof(float));
    states[i] = {-__builtin_inff(), {}, {}};
  }
  __builtin_memset(weights.data, 0, static_cast<size_t>(rows * kSlots) * sizeof(float));
  __builtin_memset(wide.data, 0, static_cast<size_t>(kSlots * padded) * sizeof(float));
  __builtin_memset(products.data, 0, static_cast<size_t>(rows * padded) * sizeof(float));
  __builtin_memset(acc.data, 0, static_cast<size_t>(rows * padded) * sizeof(float));

  int64_t from = 0;  // rows before it see nothing of the block
  for (int64_t j = 0; j < seen; j += kSlots) {
    const int64_t count = seen - j < kSlots ? seen - j : kSlots;
    const auto seen_of = [&](int64_t i) { return seen_by(i) - j < count ? seen_by(i) - j : count; };
    while (seen_by(from) <= j) ++from;
    widen_slots<V>(args.k, pages, batch, kv_head, start + j, count, d, padded, wide);
    transpose_slots<V>(wide, d, padded, keys);
    widen_slots<V>(args.v, pages, batch, kv_head, start + j, count, d, padded, values);
    chain_matmul<V>({queries + from * d, d, 1, keys, kSlots, weights + from * kSlots, kSlots}, rows - from, count, d);
    for (int64_t i = from, next; i < rows; i = next) {  // rows that see the same slots, together: what a row does not see must not reach it, not even as 0 * NaN
      next = i + 1;
      while (next < rows && seen_of(next) == seen_of(i)) ++next;
      float correction[quota::kQueryTile];
      for (int64_t r = i; r < next; ++r) correction[r - i] = weigh_scores<V>(weights + r * kSlots, seen_of(r), args.scaling, states[r]);
      chain_matmul<V>({weights + i * kSlots, kSlots, 1, values, padded, products + i * padded, padded}, next - i, d, seen_of(i));
      for (int64_t r = i; r < next; ++r)
        for (int64_t c = r * padded; c < (r + 1) * padded; c += kLanes)
          V::store(acc + c, V::fma(V::load(acc + c), V::set1(correction[r - i]), V::load(products + c)));
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    const bool blind = seen_by(i) <= 0;
    const float total = blind ? 1.0f : sum_of_lanes<V>(V::load(states[i].total));
    args.lse[flat_row(i)] = blind ? -__builtin_inff() : states[i].best + __builtin_logf(total);
    float* out = args.out + ((batch * args.tokens + query_of(i)) * args.heads + head_index(i)) * d;
    for (int64_t c = 0; c < d; c += kLanes) {
      const auto y = V::div(V::load(acc + i * padded + c), V::set1(total));
      if (d - c < kLanes)
        V::store(out + c, y, d - c);
      else
        V::store(out + c, y);
    }
  }
}

}  // namespace
