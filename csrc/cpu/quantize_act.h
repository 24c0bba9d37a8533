// quantize_act: prologue, transform, then quota/quant/affine.py step by step in float32. The quantizer itself (`codes_of`) serves kv4_append too.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "quota/kernels.h"
#include "transform.h"

namespace {

constexpr float kSmallestRange = 1e-8f;

// Largest magnitude; a NaN wins, because as integers its bits are above every number's.
template <class V>
inline float largest_magnitude(const float* x, int64_t k) {
  auto largest = V::izero();
  const auto magnitude = V::iset1(0x7fffffff);
  for (int64_t i = 0; i < k; i += kLanes) {
    const auto v = i + kLanes <= k ? V::load(x + i) : V::load(x + i, k - i);
    largest = V::imax(largest, V::iand(V::bits(v), magnitude));
  }
  return bits_to_float(V::largest(largest));
}

// codes = clamp(round((x - zero) * inverse), low, high) as int8, packed in pairs. `codes`: k rounded up to 16.
template <class V>
inline void codes_of(const float* x, int64_t k, float zero, float inverse, float low, float high, int8_t* codes, uint8_t* packed) {
  const auto offset = V::set1(zero), factor = V::set1(inverse), least = V::set1(low), most = V::set1(high);
  for (int64_t i = 0; i < k; i += kLanes) {
    auto v = i + kLanes <= k ? V::load(x + i) : V::first(V::load(x + i, k - i), k - i, offset);  // padding becomes code 0
    v = V::round(V::mul(V::sub(v, offset), factor));
    V::store_bytes(codes + i, V::to_int(V::max(least, V::min(most, v))));
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(codes);
  for (int64_t i = 0; i < (k + 1) / 2; ++i) packed[i] = static_cast<uint8_t>((bytes[2 * i] & 15) | bytes[2 * i + 1] << 4);
}

template <class V>
void quantize_rows(const quota::QuantizeArgs& args, int64_t begin, int64_t end) {
  const auto& t = args.transform;
  const int64_t k = t.l * t.r, at_once = end - begin < kRowsAtOnce ? end - begin : kRowsAtOnce;
  const bool moves = t.left || t.right, prepares = args.prologue != quota::Prologue::kNone;
  const int64_t width = args.prologue == quota::Prologue::kSiluMul ? 2 * k : k;
  const Scratch<float> middle(t.left && t.right ? at_once * k : 0), y(moves ? at_once * k : 0), prepared(prepares ? at_once * k : 0);
  const Scratch<int8_t> codes(round_up(k, kLanes));
  prefetch_factor(t.left, t.l), prefetch_factor(t.right, t.r);
  for (int64_t m = begin; m < end; m += at_once) {
    const int64_t rows = end - m < at_once ? end - m : at_once;
    const float* x = prepares ? prepared : t.x + m * k;
    for (int64_t i = 0; prepares && i < rows; ++i) apply_prologue<V>(args.prologue, t.x + (m + i) * width, k, prepared + i * k);
    if (moves) transform_into<V>(t, x, y, rows, middle);
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = moves ? y + i * k : x + i * k;
      const float reach = largest_magnitude<V>(row, k) * args.clip;
      const float scale = (reach < kSmallestRange ? kSmallestRange : reach) / 7.0f;
      args.scale[m + i] = scale;
      codes_of<V>(row, k, 0.0f, 1.0f / scale, -8.0f, 7.0f, codes, args.q + (m + i) * ((k + 1) / 2));
    }
  }
}

}  // namespace
