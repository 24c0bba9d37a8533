#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own intrinsics
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "quota/kernels.h"

namespace {

// Sixteen lanes in one register.
struct Vec {
  using F = __m512;
  using I = __m512i;
  static constexpr int kChainRows = 6, kChainVectors = 4, kNarrowRows = 12, kDotVectors = 4, kPairRows = 6, kPairVectors = 4;  // 24 accumulators of 32 registers

  static __mmask16 first_mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_mask(n), p); }
  static F widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static F load(const quota::Bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const quota::Bfloat16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_mask(n), p)); }
  static F load(const quota::Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const quota::Float16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_mask(n), p)); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first_mask(n), x); }
  static F first(F x, int64_t n, F other) { return _mm512_mask_mov_ps(other, first_mask(n), x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F less(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
  static I izero() { return _mm512_setzero_si512(); }
  static I iset1(int32_t x) { return _mm512_set1_epi32(x); }
  static I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void istore(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I imax(I a, I b) { return _mm512_max_epi32(a, b); }
  static I iand(I a, I b) { return _mm512_and_si512(a, b); }
  static I shift_left_23(I a) { return _mm512_slli_epi32(a, 23); }
  static I shift_right_4(I a) { return _mm512_srli_epi32(a, 4); }
  static I bits(F x) { return _mm512_castps_si512(x); }
  static F from_bits(I x) { return _mm512_castsi512_ps(x); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static I to_int(F x) { return _mm512_cvtps_epi32(x); }
  static void store_bytes(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }

  // Pairs of int16, the first in the lower half of a lane.
  static I load_pairs(const int16_t* p) { return _mm512_loadu_si512(p); }
  static void store_pairs(int16_t* p, I low, I high) { _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(high, 16))); }
  static void store_shorts(int16_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x)); }
  static I iabs(I x) { return _mm512_abs_epi32(x); }
  static I shift_right(I x, int bits) { return _mm512_sra_epi32(x, _mm_cvtsi32_si128(bits)); }

  static float largest(F x) { return _mm512_reduce_max_ps(x); }
  static int32_t largest(I x) { return _mm512_reduce_max_epi32(x); }
  static int32_t sum(I x) { return _mm512_reduce_add_epi32(x); }

  // 64 bytes; the first 32 and zeros; the first halves of two.
  static I load_block(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I load_half_block(const uint8_t* p) { return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store_block(uint8_t* p, I x) { _mm512_storeu_si512(p, x); }
  static I low_halves(I x, I y) { return _mm512_inserti64x4(x, _mm512_castsi512_si256(y), 1); }
  // Accumulating steps of the inner loops, in assembly: from the intrinsics GCC 12 copies accumulators from register to register, which halves
  // the rate. The second one adds to each lane its four unsigned bytes times four signed ones, the third its two int16 times two.
  static F accumulate(F acc, F x, F y) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
    return acc;
  }
  static I dot4(I acc, I bytes, I values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(bytes), "v"(values));
    return acc;
  }

  static I dot2(I acc, I pairs, I values) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(pairs), "v"(values));
    return acc;
  }

  // Adds to each lane its four signed weights, each plus kByteOffset, times four signed values.
  static constexpr int32_t kByteOffset = 128;
  static I dot4_signed(I acc, I weights, I values) { return dot4(acc, _mm512_xor_si512(weights, _mm512_set1_epi8(static_cast<char>(0x80))), values); }

  // out[i] lane j = four bytes 4i .. of row j, for sixteen rows of sixteen bytes.
  static void transpose_fours(const uint8_t* p, int64_t stride, I (&out)[4]) {
    const auto row = [&](int64_t j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j * stride)); };
    I x[4];
    for (int j = 0; j < 4; ++j) {
      x[j] = _mm512_inserti32x4(_mm512_castsi128_si512(row(j)), row(j + 4), 1);
      x[j] = _mm512_inserti32x4(_mm512_inserti32x4(x[j], row(j + 8), 2), row(j + 12), 3);
    }
    const I a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const I c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
  }

  // x[i] lane j = bytes 16 (j / 4) + 4i + j % 4 of the four blocks.
  static void interleave_bytes(I (&x)[4]) {
    const I a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
    const I c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi16(a, c), x[1] = _mm512_unpackhi_epi16(a, c);
    x[2] = _mm512_unpacklo_epi16(b, d), x[3] = _mm512_unpackhi_epi16(b, d);
  }

  // Each lane (at most 8355711 in magnitude) as three signed bytes: adding 128 to each makes them unsigned, which is how bytes carry.
  static void store_limbs(int8_t* p, int64_t stride, I x) {
    const I bias = iset1(0x808080), u = _mm512_xor_si512(iadd(x, bias), bias);
    store_bytes(p, u), store_bytes(p + stride, _mm512_srli_epi32(u, 8)), store_bytes(p + 2 * stride, _mm512_srli_epi32(u, 16));
  }

  // out[row][64] += sum over k of a[row][k] * (w + 8)[k][64]; from zero unless kContinue. `w`: 128 packed or 256 unpacked bytes per group of
  // four k. Groups are even in number.
  template <int kRows, bool kPacked, bool kContinue>
  static void dot(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
    constexpr int kParts = kRows == 1 ? 2 : 1;  // a single row alternates between two sets of accumulators to hide latency
    const I low = _mm512_set1_epi8(15);
    I acc[kParts * kRows][4];  // every loop over it is unrolled, else it lives in memory
#pragma GCC unroll 6
    for (int row = 0; row < kParts * kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[row][v] = kContinue && row < kRows ? iload(out + row * 64 + v * 16) : izero();
    for (int64_t group = 0; group < groups; group += kParts) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        I column[4];
        if constexpr (kPacked) {
          const uint8_t* p = w + (group + part) * 128;
          _mm_prefetch(reinterpret_cast<const char*>(p + 2048), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(p + 2112), _MM_HINT_T0);
          const I x = _mm512_loadu_si512(p), y = _mm512_loadu_si512(p + 64);
          column[0] = iand(x, low), column[1] = iand(_mm512_srli_epi16(x, 4), low);
          column[2] = iand(y, low), column[3] = iand(_mm512_srli_epi16(y, 4), low);
        } else {
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) column[v] = _mm512_loadu_si512(w + (group + part) * 256 + v * 64);
        }
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
          int32_t four;
          std::memcpy(&four, a + row * lda + (group + part) * 4, 4);
          const I x = iset1(four);
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            acc[part * kRows + row][v] = _mm512_dpbusd_epi32(acc[part * kRows + row][v], column[v], x);
            asm("" : "+v"(acc[part * kRows + row][v]));  // g++ 12 copies every sum to the stack in every turn otherwise
          }
        }
      }
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) istore(out + row * 64 + v * 16, kParts == 2 ? iadd(acc[row][v], acc[kRows + row][v]) : acc[row][v]);
  }
};

}  // namespace

#include "kernels_of.h"

namespace quota {
extern const Kernels kernels_avx512vnni;
const Kernels kernels_avx512vnni = table_of<Vec>("avx512vnni");
}  // namespace quota
