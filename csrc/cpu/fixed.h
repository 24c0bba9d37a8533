// Products with transform factors in exact integers, quota/quant/fixed.py step by step: rows as 16-bit fixed point, sums of int16 pairs in int32.
// A value is at most 32639 and a factor's column sums to at most 65536 in magnitude, so every sum, whole or in part, is below 2^31.
#pragma once

#include <cstdint>

#include "chain.h"
#include "elementwise.h"
#include "quota/kernels.h"

namespace {

constexpr int32_t kLargestFixed16 = 127 * 257;  // what two signed bytes hold
constexpr float kSmallestReach = 0x1p-100f;  // rows that reach no further are zeros: 32639 / reach stays finite

// A: rows of int16, `a_row` apart; B: panels of sixteen columns, [panels][pairs][16][2]; C int32, rows `c_row` apart.
struct PairProduct {
  const int16_t* a;
  int64_t a_row;
  const int16_t* b;
  int64_t pairs;
  int32_t* c;
  int64_t c_row;
};

// One tile of kRows x (16 kVectors) sums.
template <class V, int kRows, int kVectors>
inline void pair_tile(const PairProduct& t) {
  typename V::I acc[kRows][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[i][v] = V::izero();
  for (int64_t j = 0; j < t.pairs; ++j) {
    typename V::I column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = V::load_pairs(t.b + (v * t.pairs + j) * 2 * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      int32_t two;
      __builtin_memcpy(&two, t.a + i * t.a_row + 2 * j, sizeof two);
      const auto x = V::iset1(two);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = V::dot2(acc[i][v], column[v], x);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) V::istore(t.c + i * t.c_row + v * kLanes, acc[i][v]);
}

// All rows of 16 kVectors columns, which stay in the first-level cache meanwhile.
template <class V, int kVectors>
inline void pair_panel(PairProduct t, int64_t rows) {
  constexpr int kFit = V::kPairRows * V::kPairVectors / kVectors, kMost = kFit < 6 ? kFit : 6;
  while (rows > 0) {
    const int64_t height = even_share(rows, kMost);
    switch (height) {
      case 6: pair_tile<V, 6, kVectors>(t); break;
      case 5: pair_tile<V, 5, kVectors>(t); break;
      case 4: pair_tile<V, 4, kVectors>(t); break;
      case 3: pair_tile<V, 3, kVectors>(t); break;
      case 2: pair_tile<V, 2, kVectors>(t); break;
      default: pair_tile<V, 1, kVectors>(t);
    }
    rows -= height, t.a += height * t.a_row, t.c += height * t.c_row;
  }
}

// C [rows][16 panels] = A B.
template <class V>
inline void pair_product(PairProduct t, int64_t rows, int64_t panels) {
  constexpr int kMost = V::kPairVectors;
  static_assert(kMost <= 4);
  while (panels > 0) {
    const int64_t vectors = even_share(panels, kMost);
    if (vectors == 1) pair_panel<V, 1>(t, rows);
    if constexpr (kMost >= 2)
      if (vectors == 2) pair_panel<V, 2>(t, rows);
    if constexpr (kMost >= 3)
      if (vectors == 3) pair_panel<V, 3>(t, rows);
    if constexpr (kMost >= 4)
      if (vectors == 4) pair_panel<V, 4>(t, rows);
    panels -= vectors, t.b += vectors * t.pairs * 2 * kLanes, t.c += vectors * kLanes;
  }
}

// Largest magnitude; a NaN wins, because as integers its bits are above every number's.
template <class V>
inline float largest_magnitude(const float* x, int64_t k) {
  auto largest = V::izero();
  const auto magnitude = V::iset1(0x7fffffff);
  for (int64_t i = 0; i < k; i += kLanes) {
    const auto v = i + kLanes <= k ? V::load(x + i) : V::load(x + i, k - i);
    largest = V::imax(largest, V::iand(V::bits(v), magnitude));
  }
  return bits_to_float(V::largest(largest));
}

// What a row's integers mean, x ~ integer * unit, and how they are made; factor 0: all are zero, whatever the row holds.
struct Unit {
  float unit, factor;
};

inline Unit unit_of(float reach) {
  const bool usable = reach > kSmallestReach && reach < __builtin_inff();
  return {reach / kLargestFixed16, usable ? kLargestFixed16 / reach : 0.0f};
}

template <class V>
inline typename V::I fixed_lanes(const float* x, int64_t n, typename V::F factor) {
  return V::to_int(V::mul(n < kLanes ? V::load(x, n) : V::load(x), factor));
}

// A matrix X [l][r] -> the panels of B for a product with X on the right.
template <class V>
inline void fixed_panels(const float* x, int64_t l, int64_t r, float factor, int16_t* panels) {
  const int64_t pairs = (l + 1) / 2;
  if (factor == 0.0f) return static_cast<void>(__builtin_memset(panels, 0, static_cast<size_t>(pairs * 2 * round_up(r, kLanes)) * sizeof *panels));
  const auto f = V::set1(factor);
  for (int64_t j = 0; j < pairs; ++j)
    for (int64_t c = 0; c < r; c += kLanes) {
      const float* from = x + 2 * j * r + c;
      const auto high = 2 * j + 1 < l ? fixed_lanes<V>(from + r, r - c, f) : V::izero();
      V::store_pairs(panels + (c / kLanes * pairs + j) * 2 * kLanes, fixed_lanes<V>(from, r - c, f), high);
    }
}

// A matrix X [l][r] -> rows of A, r rounded up to 16 apart.
template <class V>
inline void fixed_rows(const float* x, int64_t l, int64_t r, float factor, int16_t* rows) {
  const int64_t wide = round_up(r, kLanes);
  if (factor == 0.0f) return static_cast<void>(__builtin_memset(rows, 0, static_cast<size_t>(l * wide) * sizeof *rows));
  const auto f = V::set1(factor);
  for (int64_t i = 0; i < l; ++i)
    for (int64_t c = 0; c < r; c += kLanes) V::store_shorts(rows + i * wide + c, fixed_lanes<V>(x + i * r + c, r - c, f));
}

// Largest magnitude of n sums, a multiple of 16.
template <class V>
inline int32_t largest_sum(const int32_t* sums, int64_t n) {
  auto most = V::izero();
  for (int64_t i = 0; i < n; i += kLanes) most = V::imax(most, V::iabs(V::iload(sums + i)));
  return V::largest(most);
}

// n sums (a multiple of 16) -> int16: (sum + half) >> shift, half = 2^(shift - 1) or nothing for shift 0, with the least shift that leaves them at most
// 32639 in magnitude. Returns the shift.
template <class V>
inline int to_16_bits(const int32_t* sums, int64_t n, int16_t* out) {
  const int64_t largest = largest_sum<V>(sums, n);
  int shift = 0;
  while ((largest + (1 << shift >> 1)) >> shift > kLargestFixed16) ++shift;
  const auto half = V::iset1(1 << shift >> 1);
  for (int64_t i = 0; i < n; i += kLanes) V::store_shorts(out + i, V::shift_right(V::iadd(V::iload(sums + i), half), shift));
  return shift;
}

// Sums [l][r rounded up to 16] -> y [l][r] = float(sum) * scale.
template <class V>
inline void scaled_sums(const int32_t* sums, int64_t l, int64_t r, float scale, float* y) {
  const auto s = V::set1(scale);
  for (int64_t i = 0; i < l; ++i)
    for (int64_t c = 0; c < r; c += kLanes) {
      const auto v = V::mul(V::to_float(V::iload(sums + i * round_up(r, kLanes) + c)), s);
      if (r - c < kLanes)
        V::store(y + i * r + c, v, r - c);
      else
        V::store(y + i * r + c, v);
    }
}

// 2^exponent, for exponents of normal numbers.
inline float power_of_two(int exponent) { return bits_to_float((exponent + 127) << 23); }

}  // namespace
