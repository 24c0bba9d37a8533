// Where operands lie: the packed weights of w4a4_linear, and which k an mma operand's bytes stand for.
//
// One layout for every architecture: weights in blocks of 8 rows x 64 bytes (128 values of k), 512 contiguous bytes each, 16 blocks of a tile of
// 128 rows one after the other, then the next 128 of k. The order of k inside an operand is free as long as both operands agree, so in every
// mma a lane's operands are the 16 contiguous bytes 16 t .. of a row, t = lane % 4:
//   s4, step s of 2 (k64):  register pair (h = 0, 1) is word 2 s + h of the 16 bytes; nibble e stands for k = 32 t + 8 (2 s + h) + e.
//   s8, step s of 4 (k32):  h = 0 are the even nibbles of word s, h = 1 the odd ones, each in the high half of its byte, so 16 times its value;
//                           byte j stands for k = 32 t + 8 s + 2 j + h.
// No nibble moves between the portable layout and this one, and a warp reads 512 contiguous bytes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QUOTA_BOTH __host__ __device__
#else
#define QUOTA_BOTH
#endif

namespace quota::cuda {

constexpr int64_t kTileRows = 128;                           // output channels of a tile
constexpr int64_t kStepK = 128;                              // values of k per block
constexpr int64_t kStepBytes = kStepK / 2;                   // of one row
constexpr int64_t kRowGroup = 8;                             // rows of a block: those of one operand of 8 columns, or half a 16-row one
constexpr int64_t kGroupBytes = kRowGroup * kStepBytes;      // 512
constexpr int64_t kTileBytes = kTileRows * kStepBytes;       // 8 KiB
constexpr int kScale8 = 256;                                 // both s8 operands carry a factor of 16
constexpr int64_t kLargestK = INT32_MAX / (64 * kScale8);    // 131071: no sum of products of two nibbles -8 overflows

QUOTA_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
QUOTA_BOTH constexpr int64_t round_to(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

QUOTA_BOTH inline bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Byte offset of row n's 64 bytes of step s, of `steps`.
QUOTA_BOTH constexpr int64_t weight_offset(int64_t n, int64_t s, int64_t steps) {
  return ((n / kTileRows * steps + s) * (kTileRows / kRowGroup) + n % kTileRows / kRowGroup) * kGroupBytes + n % kRowGroup * kStepBytes;
}

// Unpacked activations for wgmma: int8 [steps][rows / 8][8][128], rows of 128 bytes with 16-byte chunk c at c ^ (row % 8) (128-byte swizzle).
// Byte 32 s + 16 h + 4 t + j of a row is operand byte j of lane t, half h, step s.
QUOTA_BOTH constexpr int64_t activation_offset(int64_t row, int64_t step, int64_t rows) { return (step * rows + row) * kStepK; }
QUOTA_BOTH constexpr int swizzled(int row, int byte) { return byte ^ (row % 8 << 4); }

// wgmma's descriptor of b [tokens x 128] in that layout: start address, 1024 bytes from 8 rows to the next 8, 128-byte swizzle.
QUOTA_BOTH constexpr uint64_t swizzled_descriptor(uint32_t address) {
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

}  // namespace quota::cuda
