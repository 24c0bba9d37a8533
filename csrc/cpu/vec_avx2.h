// 16 floats or 16 groups of four bytes in two 256-bit registers (AVX2 + FMA).
#pragma once

#include <immintrin.h>

namespace {

constexpr int kTileRows = 6, kTileVecs = 1;
constexpr int kDotRows = 3, kDotVecs = 2;
constexpr int kStreamRows = 1;

struct F16 { __m256 a, b; };
struct I16 { __m256i a, b; };
struct U64 { __m256i a, b; };

inline __m256i mask8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 0 ? 0 : n > 8 ? 8 : n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F16 load_first(const float* p, int64_t n) { return {_mm256_maskload_ps(p, mask8(n)), n > 8 ? _mm256_maskload_ps(p + 8, mask8(n - 8)) : _mm256_setzero_ps()}; }
inline void store(float* p, const F16& x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline void store_first(float* p, const F16& x, int64_t n) {
  _mm256_maskstore_ps(p, mask8(n), x.a);
  if (n > 8) _mm256_maskstore_ps(p + 8, mask8(n - 8), x.b);
}
inline F16 set1(float f) { return {_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
inline F16 fma(const F16& x, const F16& y, const F16& z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 add(const F16& x, const F16& y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 sub(const F16& x, const F16& y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 mul(const F16& x, const F16& y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 div(const F16& x, const F16& y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 max(const F16& x, const F16& y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 min(const F16& x, const F16& y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 keep_first(const F16& x, int64_t n, float fill) {
  const __m256 f = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(f, x.a, _mm256_castsi256_ps(mask8(n))), _mm256_blendv_ps(f, x.b, _mm256_castsi256_ps(mask8(n - 8)))};
}
inline F16 zero_below(const F16& x, const F16& key, float bound) {
  const __m256 f = _mm256_set1_ps(bound);
  return {_mm256_andnot_ps(_mm256_cmp_ps(key.a, f, _CMP_LT_OQ), x.a), _mm256_andnot_ps(_mm256_cmp_ps(key.b, f, _CMP_LT_OQ), x.b)};
}
inline F16 exp2_of_biased(const F16& t) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t.a), bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t.b), bias), 23))};
}
inline I16 int_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I16 int_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I16 int_load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))}; }
inline void int_store(int32_t* p, const I16& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
inline I16 int_add(const I16& x, const I16& y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I16 int_sub(const I16& x, const I16& y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I16 int_mul(const I16& x, const I16& y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline I16 int_max(const I16& x, const I16& y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline F16 to_float(const I16& x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I16 abs_bits(const F16& x) {
  const __m256i m = _mm256_set1_epi32(0x7FFFFFFF);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), m), _mm256_and_si256(_mm256_castps_si256(x.b), m)};
}
inline __m256i codes8(__m256 x, __m256 low, __m256 high) {
  const __m256 ordered = _mm256_cmp_ps(x, x, _CMP_ORD_Q);
  return _mm256_and_si256(_mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(x, low), high)), _mm256_castps_si256(ordered));
}
inline void store_codes(uint8_t* p, const F16& x, float low, float high) {
  const __m256 l = _mm256_set1_ps(low), h = _mm256_set1_ps(high);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes8(x.a, l, h), codes8(x.b, l, h)), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline U64 bytes_load(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))}; }
inline void bytes_store(uint8_t* p, const U64& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}
inline U64 low_nibbles(const U64& x) { const __m256i m = _mm256_set1_epi8(15); return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)}; }
inline U64 high_nibbles(const U64& x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
// |weight * code| <= 15 * 8, so the sum of two fits int16 and nothing saturates.
inline I16 dot4(const I16& acc, const U64& w, const int8_t* x) {
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  const __m256i v = _mm256_set1_epi32(word), ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, v), ones)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, v), ones))};
}
inline I16 gather_words(const uint8_t* p, int64_t stride) {
  alignas(32) int32_t w[16];
  for (int i = 0; i < 16; ++i) __builtin_memcpy(&w[i], p + i * stride, 4);
  return int_load(w);
}
inline F16 nibble_of(const I16& x, int shift) {
  const __m256i m = _mm256_set1_epi32(15);
  const __m128i s = _mm_cvtsi32_si128(shift);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(x.a, s), m)), _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(x.b, s), m))};
}
inline F16 nibbles_of(const uint8_t* p) {
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), m = _mm_set1_epi8(15);
  const __m128i both = _mm_unpacklo_epi8(_mm_and_si128(x, m), _mm_and_si128(_mm_srli_epi16(x, 4), m));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(both)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(both, 8)))};
}
inline void add_to_doubles(double* p, const F16& x) {
  const __m128 part[4] = {_mm256_castps256_ps128(x.a), _mm256_extractf128_ps(x.a, 1), _mm256_castps256_ps128(x.b), _mm256_extractf128_ps(x.b, 1)};
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, _mm256_add_pd(_mm256_loadu_pd(p + 4 * i), _mm256_cvtps_pd(part[i])));
}

}  // namespace
