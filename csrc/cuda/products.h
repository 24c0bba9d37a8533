// What the w4a4_linear kernels share: operands from packed words, and the epilogue.
#pragma once

#include "kernels.h"

namespace quota::cuda {

struct Words {  // 16 bytes of a row: 32 values of k
  uint32_t w[4];
};

__device__ inline Words read_words(const uint8_t* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
// Only once: past the first-level cache.
__device__ inline Words stream_words(const uint8_t* p) {
#ifdef QUOTA_EMULATED
  return read_words(p);
#else
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
#endif
}

// Even and odd nibbles as signed bytes 16 times their value.
__device__ inline uint32_t even_bytes(uint32_t word) { return word << 4 & 0xf0f0f0f0u; }
__device__ inline uint32_t odd_bytes(uint32_t word) { return word & 0xf0f0f0f0u; }

// d [16 x 8] += 128 values of k of weight rows g (`low`) and g + 8 (`high`) and of activation row g (`x`), g = lane / 4. See layout.h.
template <bool kNative4>
__device__ inline void multiply_step(int (&d)[4], const Words& low, const Words& high, const Words& x) {
  if constexpr (kNative4) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t a[4] = {low.w[2 * s], high.w[2 * s], low.w[2 * s + 1], high.w[2 * s + 1]}, b[2] = {x.w[2 * s], x.w[2 * s + 1]};
      ptx::mma_s4(d, a, b);
    }
  } else {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t a[4] = {even_bytes(low.w[s]), even_bytes(high.w[s]), odd_bytes(low.w[s]), odd_bytes(high.w[s])};
      const uint32_t b[2] = {even_bytes(x.w[s]), odd_bytes(x.w[s])};
      ptx::mma_s8(d, a, b);
    }
  }
}

// y[m][n] from the sum of products.
__device__ inline void finish_output(const LinearArgs& args, int sum, int64_t m, int64_t n) {
  if (args.x_zero) sum = static_cast<int>(static_cast<uint32_t>(sum) - static_cast<uint32_t>(args.x_zero[m]) * static_cast<uint32_t>(args.col_sum[n]));
  float y = __fmul_rn(__fmul_rn(__int2float_rn(sum), args.w_scale[n]), args.x_scale[m]);
  if (args.bias) y = __fadd_rn(y, args.bias[n]);
  args.y[m * args.n + n] = y;
}

// The output, or a part's contribution to it: partial [splits][M][N].
__device__ inline void put_sum(const LinearArgs& args, int32_t* partial, int64_t split, int sum, int64_t m, int64_t n) {
  if (m >= args.m || n >= args.n) return;
  if (partial)
    partial[(split * args.m + m) * args.n + n] = sum;
  else
    finish_output(args, sum, m, n);
}

}  // namespace quota::cuda
