// token_score: attention sums per column from the log-sum-exp of the attention that ran anyway; the S x S matrix is never stored.
#pragma once

#include <cstdint>

#include "codes.h"
#include "elementwise.h"
#include "quota/kernels.h"

namespace {

constexpr int64_t kScoreQueries = 64;  // sums are taken over this many queries, then over blocks, then over heads: a fixed order

// Scores with float keys: chains over d.
template <class V>
struct FloatScores {
  const quota::ScoreArgs& args;
  const quota::Tokens& queries;
  const float* q;
  const float* k;
  Scratch<float> keys, rows;

  FloatScores(const quota::ScoreArgs& args, int64_t head, const quota::Tokens& queries)
      : args(args), queries(queries), q(args.q + head * args.slots * args.dim),
        k(args.k + head / (args.heads / args.kv_heads) * args.slots * args.dim), keys(args.dim * kSlots), rows(kScoreQueries * args.dim) {}

  void load(const int64_t* columns, int64_t count) {
    for (int64_t i = 0; i < args.dim; ++i)
      for (int64_t c = 0; c < kSlots; ++c) keys[i * kSlots + c] = c < count ? k[columns[c] * args.dim + i] : 0.0f;
  }

  void scores(int64_t first, int64_t count, float* out) {  // out [count][64]
    for (int64_t i = 0; i < count; ++i)
      __builtin_memcpy(rows + i * args.dim, q + queries.at[first + i] * args.dim, static_cast<size_t>(args.dim) * sizeof(float));
    chain_matmul<V>({rows, args.dim, 1, keys, kSlots, out, kSlots}, count, kSlots, args.dim);
    for (int64_t i = 0; i < count * kSlots; i += kLanes) V::store(out + i, V::mul(V::load(out + i), V::set1(args.scaling)));
  }
};

// Scores with packed keys, as kv4_attention computes them.
template <class V, class Dot>
struct PackedScores {
  const quota::ScoreArgs& args;
  Kv4Head k;
  QueryRows rows;
  Scratch<uint8_t> panel, staging;
  BlockScales block;

  PackedScores(const quota::ScoreArgs& args, int64_t head, const quota::Tokens& queries)
      : args(args), k(head_of(args.packed, 0, head / (args.heads / args.kv_heads), 0, args.dim / 2)), rows(queries.count, args.dim),
        panel(kSlots * rows.padded), staging(kSlots * rows.padded / 2) {
    for (int64_t i = 0; i < queries.count; ++i) rows.set<V>(i, args.q + (head * args.slots + queries.at[i]) * args.dim);
  }

  void load(const int64_t* columns, int64_t count) {
    const int64_t row_bytes = args.dim / 2, stride = rows.padded / 2;
    __builtin_memset(staging.data, 0, static_cast<size_t>(kSlots * stride));
    for (int64_t c = 0; c < kSlots; ++c) {
      if (c < count) __builtin_memcpy(staging + c * stride, k.q + columns[c] * row_bytes, static_cast<size_t>(row_bytes));
      block.set(c, c < count ? k.scale[columns[c]] : 0.0f, c < count ? k.zero[columns[c]] : 0.0f);
    }
    key_panel<V>(rows_at(staging, stride), rows.padded, panel);
  }

  void scores(int64_t first, int64_t count, float* out) {  // out [count][64]
    alignas(64) int32_t sums[Dot::kRows * kLimbs * kSlots];
    for (int64_t i = 0; i < count; i += Dot::kRows) {
      const int64_t some = count - i < Dot::kRows ? count - i : Dot::kRows;
      Dot::run(some, rows.row(first + i), rows.padded, panel, rows.padded / 4, sums);
      for (int64_t r = 0; r < some; ++r) {
        const LimbRow& query = rows.rows[first + i + r];
        const float factor = query.unit * args.scaling;
        for (int64_t c = 0; c < kSlots; c += kLanes)
          V::store(out + (i + r) * kSlots + c, score_lanes<V>(sums + r * kLimbs * kSlots, block, c, query, factor));
      }
    }
  }
};

template <class V, class Source>
void score_with(const quota::ScoreArgs& args, int64_t head, const quota::Tokens& queries, const quota::Tokens& columns, float* out) {
  Source source(args, head, queries);
  const float* lse = args.lse + head * args.slots;
  const Scratch<float> scores(kScoreQueries * kSlots);
  for (int64_t begin = 0; begin < columns.count; begin += kSlots) {
    const int64_t* column = columns.at + begin;
    const int64_t column_count = columns.count - begin < kSlots ? columns.count - begin : kSlots;
    source.load(column, column_count);
    typename V::F total[kSlots / kLanes];
    for (auto& sum : total) sum = V::zero();
    for (int64_t first = 0; first < queries.count; first += kScoreQueries) {
      const int64_t end = first + kScoreQueries < queries.count ? first + kScoreQueries : queries.count;
      int64_t i = first;
      while (i < end && queries.at[i] < column[0]) ++i;  // causal: it sees no column
      if (i == end) continue;
      source.scores(i, end - i, scores);
      typename V::F sums[kSlots / kLanes];
      for (auto& sum : sums) sum = V::zero();
      int64_t visible = 0;  // columns up to and including the query's own slot
      for (const float* row = scores; i < end; ++i, row += kSlots) {
        while (visible < column_count && column[visible] <= queries.at[i]) ++visible;
        const auto norm = V::set1(lse[queries.at[i]]);
        for (int64_t c = 0; c < visible; c += kLanes) {
          const auto p = exponential<V>(V::sub(V::load(row + c), norm));
          sums[c / kLanes] = V::add(sums[c / kLanes], V::first(p, visible - c < kLanes ? visible - c : kLanes, V::zero()));
        }
      }
      for (int64_t v = 0; v < kSlots / kLanes; ++v) total[v] = V::add(total[v], sums[v]);
    }
    for (int64_t c = 0; c < column_count; c += kLanes) {
      if (column_count - c >= kLanes)
        V::store(out + begin + c, total[c / kLanes]);
      else
        V::store(out + begin + c, total[c / kLanes], column_count - c);
    }
  }
}

template <class V, class Dot>
void score_head(const quota::ScoreArgs& args, int64_t head, const quota::Tokens& queries, const quota::Tokens& columns, float* out) {
  if (args.k)
    score_with<V, FloatScores<V>>(args, head, queries, columns, out);
  else
    score_with<V, PackedScores<V, Dot>>(args, head, queries, columns, out);
}

}  // namespace
