// w4a4_linear: exact int32 from int8 dot products, scales and bias in the epilogue.
#pragma once

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace {

constexpr int64_t kDotRows = 6;  // 6 x 64 outputs: 24 of 32 registers with AVX-512

template <class V>
void unpack_rows(const quota::UnpackArgs& args, int64_t begin, int64_t end) {
  const int64_t bytes = (args.k + 1) / 2, lda = quota::padded_k(args.k);
  for (int64_t m = begin; m < end; ++m) {
    const uint8_t* x = args.x_q + m * bytes;
    int8_t* a = args.a + m * lda;
    for (int64_t i = 0; i < bytes; ++i) {
      a[2 * i] = static_cast<int8_t>(((x[i] & 15) ^ 8) - 8);
      a[2 * i + 1] = static_cast<int8_t>((x[i] >> 4 ^ 8) - 8);
    }
    for (int64_t i = args.k; i < lda; ++i) a[i] = 0;
    int32_t sum = 0;
    for (int64_t i = 0; i < args.k; ++i) sum += a[i];
    args.row_sum[m] = sum;
  }
}

// 128 packed bytes per group -> 256 bytes in 0..15.
inline void unpack_panel(const uint8_t* packed, int64_t groups, uint8_t* panel) {
  for (int64_t half = 0; half < 2 * groups; ++half, packed += 64, panel += 128)
    for (int i = 0; i < 64; ++i) panel[i] = packed[i] & 15, panel[64 + i] = packed[i] >> 4;
}

template <class V, int kRows, bool kPacked>
inline void linear_tile(const quota::LinearArgs& args, const uint8_t* w, int64_t panel, int64_t m) {
  const int64_t lda = quota::padded_k(args.k), n0 = panel * quota::kPanel;
  alignas(64) int32_t sums[kRows * quota::kPanel];
  V::template dot<kRows, kPacked>(w, args.a + m * lda, lda, lda / quota::kGroup, sums);
  for (int64_t v = 0; v < quota::kPanel && n0 + v < args.n; v += kLanes) {
    const int64_t n = n0 + v, left = args.n - n < kLanes ? args.n - n : kLanes;
    const auto w_scale = V::load(args.w_scale + n, left);
    const auto bias = args.bias ? V::load(args.bias + n, left) : V::zero();
    for (int i = 0; i < kRows; ++i) {
      // the weights were taken as w + 8
      auto sum = V::isub(V::iload(sums + i * quota::kPanel + v), V::iset1(8 * args.row_sum[m + i]));
      if (args.x_zero) sum = V::isub(sum, V::imul(V::iset1(args.x_zero[m + i]), V::iload(args.col_sum + n)));
      auto y = V::mul(V::mul(V::to_float(sum), w_scale), V::set1(args.x_scale[m + i]));
      if (args.bias) y = V::add(y, bias);
      if (left == kLanes)
        V::store(args.y + (m + i) * args.n + n, y);
      else
        V::store(args.y + (m + i) * args.n + n, y, left);
    }
  }
}

template <class V, bool kPacked>
inline void linear_rest(const quota::LinearArgs& args, const uint8_t* w, int64_t panel, int64_t m, int64_t rows) {
  switch (rows) {
    case 1: return linear_tile<V, 1, kPacked>(args, w, panel, m);
    case 2: return linear_tile<V, 2, kPacked>(args, w, panel, m);
    case 3: return linear_tile<V, 3, kPacked>(args, w, panel, m);
    case 4: return linear_tile<V, 4, kPacked>(args, w, panel, m);
    case 5: return linear_tile<V, 5, kPacked>(args, w, panel, m);
    case 6: return linear_tile<V, 6, kPacked>(args, w, panel, m);
    default: return;
  }
}

// Few rows stream the packed weights; more rows unpack the panel once.
template <class V>
void linear_panel(const quota::LinearArgs& args, int64_t panel, int64_t begin, int64_t end) {
  const int64_t groups = quota::padded_k(args.k) / quota::kGroup;
  const uint8_t* packed = args.blocks + panel * groups * 2 * quota::kPanel;
  if (end - begin <= kDotRows) return linear_rest<V, true>(args, packed, panel, begin, end - begin);
  const Scratch<uint8_t> w(groups * 4 * quota::kPanel);
  unpack_panel(packed, groups, w);
  int64_t m = begin;
  for (; m + kDotRows <= end; m += kDotRows) linear_tile<V, kDotRows, false>(args, w, panel, m);
  linear_rest<V, false>(args, w, panel, m, end - m);
}

}  // namespace
