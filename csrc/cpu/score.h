// token_score: attention sums per column from the log-sum-exp of the attention that ran anyway; the S x S matrix is never stored.
#pragma once

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace {

constexpr int64_t kScoreQueries = 64;  // sums are taken over this many queries, then over blocks, then over heads: a fixed order

template <class V>
void score_columns(const quota::ScoreArgs& args, const int64_t* queries, int64_t query_count, const int64_t* columns, int64_t column_count, float* out) {
  constexpr int64_t width = quota::kScoreColumns;
  const int64_t d = args.dim, group = args.heads / args.kv_heads, used = round_up(column_count, kLanes);
  const Scratch<float> keys(d * width), rows(kScoreQueries * d), weights(kScoreQueries * width);
  float total[width] = {};
  for (int64_t h = 0; h < args.heads; ++h) {
    if (h % group == 0) {
      const float* k = args.k + h / group * args.slots * d;
      for (int64_t i = 0; i < d; ++i)
        for (int64_t c = 0; c < used; ++c) keys[i * width + c] = c < column_count ? k[columns[c] * d + i] : 0.0f;
    }
    float head[width] = {};
    for (int64_t begin = 0; begin < query_count; begin += kScoreQueries) {
      const int64_t count = query_count - begin < kScoreQueries ? query_count - begin : kScoreQueries;
      if (queries[begin + count - 1] < columns[0]) continue;  // causal: none of them sees a column; skipping adds zero
      for (int64_t i = 0; i < count; ++i)
        __builtin_memcpy(rows + i * d, args.q + (h * args.slots + queries[begin + i]) * d, static_cast<size_t>(d) * sizeof(float));
      chain_matmul<V>({rows, d, 1, keys, width, weights, width}, count, used, d);
      typename V::F sums[width / kLanes];
      for (auto& sum : sums) sum = V::zero();
      int64_t visible = 0;  // columns up to and including the query's own slot
      for (int64_t i = 0; i < count; ++i) {
        const int64_t query = queries[begin + i];
        while (visible < column_count && columns[visible] <= query) ++visible;
        const auto lse = V::set1(args.lse[h * args.slots + query]), factor = V::set1(args.scaling);
        for (int64_t c = 0; c < visible; c += kLanes) {
          const auto p = exponential<V>(V::sub(V::mul(V::load(weights + i * width + c), factor), lse));
          sums[c / kLanes] = V::add(sums[c / kLanes], V::first(p, visible - c < kLanes ? visible - c : kLanes, V::zero()));
        }
      }
      for (int64_t c = 0; c < used; c += kLanes) V::store(head + c, V::add(V::load(head + c), sums[c / kLanes]));
    }
    for (int64_t c = 0; c < used; c += kLanes) V::store(total + c, V::add(V::load(total + c), V::load(head + c)));
  }
  const float terms = static_cast<float>(query_count ? args.heads * query_count : 1);
  for (int64_t c = 0; c < column_count; ++c) out[columns[c]] = total[c] / terms;
}

}  // namespace
