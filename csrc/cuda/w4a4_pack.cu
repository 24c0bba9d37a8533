// w4a4_pack: portable weight rows -> the blocks of layout.h, once at load time.
#include "kernels.h"
#include "values.h"

namespace quota::cuda {
namespace {

constexpr int kThreads = 256;

// Thread: 16 bytes of the packed layout, in its order. Zeros outside the matrix, whatever the padding nibble of an odd k holds.
__global__ void __launch_bounds__(kThreads) pack_kernel(PackArgs args, int64_t chunks, int64_t steps) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= chunks) return;
  const int64_t row_bytes = (args.k + 1) / 2, row_chunk = i / (kStepBytes / 16), chunk = i % (kStepBytes / 16);
  const int64_t block = row_chunk / kTileRows, n = block / steps * kTileRows + row_chunk % kTileRows, step = block % steps;
  uint32_t words[4] = {};
  for (int64_t byte = 0; byte < 16; ++byte) {
    const int64_t at = step * kStepBytes + chunk * 16 + byte;
    if (n >= args.n || at >= row_bytes) continue;
    uint32_t value = args.w_q[n * row_bytes + at];
    if (2 * at + 1 >= args.k) value &= 15;
    words[byte / 4] |= value << 8 * (byte % 4);
  }
  *reinterpret_cast<uint4*>(args.blocks + weight_offset(n, step, steps) + chunk * 16) = uint4{words[0], words[1], words[2], words[3]};
}

// Warp: the sum of one row.
__global__ void __launch_bounds__(kThreads) sum_kernel(PackArgs args) {
  const int64_t n = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32, row_bytes = (args.k + 1) / 2;
  if (n >= args.n) return;
  int sum = 0;
  for (int64_t i = threadIdx.x % 32; i < args.k; i += 32) sum += static_cast<int>(args.w_q[n * row_bytes + i / 2] >> 4 * (i % 2) & 15 ^ 8) - 8;
  sum = across_warp(sum, [](int a, int b) { return a + b; });
  if (threadIdx.x % 32 == 0) args.col_sum[n] = sum;
}

}  // namespace

#ifndef QUOTA_EMULATED
void check_architecture() {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, pack_kernel);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  check(error, "this library has no code for this GPU, build it with QUOTA_CUDA_ARCHS naming its architecture");
}
#endif

void w4a4_pack(const PackArgs& args, cudaStream_t stream) {
  const int64_t steps = ceil_div(args.k, kStepK), chunks = round_to(args.n, kTileRows) * steps * (kStepBytes / 16);
  if (chunks) launch(pack_kernel, ceil_div(chunks, kThreads), kThreads, 0, stream, args, chunks, steps);
  if (args.n) launch(sum_kernel, ceil_div(args.n, kThreads / 32), kThreads, 0, stream, args);
}

}  // namespace quota::cuda
