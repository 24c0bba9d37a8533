// 16 floats or 16 groups of four bytes, in plain C++.
#pragma once

namespace {

constexpr int kTileRows = 4, kTileVecs = 1;        // float tiles
constexpr int kDotRows = 1, kDotVecs = 1;          // integer tiles
constexpr int kStreamRows = 1;                     // rows per pass over packed weights

struct F16 { float v[16]; };
struct I16 { int32_t v[16]; };
struct U64 { uint8_t v[64]; };

#define QUOTA_EACH for (int i = 0; i < 16; ++i)
inline uint32_t bits_of(float f) { uint32_t u; __builtin_memcpy(&u, &f, 4); return u; }
inline float float_of(uint32_t u) { float f; __builtin_memcpy(&f, &u, 4); return f; }

inline F16 load(const float* p) { F16 r; QUOTA_EACH r.v[i] = p[i]; return r; }
inline F16 load_first(const float* p, int64_t n) { F16 r; QUOTA_EACH r.v[i] = i < n ? p[i] : 0.0f; return r; }
inline void store(float* p, const F16& a) { QUOTA_EACH p[i] = a.v[i]; }
inline void store_first(float* p, const F16& a, int64_t n) { for (int i = 0; i < 16 && i < n; ++i) p[i] = a.v[i]; }
inline F16 set1(float f) { F16 r; QUOTA_EACH r.v[i] = f; return r; }
inline F16 fma(const F16& a, const F16& b, const F16& c) { F16 r; QUOTA_EACH r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return r; }
inline F16 add(const F16& a, const F16& b) { F16 r; QUOTA_EACH r.v[i] = a.v[i] + b.v[i]; return r; }
inline F16 sub(const F16& a, const F16& b) { F16 r; QUOTA_EACH r.v[i] = a.v[i] - b.v[i]; return r; }
inline F16 mul(const F16& a, const F16& b) { F16 r; QUOTA_EACH r.v[i] = a.v[i] * b.v[i]; return r; }
inline F16 div(const F16& a, const F16& b) { F16 r; QUOTA_EACH r.v[i] = a.v[i] / b.v[i]; return r; }
// b where either is NaN, as the x86 instructions do
inline F16 max(const F16& a, const F16& b) { F16 r; QUOTA_EACH r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
inline F16 min(const F16& a, const F16& b) { F16 r; QUOTA_EACH r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return r; }
inline F16 keep_first(const F16& a, int64_t n, float fill) { F16 r; QUOTA_EACH r.v[i] = i < n ? a.v[i] : fill; return r; }
// 0 where x < bound
inline F16 zero_below(const F16& a, const F16& x, float bound) { F16 r; QUOTA_EACH r.v[i] = x.v[i] < bound ? 0.0f : a.v[i]; return r; }
// 2^n for t = 1.5 * 2^23 + n
inline F16 exp2_of_biased(const F16& t) { F16 r; QUOTA_EACH r.v[i] = float_of((bits_of(t.v[i]) + 127u) << 23); return r; }
inline I16 int_zero() { I16 r; QUOTA_EACH r.v[i] = 0; return r; }
inline I16 int_set1(int32_t x) { I16 r; QUOTA_EACH r.v[i] = x; return r; }
inline I16 int_load(const int32_t* p) { I16 r; QUOTA_EACH r.v[i] = p[i]; return r; }
inline void int_store(int32_t* p, const I16& a) { QUOTA_EACH p[i] = a.v[i]; }
inline I16 int_add(const I16& a, const I16& b) { I16 r; QUOTA_EACH r.v[i] = a.v[i] + b.v[i]; return r; }
inline I16 int_sub(const I16& a, const I16& b) { I16 r; QUOTA_EACH r.v[i] = a.v[i] - b.v[i]; return r; }
inline I16 int_mul(const I16& a, const I16& b) { I16 r; QUOTA_EACH r.v[i] = a.v[i] * b.v[i]; return r; }
inline I16 int_max(const I16& a, const I16& b) { I16 r; QUOTA_EACH r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
inline F16 to_float(const I16& a) { F16 r; QUOTA_EACH r.v[i] = static_cast<float>(a.v[i]); return r; }
inline I16 abs_bits(const F16& a) { I16 r; QUOTA_EACH r.v[i] = static_cast<int32_t>(bits_of(a.v[i]) & 0x7FFFFFFFu); return r; }
// clamp, round half to even, 0 for NaN
inline void store_codes(uint8_t* p, const F16& a, float low, float high) {
  QUOTA_EACH {
    float x = a.v[i] > low ? a.v[i] : low;
    x = x < high ? x : high;
    p[i] = a.v[i] != a.v[i] ? 0 : static_cast<uint8_t>(static_cast<int32_t>(__builtin_nearbyintf(x)));
  }
}
inline U64 bytes_load(const uint8_t* p) { U64 r; __builtin_memcpy(r.v, p, 64); return r; }
inline void bytes_store(uint8_t* p, const U64& a) { __builtin_memcpy(p, a.v, 64); }
inline U64 low_nibbles(const U64& a) { U64 r; for (int i = 0; i < 64; ++i) r.v[i] = a.v[i] & 15; return r; }
inline U64 high_nibbles(const U64& a) { U64 r; for (int i = 0; i < 64; ++i) r.v[i] = a.v[i] >> 4; return r; }
// acc + sum of four products of unsigned weights and the four signed codes at x
inline I16 dot4(const I16& acc, const U64& w, const int8_t* x) {
  I16 r;
  QUOTA_EACH r.v[i] = acc.v[i] + w.v[4 * i] * x[0] + w.v[4 * i + 1] * x[1] + w.v[4 * i + 2] * x[2] + w.v[4 * i + 3] * x[3];
  return r;
}
// the four bytes at each of 16 rows
inline I16 gather_words(const uint8_t* p, int64_t stride) { I16 r; QUOTA_EACH __builtin_memcpy(&r.v[i], p + i * stride, 4); return r; }
inline F16 nibble_of(const I16& a, int shift) { F16 r; QUOTA_EACH r.v[i] = static_cast<float>(static_cast<uint32_t>(a.v[i]) >> shift & 15u); return r; }
// 16 consecutive nibbles
inline F16 nibbles_of(const uint8_t* p) { F16 r; QUOTA_EACH r.v[i] = static_cast<float>(p[i / 2] >> (i % 2 * 4) & 15); return r; }
inline void add_to_doubles(double* p, const F16& a) { QUOTA_EACH p[i] += static_cast<double>(a.v[i]); }
#undef QUOTA_EACH

}  // namespace
