// CPU kernels, free of torch: raw pointers and sizes. One table of functions per instruction set, chosen by CPUID or by name.
//
// Every float result is defined by its inputs alone: each dot product is an ascending chain of fused multiply-adds from zero, every other
// step is one IEEE operation. So results do not depend on batch, threads, tiling or instruction set.
// All arrays are row-major float32 unless said otherwise; sizes count elements.
#pragma once

#include <cstdint>

namespace quota {

constexpr int64_t kPanel = 64;  // weight columns per block
constexpr int64_t kGroup = 4;   // k values that one int8 dot-product instruction takes

// Bytes of one row of unpacked activations: k rounded up to two groups.
constexpr int64_t padded_k(int64_t k) { return (k + 2 * kGroup - 1) / (2 * kGroup) * (2 * kGroup); }

// Y = left^T X right on each row of x viewed as [l, r]. left [l, l] and right [r, r]; null is the identity.
struct TransformArgs {
  const float* x;
  const float* left;
  const float* right;
  int64_t l, r;
  float* y;
};

// Transform, then symmetric int4 per row: q [M, ceil(K/2)] two's complement nibbles, scale [M]. `transform.y` is not used.
struct QuantizeArgs {
  TransformArgs transform;
  float clip;
  uint8_t* q;
  float* scale;
};

// Packed activations [M, ceil(K/2)] -> int8 [M, padded_k(K)] and the sum of each row.
struct UnpackArgs {
  const uint8_t* x_q;
  int64_t k;
  int8_t* a;
  int32_t* row_sum;
};

// Weight [N, ceil(K/2)] -> blocks [ceil(N/64)][padded_k(K)/4][128] bytes and col_sum [64 ceil(N/64)].
// Byte h*64 + c*4 + i of a group holds k = 4 group + i of column 32h + c (low nibble) and 32h + 16 + c (high), both as w + 8.
struct PackArgs {
  const uint8_t* w_q;
  int64_t n, k;
  uint8_t* blocks;
  int32_t* col_sum;
};

// y [M, N] = (float(sum a w - x_zero * col_sum) * w_scale) * x_scale (+ bias). bias and x_zero may be null.
struct LinearArgs {
  const int8_t* a;
  const int32_t* row_sum;
  const float* x_scale;
  const int32_t* x_zero;
  const uint8_t* blocks;
  const int32_t* col_sum;
  const float* w_scale;
  const float* bias;
  float* y;
  int64_t m, n, k;
};

// A 4-bit cache: q uint8 [B, Hkv, C, D/2], scale and zero [B, Hkv, C], with the strides of batch and head.
template <class Byte, class Float>
struct Kv4 {
  Byte* q;
  Float* scale;
  Float* zero;
  int64_t q_batch, q_head, scale_batch, scale_head, zero_batch, zero_head;
};

// Quantizes x [B, Hkv, T, D] into slots position .. position + T.
struct AppendArgs {
  Kv4<uint8_t, float> cache;
  const float* x;
  int64_t heads, tokens, dim, position;
  float clip;
};

// q [B, H, T, D + E] -> out [B, T, H, D], lse [B, H, T]; query t of row b sees slots start[b] .. length - T + t.
// `shared` [B, E, shared_slots >= length]: float key channels that all heads of a slot have in common, continuing the chain after the D packed ones.
struct AttentionArgs {
  const float* q;
  Kv4<const uint8_t, const float> k, v;
  const int32_t* start;
  const float* shared;
  float* out;
  float* lse;
  int64_t heads, kv_heads, tokens, dim, extra, shared_slots, length;
  float scaling;
};
constexpr int64_t kQueryTile = 64;  // query rows (queries times heads of one KV head) per attention task

// Attention that `queries` (ascending) of one batch row give to `columns` (ascending, at most 64), mean over heads and queries.
struct ScoreArgs {
  const float* q;    // [H, S, D] of the batch row
  const float* k;    // [Hkv, S, D]
  const float* lse;  // [H, S]
  int64_t heads, kv_heads, slots, dim;
  float scaling;
};
constexpr int64_t kScoreColumns = 64;

struct Kernels {
  const char* name;
  void (*transform)(const TransformArgs&, int64_t row_begin, int64_t row_end);
  void (*quantize_act)(const QuantizeArgs&, int64_t row_begin, int64_t row_end);
  void (*unpack_act)(const UnpackArgs&, int64_t row_begin, int64_t row_end);
  void (*linear)(const LinearArgs&, int64_t panel, int64_t row_begin, int64_t row_end);
  void (*append)(const AppendArgs&, int64_t row_begin, int64_t row_end);  // rows of [B, Hkv, T]
  void (*attention)(const AttentionArgs&, int64_t batch, int64_t kv_head, int64_t tile);
  void (*score)(const ScoreArgs&, const int64_t* queries, int64_t query_count, const int64_t* columns, int64_t column_count, float* out);
};

// mask[i] = 1 for the `keep` largest scores among the eligible: NaN above every number, ties to the lower index.
void select_tokens(const float* score, const uint8_t* eligible, int64_t count, int64_t keep, uint8_t* mask);

void pack_weight(const PackArgs&, int64_t panel_begin, int64_t panel_end);

// The table in use; the best one of this CPU until `use` is called.
const Kernels& kernels();
// Switch to a table by name; false when it is unknown or this CPU cannot run it.
bool use(const char* name);
// The i-th table this CPU can run, best first; null past the end.
const Kernels* supported(int i);

}  // namespace quota
