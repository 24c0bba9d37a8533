// w4a4_linear by mma.sync: native 4-bit products on sm_80 to sm_89, 8-bit ones elsewhere. Tiles of 128 channels x 64 or 128 rows of activations,
// both operands packed in shared memory, four stages ahead.
#include "kernels.h"
#include "products.h"

namespace quota::cuda {
namespace {

constexpr int kWarps = 8, kStages = 4;
constexpr int kChannelWarps = 4, kTokenWarps = 2;  // a warp has 32 channels and half of the tokens

template <bool kNative4, int kTokens>
__global__ void __launch_bounds__(32 * kWarps) tile_kernel(LinearArgs args, const uint8_t* rows, int64_t row_bytes, int32_t* partial, int64_t splits) {
  constexpr int kStageBytes = kTileBytes + kTokens * kStepBytes, kColumns = kTokens / kTokenWarps / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, in_group = lane % 4;
  const int64_t steps = ceil_div(args.k, kStepK), tiles_m = ceil_div(args.m, kTokens);
  const int64_t m0 = blockIdx.x % tiles_m * kTokens, rest = blockIdx.x / tiles_m, split = rest % splits, n0 = rest / splits * kTileRows;
  const int64_t begin = steps * split / splits, end = steps * (split + 1) / splits;
  unsigned char* memory = shared_memory();

  const auto load = [&](int64_t step) {
    if (step < end) {
      unsigned char* stage = memory + step % kStages * kStageBytes;
      const uint8_t* w = args.blocks + weight_offset(n0, step, steps);
      for (int i = threadIdx.x; i < kTileBytes / 16; i += blockDim.x) ptx::copy_16(stage + i * 16, w + i * 16, true);
      for (int i = threadIdx.x; i < kTokens * kStepBytes / 16; i += blockDim.x) {
        const int64_t m = m0 + i / (kStepBytes / 16), at = step * kStepBytes + i % (kStepBytes / 16) * 16;
        const bool there = m < args.m && at < row_bytes;
        ptx::copy_16(stage + kTileBytes + i * 16, there ? rows + m * row_bytes + at : rows, there);
      }
    }
    ptx::copy_commit();
  };
  for (int64_t i = 0; i < kStages - 1; ++i) load(begin + i);

  int sum[2][kColumns][4] = {};
  const int channel_warp = warp % kChannelWarps, token_warp = warp / kChannelWarps;
  for (int64_t step = begin; step < end; ++step) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();  // all threads' copies of this stage have landed; the oldest stage is free
    load(step + kStages - 1);
    const unsigned char* stage = memory + step % kStages * kStageBytes;
    Words low[2], high[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned char* w = stage + (channel_warp * 4 + r * 2) * kGroupBytes + lane * 16;
      low[r] = read_words(w), high[r] = read_words(w + kGroupBytes);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const Words x = read_words(stage + kTileBytes + (token_warp * kColumns + c) * kGroupBytes + lane * 16);
#pragma unroll
      for (int r = 0; r < 2; ++r) multiply_step<kNative4>(sum[r][c], low[r], high[r], x);
    }
  }
  ptx::copy_wait<0>();
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t n = n0 + channel_warp * 32 + r * 16 + group + i / 2 * 8, m = m0 + (token_warp * kColumns + c) * 8 + in_group * 2 + i % 2;
        put_sum(args, partial, split, kNative4 ? sum[r][c][i] : sum[r][c][i] / kScale8, m, n);
      }
}

template <bool kNative4, int kTokens>
void run(const LinearArgs& args, const LinearPlan& plan, const uint8_t* rows, int64_t row_bytes, int32_t* partial, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.m, kTokens) * plan.splits * ceil_div(args.n, kTileRows);
  const size_t shared = kStages * (kTileBytes + kTokens * kStepBytes);
  launch(tile_kernel<kNative4, kTokens>, blocks, 32 * kWarps, shared, stream, args, rows, row_bytes, partial, plan.splits);
}

}  // namespace

void linear_tile(const LinearArgs& args, const LinearPlan& plan, const uint8_t* rows, int64_t row_bytes, int32_t* partial, cudaStream_t stream) {
  const bool native = plan.way == Way::kTile4, narrow = plan.tokens == 64;
  const auto go = native ? (narrow ? run<true, 64> : run<true, 128>) : (narrow ? run<false, 64> : run<false, 128>);
  go(args, plan, rows, row_bytes, partial, stream);
}

}  // namespace quota::cuda
