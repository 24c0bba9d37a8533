// kv4_append and qkv_append: quantize_slot of csrc/cpu/kv4_append.h by one warp per row.
#include "fixed.h"
#include "kernels.h"
#include "values.h"

namespace quota::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kHeadRows = 16;  // tokens of a block: the rows of one tensor-core product

// One row of d values (in shared or global memory) -> a slot of a cache, by one warp.
__device__ inline void quantize_slot(const float* x, int64_t d, float clip, const Kv4<uint8_t, float>& c, int64_t b, int64_t h, int64_t slot) {
  const int lane = threadIdx.x % 32;
  float low = infinity(), high = -infinity(), poison = 0.0f;  // NaN from the first value that is not finite
  for (int64_t i = lane; i < d; i += 32) {
    low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
    poison = __fadd_rn(poison, __fsub_rn(x[i], x[i]));
  }
  low = across_warp(low, [](float a, float b) { return b < a ? b : a; });
  high = across_warp(high, [](float a, float b) { return b > a ? b : a; });
  poison = across_warp(poison, [](float a, float b) { return __fadd_rn(a, b); });
  const float zero = __fmul_rn(__fadd_rn(low, poison), clip), range = __fsub_rn(__fmul_rn(__fadd_rn(high, poison), clip), zero);
  const float scale = __fdiv_rn(range < kSmallestRange ? kSmallestRange : range, 15.0f), inverse = __fdiv_rn(1.0f, scale);
  if (lane == 0) {
    c.scale[b * c.scale_batch + h * c.scale_head + slot] = scale;
    c.zero[b * c.zero_batch + h * c.zero_head + slot] = zero;
  }
  uint8_t* q = c.q + b * c.q_batch + h * c.q_head + slot * (d / 2);
  for (int64_t i = lane; i < d / 2; i += 32)
    q[i] = static_cast<uint8_t>(code_of(x[2 * i], zero, inverse, 0.0f, 15.0f) | code_of(x[2 * i + 1], zero, inverse, 0.0f, 15.0f) << 4);
}

__global__ void __launch_bounds__(32 * kWarps) append_kernel(AppendArgs args, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= rows) return;  // whole warps
  const int64_t t = row % args.tokens, h = row / args.tokens % args.heads, b = row / args.tokens / args.heads;
  quantize_slot(args.x + row * args.dim, args.dim, args.clip, args.cache, b, h, args.position + t);
}

// Block: head h of kHeadRows tokens. Rotation, the transform, then a warp per token.
__global__ void __launch_bounds__(32 * kWarps) heads_kernel(HeadsArgs args, int64_t rows) {
  const int64_t d = args.dim, half = d / 2, all = args.heads + 2 * args.kv_heads;
  const int64_t h = blockIdx.x % all, first = blockIdx.x / all * kHeadRows, count = rows - first < kHeadRows ? rows - first : kHeadRows;
  const int kind = h < args.heads ? 0 : h < args.heads + args.kv_heads ? 1 : 2;
  float* x = reinterpret_cast<float*>(shared_memory());  // [kHeadRows][d]
  for (int64_t i = threadIdx.x; i < count * d; i += blockDim.x) {
    const int64_t token = first + i / d, c = i % d;
    const float* from = args.qkv + (token * all + h) * d;
    float v = from[c];
    if (args.cos && kind < 2) {  // channels c and c + d/2 are a pair
      const int64_t at = token / args.tokens * args.rotary_batch + token % args.tokens * d + c;
      const float turned = __fmul_rn(v, args.cos[at]), other = __fmul_rn(from[c < half ? c + half : c - half], args.sin[at]);
      v = c < half ? __fsub_rn(turned, other) : __fadd_rn(turned, other);
    }
    x[i] = v;
  }
  __syncthreads();
  const int16_t* matrix = kind == 0 ? args.q_transform : kind == 1 ? args.k_transform : nullptr;
  if (matrix) {
    auto* memory = reinterpret_cast<unsigned char*>(x + kHeadRows * d);
    times_right(x, static_cast<int>(count), static_cast<int>(d), matrix, kind == 0 ? args.q_exponent : args.k_exponent, memory, x);
  }
  for (int64_t mine = threadIdx.x / 32; mine < count; mine += kWarps) {
    const int64_t token = first + mine, b = token / args.tokens, t = token % args.tokens;
    if (kind == 0) {
      float* q = args.q + ((b * args.heads + h) * args.tokens + t) * d;
      for (int64_t i = threadIdx.x % 32; i < d; i += 32) q[i] = x[mine * d + i];
    } else {
      const bool key = kind == 1;
      quantize_slot(x + mine * d, d, key ? args.k_clip : args.v_clip, key ? args.k : args.v, b, h - args.heads - (key ? 0 : args.kv_heads), args.position + t);
    }
  }
}

}  // namespace

void kv4_append(const AppendArgs& args, int64_t batch, cudaStream_t stream) {
  const int64_t rows = batch * args.heads * args.tokens;
  if (rows) launch(append_kernel, ceil_div(rows, kWarps), 32 * kWarps, 0, stream, args, rows);
}

void qkv_append(const HeadsArgs& args, int64_t batch, cudaStream_t stream) {
  const int64_t rows = batch * args.tokens, all = args.heads + 2 * args.kv_heads;
  const size_t shared = static_cast<size_t>(kHeadRows * args.dim) * sizeof(float) + times_right_bytes(kHeadRows, static_cast<int>(args.dim));
  if (rows) launch(heads_kernel, ceil_div(rows, kHeadRows) * all, 32 * kWarps, shared, stream, args, rows);
}

}  // namespace quota::cuda
