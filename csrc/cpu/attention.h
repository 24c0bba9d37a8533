// kv4_attention: blocks of keys and values are dequantized once per tile of query rows.
//
// A row's result depends on its own query and on the slots start .. its last one: scores are chains over d, the maximum has no order, the
// sum of exponentials runs in sixteen lanes counted from `start`, the output is a chain over slots. Slots after a row's last have weight zero.
#pragma once

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace {

constexpr int64_t kKeyBlock = 64;

struct Kv4Head {  // one (batch, KV head) from its first visible slot on
  const uint8_t* q;
  const float* scale;
  const float* zero;
};

inline Kv4Head head_of(const quota::Kv4<const uint8_t, const float>& kv, int64_t b, int64_t h, int64_t start, int64_t row_bytes) {
  return {kv.q + b * kv.q_batch + h * kv.q_head + start * row_bytes, kv.scale + b * kv.scale_batch + h * kv.scale_head + start,
          kv.zero + b * kv.zero_batch + h * kv.zero_head + start};
}

// Slots first .. first + count as floats, transposed: out [D][64]; columns past count (up to a multiple of 16) are zero.
template <class V>
inline void dequantize_transposed(const Kv4Head& kv, int64_t first, int64_t count, int64_t dim, float* out) {
  const int64_t row_bytes = dim / 2;
  alignas(16) static constexpr uint8_t nothing[16] = {};
  alignas(16) uint8_t edge[16][16], columns[16][16];
  const auto low = V::iset1(15);
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t lanes = count - j < kLanes ? count - j : kLanes;
    const auto scale = V::load(kv.scale + first + j, lanes), zero = V::load(kv.zero + first + j, lanes);
    for (int64_t byte = 0; byte < row_bytes; byte += 16) {
      const int64_t bytes = row_bytes - byte < 16 ? row_bytes - byte : 16;
      const uint8_t* rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        rows[i] = i < lanes ? kv.q + (first + j + i) * row_bytes + byte : nothing;
        if (bytes < 16) {
          __builtin_memset(edge[i], 0, 16);
          if (i < lanes) __builtin_memcpy(edge[i], rows[i], static_cast<size_t>(bytes));
          rows[i] = edge[i];
        }
      }
      transpose_bytes(rows, columns);
      for (int64_t i = 0; i < bytes; ++i) {
        const auto pair = V::bytes(columns[i]);
        float* to = out + 2 * (byte + i) * kKeyBlock + j;
        V::store(to, V::add(V::mul(V::to_float(V::iand(pair, low)), scale), zero));
        V::store(to + kKeyBlock, V::add(V::mul(V::to_float(V::shift_right_4(pair)), scale), zero));
      }
    }
  }
}

// The float channels of `count` slots below the packed ones: from [extra][slots], out [extra][64] padded as above.
inline void copy_shared(const float* from, int64_t slots, int64_t count, int64_t extra, float* out) {
  for (int64_t e = 0; e < extra; ++e) {
    __builtin_memcpy(out + e * kKeyBlock, from + e * slots, static_cast<size_t>(count) * sizeof(float));
    for (int64_t j = count; j < round_up(count, kLanes); ++j) out[e * kKeyBlock + j] = 0.0f;
  }
}

// Slots first .. first + count as floats: out [count][ld], ld a multiple of 16; columns past D are not meaningful.
template <class V>
inline void dequantize_rows(const Kv4Head& kv, int64_t first, int64_t count, int64_t dim, float* out, int64_t ld) {
  const int64_t row_bytes = dim / 2;
  uint8_t nibbles[16];
  for (int64_t j = 0; j < count; ++j) {
    const auto scale = V::set1(kv.scale[first + j]), zero = V::set1(kv.zero[first + j]);
    const uint8_t* row = kv.q + (first + j) * row_bytes;
    for (int64_t byte = 0; byte < row_bytes; byte += 8) {
      if (byte + 8 <= row_bytes) {
        split_nibbles(row + byte, nibbles);
      } else {
        uint8_t edge[8] = {};
        __builtin_memcpy(edge, row + byte, static_cast<size_t>(row_bytes - byte));
        split_nibbles(edge, nibbles);
      }
      V::store(out + j * ld + 2 * byte, V::add(V::mul(V::to_float(V::bytes(nibbles)), scale), zero));
    }
  }
}

// Scores in place -> exp(score * scaling - max), zero from `count` to the end of its key block. Returns the sum; `largest` is the maximum.
template <class V>
inline float softmax_weights(float* row, int64_t count, float scaling, float& largest) {
  const auto factor = V::set1(scaling), lowest = V::set1(-__builtin_inff());
  auto best = lowest;
  const int64_t full = count / kLanes * kLanes;
  for (int64_t j = 0; j < count; j += kLanes) {
    auto s = V::mul(V::load(row + j), factor);
    if (j == full) s = V::first(s, count - full, lowest);
    V::store(row + j, s);
    best = V::max(best, s);
  }
  float lanes[kLanes];
  V::store(lanes, best);
  largest = lanes[0];
  for (int i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  auto total = V::zero();
  const auto top = V::set1(largest);
  for (int64_t j = 0; j < count; j += kLanes) {
    const auto p = exponential<V>(V::sub(V::load(row + j), top));  // masked lanes: exp(-inf) = 0
    V::store(row + j, p);
    total = V::add(total, p);
  }
  for (int64_t j = round_up(count, kLanes); j < round_up(count, kKeyBlock); j += kLanes) V::store(row + j, V::zero());
  V::store(lanes, total);
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  return sum;
}

// Query rows tile * 64 .. of one (batch, KV head); row i is query i / group of head kv_head * group + i % group.
template <class V>
void attention_tile(const quota::AttentionArgs& args, int64_t batch, int64_t kv_head, int64_t tile) {
  const int64_t group = args.heads / args.kv_heads, d = args.dim, ld = round_up(d, kLanes), row_bytes = d / 2, wide = d + args.extra;
  const int64_t first_row = tile * quota::kQueryTile;
  const int64_t rows = args.tokens * group - first_row < quota::kQueryTile ? args.tokens * group - first_row : quota::kQueryTile;
  const int64_t start = args.start[batch];
  const auto query_of = [&](int64_t i) { return (first_row + i) / group; };
  const auto head_index = [&](int64_t i) { return kv_head * group + (first_row + i) % group; };
  const auto seen_by = [&](int64_t i) { return args.length - args.tokens + query_of(i) + 1 - start; };  // number of slots
  const int64_t seen = seen_by(rows - 1) > 0 ? seen_by(rows - 1) : 0, width = round_up(seen, kKeyBlock);

  const Scratch<float> queries(rows * wide), weights(rows * width), block(kKeyBlock * (ld > wide ? ld : wide)), acc(rows * ld);
  for (int64_t i = 0; i < rows; ++i)
    __builtin_memcpy(queries + i * wide, args.q + ((batch * args.heads + head_index(i)) * args.tokens + query_of(i)) * wide,
                     static_cast<size_t>(wide) * sizeof(float));
  __builtin_memset(acc.data, 0, static_cast<size_t>(rows * ld) * sizeof(float));

  const Kv4Head keys = head_of(args.k, batch, kv_head, start, row_bytes), values = head_of(args.v, batch, kv_head, start, row_bytes);
  int64_t from = 0;  // rows before it see nothing of the block
  for (int64_t j = 0; j < seen; j += kKeyBlock) {
    const int64_t count = seen - j < kKeyBlock ? seen - j : kKeyBlock;
    while (seen_by(from) <= j) ++from;
    dequantize_transposed<V>(keys, j, count, d, block);
    if (args.extra) copy_shared(args.shared + batch * args.extra * args.shared_slots + start + j, args.shared_slots, count, args.extra, block + d * kKeyBlock);
    chain_matmul<V>({queries + from * wide, wide, 1, block, kKeyBlock, weights + from * width + j, width}, rows - from, round_up(count, kLanes), wide);
  }

  float sums[quota::kQueryTile];
  for (int64_t i = 0; i < rows; ++i) {
    float* lse = args.lse + (batch * args.heads + head_index(i)) * args.tokens + query_of(i);
    if (seen_by(i) <= 0) {
      sums[i] = 1.0f, *lse = -__builtin_inff();
      continue;
    }
    float largest;
    sums[i] = softmax_weights<V>(weights + i * width, seen_by(i), args.scaling, largest);
    *lse = largest + __builtin_logf(sums[i]);
  }

  from = 0;
  for (int64_t j = 0; j < seen; j += kKeyBlock) {
    const int64_t count = seen - j < kKeyBlock ? seen - j : kKeyBlock;
    while (seen_by(from) <= j) ++from;
    dequantize_rows<V>(values, j, count, d, block, ld);
    chain_matmul<V, true>({weights + from * width + j, width, 1, block, ld, acc + from * ld, ld}, rows - from, d, count);
  }

  for (int64_t i = 0; i < rows; ++i) {
    float* out = args.out + ((batch * args.tokens + query_of(i)) * args.heads + head_index(i)) * d;
    const auto sum = V::set1(sums[i]);
    for (int64_t v = 0; v < d; v += kLanes) V::store(out + v, V::div(V::load(acc + i * ld + v), sum), d - v < kLanes ? d - v : kLanes);
  }
}

}  // namespace
