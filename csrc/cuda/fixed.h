// Products with transform factors in exact integers, quota/quant/fixed.py step by step: 16-bit values v = 256 high + low as a signed and an unsigned
// byte, so a product is four of mma.sync. Its four parts wrap; the sum of all fits, as the bound in csrc/cpu/fixed.h says.
#pragma once

#include "kernels.h"
#include "values.h"

namespace quota::cuda {

constexpr int kLargestFixed16 = 127 * 257;  // what two signed bytes hold
constexpr float kSmallestReach = 0x1p-100f;

// Rows of int16, the values of a product's inner dimension side by side: `width` of them, even and zero past the row's own. 4-byte aligned.
struct FixedRows {
  const int16_t* data;
  int stride, count, width;
};

// int16 from row to row in shared memory: eight rows times 32 bytes then lie in different banks.
__host__ __device__ inline int fixed_stride(int width) { return static_cast<int>(round_to(width, 64)) + 16; }
__host__ __device__ inline int even(int width) { return width + width % 2; }

struct Bytes {  // of four values
  uint32_t low, high;
};

__device__ inline Bytes bytes_at(const FixedRows& rows, int row, int k) {
  uint32_t first = 0, second = 0;
  if (row < rows.count) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(rows.data + static_cast<int64_t>(row) * rows.stride + k);
    if (k < rows.width) first = pairs[0];
    if (k + 2 < rows.width) second = pairs[1];
  }
  return {__byte_perm(first, second, 0x6420), __byte_perm(first, second, 0x7531)};
}

// put(i, j, sum over k of a[i][k] b[j][k]) for every i and j, by the block's warps, tiles of 16 x 32 each.
template <class Put>
__device__ inline void fixed_product(const FixedRows& a, const FixedRows& b, Put put) {
  constexpr int kTiles = 4;  // of eight columns
  const int lane = threadIdx.x % 32, group = lane / 4, in_group = lane % 4;
  const int wide = (b.count + 8 * kTiles - 1) / (8 * kTiles), tiles = (a.count + 15) / 16 * wide;
  for (int tile = threadIdx.x / 32; tile < tiles; tile += blockDim.x / 32) {
    const int row = tile / wide * 16, column = tile % wide * 8 * kTiles;
    int low[kTiles][4] = {}, middle[kTiles][4] = {}, high[kTiles][4] = {};
    for (int step = 0; step < a.width; step += 32) {
      const int k = step + 4 * in_group;
      const Bytes x[] = {bytes_at(a, row + group, k), bytes_at(a, row + group + 8, k), bytes_at(a, row + group, k + 16), bytes_at(a, row + group + 8, k + 16)};
      const uint32_t a_low[4] = {x[0].low, x[1].low, x[2].low, x[3].low}, a_high[4] = {x[0].high, x[1].high, x[2].high, x[3].high};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const Bytes first = bytes_at(b, column + 8 * t + group, k), second = bytes_at(b, column + 8 * t + group, k + 16);
        const uint32_t b_low[2] = {first.low, second.low}, b_high[2] = {first.high, second.high};
        ptx::mma_u8(low[t], a_low, b_low);
        ptx::mma_s8u8(middle[t], a_high, b_low);
        ptx::mma_u8s8(middle[t], a_low, b_high);
        ptx::mma_s8(high[t], a_high, b_high);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int to_row = row + group + i / 2 * 8, to_column = column + 8 * t + 2 * in_group + i % 2;
        const uint32_t sum = static_cast<uint32_t>(low[t][i]) + (static_cast<uint32_t>(middle[t][i]) << 8) + (static_cast<uint32_t>(high[t][i]) << 16);
        if (to_row < a.count && to_column < b.count) put(to_row, to_column, static_cast<int>(sum));
      }
  }
}

// x ~ integer * unit; factor 0: all are zero, whatever the row holds.
struct Unit {
  float unit, factor;
};

__device__ inline Unit unit_of(float reach) {
  const bool usable = reach > kSmallestReach && reach < infinity();
  return {__fdiv_rn(reach, static_cast<float>(kLargestFixed16)), usable ? __fdiv_rn(static_cast<float>(kLargestFixed16), reach) : 0.0f};
}

__device__ inline int16_t fixed_of(float x, float factor) { return factor == 0.0f ? int16_t{0} : static_cast<int16_t>(__float2int_rn(__fmul_rn(x, factor))); }

// The least shift after which a sum of magnitude `largest` is at most 32639, rounded half up.
__device__ inline int shift_of(int largest) {
  int shift = 0;
  while ((largest + (1 << shift >> 1)) >> shift > kLargestFixed16) ++shift;
  return shift;
}

// 2^exponent, for exponents of normal numbers.
__device__ inline float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Shared memory of times_right: integers, and a scale for each row.
__host__ __device__ inline size_t times_right_bytes(int rows, int r) { return static_cast<size_t>(rows) * (fixed_stride(r) * sizeof(int16_t) + sizeof(float)); }

// Rows x [rows][r] in shared memory times right^T [r][r rounded up to 2], by the block: y may be x. `memory`: times_right_bytes, 4-byte aligned.
__device__ inline void times_right(const float* x, int rows, int r, const int16_t* right, int exponent, unsigned char* memory, float* y) {
  const int stride = fixed_stride(r), lane = threadIdx.x % 32;
  float* scales = reinterpret_cast<float*>(memory);
  int16_t* integers = reinterpret_cast<int16_t*>(scales + rows);
  for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32) {
    int bits = 0;
    for (int c = lane; c < r; c += 32) bits = largest(bits, magnitude_bits(x[row * r + c]));
    const Unit unit = unit_of(__int_as_float(across_warp(bits, largest)));
    for (int c = lane; c < even(r); c += 32) integers[row * stride + c] = c < r ? fixed_of(x[row * r + c], unit.factor) : int16_t{0};
    if (lane == 0) scales[row] = __fmul_rn(unit.unit, power_of_two(exponent));
  }
  __syncthreads();
  fixed_product({integers, stride, rows, even(r)}, {right, even(r), r, even(r)},
                [&](int i, int j, int sum) { y[i * r + j] = __fmul_rn(__int2float_rn(sum), scales[i]); });
  __syncthreads();
}

}  // namespace quota::cuda
