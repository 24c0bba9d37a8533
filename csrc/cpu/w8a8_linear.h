// w8a8_linear: rows to int8, exact int32 dot products, scales and bias in the epilogue.
#pragma once

#include <cstdint>

#include "quantize_act.h"
#include "quota/kernels.h"

namespace {

constexpr int kRows8 = 6;  // as kDotRows: rows of one tile of accumulators

template <class V>
void quantize8_rows(const quota::Quantize8Args& args, int64_t begin, int64_t end) {
  const int64_t lda = quota::padded_k(args.k);
  for (int64_t m = begin; m < end; ++m) {
    const float* x = args.x + m * args.k;
    int8_t* q = args.q + m * lda;
    const float reach = largest_magnitude<V>(x, args.k), scale = (reach < kSmallestRange ? kSmallestRange : reach) / 127.0f;
    args.scale[m] = scale, args.row_sum[m] = 0;
    const bool finite = scale - scale == 0.0f;  // else the scale alone makes the row's outputs what they are
    for (int64_t i = 0; i < lda; i += kLanes) {
      auto v = i + kLanes <= args.k ? V::load(x + i) : i < args.k ? V::load(x + i, args.k - i) : V::zero();
      v = V::min(V::set1(127.0f), V::max(V::set1(-127.0f), V::round(V::mul(v, V::set1(1.0f / scale)))));
      V::store_bytes(q + i, finite ? V::to_int(v) : V::izero());
    }
    for (int64_t i = 0; i < args.k; ++i) args.row_sum[m] += q[i];
  }
}

// sums [kRows][64] of rows of a with one panel.
template <class V, int kRows>
inline void dot8(const int8_t* w, const int8_t* a, int64_t lda, int32_t* sums) {
  constexpr int kVectors = V::kDotVectors;
  for (int first = 0; first < 4; first += kVectors) {
    typename V::I acc[kRows][kVectors];
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[row][v] = V::izero();
    for (int64_t group = 0; group < lda / quota::kGroup; ++group) {
      typename V::I column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) column[v] = V::load_block(reinterpret_cast<const uint8_t*>(w + group * 4 * quota::kPanel + (first + v) * 64));
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
        int32_t four;
        __builtin_memcpy(&four, a + row * lda + group * quota::kGroup, 4);
        const auto x = V::iset1(four);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[row][v] = V::dot4_signed(acc[row][v], column[v], x);
      }
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) V::istore(sums + row * quota::kPanel + (first + v) * kLanes, acc[row][v]);
  }
}

template <class V>
void linear8_panel(const quota::Linear8Args& args, int64_t panel) {
  const int64_t lda = quota::padded_k(args.x.k), n0 = panel * quota::kPanel;
  const int8_t* w = args.blocks + panel * quota::kPanel * lda;
  alignas(64) int32_t sums[kRows8 * quota::kPanel];
  for (int64_t m = 0; m < args.m;) {
    const int64_t rows = args.m - m < kRows8 ? args.m - m : kRows8;
    const int8_t* a = args.x.q + m * lda;
    switch (rows) {
      case 6: dot8<V, 6>(w, a, lda, sums); break;
      case 5: dot8<V, 5>(w, a, lda, sums); break;
      case 4: dot8<V, 4>(w, a, lda, sums); break;
      case 3: dot8<V, 3>(w, a, lda, sums); break;
      case 2: dot8<V, 2>(w, a, lda, sums); break;
      default: dot8<V, 1>(w, a, lda, sums);
    }
    for (int64_t v = 0; v < quota::kPanel && n0 + v < args.n; v += kLanes) {
      const int64_t n = n0 + v, left = args.n - n < kLanes ? args.n - n : kLanes;
      const auto w_scale = V::load(args.w_scale + n, left), bias = args.bias ? V::load(args.bias + n, left) : V::zero();
      for (int64_t i = 0; i < rows; ++i) {
        const auto sum = V::isub(V::iload(sums + i * quota::kPanel + v), V::iset1(V::kByteOffset * args.x.row_sum[m + i]));
        auto y = V::mul(V::mul(V::to_float(sum), w_scale), V::set1(args.x.scale[m + i]));
        if (args.bias) y = V::add(y, bias);
        V::store(args.y + (m + i) * args.n + n, y, left);
      }
    }
    m += rows;
  }
}

}  // namespace
