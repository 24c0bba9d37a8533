// rms_norm: quota/ops/rms_norm.py.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "quota/kernels.h"

namespace {

// y = (x / sqrt(mean(x^2) + eps)) * weight; the squares are summed in sixteen chains, lane i taking i, i + 16, ...
template <class V>
void rms_norm_rows(const quota::NormArgs& args, int64_t begin, int64_t end) {
  const int64_t k = args.k;
  for (int64_t m = begin; m < end; ++m) {
    const float* x = args.x + m * k;
    float* y = args.y + m * k;
    auto squares = V::zero();
    for (int64_t i = 0; i < k; i += kLanes) {
      const auto v = V::load(x + i, k - i < kLanes ? k - i : kLanes);
      squares = V::fma(v, v, squares);
    }
    const auto factor = V::set1(1.0f / __builtin_sqrtf(sum_of_lanes<V>(squares) / static_cast<float>(k) + args.eps));
    for (int64_t i = 0; i < k; i += kLanes) {
      const int64_t n = k - i < kLanes ? k - i : kLanes;
      V::store(y + i, V::mul(V::mul(V::load(x + i, n), factor), V::load(args.weight + i, n)), n);
    }
  }
}

}  // namespace
