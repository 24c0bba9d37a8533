// Functions of single values and rows by additions, multiplications, divisions and square roots alone, so that every instruction set agrees.
#pragma once

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace {

// e^x; relative error about 1e-7.
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

// x / (1 + e^(-slope x)): SiLU for slope 1, CLIP's approximate GELU for slope 1.702.
template <class V>
inline typename V::F gated_by_sigmoid(typename V::F x, float slope) {
  return V::div(x, V::add(V::set1(1.0f), exponential<V>(V::mul(V::set1(-slope), x))));
}

// x Phi(x), Phi the normal distribution function, as max(x, 0) - |x| Phi(-|x|): negative x keep their digits. See quota/ops/elementwise.py.
template <class V>
inline typename V::F gelu(typename V::F x) {
  constexpr float kLogPhi[] = {-2.71311613e-8f, 7.48082016e-7f, -8.90884803e-6f, 5.87551549e-5f, -2.07808291e-4f, 1.82192598e-5f,
                               4.80406592e-3f, -3.63481157e-2f, -3.18306506e-1f, -7.97884881e-1f, -6.93147182e-1f};
  const auto a = V::min(V::set1(16.0f), V::from_bits(V::iand(V::bits(x), V::iset1(0x7fffffff))));
  auto p = V::set1(kLogPhi[0]);
#pragma GCC unroll 10
  for (int i = 1; i < 11; ++i) p = V::fma(p, a, V::set1(kLogPhi[i]));
  return V::sub(V::less(x, V::zero(), V::zero(), x), V::mul(a, exponential<V>(p)));
}

inline float bits_to_float(int32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The sixteen lanes added in ascending order.
template <class V>
inline float sum_of_lanes(typename V::F x) {
  float lanes[kLanes], sum = 0.0f;
  V::store(lanes, x);
  for (float lane : lanes) sum += lane;
  return sum;
}

// One row through a prologue other than none: x (two halves of k when gated) -> y [k].
template <class V>
inline void apply_prologue(quota::Prologue prologue, const float* x, int64_t k, float* y) {
  const auto each = [&](auto value) {
    for (int64_t i = 0; i < k; i += kLanes) {
      const int64_t n = k - i < kLanes ? k - i : kLanes;
      V::store(y + i, value(V::load(x + i, n), i, n), n);
    }
  };
  switch (prologue) {
    case quota::Prologue::kSiluMul:
      return each([&](auto v, int64_t i, int64_t n) { return V::mul(gated_by_sigmoid<V>(v, 1.0f), V::load(x + k + i, n)); });
    case quota::Prologue::kQuickGelu: return each([](auto v, int64_t, int64_t) { return gated_by_sigmoid<V>(v, 1.702f); });
    default: return each([](auto v, int64_t, int64_t) { return gelu<V>(v); });
  }
}

}  // namespace
