// 16 floats or 16 groups of four bytes in one 512-bit register (AVX512 F, BW, DQ, VL, VNNI).
#pragma once

#include <immintrin.h>

namespace {

constexpr int kTileRows = 6, kTileVecs = 4;  // 24 accumulators, 4 operands, 1 broadcast of 32 registers
constexpr int kDotRows = 6, kDotVecs = 4;
constexpr int kStreamRows = 4;

struct F16 { __m512 a; };
struct I16 { __m512i a; };
struct U64 { __m512i a; };

inline __mmask16 mask16(int64_t n) { return static_cast<__mmask16>(n <= 0 ? 0u : n >= 16 ? 0xFFFFu : (1u << n) - 1u); }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(mask16(n), p)}; }
inline void store(float* p, const F16& x) { _mm512_storeu_ps(p, x.a); }
inline void store_first(float* p, const F16& x, int64_t n) { _mm512_mask_storeu_ps(p, mask16(n), x.a); }
inline F16 set1(float f) { return {_mm512_set1_ps(f)}; }
inline F16 fma(const F16& x, const F16& y, const F16& z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
inline F16 add(const F16& x, const F16& y) { return {_mm512_add_ps(x.a, y.a)}; }
inline F16 sub(const F16& x, const F16& y) { return {_mm512_sub_ps(x.a, y.a)}; }
inline F16 mul(const F16& x, const F16& y) { return {_mm512_mul_ps(x.a, y.a)}; }
inline F16 div(const F16& x, const F16& y) { return {_mm512_div_ps(x.a, y.a)}; }
inline F16 max(const F16& x, const F16& y) { return {_mm512_max_ps(x.a, y.a)}; }
inline F16 min(const F16& x, const F16& y) { return {_mm512_min_ps(x.a, y.a)}; }
inline F16 keep_first(const F16& x, int64_t n, float fill) { return {_mm512_mask_blend_ps(mask16(n), _mm512_set1_ps(fill), x.a)}; }
inline F16 zero_below(const F16& x, const F16& key, float bound) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(key.a, _mm512_set1_ps(bound), _CMP_LT_OQ), x.a, _mm512_setzero_ps())};
}
inline F16 exp2_of_biased(const F16& t) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(t.a), _mm512_set1_epi32(127)), 23))};
}
inline I16 int_zero() { return {_mm512_setzero_si512()}; }
inline I16 int_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I16 int_load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void int_store(int32_t* p, const I16& x) { _mm512_storeu_si512(p, x.a); }
inline I16 int_add(const I16& x, const I16& y) { return {_mm512_add_epi32(x.a, y.a)}; }
inline I16 int_sub(const I16& x, const I16& y) { return {_mm512_sub_epi32(x.a, y.a)}; }
inline I16 int_mul(const I16& x, const I16& y) { return {_mm512_mullo_epi32(x.a, y.a)}; }
inline I16 int_max(const I16& x, const I16& y) { return {_mm512_max_epi32(x.a, y.a)}; }
inline F16 to_float(const I16& x) { return {_mm512_cvtepi32_ps(x.a)}; }
inline I16 abs_bits(const F16& x) { return {_mm512_and_si512(_mm512_castps_si512(x.a), _mm512_set1_epi32(0x7FFFFFFF))}; }
inline void store_codes(uint8_t* p, const F16& x, float low, float high) {
  const __mmask16 ordered = _mm512_cmp_ps_mask(x.a, x.a, _CMP_ORD_Q);
  const __m512 clamped = _mm512_min_ps(_mm512_max_ps(x.a, _mm512_set1_ps(low)), _mm512_set1_ps(high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(ordered, clamped)));
}
inline U64 bytes_load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void bytes_store(uint8_t* p, const U64& x) { _mm512_storeu_si512(p, x.a); }
inline U64 low_nibbles(const U64& x) { return {_mm512_and_si512(x.a, _mm512_set1_epi8(15))}; }
inline U64 high_nibbles(const U64& x) { return {_mm512_and_si512(_mm512_srli_epi16(x.a, 4), _mm512_set1_epi8(15))}; }
inline I16 dot4(const I16& acc, const U64& w, const int8_t* x) {
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  return {_mm512_dpbusd_epi32(acc.a, w.a, _mm512_set1_epi32(word))};
}
inline I16 gather_words(const uint8_t* p, int64_t stride) {
  const __m512i index = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(static_cast<int>(stride)));
  return {_mm512_i32gather_epi32(index, p, 1)};
}
inline F16 nibble_of(const I16& x, int shift) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(x.a, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(15)))};
}
inline F16 nibbles_of(const uint8_t* p) {
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), m = _mm_set1_epi8(15);
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_and_si128(x, m), _mm_and_si128(_mm_srli_epi16(x, 4), m))))};
}
inline void add_to_doubles(double* p, const F16& x) {
  _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), _mm512_cvtps_pd(_mm512_castps512_ps256(x.a))));
  _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.a, 1))));
}

}  // namespace
