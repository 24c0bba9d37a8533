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

// A [rows, k] with strides (element [i][j] at i * row + j * step), B [k, cols] and C [rows, cols] with leading dimensions. B may be bfloat16, which
// is float32 without its lower half: read as that, it gives the same bits from half the memory.
template <class B>
struct ChainOf {
  const float* a;
  int64_t a_row, a_step;
  const B* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
};
using Chain = ChainOf<float>;

// One tile of kRows x (16 kVectors) outputs; with kTail the last vector has `last` lanes.
template <class V, int kRows, int kVectors, bool kTail, class B>
inline void chain_tile(const ChainOf<B>& t, int64_t k, int64_t last) {
  typename V::F acc[kRows][kVectors];
  const auto read = [&](const B* p, int v) { return kTail && v == kVectors - 1 ? V::load(p + v * kLanes, last) : V::load(p + v * kLanes); };
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) acc[i][v] = V::zero();
  for (int64_t j = 0; j < k; ++j) {
    typename V::F column[kVectors];
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) column[v] = read(t.b + j * t.b_row, v);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const auto x = V::set1(t.a[i * t.a_row + j * t.a_step]);
#pragma GCC unroll 12
      for (int v = 0; v < kVectors; ++v) acc[i][v] = V::accumulate(acc[i][v], x, column[v]);
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

// The even share of `total` that a tile of at most `most` takes: 10 vectors go as 4 + 3 + 3 and 14 rows as 5 + 5 + 4, so that no tile is
// left with too few chains to hide the latency of an addition.
constexpr int64_t even_share(int64_t total, int64_t most) {
  const int64_t tiles = (total + most - 1) / most;
  return (total + tiles - 1) / tiles;
}

// All rows of a panel of at most 16 kVectors columns, which stays in the first-level cache meanwhile.
template <class V, int kVectors, bool kTail, class B>
inline void chain_panel(ChainOf<B> t, int64_t rows, int64_t k, int64_t last) {
  static_assert(V::kChainRows <= 6);
  const auto advance = [&](int64_t n) { rows -= n, t.a += n * t.a_row, t.c += n * t.c_row; };
  if constexpr (kVectors <= 2 && V::kNarrowRows > V::kChainRows)  // few columns: more rows, so that enough chains run at once
    for (; rows >= V::kNarrowRows; advance(V::kNarrowRows)) chain_tile<V, V::kNarrowRows, kVectors, kTail>(t, k, last);
  while (rows > 0) {
    const int64_t height = even_share(rows, V::kChainRows);
    switch (height) {
      case 6: chain_tile<V, 6, kVectors, kTail>(t, k, last); break;
      case 5: chain_tile<V, 5, kVectors, kTail>(t, k, last); break;
      case 4: chain_tile<V, 4, kVectors, kTail>(t, k, last); break;
      case 3: chain_tile<V, 3, kVectors, kTail>(t, k, last); break;
      case 2: chain_tile<V, 2, kVectors, kTail>(t, k, last); break;
      default: chain_tile<V, 1, kVectors, kTail>(t, k, last);
    }
    advance(height);
  }
}

template <class V, int kVectors, class B>
inline void chain_columns(const ChainOf<B>& t, int64_t rows, int64_t cols, int64_t k) {
  if (cols >= kVectors * kLanes)
    chain_panel<V, kVectors, false>(t, rows, k, 0);
  else
    chain_panel<V, kVectors, true>(t, rows, k, cols - (kVectors - 1) * kLanes);
}

// C = A B in chain order, B read as it lies.
template <class V, class B>
inline void chain_product(ChainOf<B> t, int64_t rows, int64_t cols, int64_t k) {
  constexpr int kMost = V::kChainVectors;
  static_assert(kMost <= 4);
  while (cols > 0) {
    const int64_t vectors = even_share((cols + kLanes - 1) / kLanes, kMost);
    if (vectors == 1) chain_columns<V, 1>(t, rows, cols, k);
    if constexpr (kMost >= 2)
      if (vectors == 2) chain_columns<V, 2>(t, rows, cols, k);
    if constexpr (kMost >= 3)
      if (vectors == 3) chain_columns<V, 3>(t, rows, cols, k);
    if constexpr (kMost >= 4)
      if (vectors == 4) chain_columns<V, 4>(t, rows, cols, k);
    cols -= vectors * kLanes, t.b += vectors * kLanes, t.c += vectors * kLanes;
  }
}

constexpr int64_t kRowsWorthPacking = 16;

// C = A B in chain order.
template <class V>
inline void chain_matmul(Chain t, int64_t rows, int64_t cols, int64_t k) {
  const bool packs = t.b_row % kLanes != 0 && rows >= kRowsWorthPacking;  // loads that cross cache lines halve the rate
  const int64_t packed_row = packs ? round_up(cols, kLanes) : 0;
  const Scratch<float> packed(k * packed_row);
  if (packs) {
    for (int64_t j = 0; j < k; ++j) __builtin_memcpy(packed + j * packed_row, t.b + j * t.b_row, static_cast<size_t>(cols) * sizeof(float));
    t.b = packed, t.b_row = packed_row;
  }
  chain_product<V>(t, rows, cols, k);
}

}  // namespace
