// transform: products with one or two square factors, chains in ascending order.
#pragma once

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace {

constexpr int64_t kRowsAtOnce = 4;  // rows between the steps of transform and quantization: they stay in the second-level cache

// n floats, `ahead` of x, into the second-level cache: a row is read panel by panel, which the processor does not foresee. As an integer,
// because the address may lie past the end of x, where a prefetch does nothing.
inline void prefetch(const float* x, int64_t ahead, int64_t n) {
  const auto from = reinterpret_cast<uintptr_t>(x) + static_cast<uintptr_t>(ahead) * sizeof(float);
  for (uintptr_t i = 0; i < static_cast<uintptr_t>(n) * sizeof(float); i += 64) __builtin_prefetch(reinterpret_cast<const void*>(from + i), 0, 2);
}

// A square factor, or null, asked for as a whole: in a decode step a hundred megabytes of weights have passed since its last use, and a few rows
// would wait for its lines one after the other.
inline void prefetch_factor(const float* factor, int64_t size) {
  if (factor) prefetch(factor, 0, size * size);
}

// rows of x -> y, `middle` holding as many floats when both factors are there.
template <class V>
inline void transform_into(const quota::TransformArgs& t, const float* x, float* y, int64_t rows, float* middle) {
  const int64_t l = t.l, r = t.r;
  if (t.left == nullptr) {  // all rows are one tall matrix
    chain_matmul<V>({x, r, 1, t.right, r, y, r}, rows * l, r, r);
    return;
  }
  float* turned = t.right ? middle : y;
  for (int64_t m = 0; m < rows; ++m) {
    prefetch(x + m * l * r, l * r, l * r);
    chain_matmul<V>({t.left, 1, l, x + m * l * r, r, turned + m * l * r, r}, l, r, l);
  }
  if (t.right) chain_matmul<V>({middle, r, 1, t.right, r, y, r}, rows * l, r, r);
}

template <class V>
void transform_rows(const quota::TransformArgs& t, int64_t begin, int64_t end) {
  const int64_t k = t.l * t.r, at_once = t.left ? kRowsAtOnce : end - begin;
  const Scratch<float> middle(t.left ? at_once * k : 0);
  for (int64_t m = begin; m < end; m += at_once) transform_into<V>(t, t.x + m * k, t.y + m * k, end - m < at_once ? end - m : at_once, middle);
}

}  // namespace
