// Products of float rows with 4-bit codes in exact integers: a row becomes 24-bit fixed point in three signed bytes ("limbs"), so the dot
// products of codes with limbs are int8 dot products, and no order of summation, tile or instruction set can change them.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "quota/kernels.h"

namespace {

constexpr int64_t kLimbs = 3;
constexpr float kLargestFixed = 8355710.0f;  // 127 * (65536 + 256 + 1) is what three signed bytes hold; a rounded factor may add one
constexpr int64_t kSlots = 64;               // slots of one panel of keys or values
constexpr int64_t kDims = 64;                // dims come in steps of this many, the rest is zero

struct Kv4Head {  // one (batch, KV head) from some slot on
  const uint8_t* q;
  const float* scale;
  const float* zero;
};

inline Kv4Head head_of(const quota::Kv4<const uint8_t, const float>& kv, int64_t b, int64_t h, int64_t start, int64_t row_bytes) {
  return {kv.q + b * kv.q_batch + h * kv.q_head + start * row_bytes, kv.scale + b * kv.scale_batch + h * kv.scale_head + start,
          kv.zero + b * kv.zero_batch + h * kv.zero_head + start};
}

constexpr int64_t kParts = kSlots / kLanes;

// 64 rows of codes, sixteen by sixteen, each readable for whole steps of kDims.
struct CodeRows {
  const uint8_t* part[kParts];
  int64_t stride;

  const uint8_t* row(int64_t i) const { return part[i / kLanes] + i % kLanes * stride; }
};

inline CodeRows rows_at(const uint8_t* data, int64_t stride) {
  CodeRows rows{{}, stride};
  for (int64_t i = 0; i < kParts; ++i) rows.part[i] = data + i * kLanes * stride;
  return rows;
}

// The rows as they are when `count` of them fill a panel, else copied into `staging` [kSlots][padded / 2] with zeros around.
inline CodeRows whole_rows(const CodeRows& rows, int64_t count, int64_t padded, uint8_t* staging) {
  if (count == kSlots && rows.stride == padded / 2) return rows;
  __builtin_memset(staging, 0, static_cast<size_t>(kSlots * padded / 2));
  for (int64_t i = 0; i < count; ++i) __builtin_memcpy(staging + i * (padded / 2), rows.row(i), static_cast<size_t>(rows.stride));
  return rows_at(staging, padded / 2);
}

// A panel of 64 keys: [padded / 4][64 slots][4] codes. Four packed bytes hold eight dims: the even ones make one group, the odd ones the next.
template <class V>
inline void key_panel(const CodeRows& rows, int64_t padded, uint8_t* panel) {
  const auto low = V::iset1(0x0f0f0f0f);
  for (int64_t slot = 0; slot < kSlots; slot += kLanes)
    for (int64_t byte = 0; byte < padded / 2; byte += 16) {
      typename V::I four[4];
      V::transpose_fours(rows.part[slot / kLanes] + byte, rows.stride, four);
      for (int64_t i = 0; i < 4; ++i) {
        uint8_t* group = panel + (byte / 4 + i) * 2 * 4 * kSlots + 4 * slot;
        V::store_block(group, V::iand(four[i], low));
        V::store_block(group + 4 * kSlots, V::iand(V::shift_right_4(four[i]), low));
      }
    }
}

// A row of queries, padded with zeros, in the order of a key panel.
inline void key_order(const float* x, int64_t padded, float* out) {
  using Eight [[gnu::vector_size(32)]] = float;
  using Order [[gnu::vector_size(32)]] = int32_t;
  for (int64_t i = 0; i < padded; i += 8) {
    Eight eight;
    __builtin_memcpy(&eight, x + i, sizeof eight);
    eight = __builtin_shuffle(eight, Order{0, 2, 4, 6, 1, 3, 5, 7});
    __builtin_memcpy(out + i, &eight, sizeof eight);
  }
}

// Panels of 64 value columns: [padded / 64][16][64 columns][4 slots] codes. See value_dim for the order of the columns.
template <class V>
inline void value_panels(const CodeRows& rows, int64_t padded, uint8_t* panels) {
  const auto low = V::iset1(0x0f0f0f0f);
  for (int64_t dim = 0; dim < padded; dim += 2 * kDims) {
    const bool whole = padded - dim >= 2 * kDims;  // 64 bytes of a row, else 32
    for (int64_t four = 0; four < kSlots / 4; ++four) {
      typename V::I x[4];
      for (int64_t i = 0; i < 4; ++i) {
        const uint8_t* from = rows.row(4 * four + i) + dim / 2;
        x[i] = whole ? V::load_block(from) : V::load_half_block(from);
      }
      V::interleave_bytes(x);
      if (!whole) x[0] = V::low_halves(x[0], x[1]), x[1] = V::low_halves(x[2], x[3]);
      for (int64_t i = 0; i < (whole ? 4 : 2); ++i) {
        uint8_t* to = panels + ((dim / kDims + i / 2) * (kSlots / 4) + four) * 4 * kSlots + i % 2 * 128;
        V::store_block(to, V::iand(x[i], low));
        V::store_block(to + 64, V::iand(V::shift_right_4(x[i]), low));
      }
    }
  }
}

// The dim of column c of the value panels: bytes of a row were interleaved by fours within 16-byte lanes, then split into nibbles.
inline int64_t value_dim(int64_t c, int64_t padded) {
  const int64_t first = c / (2 * kDims) * 2 * kDims, vector = c % (2 * kDims) / kLanes, lane = c % kLanes / 4, i = vector / 2;
  const bool whole = padded - first >= 2 * kDims;
  const int64_t byte = whole ? 16 * lane + 4 * i + c % 4 : 16 * (lane % 2) + 4 * (2 * i + lane / 2) + c % 4;
  return first + 2 * byte + vector % 2;
}

// Codes count from their middle: x = (code - 8) * scale + (zero + 8 * scale), or else a sum would be the small difference of two large ones.
constexpr int32_t kMiddle = 8;

// A row of limbs: its unit, the sum of its fixed-point values, and 8 times that sum dealt out to the three limbs.
struct LimbRow {
  float unit, sum;
  int32_t middle[kLimbs];
};

// n values (a multiple of 64) -> limbs [3][stride], lowest first, of round(x * (8355710 / max|x|)). The unit is max|x| / 8355710.
template <class V>
inline LimbRow to_limbs(const float* x, int64_t n, int8_t* limbs, int64_t stride) {
  auto largest = V::izero();  // as integers, the bits of a NaN are above every number's: it reaches the unit
  const auto magnitude = V::iset1(0x7fffffff);
  for (int64_t i = 0; i < n; i += kLanes) largest = V::imax(largest, V::iand(V::bits(V::load(x + i)), magnitude));
  const float reach = bits_to_float(V::largest(largest));
  const auto factor = V::set1(reach == 0.0f ? 0.0f : kLargestFixed / reach);
  int64_t sum = 0;
  for (int64_t i = 0; i < n; i += kDims) {  // 64 values add up to less than 2^31
    auto part = V::izero();
#pragma GCC unroll 4
    for (int64_t j = i; j < i + kDims; j += kLanes) {
      const auto fixed = V::to_int(V::mul(V::load(x + j), factor));
      part = V::iadd(part, fixed);
      V::store_limbs(limbs + j, stride, fixed);
    }
    sum += V::sum(part);
  }
  const int64_t middle = kMiddle * sum, high = (middle + (1 << 15)) >> 16, rest = middle - (high << 16), mid = (rest + 128) >> 8;
  return {reach / kLargestFixed, static_cast<float>(sum),
          {static_cast<int32_t>(rest - (mid << 8)), static_cast<int32_t>(mid), static_cast<int32_t>(high)}};
}

// Sums [3][64] of codes with a row of limbs, at 16 columns -> the sum of (code - 8) times the row's values.
template <class V>
inline typename V::F centred(const int32_t* sums, const LimbRow& row) {
  const auto part = [&](int64_t limb) { return V::to_float(V::isub(V::iload(sums + limb * kSlots), V::iset1(row.middle[limb]))); };
  return V::fma(part(2), V::set1(65536.0f), V::fma(part(1), V::set1(256.0f), part(0)));
}

// sums [kRows][64] = a [kRows][4 groups] times a panel [groups][64][4].
template <class V, int kRows>
inline void dot_panel(const int8_t* a, int64_t lda, const uint8_t* panel, int64_t groups, int32_t* sums) {
  for (int v = 0; v < 4; v += V::kDotVectors) {
    typename V::I acc[kRows][V::kDotVectors];
    for (auto& row : acc)
      for (auto& x : row) x = V::izero();
    for (int64_t group = 0; group < groups; ++group) {
      typename V::I column[V::kDotVectors];
#pragma GCC unroll 4
      for (int c = 0; c < V::kDotVectors; ++c) column[c] = V::load_block(panel + group * 256 + (v + c) * 64);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
        int32_t four;
        __builtin_memcpy(&four, a + row * lda + group * 4, 4);
        const auto x = V::iset1(four);
#pragma GCC unroll 4
        for (int c = 0; c < V::kDotVectors; ++c) acc[row][c] = V::dot4(acc[row][c], column[c], x);
      }
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int c = 0; c < V::kDotVectors; ++c) V::istore(sums + row * kSlots + (v + c) * kLanes, acc[row][c]);
  }
}

// How many rows of limbs are taken from step to step (enough that the latencies of one row hide behind the others), and their dot products.
template <class V>
struct VectorDot {
  static constexpr int64_t kRows = 8;
  static void run(int64_t rows, const int8_t* a, int64_t lda, const uint8_t* panel, int64_t groups, int32_t* sums) {
    for (; rows >= 2; rows -= 2, a += 2 * kLimbs * lda, sums += 2 * kLimbs * kSlots)
      dot_panel<V, 2 * kLimbs>(a, lda, panel, groups, sums);  // six rows of bytes times 64 columns: 24 of 32 registers with AVX-512
    if (rows) dot_panel<V, kLimbs>(a, lda, panel, groups, sums);
  }
};

// Query rows as limbs, in the order of key panels.
struct QueryRows {
  int64_t dim, padded;
  Scratch<int8_t> limbs;  // [rows][3][padded]
  Scratch<LimbRow> rows;
  Scratch<float> whole, ordered;

  QueryRows(int64_t count, int64_t dim)
      : dim(dim), padded(round_up(dim, kDims)), limbs(count * kLimbs * padded), rows(count), whole(padded), ordered(padded) {
    __builtin_memset(whole.data, 0, static_cast<size_t>(padded) * sizeof(float));
  }
  const int8_t* row(int64_t i) const { return limbs + i * kLimbs * padded; }

  template <class V>
  void set(int64_t i, const float* q) const {
    __builtin_memcpy(whole.data, q, static_cast<size_t>(dim) * sizeof(float));
    key_order(whole, padded, ordered);
    rows[i] = to_limbs<V>(ordered, padded, limbs + i * kLimbs * padded, padded);
  }
};

// Scales, and middles (zero + 8 * scale), of a block of slots.
struct BlockScales {
  alignas(64) float scale[kSlots], middle[kSlots];

  void set(int64_t i, float s, float z) { scale[i] = s, middle[i] = z + static_cast<float>(kMiddle) * s; }
};

// Scores of one query row with 16 slots: (scale * sum((code - 8) q) + middle * sum(q)) * factor.
template <class V>
inline typename V::F score_lanes(const int32_t* sums, const BlockScales& block, int64_t slot, const LimbRow& row, float factor) {
  const auto codes = V::mul(V::load(block.scale + slot), centred<V>(sums + slot, row));
  return V::mul(V::fma(V::load(block.middle + slot), V::set1(row.sum), codes), V::set1(factor));
}

}  // namespace
