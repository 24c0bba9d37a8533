// qkv_append: what lies between the q/k/v projection and attention, in one pass over its output.
#pragma once

#include <cstdint>

#include "chain.h"
#include "kv4_append.h"
#include "quota/kernels.h"
#include "transform.h"

namespace {

constexpr int64_t kHeadsAtOnce = kRowsAtOnce;  // heads of one kind that share a pass over the transform

// x [d] turned by cos and sin [d] -> y; channels i and i + d/2 are a pair.
template <class V>
inline void rotate(const float* x, const float* cos, const float* sin, int64_t d, float* y) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i < kLanes ? half - i : kLanes;
    const auto a = V::load(x + i, n), b = V::load(x + half + i, n);
    V::store(y + i, V::sub(V::mul(a, V::load(cos + i, n)), V::mul(b, V::load(sin + i, n))), n);
    V::store(y + half + i, V::add(V::mul(b, V::load(cos + half + i, n)), V::mul(a, V::load(sin + half + i, n))), n);
  }
}

// Heads begin .. end of [B, T, H + 2 Hkv]; kind 0 is q, 1 is k, 2 is v. Heads of a kind are gathered until there are enough for one product.
template <class V>
void heads_range(const quota::HeadsArgs& args, int64_t begin, int64_t end) {
  const int64_t d = args.dim, all = args.heads + 2 * args.kv_heads;
  const Scratch<float> x(kHeadsAtOnce * d), y(kHeadsAtOnce * d);
  const Scratch<int8_t> codes(round_up(d, kLanes));
  const quota::TransformArgs transforms[] = {{nullptr, nullptr, args.q_transform, 1, d, args.q_exponent, nullptr},
                                             {nullptr, nullptr, args.k_transform, 1, d, args.k_exponent, nullptr},
                                             {}};
  const TransformScratch scratch(transforms[args.q_transform ? 0 : 1], kHeadsAtOnce);
  for (const auto& t : transforms) prefetch_factors(t);
  const int64_t first_head[] = {0, args.heads, args.heads + args.kv_heads, all};
  for (int kind = 0; kind < 3; ++kind) {
    const quota::TransformArgs& transform = transforms[kind];
    int64_t rows[kHeadsAtOnce], count = 0;
    const auto put = [&] {
      if (transform.right) transform_into<V>(transform, x, y, count, scratch);
      for (int64_t i = 0; i < count; ++i) {
        const float* row = (transform.right ? y : x) + i * d;
        const int64_t token = rows[i] / all, h = rows[i] % all - first_head[kind], b = token / args.tokens, t = token % args.tokens;
        if (kind == 0)
          __builtin_memcpy(args.q + ((b * args.heads + h) * args.tokens + t) * d, row, static_cast<size_t>(d) * sizeof(float));
        else
          quantize_slot<V>(row, d, kind == 1 ? args.k_clip : args.v_clip, kind == 1 ? args.k : args.v, b, h, args.position + t, codes);
      }
      count = 0;
    };
    for (int64_t token = begin / all; token * all < end; ++token) {
      const int64_t low = token * all + first_head[kind], high = token * all + first_head[kind + 1];
      const float* cos = args.cos ? args.cos + token / args.tokens * args.rotary_batch + token % args.tokens * d : nullptr;
      const float* sin = args.sin ? args.sin + (cos - args.cos) : nullptr;
      for (int64_t row = low < begin ? begin : low; row < (high < end ? high : end); ++row) {
        if (cos && kind < 2)
          rotate<V>(args.qkv + row * d, cos, sin, d, x + count * d);
        else
          __builtin_memcpy(x + count * d, args.qkv + row * d, static_cast<size_t>(d) * sizeof(float));
        rows[count] = row;
        if (++count == kHeadsAtOnce) put();
      }
    }
    if (count) put();
  }
}

}  // namespace
