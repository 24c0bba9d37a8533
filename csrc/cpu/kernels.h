// The CPU kernels, torch-free: raw pointers and sizes. One table of functions per instruction set, all bitwise equal.
//
// Float order: every float dot product is an ascending chain of fused multiply-adds starting at 0 per output element; sums of
// probabilities use 16 lanes (lane = index % 16) folded 8, 4, 2, 1. Vector width, tiling and threads never change a result.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quota {

constexpr int64_t kBlockN = 64;   // output channels per weight block
constexpr int64_t kGroupK = 8;    // input channels per packed group: low nibbles hold k..k+3, high nibbles k+4..k+7
constexpr int64_t kPanel = 64;    // keys per panel of transposed keys

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Growing 64-byte aligned memory that one thread reuses from call to call. Contents are never assumed to be zero.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();
  void* take(size_t bytes);  // valid until the next reset()
  void reset();
  template <class T>
  T* get(int64_t count) { return static_cast<T*>(take(static_cast<size_t>(count) * sizeof(T))); }

 private:
  struct Slab { void* data; size_t bytes; size_t used; };
  static constexpr int kSlabs = 32;
  Slab slabs_[kSlabs] = {};
  int count_ = 0;
};

struct TransformArgs {
  const float* x;      // [M, l * r]
  const float* left;   // [l, l] or null
  const float* right;  // [r, r] or null
  int64_t l, r;
};

struct LinearArgs {
  const int8_t* x;         // [M, kp] codes, zero beyond k
  const int32_t* x_sum8;   // [M] 8 * sum of the row's codes (weights are stored + 8)
  const float* x_scale;    // [M]
  const int32_t* x_zero;   // [M] or null
  const uint8_t* w;        // [nb, kp / 8, 4, 64] nibbles + 8
  const int32_t* w_sum;    // [N]
  const float* w_scale;    // [N]
  const float* bias;       // [N] or null
  float* y;                // [M, N]
  int64_t m, n, kp;
};

struct Kv {  // one packed cache; strides in elements over batch, head and slot
  const uint8_t* q;
  const float *scale, *zero;
  int64_t q_b, q_h, q_s, s_b, s_h, s_s, z_b, z_h, z_s;
};

struct AttentionArgs {
  const float* q;  // [B, H, T, D]
  Kv k, v;
  const int32_t* start;  // [B]
  float* out;            // [B, T, H, D]
  float* lse;            // [B, H, T]
  int64_t b, h, hkv, t, d, s;
  float scaling;
};

struct ScoreArgs {
  const float* q;    // [B, H, S, D]
  const float* k;    // [B, Hkv, S, D]
  const float* lse;  // [B, H, S]
  int64_t h, hkv, s, d;
  float scaling;
};

struct Kernels {
  const char* name;
  // tokens begin..end of y = transform(x) [M, l * r]
  void (*transform)(const TransformArgs&, float* y, int64_t begin, int64_t end, Arena&);
  // the same, quantized to int4: x_q [M, ceil(K/2)], x_scale [M]
  void (*quantize_act)(const TransformArgs&, float clip, uint8_t* x_q, float* x_scale, int64_t begin, int64_t end, Arena&);
  // rows begin..end of weight block `block`
  void (*linear)(const LinearArgs&, int64_t block, int64_t begin, int64_t end, Arena&);
  // one row of d values -> d / 2 bytes, scale, zero
  void (*kv4_row)(const float* x, int64_t d, float clip, uint8_t* q, float* scale, float* zero, Arena&);
  // queries begin..end of every head that reads kv head `head` of batch row `b`
  void (*attention)(const AttentionArgs&, int64_t b, int64_t head, int64_t begin, int64_t end, Arena&);
  // attention received by `columns` (at most kPanel, ascending) from `rows`, summed over heads and rows in float64 into sum[columns]
  void (*score)(const ScoreArgs&, int64_t b, const int32_t* columns, int64_t n_columns, const int32_t* rows, int64_t n_rows, double* sum, Arena&);
};

const Kernels* kernels_portable();
const Kernels* kernels_avx2();        // null where not compiled in
const Kernels* kernels_avx512vnni();  // null where not compiled in

// Layout conversions without arithmetic to speed up.
void pack_weight(const uint8_t* w_q, int64_t n, int64_t k, uint8_t* blocked, int32_t* w_sum);
void unpack_rows(const uint8_t* x_q, int64_t k, int64_t kp, int64_t begin, int64_t end, int8_t* x, int32_t* x_sum8);

}  // namespace quota
