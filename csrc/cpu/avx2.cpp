#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "dot_ymm.h"
#include "quota/kernels.h"

namespace {

// Sixteen lanes in two registers.
struct Vec {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  static constexpr int kChainRows = 6, kChainVectors = 1, kNarrowRows = 6, kDotVectors = 1, kPairRows = 3, kPairVectors = 2;  // 12 accumulators of 16 registers

  static __m256i mask(int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, mask(n)), _mm256_maskload_ps(p + 8, mask(n - 8))}; }
  static __m256 widen(const quota::Bfloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static F load(const quota::Bfloat16* p) { return {widen(p), widen(p + 8)}; }
  static F load(const quota::Bfloat16* p, int64_t n) {
    quota::Bfloat16 lanes[16] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof *p);
    return load(lanes);
  }
  static F load(const quota::Float16* p) {
    const auto* at = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
  }
  static F load(const quota::Float16* p, int64_t n) {
    quota::Float16 lanes[16] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof *p);
    return load(lanes);
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
  static void store(float* p, F x, int64_t n) { _mm256_maskstore_ps(p, mask(n), x.a), _mm256_maskstore_ps(p + 8, mask(n - 8), x.b); }
  static F first(F x, int64_t n, F other) {
    return {_mm256_blendv_ps(other.a, x.a, _mm256_castsi256_ps(mask(n))), _mm256_blendv_ps(other.b, x.b, _mm256_castsi256_ps(mask(n - 8)))};
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F accumulate(F acc, F x, F y) { return fma(x, y, acc); }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static __m256 round(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F round(F x) { return {round(x.a), round(x.b)}; }
  static F less(F x, F y, F yes, F no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)), _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
  }
  static I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static I iload(const int32_t* p) { return {load256(p), load256(p + 8)}; }
  static void istore(int32_t* p, I x) { store256(p, x.a), store256(p + 8, x.b); }
  static I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I isub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static I imul(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static I imax(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static I iand(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static I shift_left_23(I x) { return {_mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23)}; }
  static I shift_right_4(I x) { return {_mm256_srli_epi32(x.a, 4), _mm256_srli_epi32(x.b, 4)}; }
  static I bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  static F from_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
  static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
  static __m128i to_16(__m256i x) { return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)); }
  static void store_bytes(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(to_16(x.a), to_16(x.b))); }

  // Sums of int16 pairs; the addition in assembly, because from the intrinsic GCC 12 copies accumulators from register to register.
  static __m256i dot2(__m256i acc, __m256i pairs, __m256i values) {
    asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(_mm256_madd_epi16(pairs, values)));
    return acc;
  }
  static I dot2(I acc, I pairs, I values) { return {dot2(acc.a, pairs.a, values.a), dot2(acc.b, pairs.b, values.b)}; }
  static I load_pairs(const int16_t* p) { return {load256(p), load256(p + 16)}; }
  static void store_pairs(int16_t* p, I low, I high) {
    const auto both = [](__m256i x, __m256i y) { return _mm256_blend_epi16(x, _mm256_slli_epi32(y, 16), 0xaa); };
    store256(p, both(low.a, high.a)), store256(p + 16, both(low.b, high.b));
  }
  static void store_shorts(int16_t* p, I x) { store256(p, _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8)); }
  static I iabs(I x) { return {_mm256_abs_epi32(x.a), _mm256_abs_epi32(x.b)}; }
  static I shift_right(I x, int bits) { return {_mm256_sra_epi32(x.a, _mm_cvtsi32_si128(bits)), _mm256_sra_epi32(x.b, _mm_cvtsi32_si128(bits))}; }

  static float largest(F x) {
    const __m256 y = _mm256_max_ps(x.a, x.b);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_shuffle_ps(z, z, 1)));
  }
  static int32_t largest(I x) {
    const __m256i y = _mm256_max_epi32(x.a, x.b);
    __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
  }
  static int32_t sum(I x) {
    const __m256i y = _mm256_add_epi32(x.a, x.b);
    __m128i z = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_add_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
  }

  // As in avx512vnni.cpp, from here on.
  static I load_block(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
  static I load_half_block(const uint8_t* p) { return {load256(p), _mm256_setzero_si256()}; }
  static void store_block(uint8_t* p, I x) { store256(p, x.a), store256(p + 32, x.b); }
  static I low_halves(I x, I y) { return {x.a, y.a}; }
  static __m256i dot4(__m256i acc, __m256i bytes, __m256i values) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, values), _mm256_set1_epi16(1)));
  }
  static I dot4(I acc, I bytes, I values) { return {dot4(acc.a, bytes.a, values.a), dot4(acc.b, bytes.b, values.b)}; }
  // vpmaddubsw takes the magnitudes of the weights and the values with their signs: two products of at most 128 * 127 fit in int16.
  static constexpr int32_t kByteOffset = 0;
  static __m256i dot4_signed(__m256i acc, __m256i weights, __m256i values) {
    return dot4(acc, _mm256_abs_epi8(weights), _mm256_sign_epi8(values, weights));
  }
  static I dot4_signed(I acc, I weights, I values) { return {dot4_signed(acc.a, weights.a, values.a), dot4_signed(acc.b, weights.b, values.b)}; }
  static void transpose_fours(const uint8_t* p, int64_t stride, I (&out)[4]) {
    const auto half = [&](const uint8_t* q, __m256i(&to)[4]) {  // eight rows
      __m256i x[4];
      for (int j = 0; j < 4; ++j)
        x[j] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(q + (j + 4) * stride), reinterpret_cast<const __m128i*>(q + j * stride));
      const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
      const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
      to[0] = _mm256_unpacklo_epi64(a, c), to[1] = _mm256_unpackhi_epi64(a, c);
      to[2] = _mm256_unpacklo_epi64(b, d), to[3] = _mm256_unpackhi_epi64(b, d);
    };
    __m256i first[4], second[4];
    half(p, first), half(p + 8 * stride, second);
    for (int i = 0; i < 4; ++i) out[i] = {first[i], second[i]};
  }
  static void interleave_bytes(I (&x)[4]) {
    const auto half = [&](__m256i I::*part) {
      const __m256i a = _mm256_unpacklo_epi8(x[0].*part, x[1].*part), b = _mm256_unpackhi_epi8(x[0].*part, x[1].*part);
      const __m256i c = _mm256_unpacklo_epi8(x[2].*part, x[3].*part), d = _mm256_unpackhi_epi8(x[2].*part, x[3].*part);
      x[0].*part = _mm256_unpacklo_epi16(a, c), x[1].*part = _mm256_unpackhi_epi16(a, c);
      x[2].*part = _mm256_unpacklo_epi16(b, d), x[3].*part = _mm256_unpackhi_epi16(b, d);
    };
    half(&I::a), half(&I::b);
  }
  static void store_limbs(int8_t* p, int64_t stride, I x) {
    const I bias = iset1(0x808080), sum = iadd(x, bias);
    const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i a = _mm256_shuffle_epi8(_mm256_xor_si256(sum.a, bias.a), gather), b = _mm256_shuffle_epi8(_mm256_xor_si256(sum.b, bias.b), gather);
    const __m256i low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);  // bytes 0 and 1, then 2 and 3, of lanes 0-3 8-11 | 4-7 12-15
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i first = _mm256_permutevar8x32_epi32(low, order), third = _mm256_permutevar8x32_epi32(high, order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(first));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + stride), _mm256_extracti128_si256(first, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * stride), _mm256_castsi256_si128(third));
  }

  // vpmaddubsw adds two products of at most 120 in magnitude, so 128 groups fit in int16 before they are widened.
  struct Mac {
    static __m256i add(__m256i sum, __m256i x, __m256i z) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, z)); }
    static __m256i widen(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
  };
  template <int kRows, bool kPacked, bool kContinue>
  static void dot(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
    dot_ymm<Mac, kRows, kPacked, kContinue>(w, a, lda, groups, out);
  }
};

}  // namespace

#include "kernels_of.h"

namespace quota {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = table_of<Vec>("avx2");
}  // namespace quota
