// quantize_act: prologue, transform, then quota/quant/affine.py step by step in float32. The quantizer itself (`codes_of`) serves kv4_append too.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "fixed.h"
#include "quota/kernels.h"
#include "transform.h"

namespace {

constexpr float kSmallestRange = 1e-8f;

// How floats become codes: clamp(round((x - zero) * inverse), low, high).
template <class V>
struct Codes {
  typename V::F zero, inverse, low, high;

  Codes(float zero, float inverse, float low, float high) : zero(V::set1(zero)), inverse(V::set1(inverse)), low(V::set1(low)), high(V::set1(high)) {}
  void put(typename V::F x, int8_t* codes) const {
    V::store_bytes(codes, V::to_int(V::max(low, V::min(high, V::round(V::mul(V::sub(x, zero), inverse))))));
  }
};

// k codes -> nibbles; for odd k one code more.
inline void pack_codes(const int8_t* codes, int64_t k, uint8_t* packed) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(codes);
  for (int64_t i = 0; i < (k + 1) / 2; ++i) packed[i] = static_cast<uint8_t>((bytes[2 * i] & 15) | bytes[2 * i + 1] << 4);
}

// A row -> nibbles. `codes`: k rounded up to 16.
template <class V>
inline void codes_of(const float* x, int64_t k, float zero, float inverse, float low, float high, int8_t* codes, uint8_t* packed) {
  const Codes<V> code(zero, inverse, low, high);
  for (int64_t i = 0; i < k; i += kLanes)  // padding becomes code 0
    code.put(i + kLanes <= k ? V::load(x + i) : V::first(V::load(x + i, k - i), k - i, V::set1(zero)), codes + i);
  pack_codes(codes, k, packed);
}

inline float scale_of(float reach, float clip) {
  const float clipped = reach * clip;
  return (clipped < kSmallestRange ? kSmallestRange : clipped) / 7.0f;
}

// Transformed rows as `transform_sums` leaves them -> nibbles and scales. `codes`: k and 16 more, since a matrix row ends in zeros that the next covers.
template <class V>
inline void quantize_sums(const quota::QuantizeArgs& args, int64_t first, int64_t count, const TransformScratch& scratch, int8_t* codes) {
  const int64_t l = args.transform.l, r = args.transform.r, wide = round_up(r, kLanes);
  for (int64_t m = 0; m < count; ++m) {
    const int32_t* sums = scratch.sums + m * l * wide;
    const float worth = scratch.scales[m], scale = scale_of(static_cast<float>(largest_sum<V>(sums, l * wide)) * worth, args.clip);
    args.scale[first + m] = scale;
    const Codes<V> code(0.0f, 1.0f / scale, -8.0f, 7.0f);
    for (int64_t i = 0; i < l; ++i)
      for (int64_t c = 0; c < r; c += kLanes) code.put(V::mul(V::to_float(V::iload(sums + i * wide + c)), V::set1(worth)), codes + i * r + c);
    pack_codes(codes, l * r, args.q + (first + m) * ((l * r + 1) / 2));
  }
}

template <class V>
void quantize_rows(const quota::QuantizeArgs& args, int64_t begin, int64_t end) {
  const auto& t = args.transform;
  const bool moves = t.left || t.right, prepares = args.prologue != quota::Prologue::kNone;
  const int64_t k = t.l * t.r, most = moves ? rows_at_once(t) : 1, at_once = end - begin < most ? end - begin : most;
  const int64_t width = args.prologue == quota::Prologue::kSiluMul ? 2 * k : k;
  const TransformScratch scratch(t, moves ? at_once : 0);
  const Scratch<float> prepared(prepares ? at_once * k : 0);
  const Scratch<int8_t> codes(round_up(k, kLanes) + kLanes);
  prefetch_factors(t);
  for (int64_t m = begin; m < end; m += at_once) {
    const int64_t rows = end - m < at_once ? end - m : at_once;
    const float* x = prepares ? prepared : t.x + m * k;
    for (int64_t i = 0; prepares && i < rows; ++i) apply_prologue<V>(args.prologue, t.x + (m + i) * width, k, prepared + i * k);
    if (moves) {
      transform_sums<V>(t, x, rows, scratch);
      quantize_sums<V>(args, m, rows, scratch, codes);
    } else {
      const float scale = args.scale[m] = scale_of(largest_magnitude<V>(x, k), args.clip);
      codes_of<V>(x, k, 0.0f, 1.0f / scale, -8.0f, 7.0f, codes, args.q + m * ((k + 1) / 2));
    }
  }
}

}  // namespace
