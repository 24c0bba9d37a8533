// transform and quantize_act: the chains of csrc/cpu/chain.h and the quantizer of csrc/cpu/quantize_act.h, with equal bits.
#include "kernels.h"
#include "values.h"

namespace quota::cuda {
namespace {

constexpr int kWide = 4;         // columns of a thread's tile
constexpr int kManyRows = 8;     // rows of it where there is work for the whole device,
constexpr int kFewTileRows = 2;  // or else
constexpr int kMostThreads = 256;

// How a matrix X [l, r] is cut: a block takes `slice` rows of Y, a thread tiles of `tile` rows x 4 columns.
struct TransformPlan {
  int tile;
  int64_t slice, slices;
  int threads;
  size_t shared_bytes;
};

TransformPlan plan_of(int64_t l, int64_t r, int64_t rows, bool left, bool right, const Device& device) {
  const int64_t wide = ceil_div(r, kWide), all = rows * ceil_div(l, kManyRows) * wide;
  const int tile = all >= int64_t{device.processors} * kMostThreads ? kManyRows : kFewTileRows;
  const int64_t most = tile == kManyRows ? kMostThreads : 64;
  int64_t high = most / wide > 1 ? most / wide : 1;
  if (high > ceil_div(l, tile)) high = ceil_div(l, tile);
  const int64_t slice = high * tile, tiles = high * wide;
  const int64_t floats = slice * ((left ? l : 0) + (right ? r : 0)) + kMostThreads / 32;
  return {tile, slice, ceil_div(l, slice), static_cast<int>(round_to(tiles < most ? tiles : most, 32)), static_cast<size_t>(floats) * sizeof(float)};
}

// Four values of a row of `width`, zeros past its end.
__device__ inline float4 four(const float* row, int64_t column, int64_t width, bool whole) {
  if (whole) return *reinterpret_cast<const float4*>(row + column);
  float4 x{0.0f, 0.0f, 0.0f, 0.0f};
  if (column < width) x.x = row[column];
  if (column + 1 < width) x.y = row[column + 1];
  if (column + 2 < width) x.z = row[column + 2];
  if (column + 3 < width) x.w = row[column + 3];
  return x;
}

template <int kRows>
__device__ inline void accumulate(float (&sum)[kRows][kWide], const float* column, const float4& x) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = __fmaf_rn(column[i], x.x, sum[i][0]);
    sum[i][1] = __fmaf_rn(column[i], x.y, sum[i][1]);
    sum[i][2] = __fmaf_rn(column[i], x.z, sum[i][2]);
    sum[i][3] = __fmaf_rn(column[i], x.w, sum[i][3]);
  }
}

// Block: rows first .. of Y = left^T X right for one X. Every sum is one ascending chain, in one thread. reach [blocks]: the largest |Y| as bits.
template <int kRows>
__global__ void __launch_bounds__(kMostThreads) transform_kernel(TransformArgs t, int64_t slice, int64_t slices, int* reach) {
  const int64_t l = t.l, r = t.r, m = blockIdx.x / slices, first = blockIdx.x % slices * slice, height = l - first < slice ? l - first : slice;
  const float* x = t.x + m * l * r;
  float* y = t.y + m * l * r;
  float* columns = reinterpret_cast<float*>(shared_memory());  // [l][slice]: the slice's columns of left
  float* turned = columns + (t.left ? l * slice : 0);          // [r][slice]: left^T X, transposed
  int* scratch = reinterpret_cast<int*>(turned + (t.right ? r * slice : 0));
  const int64_t wide = ceil_div(r, kWide), tiles = ceil_div(height, kRows) * wide;
  const bool whole = r % kWide == 0 && aligned_16(t.x) && (t.right == nullptr || aligned_16(t.right));

  if (t.left)
    for (int64_t i = threadIdx.x; i < l * slice; i += blockDim.x) columns[i] = i % slice < height ? t.left[i / slice * l + first + i % slice] : 0.0f;
  else
    for (int64_t i = threadIdx.x; i < slice * r; i += blockDim.x) turned[i % r * slice + i / r] = i / r < height ? x[(first + i / r) * r + i % r] : 0.0f;
  __syncthreads();

  int largest_bits = 0;
  const auto put = [&](const float (&sum)[kRows][kWide], int64_t row, int64_t column) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int c = 0; c < kWide; ++c)
        if (row + i < height && column + c < r) {
          y[(first + row + i) * r + column + c] = sum[i][c];
          largest_bits = largest(largest_bits, magnitude_bits(sum[i][c]));
        }
  };
  if (t.left) {
    for (int64_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
      const int64_t row = tile / wide * kRows, column = tile % wide * kWide;
      float sum[kRows][kWide] = {};
#pragma unroll 4
      for (int64_t j = 0; j < l; ++j) accumulate<kRows>(sum, columns + j * slice + row, four(x + j * r, column, r, whole));
      if (!t.right) {
        put(sum, row, column);
        continue;
      }
#pragma unroll
      for (int c = 0; c < kWide; ++c)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          if (column + c < r) turned[(column + c) * slice + row + i] = sum[i][c];
    }
    __syncthreads();
  }
  if (t.right)
    for (int64_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
      const int64_t row = tile / wide * kRows, column = tile % wide * kWide;
      float sum[kRows][kWide] = {};
#pragma unroll 4
      for (int64_t j = 0; j < r; ++j) accumulate<kRows>(sum, turned + j * slice + row, four(t.right + j * r, column, r, whole));
      put(sum, row, column);
    }
  if (reach == nullptr) return;
  largest_bits = across_block_largest(largest_bits, scratch);
  if (threadIdx.x == 0) reach[blockIdx.x] = largest_bits;
}

__global__ void __launch_bounds__(kMostThreads) prologue_kernel(const float* x, float* y, int64_t count, int64_t k, Prologue prologue) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  if (prologue == Prologue::kSiluMul) {
    const float* row = x + i / k * 2 * k + i % k;
    y[i] = __fmul_rn(gated_by_sigmoid(row[0], 1.0f), row[k]);
  } else {
    y[i] = prologue == Prologue::kGelu ? gelu(x[i]) : gated_by_sigmoid(x[i], 1.702f);
  }
}

// Block: one row y [k] -> nibbles and scale. `reach` [rows][slices] is what the transform saw; null: looked for here.
__global__ void __launch_bounds__(kMostThreads) quantize_kernel(const float* y, int64_t k, float clip, const int* reach, int64_t slices, uint8_t* q, float* scale) {
  const int64_t m = blockIdx.x, bytes = (k + 1) / 2;
  const float* row = y + m * k;
  int bits = 0;
  if (reach)
    for (int64_t i = threadIdx.x; i < slices; i += blockDim.x) bits = largest(bits, reach[m * slices + i]);
  else
    for (int64_t i = threadIdx.x; i < k; i += blockDim.x) bits = largest(bits, magnitude_bits(row[i]));
  bits = across_block_largest(bits, reinterpret_cast<int*>(shared_memory()));
  const float clipped = __fmul_rn(__int_as_float(bits), clip), s = __fdiv_rn(clipped < kSmallestRange ? kSmallestRange : clipped, 7.0f);
  const float inverse = __fdiv_rn(1.0f, s);
  if (threadIdx.x == 0) scale[m] = s;
  for (int64_t i = threadIdx.x; i < bytes; i += blockDim.x) {
    const int low = code_of(row[2 * i], 0.0f, inverse, -8.0f, 7.0f), high = 2 * i + 1 < k ? code_of(row[2 * i + 1], 0.0f, inverse, -8.0f, 7.0f) : 0;
    q[m * bytes + i] = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
  }
}

void launch_transform(const TransformArgs& t, int64_t rows, int* reach, const TransformPlan& plan, cudaStream_t stream) {
  const auto kernel = plan.tile == kManyRows ? transform_kernel<kManyRows> : transform_kernel<kFewTileRows>;
  launch(kernel, rows * plan.slices, plan.threads, plan.shared_bytes, stream, t, plan.slice, plan.slices, reach);
}

}  // namespace

bool transform_fits(int64_t l, int64_t r, const Device& device) {
  return static_cast<size_t>(kFewTileRows * (l + r) + kMostThreads / 32) * sizeof(float) <= device.shared_bytes;
}

// A plan whose shared memory fits: fewer rows a block, if need be.
static TransformPlan fitting(const TransformArgs& t, int64_t l, int64_t rows, const Device& device) {
  TransformPlan plan = plan_of(l, t.r, rows, t.left, t.right, device);
  while (plan.shared_bytes > device.shared_bytes && plan.slice > kFewTileRows) {
    if (plan.slice == plan.tile) plan.tile = kFewTileRows;
    plan.slice = plan.slice > plan.tile ? plan.slice - plan.tile : plan.tile;
    plan.slices = ceil_div(l, plan.slice);
    plan.shared_bytes = static_cast<size_t>(plan.slice * ((t.left ? l : 0) + (t.right ? t.r : 0)) + kMostThreads / 32) * sizeof(float);
  }
  return plan;
}

void transform(const TransformArgs& args, int64_t rows, const Device& device, cudaStream_t stream) {
  if (rows == 0) return;
  TransformArgs t = args;
  if (!t.left) t.l *= rows, rows = 1;  // all rows are one tall matrix
  launch_transform(t, rows, nullptr, fitting(t, t.l, rows, device), stream);
}

int64_t quantize_workspace(const QuantizeArgs& args, int64_t rows, const Device& device) {
  const auto& t = args.transform;
  const bool moves = t.left || t.right, prepares = args.prologue != Prologue::kNone;
  return rows * t.l * t.r * (moves + prepares) + (moves ? rows * fitting(t, t.l, rows, device).slices : 0);
}

void quantize_act(const QuantizeArgs& args, int64_t rows, float* workspace, const Device& device, cudaStream_t stream) {
  if (rows == 0) return;
  TransformArgs t = args.transform;
  const int64_t k = t.l * t.r;
  const size_t scratch = kMostThreads / 32 * sizeof(int);
  if (args.prologue != Prologue::kNone) {
    launch(prologue_kernel, ceil_div(rows * k, kMostThreads), kMostThreads, 0, stream, t.x, workspace, rows * k, k, args.prologue);
    t.x = workspace, workspace += rows * k;
  }
  int* reach = nullptr;
  int64_t slices = 0;
  if (t.left || t.right) {
    const auto plan = fitting(t, t.l, rows, device);
    t.y = workspace, reach = reinterpret_cast<int*>(workspace + rows * k), slices = plan.slices;
    launch_transform(t, rows, reach, plan, stream);
    t.x = t.y;
  }
  launch(quantize_kernel, rows, kMostThreads, scratch, stream, t.x, k, args.clip, reach, slices, args.q, args.scale);
}

}  // namespace quota::cuda
