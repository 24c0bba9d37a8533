// The one float matrix product: every output is an ascending chain of fused multiply-adds.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

constexpr int64_t kLanes = 16;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Uninitialised aligned memory for one task.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count) : data(static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(round_up((count ? count : 1) * int64_t(sizeof(T)), 64))))) {
    if (data == nullptr) std::abort();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
  operator T*() const { return data; }
};

// A [rows, k] with strides (element [i][j] at i * row + j * step), B [k, cols] and C [rows, cols] with leading dimensions.
struct Chain {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
};

// One tile of kRows x (16 kVectors) outputs; with kTail the last vector has `last` lanes. kContinue: chains go on from C instead of zero.
template <class V, int kRows, int kVectors, bool kTail, bool kContinue>
inline void chain_tile(const Chain& t, int64_t k, int64_t last) {
  typename V::F acc[kRows][kVectors];
  const auto read = [&](const float* p, int v) { return kTail && v == kVectors - 1 ? V::load(p + v * kLanes, last) : V::load(p + v * kLanes); };
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) acc[i][v] = kContinue ? read(t.c + i * t.c_row, v) : V::zero();
  for (int64_t j = 0; j < k; ++j) {
    typename V::F column[kVectors];
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) column[v] = read(t.b + j * t.b_row, v);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const auto x = V::set1(t.a[i * t.a_row + j * t.a_step]);
#pragma GCC unroll 12
      for (int v = 0; v < kVectors; ++v) acc[i][v] = V::fma(x, column[v], acc[i][v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) {
      float* p = t.c + i * t.c_row + v * kLanes;
      if (kTail && v == kVectors - 1)
        V::store(p, acc[i][v], last);
      else
        V::store(p, acc[i][v]);
    }
}

template <class V, int kRows, bool kContinue, bool kNarrow = false>
inline void chain_rows(Chain t, int64_t cols, int64_t k) {
  constexpr int kVectors = kNarrow && V::kChainVectors > 2 ? 2 : V::kChainVectors;
  for (; cols >= kVectors * kLanes; cols -= kVectors * kLanes, t.b += kVectors * kLanes, t.c += kVectors * kLanes)
    chain_tile<V, kRows, kVectors, false, kContinue>(t, k, 0);
  if constexpr (kVectors > 2)
    for (; cols >= 2 * kLanes; cols -= 2 * kLanes, t.b += 2 * kLanes, t.c += 2 * kLanes) chain_tile<V, kRows, 2, false, kContinue>(t, k, 0);
  if constexpr (kVectors > 1)
    for (; cols >= kLanes; cols -= kLanes, t.b += kLanes, t.c += kLanes) chain_tile<V, kRows, 1, false, kContinue>(t, k, 0);
  if (cols > 0) chain_tile<V, kRows, 1, true, kContinue>(t, k, cols);
}

// C = A B (kContinue: C += A B) in chain order.
template <class V, bool kContinue = false>
inline void chain_matmul(Chain t, int64_t rows, int64_t cols, int64_t k) {
  constexpr int kRows = V::kChainRows;
  const auto advance = [&](int64_t n) { rows -= n, t.a += n * t.a_row, t.c += n * t.c_row; };
  if constexpr (V::kNarrowRows > kRows)  // few columns: more rows, so that enough chains run at once to hide latency
    if (cols < V::kChainVectors * kLanes)
      for (; rows >= V::kNarrowRows; advance(V::kNarrowRows)) chain_rows<V, V::kNarrowRows, kContinue, true>(t, cols, k);
  for (; rows >= kRows; advance(kRows)) chain_rows<V, kRows, kContinue>(t, cols, k);
  if (rows >= 4) chain_rows<V, 4, kContinue>(t, cols, k), advance(4);
  if (rows >= 2) chain_rows<V, 2, kContinue>(t, cols, k), advance(2);
  if (rows >= 1) chain_rows<V, 1, kContinue>(t, cols, k);
}

// e^x by additions and multiplications alone, so that every instruction set agrees; relative error about 1e-7.
// Zero below -87, clamped above 88, NaN stays NaN. Coefficients: Cephes expf.
template <class V>
inline typename V::F exponential(typename V::F x) {
  const auto bounded = V::max(V::set1(-87.0f), V::min(V::set1(88.0f), x));  // the second operand survives when one is NaN
  const auto n = V::round(V::mul(bounded, V::set1(1.44269504088896341f)));
  auto r = V::fma(n, V::set1(-0.693359375f), bounded);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  auto p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::add(V::fma(p, V::mul(r, r), r), V::set1(1.0f));
  const auto power = V::from_bits(V::shift_left_23(V::iadd(V::to_int(n), V::iset1(127))));
  return V::less(x, V::set1(-87.0f), V::zero(), V::mul(p, power));
}

}  // namespace
