// transform, quantize_act and kv4_append: quota/quant/affine.py step by step in float32.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "quota/kernels.h"

namespace {

constexpr float kSmallestRange = 1e-8f;
constexpr int64_t kRowsAtOnce = 4;  // rows between the steps of transform and quantization: they stay in the second-level cache

// n floats, `ahead` of x, into the second-level cache: a row is read panel by panel, which the processor does not foresee. As an integer,
// because the address may lie past the end of x, where a prefetch does nothing.
inline void prefetch(const float* x, int64_t ahead, int64_t n) {
  const auto from = reinterpret_cast<uintptr_t>(x) + static_cast<uintptr_t>(ahead) * sizeof(float);
  for (uintptr_t i = 0; i < static_cast<uintptr_t>(n) * sizeof(float); i += 64) __builtin_prefetch(reinterpret_cast<const void*>(from + i), 0, 2);
}

// A square factor, or null, asked for as a whole: in a decode step a hundred megabytes of weights have passed since its last use, and a few rows
// would wait for its lines one after the other.
inline void prefetch_factor(const float* factor, int64_t size) {
  if (factor) prefetch(factor, 0, size * size);
}

// rows of x -> y, `middle` holding as many floats when both factors are there.
template <class V>
inline void transform_into(const quota::TransformArgs& t, const float* x, float* y, int64_t rows, float* middle) {
  const int64_t l = t.l, r = t.r;
  if (t.left == nullptr) {  // all rows are one tall matrix
    chain_matmul<V>({x, r, 1, t.right, r, y, r}, rows * l, r, r);
    return;
  }
  float* turned = t.right ? middle : y;
  for (int64_t m = 0; m < rows; ++m) {
    prefetch(x + m * l * r, l * r, l * r);
    chain_matmul<V>({t.left, 1, l, x + m * l * r, r, turned + m * l * r, r}, l, r, l);
  }
  if (t.right) chain_matmul<V>({middle, r, 1, t.right, r, y, r}, rows * l, r, r);
}

template <class V>
void transform_rows(const quota::TransformArgs& t, int64_t begin, int64_t end) {
  const int64_t k = t.l * t.r, at_once = t.left ? kRowsAtOnce : end - begin;
  const Scratch<float> middle(t.left ? at_once * k : 0);
  for (int64_t m = begin; m < end; m += at_once) transform_into<V>(t, t.x + m * k, t.y + m * k, end - m < at_once ? end - m : at_once, middle);
}

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

// Range of a row of d values, widened to NaN by a value that is not finite.
struct Range {
  float low, high;
};

template <class V>
inline Range range_of(const float* x, int64_t d) {
  const auto inf = V::set1(__builtin_inff());
  auto least = inf, most = V::sub(V::zero(), inf), invalid = V::zero();  // `invalid` becomes NaN at the first value that is not finite
  for (int64_t i = 0; i < d; i += kLanes) {
    const int64_t n = d - i < kLanes ? d - i : kLanes;
    const auto v = V::load(x + i, n);
    least = V::min(least, V::first(v, n, least));
    most = V::max(most, V::first(v, n, most));
    invalid = V::add(invalid, V::sub(v, v));
  }
  float low_lanes[kLanes], high_lanes[kLanes];
  V::store(low_lanes, least), V::store(high_lanes, most);
  float low = low_lanes[0], high = high_lanes[0];
  for (int i = 1; i < kLanes; ++i) {
    low = low_lanes[i] < low ? low_lanes[i] : low;
    high = high_lanes[i] > high ? high_lanes[i] : high;
  }
  const float poison = sum_of_lanes<V>(invalid);
  return {low + poison, high + poison};
}

// One row of d values -> a slot of a cache. `codes`: d rounded up to 16.
template <class V>
inline void quantize_slot(const float* x, int64_t d, float clip, const quota::Kv4<uint8_t, float>& c, int64_t b, int64_t h, int64_t slot, int8_t* codes) {
  const Range reach = range_of<V>(x, d);
  const float low = reach.low * clip, range = reach.high * clip - low, scale = (range < kSmallestRange ? kSmallestRange : range) / 15.0f;
  c.scale[b * c.scale_batch + h * c.scale_head + slot] = scale;
  c.zero[b * c.zero_batch + h * c.zero_head + slot] = low;
  codes_of<V>(x, d, low, 1.0f / scale, 0.0f, 15.0f, codes, c.q + b * c.q_batch + h * c.q_head + slot * (d / 2));
}

template <class V>
void append_rows(const quota::AppendArgs& args, int64_t begin, int64_t end) {
  const Scratch<int8_t> codes(round_up(args.dim, kLanes));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t t = row % args.tokens, h = row / args.tokens % args.heads, b = row / args.tokens / args.heads;
    quantize_slot<V>(args.x + row * args.dim, args.dim, args.clip, args.cache, b, h, args.position + t, codes);
  }
}

}  // namespace
