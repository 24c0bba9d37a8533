// CUDA kernels, free of torch: raw device pointers, sizes and a stream. The arguments are those of csrc/include/quota/kernels.h.
//
// No function synchronises with the host or allocates; workspaces come from the caller, so a sequence of calls can be captured in a graph.
#pragma once

#include <cstddef>

#include "device.h"
#include "layout.h"
#include "quota/kernels.h"

namespace quota::cuda {

struct Device {
  int arch;             // 10 * major + minor
  int processors;       // multiprocessors
  size_t shared_bytes;  // that a block may ask for
};

// Throws where this library has no code for the current device. Launches nothing.
void check_architecture();

// transform: y; quantize_act: codes and scales. One launch each. Factors as TransformArgs says, but right as left: right^T as rows
// [r][r rounded up to 2]. HeadsArgs' too.
void transform(const TransformArgs&, int64_t rows, int32_t* workspace, const Device&, cudaStream_t);
void quantize_act(const QuantizeArgs&, int64_t rows, int32_t* workspace, const Device&, cudaStream_t);
// int32 of workspace for both.
int64_t transform_workspace(const TransformArgs&, int64_t rows, const Device&);
// Whether a row's operands fit into a block's shared memory.
bool transform_fits(const TransformArgs&, const Device&);

// One launch each.
void kv4_append(const AppendArgs&, int64_t batch, cudaStream_t);
void qkv_append(const HeadsArgs&, int64_t batch, cudaStream_t);

// Weight [N, ceil(K/2)] -> blocks (layout.h; n to 128, k to 128) and col_sum [N]. Two launches.
void w4a4_pack(const PackArgs&, cudaStream_t);

// Whether warpgroup_kernel has a body: code for 90a alone has it, and code for 90 runs on the same devices (setup.py).
#if defined(QUOTA_EMULATED) || defined(QUOTA_WARPGROUP)
constexpr bool kWarpgroupBuilt = true;
#else
constexpr bool kWarpgroupBuilt = false;
#endif
// How a product is computed. `kChoose` takes what the device is best at and the library has.
enum class Way : int64_t { kChoose, kFew4, kFew8, kTile4, kTile8, kWarpgroup };
constexpr int64_t kFewRows = 16;  // rows up to which the weights' bytes are all that matters

struct LinearPlan {
  Way way;
  int tokens;               // of a tile
  int splits;               // parts of k; above 1 they meet in the workspace
  int64_t workspace_bytes;  // unpacked activations, then partial sums
};
LinearPlan plan_linear(const LinearArgs&, Way, const Device&);
// `blocks` as w4a4_pack leaves them; `a` and `row_sum` are not used. 1 launch (kFew*, kTile* with one split), at most 3.
void w4a4_linear(const LinearArgs&, const LinearPlan&, void* workspace, cudaStream_t);
// Its parts, one file each.
void linear_few(const LinearArgs&, const LinearPlan&, cudaStream_t);
void linear_tile(const LinearArgs&, const LinearPlan&, const uint8_t* rows, int64_t row_bytes, int32_t* partial, cudaStream_t);
void linear_warpgroup(const LinearArgs&, const LinearPlan&, const int8_t* rows, int32_t* partial, cudaStream_t);

struct AttentionPlan {
  int splits;
  int64_t tokens;  // queries whose splits are in the workspace at a time; the next ones reuse it
  int64_t workspace_floats;
};
AttentionPlan plan_attention(const AttentionArgs&, int64_t batch);
// One launch; where slots are split, two for every `tokens` queries of the plan.
void kv4_attention(const AttentionArgs&, const Pages&, int64_t batch, const AttentionPlan&, float* workspace, cudaStream_t);
constexpr int64_t kSplitSlots = 1024;  // a split's slots: fixed, or bits would depend on the batch
constexpr int64_t kLargestHead = 256;
#ifdef QUOTA_EMULATED
constexpr int64_t kWorkspaceFloats = 1 << 10;
#else
constexpr int64_t kWorkspaceFloats = 1 << 24;  // 64 MiB, except that eight queries always fit
#endif

}  // namespace quota::cuda
