// w4a4_linear on Hopper (sm_90a): y^T = W x^T by wgmma, packed weights from shared memory through registers (two operations per eight of them)
// as operand a, activations as bytes in shared memory as operand b. One warp feeds the copy engine, two warpgroups of 64 channels each compute.
#include "kernels.h"
#include "products.h"
#ifndef QUOTA_EMULATED
#include "wgmma.h"
#endif

namespace quota::cuda {
namespace {

// Tiles of at most 192 rows of activations: nine warps leave 168 registers a thread, and wider tiles spill.
constexpr int kGroups = 2, kGroupThreads = 128, kThreads = kGroups * kGroupThreads + 32;
constexpr int64_t kBarrierBytes = 1024;
constexpr size_t kSharedBytes = 200 << 10;

QUOTA_BOTH constexpr int stage_bytes(int tokens) { return static_cast<int>(kTileBytes + tokens * kStepK); }
QUOTA_BOTH constexpr int stages(int tokens) { return (kSharedBytes / stage_bytes(tokens)) < 8 ? static_cast<int>(kSharedBytes / stage_bytes(tokens)) : 8; }

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 1) warpgroup_kernel(LinearArgs args, const int8_t* rows, int64_t padded_rows, int32_t* partial, int64_t splits) {
#if defined(QUOTA_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kStages = stages(kTokens), kStageBytes = stage_bytes(kTokens), kSteps = 4;  // of 32 values of k in a stage
  const int64_t steps = ceil_div(args.k, kStepK), tiles_m = ceil_div(args.m, kTokens);
  const int64_t m0 = blockIdx.x % tiles_m * kTokens, rest = blockIdx.x / tiles_m, split = rest % splits, n0 = rest / splits * kTileRows;
  const int64_t begin = steps * split / splits, count = steps * (split + 1) / splits - begin;
  unsigned char* memory = shared_memory();  // stages of activations, then of weights: swizzled tiles start at multiples of 1024
  uint64_t* full = reinterpret_cast<uint64_t*>(memory + kStages * kStageBytes);
  uint64_t* empty = full + kStages;
  const auto activations = [&](int64_t i) { return memory + i % kStages * (kTokens * kStepK); };
  const auto weights = [&](int64_t i) { return memory + kStages * (kTokens * kStepK) + i % kStages * kTileBytes; };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) ptx::barrier_init(full + i, 1), ptx::barrier_init(empty + i, kGroups * kGroupThreads / 32);
    ptx::barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x >= kGroups * kGroupThreads) {
    if (threadIdx.x % 32) return;
    for (int64_t i = 0; i < count; ++i) {
      if (i >= kStages) ptx::barrier_wait(empty + i % kStages, (i / kStages - 1) & 1);
      uint64_t* barrier = full + i % kStages;
      ptx::barrier_expect(barrier, kStageBytes);
      ptx::bulk_copy(activations(i), rows + activation_offset(m0, begin + i, padded_rows), kTokens * kStepK, barrier);
      ptx::bulk_copy(weights(i), args.blocks + weight_offset(n0, begin + i, steps), kTileBytes, barrier);
    }
    return;
  }

  const int warpgroup = threadIdx.x / kGroupThreads, warp = threadIdx.x % kGroupThreads / 32, lane = threadIdx.x % 32;
  int sum[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0;
  uint32_t a[2][kSteps][4];  // operands of this stage, and of the next one while this one's products are under way
  const auto unpack = [&](uint32_t(&to)[kSteps][4], int64_t i) {
    ptx::barrier_wait(full + i % kStages, i / kStages & 1);
    const unsigned char* w = weights(i) + (warpgroup * 8 + warp * 2) * kGroupBytes + lane * 16;
    const Words low = read_words(w), high = read_words(w + kGroupBytes);
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      to[s][0] = even_bytes(low.w[s]), to[s][1] = even_bytes(high.w[s]), to[s][2] = odd_bytes(low.w[s]), to[s][3] = odd_bytes(high.w[s]);
  };
  const auto stage = [&](uint32_t(&now)[kSteps][4], uint32_t(&next)[kSteps][4], int64_t i) {
    ptx::wgmma_fence();
    const uint32_t address = ptx::shared_address(activations(i));
#pragma unroll
    for (int s = 0; s < kSteps; ++s) ptx::wgmma_s8<kTokens>(sum, now[s], swizzled_descriptor(address + 32 * s), 1);
    ptx::wgmma_commit();
    if (i + 1 < count) unpack(next, i + 1);
    ptx::wgmma_wait();
    if (lane == 0) ptx::barrier_arrive(empty + i % kStages);  // a warp speaks for itself: its products and its reads of the weights are done
  };
  if (count > 0) unpack(a[0], 0);
  for (int64_t i = 0; i < count; i += 2) {
    stage(a[0], a[1], i);
    if (i + 1 < count) stage(a[1], a[0], i + 1);
  }
  ptx::settle(sum);
  // A thread has two channels and every eighth pair of rows: what belongs to the channels is read once, and offsets inside a tile fit 32 bits.
  const int n = static_cast<int>(n0) + warpgroup * 64 + warp * 16 + lane / 4, limit_m = static_cast<int>(args.m), limit_n = static_cast<int>(args.n);
  const int first = static_cast<int>(m0) + lane % 4 * 2;
  const bool inside[2] = {n < limit_n, n + 8 < limit_n};
  if (partial) {
    int32_t* to = partial + (split * args.m + first) * args.n + n;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int row = i / 4 * 8 + i % 2, half = i / 2 % 2;
      if (first + row < limit_m && inside[half]) to[row * limit_n + half * 8] = sum[i] / kScale8;
    }
    return;
  }
  float scale[2], bias[2];
  uint32_t column[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    scale[half] = inside[half] ? args.w_scale[n + 8 * half] : 0.0f;
    bias[half] = args.bias && inside[half] ? args.bias[n + 8 * half] : -0.0f;  // adding it changes no bit
    column[half] = args.x_zero && inside[half] ? static_cast<uint32_t>(args.col_sum[n + 8 * half]) : 0;
  }
  float* to = args.y + int64_t{first} * args.n + n;
#pragma unroll
  for (int i = 0; i < kTokens / 4; ++i) {
    const int row = i / 2 * 8 + i % 2;
    if (first + row >= limit_m) continue;
    const float x = args.x_scale[first + row];
    const uint32_t zero = args.x_zero ? static_cast<uint32_t>(args.x_zero[first + row]) : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int whole = static_cast<int>(static_cast<uint32_t>(sum[i / 2 * 4 + half * 2 + i % 2] / kScale8) - zero * column[half]);
      if (inside[half]) to[row * limit_n + half * 8] = __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(whole), scale[half]), x), bias[half]);
    }
  }
#else
  __trap();  // never uninitialised memory as a result; plan_linear does not come here
#endif
}

template <int kTokens>
void run(const LinearArgs& args, const LinearPlan& plan, const int8_t* rows, int32_t* partial, cudaStream_t stream) {
  const int64_t tiles = ceil_div(args.m, kTokens), blocks = tiles * plan.splits * ceil_div(args.n, kTileRows);
  const size_t shared = static_cast<size_t>(stages(kTokens) * stage_bytes(kTokens) + kBarrierBytes);
  launch(warpgroup_kernel<kTokens>, blocks, kThreads, shared, stream, args, rows, tiles * kTokens, partial, plan.splits);
}

}  // namespace

void linear_warpgroup(const LinearArgs& args, const LinearPlan& plan, const int8_t* rows, int32_t* partial, cudaStream_t stream) {
  switch (plan.tokens) {
    case 32: return run<32>(args, plan, rows, partial, stream);
    case 64: return run<64>(args, plan, rows, partial, stream);
    case 96: return run<96>(args, plan, rows, partial, stream);
    case 128: return run<128>(args, plan, rows, partial, stream);
    case 160: return run<160>(args, plan, rows, partial, stream);
    default: return run<192>(args, plan, rows, partial, stream);
  }
}

}  // namespace quota::cuda
