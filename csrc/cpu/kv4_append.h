// kv4_append: a row of keys or values becomes a slot of a cache, quota/quant/affine.py step by step in float32.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "quantize_act.h"
#include "quota/kernels.h"

namespace {

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
