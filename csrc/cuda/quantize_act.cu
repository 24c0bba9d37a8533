// transform and quantize_act: the integers of csrc/cpu/fixed.h and the quantizer of csrc/cpu/quantize_act.h, with equal bits. One block takes a row
// from its prologue to its codes.
#include "fixed.h"
#include "kernels.h"
#include "values.h"

namespace quota::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTallRows = 16;  // rows of a block that have a matrix of one row each

__device__ inline float activated(const float* row, int i, int k, Prologue prologue) {
  switch (prologue) {
    case Prologue::kSiluMul: return __fmul_rn(gated_by_sigmoid(row[i], 1.0f), row[k + i]);
    case Prologue::kQuickGelu: return gated_by_sigmoid(row[i], 1.702f);
    case Prologue::kGelu: return gelu(row[i]);
    default: return row[i];
  }
}

// int16 of the operands in shared memory: X^T for a product with left, then (or instead) the rows for one with right.
__host__ __device__ inline int operand_values(const TransformArgs& t) {
  const int l = static_cast<int>(t.l), r = static_cast<int>(t.r), before = t.left ? r * fixed_stride(l) : 0, after = t.right ? l * fixed_stride(r) : 0;
  return before > after ? before : after;
}

// put(row, column) for every element of a matrix, a warp per row.
template <class Put>
__device__ inline void each_element(int rows, int columns, Put put) {
  for (int i = threadIdx.x / 32; i < rows; i += kWarps)
    for (int j = threadIdx.x % 32; j < columns; j += 32) put(i, j);
}

// X [l][r] at `values` -> sums of left^T X right at `sums`, which may be the same memory. Returns what a sum is worth, times 2^-exponent, and in `most`
// the largest magnitude of a sum.
__device__ inline float kronecker(const TransformArgs& t, const float* values, float reach, int16_t* operand, int32_t* sums, int* scratch, int* most) {
  const int l = static_cast<int>(t.l), r = static_cast<int>(t.r), across = fixed_stride(l), along = fixed_stride(r);
  const Unit unit = unit_of(reach);
  int found = 0, shift = 0;
  const auto put = [&](int i, int j, int sum) { sums[i * r + j] = sum, found = largest(found, sum < 0 ? -sum : sum); };
  if (t.left) {
    each_element(even(l), r, [&](int i, int j) { operand[j * across + i] = i < l ? fixed_of(values[i * r + j], unit.factor) : int16_t{0}; });
    __syncthreads();
    fixed_product({t.left, even(l), l, even(l)}, {operand, across, r, even(l)}, put);
    found = across_block_largest(found, scratch);
    __syncthreads();
  }
  if (t.right) {
    shift = t.left ? shift_of(found) : 0;
    each_element(l, even(r), [&](int i, int j) {
      operand[i * along + j] = j >= r ? int16_t{0} : t.left ? static_cast<int16_t>((sums[i * r + j] + (1 << shift >> 1)) >> shift) : fixed_of(values[i * r + j], unit.factor);
    });
    found = 0;
    __syncthreads();
    fixed_product({operand, along, l, even(r)}, {t.right, even(r), r, even(r)}, put);
    found = across_block_largest(found, scratch);
    __syncthreads();
  }
  *most = found;
  return __fmul_rn(unit.unit, power_of_two(t.exponent + shift));
}

// Block: one row -> y, or where args.q is there its nibbles and scale. `outside`: memory for the rows' values and sums, null: shared memory.
__global__ void __launch_bounds__(kThreads) row_kernel(QuantizeArgs args, int32_t* outside) {
  const TransformArgs& t = args.transform;
  const int k = static_cast<int>(t.l * t.r);
  const int64_t m = blockIdx.x;
  int* scratch = reinterpret_cast<int*>(shared_memory());
  int16_t* operand = reinterpret_cast<int16_t*>(scratch + kWarps);
  int32_t* sums = outside ? outside + m * k : reinterpret_cast<int32_t*>(operand + operand_values(t));
  float* values = reinterpret_cast<float*>(sums);
  const float* x = t.x + m * (args.prologue == Prologue::kSiluMul ? 2 * int64_t{k} : k);
  int bits = 0;
  for (int i = threadIdx.x; i < k; i += kThreads) {
    values[i] = activated(x, i, k, args.prologue);
    bits = largest(bits, magnitude_bits(values[i]));
  }
  float reach = __int_as_float(across_block_largest(bits, scratch)), worth = 0.0f;
  __syncthreads();
  const bool moves = t.left || t.right;
  if (moves) {
    int most;
    worth = kronecker(t, values, reach, operand, sums, scratch, &most);
    reach = __fmul_rn(__int2float_rn(most), worth);
  }
  const auto value = [&](int i) { return moves ? __fmul_rn(__int2float_rn(sums[i]), worth) : values[i]; };
  if (args.q == nullptr) {
    for (int i = threadIdx.x; i < k; i += kThreads) t.y[m * k + i] = value(i);
    return;
  }
  const float clipped = __fmul_rn(reach, args.clip), scale = __fdiv_rn(clipped < kSmallestRange ? kSmallestRange : clipped, 7.0f);
  const float inverse = __fdiv_rn(1.0f, scale);
  const int bytes = (k + 1) / 2;
  if (threadIdx.x == 0) args.scale[m] = scale;
  for (int i = threadIdx.x; i < bytes; i += kThreads) {
    const int low = code_of(value(2 * i), 0.0f, inverse, -8.0f, 7.0f), high = 2 * i + 1 < k ? code_of(value(2 * i + 1), 0.0f, inverse, -8.0f, 7.0f) : 0;
    args.q[m * bytes + i] = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
  }
}

// Block: kTallRows rows of r values, each a matrix of one row, times right.
__global__ void __launch_bounds__(kThreads) tall_kernel(TransformArgs t, int64_t rows) {
  const int r = static_cast<int>(t.r);
  const int64_t first = int64_t{blockIdx.x} * kTallRows;
  const int count = rows - first < kTallRows ? static_cast<int>(rows - first) : kTallRows;
  float* x = reinterpret_cast<float*>(shared_memory());
  for (int i = threadIdx.x; i < count * r; i += kThreads) x[i] = t.x[first * r + i];
  __syncthreads();
  times_right(x, count, r, t.right, t.exponent, reinterpret_cast<unsigned char*>(x + kTallRows * r), x);
  for (int i = threadIdx.x; i < count * r; i += kThreads) t.y[first * r + i] = x[i];
}

size_t operand_bytes(const TransformArgs& t) { return kWarps * sizeof(int) + static_cast<size_t>(round_to(operand_values(t), 2)) * sizeof(int16_t); }

size_t tall_bytes(const TransformArgs& t) { return kTallRows * static_cast<size_t>(t.r) * sizeof(float) + times_right_bytes(kTallRows, static_cast<int>(t.r)); }

bool is_tall(const TransformArgs& t, const Device& device) { return !t.left && t.right && t.l == 1 && tall_bytes(t) <= device.shared_bytes; }

bool sums_fit(const TransformArgs& t, const Device& device) { return operand_bytes(t) + static_cast<size_t>(t.l * t.r) * sizeof(int32_t) <= device.shared_bytes; }

void launch_rows(const QuantizeArgs& args, int64_t rows, int32_t* workspace, const Device& device, cudaStream_t stream) {
  const bool inside = sums_fit(args.transform, device);
  const size_t shared = operand_bytes(args.transform) + (inside ? static_cast<size_t>(args.transform.l * args.transform.r) * sizeof(int32_t) : 0);
  launch(row_kernel, rows, kThreads, shared, stream, args, inside ? nullptr : workspace);
}

}  // namespace

bool transform_fits(const TransformArgs& t, const Device& device) { return operand_bytes(t) <= device.shared_bytes; }

int64_t transform_workspace(const TransformArgs& t, int64_t rows, const Device& device) { return sums_fit(t, device) ? 0 : rows * t.l * t.r; }

void transform(const TransformArgs& t, int64_t rows, int32_t* workspace, const Device& device, cudaStream_t stream) {
  if (rows == 0) return;
  if (is_tall(t, device))
    launch(tall_kernel, ceil_div(rows, kTallRows), kThreads, tall_bytes(t), stream, t, rows);
  else
    launch_rows({t, 1.0f, nullptr, nullptr, Prologue::kNone}, rows, workspace, device, stream);
}

void quantize_act(const QuantizeArgs& args, int64_t rows, int32_t* workspace, const Device& device, cudaStream_t stream) {
  if (rows) launch_rows(args, rows, workspace, device, stream);
}

}  // namespace quota::cuda
