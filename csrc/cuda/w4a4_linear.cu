// w4a4_linear: which kernel, which tiles, and what comes before and after it.
#include "kernels.h"
#include "products.h"

namespace quota::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostSplits = 16;
constexpr int64_t kWarpgroupChannels = 1 << 23;  // warpgroup_kernel's offsets inside a tile of up to 192 rows have 32 bits

// Thread: 16 packed bytes of one activation row -> 32 bytes of layout.h's activation tiles. Rows past m are zeros.
__global__ void __launch_bounds__(kThreads) spread_kernel(const uint8_t* x_q, int64_t m, int64_t k, int64_t padded_rows, int64_t chunks, int8_t* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= chunks) return;
  const int64_t per_row = kStepBytes / 16, lane = i % per_row, row = i / per_row % padded_rows, step = i / per_row / padded_rows;
  const int64_t bytes = (k + 1) / 2, at = step * kStepBytes + lane * 16;
  Words words{{0, 0, 0, 0}};
  if (row < m && at < bytes) {
    if (bytes % 16 == 0 && aligned_16(x_q))
      words = read_words(x_q + row * bytes + at);
    else
      for (int j = 0; j < 16; ++j)
        if (at + j < bytes) words.w[j / 4] |= static_cast<uint32_t>(x_q[row * bytes + at + j]) << 8 * (j % 4);
  }
  int8_t* to = out + activation_offset(row, step, padded_rows);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const int position = 32 * s + 4 * static_cast<int>(lane);
    *reinterpret_cast<uint32_t*>(to + swizzled(static_cast<int>(row % 8), position)) = even_bytes(words.w[s]);
    *reinterpret_cast<uint32_t*>(to + swizzled(static_cast<int>(row % 8), position + 16)) = odd_bytes(words.w[s]);
  }
}

// Rows of `bytes` -> rows of `padded_bytes`, which 16-byte copies can read.
__global__ void __launch_bounds__(kThreads) pad_kernel(const uint8_t* x_q, int64_t bytes, int64_t padded_bytes, int64_t count, uint8_t* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) out[i] = i % padded_bytes < bytes ? x_q[i / padded_bytes * bytes + i % padded_bytes] : 0;
}

__global__ void __launch_bounds__(kThreads) finish_kernel(LinearArgs args, const int32_t* partial, int64_t splits) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, count = args.m * args.n;
  if (i >= count) return;
  int sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += partial[s * count + i];
  finish_output(args, sum, i / args.n, i % args.n);
}

// The tile with the least work on the busiest processor: waves times width, and a fixed part per wave for what no tile shares.
int best_tokens(const LinearArgs& args, const int* widths, int count, const Device& device) {
  int best = widths[0];
  int64_t least = INT64_MAX;
  for (int i = 0; i < count; ++i) {
    const int64_t blocks = ceil_div(args.m, widths[i]) * ceil_div(args.n, kTileRows), cost = ceil_div(blocks, device.processors) * (widths[i] + 16);
    if (cost < least) least = cost, best = widths[i];
  }
  return best;
}

// Whether the rows of x_q can be read in place by 16-byte copies.
bool readable(const LinearArgs& args) { return (args.k + 1) / 2 % 16 == 0 && aligned_16(args.x_q); }

int64_t activation_bytes(const LinearArgs& args, const LinearPlan& plan) {
  if (plan.way == Way::kWarpgroup) return round_to(args.m, plan.tokens) * round_to(args.k, kStepK);
  const bool tile = plan.way == Way::kTile4 || plan.way == Way::kTile8;
  return tile && !readable(args) ? round_to(args.m * round_to((args.k + 1) / 2, 16), 128) : 0;
}

}  // namespace

LinearPlan plan_linear(const LinearArgs& args, Way way, const Device& device) {
  const bool native = device.arch >= 80 && device.arch < 90;
  if (way == Way::kChoose)
    way = args.m <= kFewRows ? (native ? Way::kFew4 : Way::kFew8) : native ? Way::kTile4 : device.arch == 90 && kWarpgroupBuilt && args.n <= kWarpgroupChannels ? Way::kWarpgroup : Way::kTile8;
  LinearPlan plan{way, 0, 1, 0};
  if (way == Way::kFew4 || way == Way::kFew8) return plan;
  constexpr int kWarpgroupTokens[] = {32, 64, 96, 128, 160, 192}, kTileTokens[] = {64, 128};
  plan.tokens = way == Way::kWarpgroup ? best_tokens(args, kWarpgroupTokens, 6, device) : best_tokens(args, kTileTokens, 2, device);
  const int64_t blocks = ceil_div(args.m, plan.tokens) * ceil_div(args.n, kTileRows), steps = ceil_div(args.k, kStepK);
  // Parts of k so that every processor has work, each long enough to fill its pipeline.
  int64_t splits = device.processors / blocks;
  splits = splits > steps / 8 ? steps / 8 : splits;
  plan.splits = static_cast<int>(splits < 1 ? 1 : splits > kMostSplits ? kMostSplits : splits);
  plan.workspace_bytes = activation_bytes(args, plan) + (plan.splits > 1 ? 4 * plan.splits * args.m * args.n : 0);
  return plan;
}

void w4a4_linear(const LinearArgs& args, const LinearPlan& plan, void* workspace, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return;
  if (plan.way == Way::kFew4 || plan.way == Way::kFew8) return linear_few(args, plan, stream);
  const int64_t own = activation_bytes(args, plan);
  int32_t* partial = plan.splits > 1 ? reinterpret_cast<int32_t*>(static_cast<uint8_t*>(workspace) + own) : nullptr;
  if (plan.way == Way::kWarpgroup) {
    const int64_t rows = round_to(args.m, plan.tokens), chunks = rows * ceil_div(args.k, kStepK) * (kStepBytes / 16);
    int8_t* a = static_cast<int8_t*>(workspace);
    launch(spread_kernel, ceil_div(chunks, kThreads), kThreads, 0, stream, args.x_q, args.m, args.k, rows, chunks, a);
    linear_warpgroup(args, plan, a, partial, stream);
  } else {
    const int64_t bytes = (args.k + 1) / 2, padded = own ? round_to(bytes, 16) : bytes;
    uint8_t* copy = static_cast<uint8_t*>(workspace);
    if (own) launch(pad_kernel, ceil_div(args.m * padded, kThreads), kThreads, 0, stream, args.x_q, bytes, padded, args.m * padded, copy);
    linear_tile(args, plan, own ? copy : args.x_q, padded, partial, stream);
  }
  if (partial) launch(finish_kernel, ceil_div(args.m * args.n, kThreads), kThreads, 0, stream, args, partial, plan.splits);
}

}  // namespace quota::cuda
