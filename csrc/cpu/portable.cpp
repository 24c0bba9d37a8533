// Plain C++ that any machine compiles. The same lanes and the same order as the vector versions, so the same bits.
#include <cstdint>
#include <cstring>

#include "quota/kernels.h"

namespace {

struct Vec {
  struct F {
    float v[16];
  };
  struct I {
    int32_t v[16];
  };
  static constexpr int kChainRows = 4, kChainVectors = 1, kNarrowRows = 4, kDotVectors = 1, kPairRows = 4, kPairVectors = 1;

  template <class Out, class Fn>
  static Out map(Fn fn) {
    Out out;
    for (int i = 0; i < 16; ++i) out.v[i] = fn(i);
    return out;
  }
  static F set1(float x) { return map<F>([=](int) { return x; }); }
  static F zero() { return set1(0.0f); }
  static F load(const float* p) { return map<F>([=](int i) { return p[i]; }); }
  static F load(const float* p, int64_t n) { return map<F>([=](int i) { return i < n ? p[i] : 0.0f; }); }
  static F load(const quota::Bfloat16* p) {
    return from_bits(map<I>([=](int i) { return static_cast<int32_t>(static_cast<uint32_t>(p[i].bits) << 16); }));
  }
  static F load(const quota::Bfloat16* p, int64_t n) {
    return from_bits(map<I>([=](int i) { return i < n ? static_cast<int32_t>(static_cast<uint32_t>(p[i].bits) << 16) : 0; }));
  }
  static float widen(quota::Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    uint32_t bits = magnitude + (magnitude < 0x7c00u << 13 ? 112u : 224u) * (1u << 23);  // the exponent's bias; of what is not finite it is the largest
    float y;
    if (magnitude < 1u << 23) {  // subnormal: units of 2^-24
      y = static_cast<float>(x.bits & 0x3ff) * 0x1p-24f;
      std::memcpy(&bits, &y, sizeof y);
    }
    bits |= sign;
    std::memcpy(&y, &bits, sizeof y);
    return y;
  }
  static F load(const quota::Float16* p) { return map<F>([=](int i) { return widen(p[i]); }); }
  static F load(const quota::Float16* p, int64_t n) { return map<F>([=](int i) { return i < n ? widen(p[i]) : 0.0f; }); }
  static void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
  static void store(float* p, const F& x, int64_t n) { std::memcpy(p, x.v, static_cast<size_t>(n < 16 ? n : 16) * sizeof(float)); }
  static F first(const F& x, int64_t n, const F& other) { return map<F>([&](int i) { return i < n ? x.v[i] : other.v[i]; }); }
  static F add(const F& a, const F& b) { return map<F>([&](int i) { return a.v[i] + b.v[i]; }); }
  static F sub(const F& a, const F& b) { return map<F>([&](int i) { return a.v[i] - b.v[i]; }); }
  static F mul(const F& a, const F& b) { return map<F>([&](int i) { return a.v[i] * b.v[i]; }); }
  static F div(const F& a, const F& b) { return map<F>([&](int i) { return a.v[i] / b.v[i]; }); }
  static F fma(const F& a, const F& b, const F& c) { return map<F>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); }); }
  static F accumulate(const F& acc, const F& x, const F& y) { return fma(x, y, acc); }
  static F max(const F& a, const F& b) { return map<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }  // NaN: b, as maxps
  static F min(const F& a, const F& b) { return map<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  static F round(const F& x) { return map<F>([&](int i) { return __builtin_nearbyintf(x.v[i]); }); }
  static F less(const F& a, const F& b, const F& yes, const F& no) {
    return map<F>([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
  }
  static I iset1(int32_t x) { return map<I>([=](int) { return x; }); }
  static I izero() { return iset1(0); }
  static I iload(const int32_t* p) { return map<I>([=](int i) { return p[i]; }); }
  static void istore(int32_t* p, const I& x) { std::memcpy(p, x.v, sizeof x.v); }
  static I iadd(const I& a, const I& b) {  // wraps
    return map<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
  }
  static I isub(const I& a, const I& b) { return map<I>([&](int i) { return a.v[i] - b.v[i]; }); }
  static I imul(const I& a, const I& b) { return map<I>([&](int i) { return a.v[i] * b.v[i]; }); }
  static I imax(const I& a, const I& b) { return map<I>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static I iand(const I& a, const I& b) { return map<I>([&](int i) { return a.v[i] & b.v[i]; }); }
  static I shift_left_23(const I& a) { return map<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << 23); }); }
  static I shift_right_4(const I& a) { return map<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> 4); }); }
  static I bits(const F& x) {
    I out;
    std::memcpy(out.v, x.v, sizeof x.v);
    return out;
  }
  static F from_bits(const I& x) {
    F out;
    std::memcpy(out.v, x.v, sizeof x.v);
    return out;
  }
  static F to_float(const I& x) { return map<F>([&](int i) { return static_cast<float>(x.v[i]); }); }
  static I to_int(const F& x) {  // to nearest; not a number, or too large: the smallest integer, as cvtps2dq
    return map<I>([&](int i) { return x.v[i] > -2147483648.0f && x.v[i] < 2147483648.0f ? static_cast<int32_t>(__builtin_nearbyintf(x.v[i])) : INT32_MIN; });
  }
  static void store_bytes(int8_t* p, const I& x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.v[i]);
  }

  static I load_pairs(const int16_t* p) {
    I out;
    std::memcpy(out.v, p, 64);
    return out;
  }
  static void store_pairs(int16_t* p, const I& low, const I& high) {
    for (int i = 0; i < 16; ++i) p[2 * i] = static_cast<int16_t>(low.v[i]), p[2 * i + 1] = static_cast<int16_t>(high.v[i]);
  }
  static void store_shorts(int16_t* p, const I& x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int16_t>(x.v[i]);
  }
  static I dot2(const I& acc, const I& pairs, const I& values) {
    int16_t a[32], b[32];
    std::memcpy(a, pairs.v, 64), std::memcpy(b, values.v, 64);
    return map<I>([&](int i) { return acc.v[i] + a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1]; });
  }
  static I iabs(const I& x) { return map<I>([&](int i) { return x.v[i] < 0 ? -x.v[i] : x.v[i]; }); }
  static I shift_right(const I& x, int bits) { return map<I>([&](int i) { return x.v[i] >> bits; }); }

  template <class T>
  static auto largest(const T& x) {
    auto best = x.v[0];
    for (int i = 1; i < 16; ++i) best = x.v[i] > best ? x.v[i] : best;
    return best;
  }
  static int32_t sum(const I& x) {
    uint32_t total = 0;
    for (int32_t v : x.v) total += static_cast<uint32_t>(v);
    return static_cast<int32_t>(total);
  }

  // As in avx512vnni.cpp, from here on. Bytes of a lane are in the order of memory.
  static I load_block(const uint8_t* p) {
    I out;
    std::memcpy(out.v, p, 64);
    return out;
  }
  static I load_half_block(const uint8_t* p) {
    I out = izero();
    std::memcpy(out.v, p, 32);
    return out;
  }
  static void store_block(uint8_t* p, const I& x) { std::memcpy(p, x.v, 64); }
  static I low_halves(const I& x, const I& y) { return map<I>([&](int i) { return i < 8 ? x.v[i] : y.v[i - 8]; }); }
  static I dot4(const I& acc, const I& bytes, const I& values) {
    uint8_t u[64];
    int8_t s[64];
    std::memcpy(u, bytes.v, 64), std::memcpy(s, values.v, 64);
    I out = acc;
    for (int i = 0; i < 64; ++i) out.v[i / 4] += u[i] * s[i];
    return out;
  }
  static constexpr int32_t kByteOffset = 0;  // as in avx512vnni.cpp
  static I dot4_signed(const I& acc, const I& weights, const I& values) {
    int8_t u[64], s[64];
    std::memcpy(u, weights.v, 64), std::memcpy(s, values.v, 64);
    I out = acc;
    for (int i = 0; i < 64; ++i) out.v[i / 4] += u[i] * s[i];
    return out;
  }
  static void transpose_fours(const uint8_t* p, int64_t stride, I (&out)[4]) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 16; ++j) std::memcpy(&out[i].v[j], p + j * stride + 4 * i, 4);
  }
  static void interleave_bytes(I (&x)[4]) {
    uint8_t in[4][64], out[4][64];
    for (int row = 0; row < 4; ++row) std::memcpy(in[row], x[row].v, 64);
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < 16; ++lane)
        for (int row = 0; row < 4; ++row) out[i][4 * lane + row] = in[row][lane / 4 * 16 + 4 * i + lane % 4];
    for (int i = 0; i < 4; ++i) std::memcpy(x[i].v, out[i], 64);
  }
  static void store_limbs(int8_t* p, int64_t stride, const I& x) {
    for (int i = 0; i < 16; ++i)
      for (int limb = 0; limb < 3; ++limb) {
        const uint32_t byte = (static_cast<uint32_t>(x.v[i]) + 0x808080u) >> 8 * limb & 255u;
        p[limb * stride + i] = static_cast<int8_t>(byte ^ 128u);
      }
  }

  // As in avx512vnni.cpp.
  template <int kRows, bool kPacked, bool kContinue>
  static void dot(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
    for (int64_t i = 0; i < kRows * 64 && !kContinue; ++i) out[i] = 0;
    for (int64_t group = 0; group < groups; ++group)
      for (int v = 0; v < 4; ++v) {
        uint8_t column[64];
        for (int i = 0; i < 64; ++i) {
          if constexpr (kPacked)
            column[i] = (v & 1 ? w[group * 128 + v / 2 * 64 + i] >> 4 : w[group * 128 + v / 2 * 64 + i]) & 15;
          else
            column[i] = w[group * 256 + v * 64 + i];
        }
        for (int row = 0; row < kRows; ++row) {
          const int8_t* x = a + row * lda + group * 4;
          for (int c = 0; c < 16; ++c)
            out[row * 64 + v * 16 + c] += column[4 * c] * x[0] + column[4 * c + 1] * x[1] + column[4 * c + 2] * x[2] + column[4 * c + 3] * x[3];
        }
      }
  }
};

}  // namespace

#include "kernels_of.h"

namespace quota {
extern const Kernels kernels_portable;
const Kernels kernels_portable = table_of<Vec>("portable");
}  // namespace quota
