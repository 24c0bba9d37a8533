// transform: products with one or two square factors in fixed point.
#pragma once

#include <cstdint>

#include "chain.h"
#include "fixed.h"
#include "quota/kernels.h"

namespace {

constexpr int64_t kRowsAtOnce = 48;  // matrix rows that share a pass over right where there is no left: 24 KiB at r = 128

// A factor, or null, asked for as a whole: in a decode step a hundred megabytes of weights have passed since its last use, and a few rows
// would wait for its lines one after the other.
inline void prefetch_factor(const int16_t* factor, int64_t values) {
  if (factor == nullptr) return;
  for (int64_t i = 0; i < values; i += 64 / sizeof *factor) __builtin_prefetch(factor + i, 0, 2);
}

inline void prefetch_factors(const quota::TransformArgs& t) {
  prefetch_factor(t.left, t.l * round_up(t.l, 2)), prefetch_factor(t.right, round_up(t.r, kLanes) * round_up(t.r, 2));
}

// How many rows of x go through `transform_sums` together: one matrix that left mixes, or else a tall one.
inline int64_t rows_at_once(const quota::TransformArgs& t) { return t.left || t.l > kRowsAtOnce / 2 ? 1 : kRowsAtOnce / t.l; }

// Memory of `transform_sums`, and what it leaves: for each row sums [l][r rounded up to 16], and what they are to be multiplied by.
struct TransformScratch {
  Scratch<int16_t> panels, rows;
  Scratch<int32_t> sums;
  Scratch<float> scales;

  explicit TransformScratch(const quota::TransformArgs& t, int64_t count)
      : panels(t.left ? round_up(t.l, 2) * round_up(t.r, kLanes) : 0), rows(t.right ? count * t.l * round_up(t.r, kLanes) : 0),
        sums(count * t.l * round_up(t.r, kLanes)), scales(count) {}
};

// `count` rows of x, at most `rows_at_once`.
template <class V>
inline void transform_sums(const quota::TransformArgs& t, const float* x, int64_t count, const TransformScratch& scratch) {
  const int64_t l = t.l, r = t.r, wide = round_up(r, kLanes), panels = wide / kLanes;
  for (int64_t m = 0; m < count; ++m, x += l * r) {
    const Unit unit = unit_of(largest_magnitude<V>(x, l * r));
    int exponent = t.exponent;
    if (t.left) {  // one row
      fixed_panels<V>(x, l, r, unit.factor, scratch.panels);
      pair_product<V>({t.left, round_up(l, 2), scratch.panels, (l + 1) / 2, scratch.sums, wide}, l, panels);
      if (t.right) exponent += to_16_bits<V>(scratch.sums, l * wide, scratch.rows);
    } else {
      fixed_rows<V>(x, l, r, unit.factor, scratch.rows + m * l * wide);
    }
    scratch.scales[m] = unit.unit * power_of_two(exponent);
  }
  if (t.right) pair_product<V>({scratch.rows, wide, t.right, (r + 1) / 2, scratch.sums, wide}, count * l, panels);
}

// The same -> y.
template <class V>
inline void transform_into(const quota::TransformArgs& t, const float* x, float* y, int64_t count, const TransformScratch& scratch) {
  const int64_t wide = round_up(t.r, kLanes);
  transform_sums<V>(t, x, count, scratch);
  for (int64_t m = 0; m < count; ++m) scaled_sums<V>(scratch.sums + m * t.l * wide, t.l, t.r, scratch.scales[m], y + m * t.l * t.r);
}

template <class V>
void transform_rows(const quota::TransformArgs& t, int64_t begin, int64_t end) {
  const int64_t k = t.l * t.r, most = rows_at_once(t), at_once = end - begin < most ? end - begin : most;
  const TransformScratch scratch(t, at_once);
  for (int64_t m = begin; m < end; m += at_once) transform_into<V>(t, t.x + m * k, t.y + m * k, end - m < at_once ? end - m : at_once, scratch);
}

}  // namespace
