// CPU kernels, free of torch: raw pointers and sizes. One table of functions per instruction set, chosen by CPUID or by name.
//
// Every float result is defined by its inputs alone. A dot product is an exact integer (linear, transforms, attention), or an ascending chain of
// fused multiply-adds from zero (float_linear, w4a16_linear); every other step is one IEEE operation in a stated order. So results do not depend on batch, threads,
// tiling or instruction set.
// All arrays are row-major float32 unless said otherwise; sizes count elements.
#pragma once

#include <cstdint>

namespace quota {

constexpr int64_t kPanel = 64;  // weight columns per block
constexpr int64_t kGroup = 4;   // k values that one int8 dot-product instruction takes
constexpr int64_t kStep = 64;   // k values of a matrix-extension tile; every k is padded to whole steps

// k rounded up to whole steps: bytes of one row of unpacked activations.
constexpr int64_t padded_k(int64_t k) { return (k + kStep - 1) / kStep * kStep; }

// Y = left^T X right on each row of x viewed as [l, r]; null is the identity. Factors are integers times 2^exponent (of both together), as
// quota/quant/fixed.py makes them: left^T as rows [l][l rounded up to 2], right as panels [ceil(r/16)][ceil(r/2)][16 columns][2 rows], zeros around.
struct TransformArgs {
  const float* x;
  const int16_t* left;
  const int16_t* right;
  int64_t l, r;
  int exponent;
  float* y;
};

// What happens to a row before its transform: nothing; silu(gate) * up on rows of 2 K values, gate first; x * sigmoid(1.702 x); x Phi(x).
enum class Prologue : int64_t { kNone, kSiluMul, kQuickGelu, kGelu };

// Prologue, transform, then symmetric int4 per row: q [M, ceil(K/2)] two's complement nibbles, scale [M]. `transform.y` is not used.
struct QuantizeArgs {
  TransformArgs transform;
  float clip;
  uint8_t* q;
  float* scale;
  Prologue prologue;
};

// y [M, K] = (x / sqrt(mean(x^2) + eps)) * weight [K].
struct NormArgs {
  const float* x;
  const float* weight;
  int64_t k;
  float eps;
  float* y;
};

// Packed activations [M, ceil(K/2)] -> int8 in the order that `multiply` wants, and the sum of each row.
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
// `multiply` reads a and row_sum, which `unpack` wrote; `few_rows` reads x_q instead.
struct LinearArgs {
  const uint8_t* x_q;
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

// The outputs of one task: panels of columns times rows.
struct LinearTask {
  int64_t panel_begin, panel_end, row_begin, row_end;
};

// One instruction set's way to w4a4_linear. Up to `few` rows go to `few_rows`; more are unpacked first, into a workspace of whole `multiple`s of
// rows, and then multiplied in tasks of about `block` rows (the activations that its caches hold) at most.
struct Linear {
  int64_t few, multiple, block;
  void (*unpack)(const UnpackArgs&, int64_t row_begin, int64_t row_end);
  void (*few_rows)(const LinearArgs&, int64_t panel_begin, int64_t panel_end);
  void (*multiply)(const LinearArgs&, const LinearTask&);
  // Scales and bias: sums [rows][64] of a times (w + 8) -> outputs of one panel.
  void (*finish)(const LinearArgs&, const int32_t* sums, int64_t panel, int64_t row, int64_t rows);
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

// qkv [B, T, H + 2 Hkv, D] -> q [B, H, T, D], and k, v quantized into slots position .. position + T. Heads of q and k are turned by cos, sin
// [B or 1, T, D] (batch stride `rotary_batch`; null: not turned), then multiplied by their transform, as `TransformArgs::right` (null: the identity).
struct HeadsArgs {
  const float* qkv;
  const float* cos;
  const float* sin;
  const int16_t* q_transform;
  const int16_t* k_transform;
  float* q;
  Kv4<uint8_t, float> k, v;
  int64_t rotary_batch, heads, kv_heads, tokens, dim, position;
  int q_exponent, k_exponent;
  float k_clip, v_clip;
};

// q [B, H, T, D + E] -> out [B, T, H, D], lse [B, H, T]; query t of row b sees slots start[b] (0 where null) .. length - T + t.
// `shared` [B, E, shared_slots >= length] (null: E = 0): float key channels that all heads of a slot have in common. A score is that of the D packed
// channels plus the chain over the E shared ones.
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
// Pages of a pool: the batch strides of `Kv4` and `Kv16` then step over units, and slot s of row b lies at place s % places of unit table[b][s / places].
struct Pages {
  const int32_t* table;   // [B, width]; null: the cache is contiguous
  const int32_t* length;  // [B] slots of each row (null: AttentionArgs::length)
  int64_t width, places;
};

struct Float16 {
  uint16_t bits;
};

// A 16-bit cache: x [B, Hkv, C, D] with the strides of batch and head.
struct Kv16 {
  const Float16* x;
  int64_t batch, head;
};

// As AttentionArgs, over a 16-bit cache.
struct Attention16Args {
  const float* q;
  Kv16 k, v;
  const int32_t* start;
  float* out;
  float* lse;
  int64_t heads, kv_heads, tokens, dim, length;
  float scaling;
};
constexpr int64_t kQueryTile = 64;  // query rows (queries times heads of one KV head) per attention task

// Slots of one batch row, ascending.
struct Tokens {
  const int64_t* at;
  int64_t count;
};

// Of one batch row: q [H, S, D]; keys [Hkv, S, D] as floats `k`, or where that is null `packed`; lse [H, S].
struct ScoreArgs {
  const float* q;
  const float* k;
  Kv4<const uint8_t, const float> packed;
  const float* lse;
  int64_t heads, kv_heads, slots, dim;
  float scaling;
};

// The upper half of a float32.
struct Bfloat16 {
  uint16_t bits;
};

// y [M, N] = x [M, K] w^T in chain order; panels [ceil(N/64)][K][64] hold w transposed, zero past N, as floats or as bfloat16.
struct FloatLinearArgs {
  const float* x;
  const void* panels;
  bool bfloat16;
  int64_t m, n, k;
  float* y;
};

constexpr int64_t kWeightGroup = 128;  // k values that share a scale and a zero

// y [M, N] = x [M, K] w^T (+ bias [N], may be null), w = (q - zero) * scale per group of 128 along K.
// words [ceil(N/64)][ceil(K/8)][64]: eight codes of a column, the lowest k in the lowest nibble; params [ceil(N/64)][ceil(K/128)][2][64]: scales, then zeros.
struct GroupedArgs {
  const float* x;
  const int32_t* words;
  const float* params;
  const float* bias;
  float* y;
  int64_t m, n, k;
};

// Symmetric int8 per row of x [M, K]: q [M, padded_k(K)], zero past K, scale [M], and the sum of each row of q.
struct Quantize8Args {
  const float* x;
  int64_t k;
  int8_t* q;
  float* scale;
  int32_t* row_sum;
};

// y [M, N] = (float(sum q w) * w_scale) * x_scale (+ bias, may be null); blocks [ceil(N/64)][padded_k(K)/4][64][4] hold w, four k of a column together.
struct Linear8Args {
  Quantize8Args x;
  const int8_t* blocks;
  const float* w_scale;
  const float* bias;
  float* y;
  int64_t m, n;
};

struct Kernels {
  const char* name;
  void (*transform)(const TransformArgs&, int64_t row_begin, int64_t row_end);
  void (*quantize_act)(const QuantizeArgs&, int64_t row_begin, int64_t row_end);
  void (*append)(const AppendArgs&, int64_t row_begin, int64_t row_end);  // rows of [B, Hkv, T]
  void (*rms_norm)(const NormArgs&, int64_t row_begin, int64_t row_end);
  void (*heads)(const HeadsArgs&, int64_t begin, int64_t end);  // heads of [B, T, H + 2 Hkv]
  void (*attention)(const AttentionArgs&, const Pages&, int64_t batch, int64_t kv_head, int64_t tile);
  void (*attention16)(const Attention16Args&, const Pages&, int64_t batch, int64_t kv_head, int64_t tile);
  // Attention of one head that the queries give to each column, summed over them: out [columns.count].
  void (*score)(const ScoreArgs&, int64_t head, const Tokens& queries, const Tokens& columns, float* out);
  void (*float_linear)(const FloatLinearArgs&, int64_t panel);
  void (*grouped_linear)(const GroupedArgs&, int64_t panel);
  void (*quantize8)(const Quantize8Args&, int64_t row_begin, int64_t row_end);
  void (*linear8)(const Linear8Args&, int64_t panel);
  Linear linear;
};

// mask[i] = 1 for the `keep` largest scores among the eligible: NaN above every number, ties to the lower index.
void select_tokens(const float* score, const uint8_t* eligible, int64_t count, int64_t keep, uint8_t* mask);

// How many blocks to cut m rows into: as the caches like it, more where panels alone cannot occupy the threads.
int64_t row_blocks(const Linear&, int64_t m, int64_t panels, int64_t threads);

void pack_weight(const PackArgs&, int64_t panel_begin, int64_t panel_end);

// The table in use; the best one of this CPU until `use` is called.
const Kernels& kernels();
// Switch to a table by name; false when it is unknown or this CPU cannot run it.
bool use(const char* name);
// The i-th table this CPU can run, best first; null past the end.
const Kernels* supported(int i);

}  // namespace quota
