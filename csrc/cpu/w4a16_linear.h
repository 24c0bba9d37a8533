// w4a16_linear: float activations times int4 weights in groups along K. Inside a group an ascending chain over whole numbers q - zero; the groups are
// joined by one more chain over their scales.
#pragma once

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace {

constexpr int64_t kWordCodes = 8;     // codes of one 32-bit word
constexpr int64_t kAhead = 16;        // words of a column from prefetch to use: a group
constexpr int64_t kStreamedRows = 4;  // up to here the products take nibbles apart themselves; more rows share an unpacked group
constexpr int64_t kJoinedRows = 64;   // rows whose group sums are kept at once: 16 KiB

// Scales of a panel's group; its zeros follow.
inline const float* group_scale(const quota::GroupedArgs& args, int64_t panel, int64_t group) {
  const int64_t groups = (args.k + quota::kWeightGroup - 1) / quota::kWeightGroup;
  return args.params + (panel * groups + group) * 2 * quota::kPanel;
}

inline const int32_t* group_words(const quota::GroupedArgs& args, int64_t panel, int64_t group) {
  const int64_t words = (args.k + kWordCodes - 1) / kWordCodes;
  return args.words + (panel * words + group * (quota::kWeightGroup / kWordCodes)) * quota::kPanel;
}

// Few rows: kVectors x 16 columns from column `at` of a panel, nibbles streamed once.
template <class V, int kRows, int kVectors>
inline void stream_columns(const quota::GroupedArgs& args, int64_t panel, int64_t at) {
  typename V::F total[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) total[r][v] = V::zero();
  const auto low = V::iset1(15);
  for (int64_t g = 0, first = 0; first < args.k; ++g, first += quota::kWeightGroup) {
    const int64_t count = args.k - first < quota::kWeightGroup ? args.k - first : quota::kWeightGroup;
    const float* scale = group_scale(args, panel, g) + at;
    const int32_t* words = group_words(args, panel, g) + at;
    typename V::F sum[kRows][kVectors], zero[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) zero[v] = V::load(scale + quota::kPanel + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = V::zero();
    for (int64_t k = 0; k < count; k += kWordCodes, words += quota::kPanel) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(words + kAhead * quota::kPanel + v * kLanes);
      typename V::I word[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) word[v] = V::iload(words + v * kLanes);
      const auto step = [&](int64_t j) {
        typename V::F x[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) x[r] = V::set1(args.x[r * args.k + first + k + j]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const auto column = V::sub(V::to_float(V::iand(word[v], low)), zero[v]);
          word[v] = V::shift_right_4(word[v]);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) sum[r][v] = V::accumulate(sum[r][v], x[r], column);
        }
      };
      if (count - k >= kWordCodes) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < kWordCodes; ++j) step(j);
      } else {
        for (int64_t j = 0; j < count - k; ++j) step(j);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const auto s = V::load(scale + v * kLanes);
      for (int r = 0; r < kRows; ++r) total[r][v] = V::fma(sum[r][v], s, total[r][v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t n = panel * quota::kPanel + at + v * kLanes, left = args.n - n < kLanes ? args.n - n : kLanes;
    if (left <= 0) return;
    for (int r = 0; r < kRows; ++r) {
      const auto y = args.bias ? V::add(total[r][v], V::load(args.bias + n, left)) : total[r][v];
      V::store(args.y + r * args.n + n, y, left);
    }
  }
}

template <class V, int kRows>
inline void stream_panel(const quota::GroupedArgs& args, int64_t panel) {
  constexpr int kVectors = V::kChainVectors == 4 ? 4 : kRows == 1 ? 2 : 1;
  for (int64_t at = 0; at < quota::kPanel && panel * quota::kPanel + at < args.n; at += kVectors * kLanes) stream_columns<V, kRows, kVectors>(args, panel, at);
}

// Codes minus zeros of a group as [count][64] floats.
template <class V>
inline void unpack_group(const quota::GroupedArgs& args, int64_t panel, int64_t group, int64_t count, float* block) {
  const float* zeros = group_scale(args, panel, group) + quota::kPanel;
  const int32_t* words = group_words(args, panel, group);
  const auto low = V::iset1(15);
  for (int64_t k = 0; k < count; k += kWordCodes, words += quota::kPanel)
    for (int64_t at = 0; at < quota::kPanel; at += kLanes) {
      auto word = V::iload(words + at);
      const auto zero = V::load(zeros + at);
      for (int64_t j = 0; j < kWordCodes && k + j < count; ++j, word = V::shift_right_4(word))
        V::store(block + (k + j) * quota::kPanel + at, V::sub(V::to_float(V::iand(word, low)), zero));
    }
}

// y = sums * scale + y (from zero at the first group), and the bias after the last.
template <class V>
inline void join_group(const quota::GroupedArgs& args, int64_t panel, int64_t group, const float* sums, int64_t row, int64_t rows) {
  const bool first = group == 0, last = (group + 1) * quota::kWeightGroup >= args.k;
  const float* scale = group_scale(args, panel, group);
  for (int64_t at = 0; at < quota::kPanel && panel * quota::kPanel + at < args.n; at += kLanes) {
    const int64_t n = panel * quota::kPanel + at, left = args.n - n < kLanes ? args.n - n : kLanes;
    const auto s = V::load(scale + at);
    for (int64_t i = 0; i < rows; ++i) {
      float* y = args.y + (row + i) * args.n + n;
      auto total = V::fma(V::load(sums + i * quota::kPanel + at), s, first ? V::zero() : V::load(y, left));
      if (last && args.bias) total = V::add(total, V::load(args.bias + n, left));
      V::store(y, total, left);
    }
  }
}

// K = 0: nothing but the bias.
template <class V>
inline void empty_sums(const quota::GroupedArgs& args, int64_t panel) {
  for (int64_t n = panel * quota::kPanel; n < args.n && n < (panel + 1) * quota::kPanel; n += kLanes) {
    const int64_t left = args.n - n < kLanes ? args.n - n : kLanes;
    for (int64_t m = 0; m < args.m; ++m) V::store(args.y + m * args.n + n, args.bias ? V::load(args.bias + n, left) : V::zero(), left);
  }
}

template <class V>
void grouped_panel(const quota::GroupedArgs& args, int64_t panel) {
  static_assert(kStreamedRows == 4);
  switch (args.m) {
    case 1: return stream_panel<V, 1>(args, panel);
    case 2: return stream_panel<V, 2>(args, panel);
    case 3: return stream_panel<V, 3>(args, panel);
    case 4: return stream_panel<V, 4>(args, panel);
    default: break;
  }
  if (args.k == 0) return empty_sums<V>(args, panel);
  const Scratch<float> block(quota::kWeightGroup * quota::kPanel), sums(kJoinedRows * quota::kPanel);
  for (int64_t g = 0, first = 0; first < args.k; ++g, first += quota::kWeightGroup) {
    const int64_t count = args.k - first < quota::kWeightGroup ? args.k - first : quota::kWeightGroup;
    unpack_group<V>(args, panel, g, count, block);
    for (int64_t row = 0; row < args.m; row += kJoinedRows) {
      const int64_t rows = args.m - row < kJoinedRows ? args.m - row : kJoinedRows;
      chain_matmul<V>({args.x + row * args.k + first, args.k, 1, block, quota::kPanel, sums, quota::kPanel}, rows, quota::kPanel, count);
      join_group<V>(args, panel, g, sums, row, rows);
    }
  }
}

}  // namespace
