// w4a4_linear for up to 16 rows: weights stream from memory straight into mma operands, eight warps of a block share k.
#include "kernels.h"
#include "products.h"

namespace quota::cuda {
namespace {

constexpr int kWarps = 8, kAhead = 4;  // steps whose loads are under way together
constexpr int64_t kChannels = 16;

// Bytes at .. at + 16 of an activation row of `bytes`, zeros past its end and for rows that are not there.
__device__ inline Words activation_words(const uint8_t* row, int64_t at, int64_t bytes, bool there, bool aligned) {
  if (!there) return {{0, 0, 0, 0}};
  if (aligned && at + 16 <= bytes) return read_words(row + at);
  Words words{{0, 0, 0, 0}};
  for (int i = 0; i < 16; ++i)
    if (at + i < bytes) words.w[i / 4] |= static_cast<uint32_t>(row[at + i]) << 8 * (i % 4);
  return words;
}

template <bool kNative4, int kTiles>
__global__ void __launch_bounds__(32 * kWarps) few_kernel(LinearArgs args, int64_t steps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, in_group = lane % 4;
  const int64_t n0 = int64_t{blockIdx.x} * kChannels, bytes = (args.k + 1) / 2;
  const bool aligned = bytes % 16 == 0 && aligned_16(args.x_q);
  int sum[kTiles][4] = {};
  for (int64_t first = warp; first < steps; first += kWarps * kAhead) {
    Words low[kAhead], high[kAhead], x[kAhead][kTiles];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t step = first + i * kWarps;
      if (step >= steps) break;
      const uint8_t* w = args.blocks + weight_offset(n0, step, steps) + lane * 16;
      low[i] = stream_words(w), high[i] = stream_words(w + kGroupBytes);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int64_t m = 8 * t + group;
        x[i][t] = activation_words(args.x_q + m * bytes, step * kStepBytes + in_group * 16, bytes, m < args.m, aligned);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * kWarps >= steps) break;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) multiply_step<kNative4>(sum[t], low[i], high[i], x[i][t]);
    }
  }
  int* sums = reinterpret_cast<int*>(shared_memory());  // [warps][tiles][8 rows of x][16 channels]
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[((warp * kTiles + t) * 8 + in_group * 2 + i % 2) * kChannels + group + i / 2 * 8] = sum[t][i];
  __syncthreads();
  for (int i = threadIdx.x; i < kTiles * 8 * kChannels; i += blockDim.x) {
    int total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w * kTiles * 8 * kChannels + i];
    const int64_t m = i / kChannels, n = n0 + i % kChannels;
    if (m < args.m && n < args.n) finish_output(args, kNative4 ? total : total / kScale8, m, n);
  }
}

}  // namespace

void linear_few(const LinearArgs& args, const LinearPlan& plan, cudaStream_t stream) {
  const bool native = plan.way == Way::kFew4, narrow = args.m <= 8;
  const auto kernel = native ? (narrow ? few_kernel<true, 1> : few_kernel<true, 2>) : (narrow ? few_kernel<false, 1> : few_kernel<false, 2>);
  const size_t shared = kWarps * (narrow ? 1 : 2) * 8 * kChannels * sizeof(int);
  launch(kernel, ceil_div(args.n, kChannels), 32 * kWarps, shared, stream, args, ceil_div(args.k, kStepK));
}

}  // namespace quota::cuda
