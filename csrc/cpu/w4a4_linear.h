// w4a4_linear: exact int32 from int8 dot products, scales and bias in the epilogue.
#pragma once

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace {

constexpr int64_t kDotRows = 6;       // 6 x 64 outputs: 24 of 32 registers with AVX-512
constexpr int64_t kGroupBlock = 128;  // 512 values of k: 32 KiB of unpacked weights
constexpr int64_t kRowBlock = 240;    // 60 KiB of sums, and 1 MB of activations at 4096
constexpr int64_t kPackedRows = 48;   // up to here the dot products take nibbles apart themselves, which costs them a tenth of their speed
constexpr int64_t kFewRows = 12;      // up to here every task unpacks the activations itself: a second pass over threads costs more

// Rows of padded_k(k) values.
inline void unpack_rows(const quota::UnpackArgs& args, int64_t begin, int64_t end) {
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

using Finish = decltype(quota::Linear::finish);

template <class V>
void finish(const quota::LinearArgs& args, const int32_t* sums, int64_t panel, int64_t m, int64_t rows) {
  const int64_t n0 = panel * quota::kPanel;
  for (int64_t v = 0; v < quota::kPanel && n0 + v < args.n; v += kLanes) {
    const int64_t n = n0 + v, left = args.n - n < kLanes ? args.n - n : kLanes;
    const auto w_scale = V::load(args.w_scale + n, left);
    const auto bias = args.bias ? V::load(args.bias + n, left) : V::zero();
    for (int64_t i = 0; i < rows; ++i) {
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

// Dot products of at most kDotRows rows, from zero or (kContinue) from the sums.
template <class D, bool kPacked, bool kContinue>
inline void dot_rows(int64_t rows, const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* sums) {
  static_assert(kDotRows == 6);
  switch (rows) {
    case 1: return D::template dot<1, kPacked, kContinue>(w, a, lda, groups, sums);
    case 2: return D::template dot<2, kPacked, kContinue>(w, a, lda, groups, sums);
    case 3: return D::template dot<3, kPacked, kContinue>(w, a, lda, groups, sums);
    case 4: return D::template dot<4, kPacked, kContinue>(w, a, lda, groups, sums);
    case 5: return D::template dot<5, kPacked, kContinue>(w, a, lda, groups, sums);
    case 6: return D::template dot<6, kPacked, kContinue>(w, a, lda, groups, sums);
    default: return;
  }
}

// Panel by panel and, where several tiles of rows share a panel, k block by k block, so that the block stays in the first-level cache. With many
// rows it pays to unpack the block first.
template <class D, Finish kFinish>
void multiply(const quota::LinearArgs& args, const quota::LinearTask& task) {
  const int64_t lda = quota::padded_k(args.k), groups = lda / quota::kGroup, rows = task.row_end - task.row_begin;
  const int64_t tiles = (rows + kDotRows - 1) / kDotRows, tile_rows = (rows + tiles - 1) / tiles;
  const bool packed = rows <= kPackedRows;
  const int64_t block = tiles == 1 ? groups : kGroupBlock;
  const Scratch<uint8_t> unpacked(packed ? 0 : kGroupBlock * 4 * quota::kPanel);
  const Scratch<int32_t> sums(rows * quota::kPanel);
  for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
    for (int64_t g = 0; g < groups; g += block) {
      const int64_t count = groups - g < block ? groups - g : block;
      const uint8_t* w = args.blocks + (panel * groups + g) * 2 * quota::kPanel;
      if (!packed) unpack_panel(w, count, unpacked), w = unpacked;
      const auto dots = packed ? (g ? dot_rows<D, true, true> : dot_rows<D, true, false>) : (g ? dot_rows<D, false, true> : dot_rows<D, false, false>);
      for (int64_t i = 0; i < rows; i += tile_rows) {
        const int64_t tile = rows - i < tile_rows ? rows - i : tile_rows;
        dots(tile, w, args.a + (task.row_begin + i) * lda + g * quota::kGroup, lda, count, sums + i * quota::kPanel);
        if (g + count == groups) kFinish(args, sums + i * quota::kPanel, panel, task.row_begin + i, tile);
      }
    }
}

template <class D, Finish kFinish>
void few_rows(const quota::LinearArgs& args, int64_t panel_begin, int64_t panel_end) {
  const Scratch<int8_t> a(args.m * quota::padded_k(args.k));
  int32_t row_sum[kFewRows];
  unpack_rows({args.x_q, args.k, a, row_sum}, 0, args.m);
  quota::LinearArgs unpacked = args;
  unpacked.a = a, unpacked.row_sum = row_sum;
  multiply<D, kFinish>(unpacked, {panel_begin, panel_end, 0, args.m});
}

// `D::dot` with an epilogue.
template <class D, Finish kFinish>
constexpr quota::Linear linear_of() {
  return {kFewRows, 1, kRowBlock, unpack_rows, few_rows<D, kFinish>, multiply<D, kFinish>, kFinish};
}

}  // namespace
