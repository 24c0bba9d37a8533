// The int8 dot products of w4a4_linear on 256-bit registers, for AVX2 and AVX-VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

inline __m256i load_ymm(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Vectors first .. first + kVectors of the eight of a group, eight columns in each: 128 packed or 256 unpacked bytes.
template <int kVectors, bool kPacked>
inline void load_columns(const uint8_t* w, int first, __m256i* x) {
  if constexpr (!kPacked) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) x[v] = load_ymm(w + (first + v) * 32);
  } else {
    const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {  // each half of the block: two vectors of low nibbles, then two of high ones
      const __m256i bytes = load_ymm(w + (first + v) / 4 * 64 + v % 2 * 32);
      x[v] = _mm256_and_si256((first + v) & 2 ? _mm256_srli_epi16(bytes, 4) : bytes, low);
    }
  }
}

// out[row][64] += sum over k of a[row][k] * (w + 8)[k][64]; from zero unless kContinue. `Mac::add` multiplies and accumulates one group, in
// sums that hold 128 groups; `Mac::widen` makes them int32.
template <class Mac, int kRows, bool kPacked, bool kContinue>
void dot_ymm(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
  constexpr int kVectors = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;  // at most 12 accumulators of 16 registers
  constexpr int64_t kBlock = 128;
  for (int64_t begin = 0; begin < groups; begin += kBlock) {
    const int64_t end = begin + kBlock < groups ? begin + kBlock : groups;
    for (int first = 0; first < 8; first += kVectors) {
      __m256i acc[kRows][kVectors];
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[row][v] = _mm256_setzero_si256();
      for (int64_t group = begin; group < end; ++group) {
        __m256i x[kVectors];
        load_columns<kVectors, kPacked>(w + group * (kPacked ? 128 : 256), first, x);
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
          int32_t four;
          std::memcpy(&four, a + row * lda + group * 4, 4);
          const __m256i z = _mm256_set1_epi32(four);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            acc[row][v] = Mac::add(acc[row][v], x[v], z);
            asm("" : "+x"(acc[row][v]));  // g++ 12 copies every sum to the stack in every turn otherwise
          }
        }
      }
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          int32_t* sum = out + row * 64 + (first + v) * 8;
          __m256i total = Mac::widen(acc[row][v]);
          if (kContinue || begin > 0) total = _mm256_add_epi32(total, load_ymm(sum));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum), total);
        }
    }
  }
}

}  // namespace
