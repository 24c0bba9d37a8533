// Functions of single float32 values, the same sequence of IEEE operations as csrc/cpu (elementwise.h, quantize_act.h). Compiled without contraction.
#pragma once

#include "device.h"

namespace quota::cuda {

constexpr float kSmallestRange = 1e-8f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// a or b, NaN where either is (fmaxf would drop it).
__device__ inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

__device__ inline float exponential(float x) {
  const float bounded = clamp(x, -87.0f, 88.0f);
  const float n = rintf(__fmul_rn(bounded, 1.44269504088896341f));
  float r = __fmaf_rn(n, -0.693359375f, bounded);
  r = __fmaf_rn(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __fmaf_rn(p, r, 1.3981999507e-3f);
  p = __fmaf_rn(p, r, 8.3334519073e-3f);
  p = __fmaf_rn(p, r, 4.1665795894e-2f);
  p = __fmaf_rn(p, r, 1.6666665459e-1f);
  p = __fmaf_rn(p, r, 5.0000001201e-1f);
  p = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
  const float power = __int_as_float((__float2int_rn(n) + 127) << 23);
  return x < -87.0f ? 0.0f : __fmul_rn(p, power);
}

__device__ inline float gated_by_sigmoid(float x, float slope) { return __fdiv_rn(x, __fadd_rn(1.0f, exponential(__fmul_rn(-slope, x)))); }

// As csrc/cpu/elementwise.h.
__device__ inline float gelu(float x) {
  const float magnitude = __int_as_float(__float_as_int(x) & 0x7fffffff), a = magnitude > 16.0f ? 16.0f : magnitude;
  float p = -2.71311613e-8f;
  p = __fmaf_rn(p, a, 7.48082016e-7f);
  p = __fmaf_rn(p, a, -8.90884803e-6f);
  p = __fmaf_rn(p, a, 5.87551549e-5f);
  p = __fmaf_rn(p, a, -2.07808291e-4f);
  p = __fmaf_rn(p, a, 1.82192598e-5f);
  p = __fmaf_rn(p, a, 4.80406592e-3f);
  p = __fmaf_rn(p, a, -3.63481157e-2f);
  p = __fmaf_rn(p, a, -3.18306506e-1f);
  p = __fmaf_rn(p, a, -7.97884881e-1f);
  p = __fmaf_rn(p, a, -6.93147182e-1f);
  return __fsub_rn(x < 0.0f ? 0.0f : x, __fmul_rn(a, exponential(p)));
}

// round((x - zero) * inverse) clamped; a NaN becomes 0.
__device__ inline int code_of(float x, float zero, float inverse, float low, float high) {
  const float v = rintf(__fmul_rn(__fsub_rn(x, zero), inverse));
  return v != v ? 0 : static_cast<int>(clamp(v, low, high));
}

__device__ inline int magnitude_bits(float x) { return __float_as_int(x) & 0x7fffffff; }

template <class T, class Combine>
__device__ inline T across_warp(T x, Combine combine) {
  for (int distance = 16; distance; distance /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

__device__ inline int largest(int a, int b) { return a > b ? a : b; }

// The largest of x over the block, in every thread; `scratch` holds an int per warp.
__device__ inline int across_block_largest(int x, int* scratch) {
  x = across_warp(x, largest);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned i = 0; i < (blockDim.x + 31) / 32; ++i) x = largest(x, scratch[i]);
  return x;
}

}  // namespace quota::cuda
