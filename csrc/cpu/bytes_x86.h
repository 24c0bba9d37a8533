// Byte shuffles that every x86-64 has (SSE2).
#pragma once

#include <emmintrin.h>

#include <cstdint>

namespace {

// Eight packed bytes -> sixteen nibbles, low first.
inline void split_nibbles(const uint8_t* packed, uint8_t* out) {
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(x, low), odd = _mm_and_si128(_mm_srli_epi16(x, 4), low);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(even, odd));
}

// out[i][j] = rows[j][i] for sixteen rows of sixteen bytes.
inline void transpose_bytes(const uint8_t* const* rows, uint8_t (*out)[16]) {
  __m128i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i]));
  for (int step = 0; step < 4; ++step) {  // each step is a perfect shuffle of the rows; four of them transpose
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
      y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
    }
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i]), x[i]);
}

}  // namespace
