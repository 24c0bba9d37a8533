// The CUDA ops as torch sees them: torch's stable ABI only. Links against any torch and loads in any; runs where torch has CUDA.
// With QUOTA_EMULATED the same ops run on CPU tensors (tests/native).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "checks.h"
#include "kernels.h"

#ifdef QUOTA_EMULATED
#define QUOTA_LIBRARY quota_emulated
#define QUOTA_KEY CPU
#else
#define QUOTA_LIBRARY quota_cuda
#define QUOTA_KEY CUDA
#include <dlfcn.h>
#endif

namespace {

using quota::cuda::Way;

#ifdef QUOTA_EMULATED
quota::cuda::Device emulated{90, 132, 227 << 10};

struct Place {  // where a call runs
  explicit Place(const Tensor&) {}
  const quota::cuda::Device& device = emulated;
  cudaStream_t stream = nullptr;
};

void use_device(int64_t arch, int64_t processors) {
  emulated = {static_cast<int>(arch), static_cast<int>(processors), static_cast<size_t>(arch == 86 || arch == 89 ? 99 << 10 : arch == 80 ? 163 << 10 : 227 << 10)};
}
#else
const quota::cuda::Device& device_of(int index) {
  static std::mutex lock;
  static std::map<int, quota::cuda::Device> known;
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const auto ask = [&](cudaDeviceAttr what) {
    int value = 0;
    quota::cuda::check(cudaDeviceGetAttribute(&value, what, index), "attribute of the device");
    return value;
  };
  return known[index] = {10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor), ask(cudaDevAttrMultiProcessorCount),
                         static_cast<size_t>(ask(cudaDevAttrMaxSharedMemoryPerBlockOptin))};
}

// Only libtorch_cuda.so has this function, and torch loads that library for itself alone: linked, the symbol would stay undefined in every process.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);
CurrentStream current_stream() {
  static const auto found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(found, "the libtorch_cuda.so of this process, expected with aoti_torch_get_current_cuda_stream, was not found; use a CUDA build of torch 2.11 or newer");
  return found;
}

// Throws where the library has no code for GPU `index`.
void check_device(int64_t index) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(index));
  quota::cuda::check_architecture();
}

struct Place {  // where a call runs: the device of its first tensor, torch's current stream there
  explicit Place(const Tensor& t) : guard(t.get_device_index()), device(device_of(t.get_device_index())) {
    void* current = nullptr;
    STD_TORCH_CHECK(current_stream()(t.get_device_index(), &current) == 0, "torch has no current CUDA stream");
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  const quota::cuda::Device& device;
  cudaStream_t stream;
};
#endif

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) { return torch::stable::new_empty(like, sizes, type); }

const float* maybe_floats(const MaybeTensor& t) { return t ? floats(*t) : nullptr; }

// Memory for `rows` rows of a transform.
Tensor transform_workspace(const Tensor& x, const quota::TransformArgs& t, int64_t rows, const Place& place) {
  STD_TORCH_CHECK(quota::cuda::transform_fits(t, place.device), "factors of ", t.left ? t.l : 0, " and ", t.right ? t.r : 0,
                  " do not fit into the shared memory of this GPU; use the triton or native implementation (QUOTA_IMPL)");
  return make(x, {quota::cuda::transform_workspace(t, rows, place.device)}, ScalarType::Int);
}

int32_t* ints_of(Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }

Tensor transform(Tensor x, MaybeTensor left, MaybeTensor right, int64_t l, int64_t exponent) {
  const Place place(x);
  check(x, "x", ScalarType::Float, {kFree, kFree});
  auto args = transform_args(x, x.size(1), left, right, l, exponent, check_rows);
  if (!left && !right) return x;
  Tensor workspace = transform_workspace(x, args, x.size(0), place);
  Tensor y = make(x, {x.size(0), x.size(1)}, ScalarType::Float);
  args.y = static_cast<float*>(y.mutable_data_ptr());
  quota::cuda::transform(args, x.size(0), ints_of(workspace), place.device, place.stream);
  return y;
}

std::tuple<Tensor, Tensor> quantize_act(Tensor x, MaybeTensor left, MaybeTensor right, int64_t l, int64_t exponent, double clip, int64_t prologue) {
  const Place place(x);
  check(x, "x", ScalarType::Float, {kFree, kFree});
  STD_TORCH_CHECK(prologue >= 0 && prologue <= static_cast<int64_t>(quota::Prologue::kGelu), "prologue: unknown number ", prologue);
  const auto first = static_cast<quota::Prologue>(prologue);
  const int64_t m = x.size(0), k = first == quota::Prologue::kSiluMul ? x.size(1) / 2 : x.size(1);
  STD_TORCH_CHECK(first != quota::Prologue::kSiluMul || 2 * k == x.size(1), "x: expected gate and up halves of one size, got ", x.size(1), " features");
  const auto transform = transform_args(x, k, left, right, l, exponent, check_rows);
  Tensor q = make(x, {m, (k + 1) / 2}, ScalarType::Byte), scale = make(x, {m}, ScalarType::Float);
  const quota::QuantizeArgs args{
      transform, static_cast<float>(clip), static_cast<uint8_t*>(q.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr()), first};
  Tensor workspace = transform_workspace(x, transform, m, place);
  quota::cuda::quantize_act(args, m, ints_of(workspace), place.device, place.stream);
  return {q, scale};
}

std::tuple<Tensor, Tensor> w4a4_pack(Tensor w_q, int64_t k) {
  const Place place(w_q);
  check(w_q, "w_q", ScalarType::Byte, {kFree, (k + 1) / 2});
  STD_TORCH_CHECK(k <= quota::cuda::kLargestK, "k: expected at most ", quota::cuda::kLargestK, " for exact sums, got ", k);
  const int64_t n = w_q.size(0), rows = quota::cuda::round_to(n, quota::cuda::kTileRows), steps = quota::cuda::ceil_div(k, quota::cuda::kStepK);
  Tensor blocks = make(w_q, {rows / quota::cuda::kTileRows, steps, quota::cuda::kTileBytes}, ScalarType::Byte), col_sum = make(w_q, {n}, ScalarType::Int);
  const quota::PackArgs args{bytes(w_q), n, k, static_cast<uint8_t*>(blocks.mutable_data_ptr()), static_cast<int32_t*>(col_sum.mutable_data_ptr())};
  quota::cuda::w4a4_pack(args, place.stream);
  return {blocks, col_sum};
}

Tensor w4a4_linear(Tensor x_q, Tensor x_scale, Tensor blocks, Tensor col_sum, Tensor w_scale, int64_t k, MaybeTensor bias, MaybeTensor x_zero, int64_t way) {
  const Place place(x_q);
  const int64_t m = x_q.size(0), n = w_scale.size(0), tiles = quota::cuda::ceil_div(n, quota::cuda::kTileRows);
  check(x_q, "x_q", ScalarType::Byte, {kFree, (k + 1) / 2});
  check(x_scale, "x_scale", ScalarType::Float, {m});
  check(w_scale, "w_scale", ScalarType::Float, {kFree});
  check(blocks, "blocks", ScalarType::Byte, {tiles, quota::cuda::ceil_div(k, quota::cuda::kStepK), quota::cuda::kTileBytes});
  check(col_sum, "col_sum", ScalarType::Int, {n});
  if (bias) check(*bias, "bias", ScalarType::Float, {n});
  if (x_zero) check(*x_zero, "x_zero", ScalarType::Int, {m});
  STD_TORCH_CHECK(way >= 0 && way <= static_cast<int64_t>(Way::kWarpgroup), "way: unknown number ", way);
  const auto wanted = static_cast<Way>(way);
  const bool few = wanted == Way::kFew4 || wanted == Way::kFew8, four = wanted == Way::kFew4 || wanted == Way::kTile4;
  STD_TORCH_CHECK(!few || m <= quota::cuda::kFewRows, "way: expected at most ", quota::cuda::kFewRows, " rows for it, got ", m);
#ifndef QUOTA_EMULATED
  STD_TORCH_CHECK(!four || place.device.arch < 90, "way: this GPU has no 4-bit products");
  STD_TORCH_CHECK(wanted != Way::kWarpgroup || (place.device.arch == 90 && quota::cuda::kWarpgroupBuilt),
                  "way: this GPU has no wgmma, or the library is built without QUOTA_CUDA_ARCHS=90a");
#else
  static_cast<void>(four);
#endif
  Tensor y = make(x_q, {m, n}, ScalarType::Float);
  if (m == 0 || n == 0) return y;
  const quota::LinearArgs args{
      bytes(x_q), nullptr, nullptr, floats(x_scale), x_zero ? ints(*x_zero) : nullptr, bytes(blocks), ints(col_sum), floats(w_scale), maybe_floats(bias),
      static_cast<float*>(y.mutable_data_ptr()), m, n, k};
  const auto plan = quota::cuda::plan_linear(args, wanted, place.device);
  Tensor workspace = make(x_q, {plan.workspace_bytes}, ScalarType::Byte);
  quota::cuda::w4a4_linear(args, plan, workspace.mutable_data_ptr(), place.stream);
  return y;
}

void kv4_append(Tensor cache_q, Tensor cache_scale, Tensor cache_zero, Tensor x, int64_t position, double clip) {
  const Place place(x);
  check(x, "x", ScalarType::Float, {kFree, kFree, kFree, kFree});
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), dim = x.size(3);
  const auto cache = kv4<uint8_t, float>(cache_q, cache_scale, cache_zero, batch, heads, dim, "cache");
  STD_TORCH_CHECK(position >= 0 && position + tokens <= cache_q.size(2), "kv4_append: expected room for slots ", position, "..", position + tokens,
                  ", the cache holds ", cache_q.size(2));
  quota::cuda::kv4_append({cache, floats(x), heads, tokens, dim, position, static_cast<float>(clip)}, batch, place.stream);
}

Tensor qkv_append(
    Tensor qkv, MaybeTensor cos, MaybeTensor sin, MaybeTensor q_transform, MaybeTensor k_transform, int64_t q_exponent, int64_t k_exponent, Tensor k_q,
    Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, int64_t position, double k_clip, double v_clip) {
  const Place place(qkv);
  quota::HeadsArgs args = heads_args(qkv, cos, sin, q_transform, k_transform, {k_q, k_scale, k_zero}, {v_q, v_scale, v_zero}, position, check_rows);
  args.q_exponent = static_cast<int>(q_exponent), args.k_exponent = static_cast<int>(k_exponent);
  args.k_clip = static_cast<float>(k_clip), args.v_clip = static_cast<float>(v_clip);
  Tensor q = make(qkv, {qkv.size(0), args.heads, args.tokens, args.dim}, ScalarType::Float);
  args.q = static_cast<float*>(q.mutable_data_ptr());
  quota::cuda::qkv_append(args, qkv.size(0), place.stream);
  return q;
}

std::tuple<Tensor, Tensor> attention(quota::AttentionArgs args, const quota::Pages& pages, const Tensor& q, const Place& place) {
  const int64_t batch = q.size(0);
  STD_TORCH_CHECK(args.dim % 8 == 0 && args.dim <= quota::cuda::kLargestHead, "q: expected a head size that is a multiple of 8 and at most ",
                  quota::cuda::kLargestHead, ", got ", args.dim, "; use the triton or native implementation (QUOTA_IMPL)");
  for (const int64_t stride : {args.k.q_batch, args.k.q_head, args.v.q_batch, args.v.q_head})
    STD_TORCH_CHECK(stride % (args.dim / 2) == 0, "k, v: expected codes of whole rows between heads, got a stride of ", stride, " bytes");
  const uintptr_t alignment = args.dim == 128 ? 16 : args.dim == 64 ? 8 : 4;  // of what the kernel reads at once
  for (const uint8_t* codes : {args.k.q, args.v.q})
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(codes) % alignment == 0, "k, v: expected codes that start at a multiple of ", alignment, " bytes");
  Tensor out = make(q, {batch, args.tokens, args.heads, args.dim}, ScalarType::Float), lse = make(q, {batch, args.heads, args.tokens}, ScalarType::Float);
  args.out = static_cast<float*>(out.mutable_data_ptr()), args.lse = static_cast<float*>(lse.mutable_data_ptr());
  const auto plan = quota::cuda::plan_attention(args, batch);
  Tensor workspace = make(q, {plan.workspace_floats}, ScalarType::Float);
  quota::cuda::kv4_attention(args, pages, batch, plan, static_cast<float*>(workspace.mutable_data_ptr()), place.stream);
  return {out, lse};
}

std::tuple<Tensor, Tensor> kv4_attention(
    Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, int64_t length, MaybeTensor start, double scaling,
    MaybeTensor shared) {
  const Place place(q);
  auto args = attention_args(q, {k_q, k_scale, k_zero}, {v_q, v_scale, v_zero}, length, start, shared);
  args.scaling = static_cast<float>(scaling);
  return attention(args, {nullptr, nullptr, 0, 0}, q, place);
}

// Lengths stay on the device: places for the widest row are launched, and those past a row's end have nothing to do.
std::tuple<Tensor, Tensor> kv4_paged_attention(
    Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, Tensor table, Tensor length, double scaling,
    MaybeTensor shared) {
  const Place place(q);
  auto args = paged_args(q, {k_q, k_scale, k_zero}, {v_q, v_scale, v_zero}, table, length, shared);
  args.scaling = static_cast<float>(scaling);
  return attention(args, {ints(table), ints(length), table.size(1), k_q.size(2)}, q, place);
}

}  // namespace

STABLE_TORCH_LIBRARY(QUOTA_LIBRARY, m) {
  m.def("transform(Tensor x, Tensor? left, Tensor? right, int l, int exponent) -> Tensor");
  m.def("quantize_act(Tensor x, Tensor? left, Tensor? right, int l, int exponent, float clip, int prologue) -> (Tensor, Tensor)");
  m.def("w4a4_pack(Tensor w_q, int k) -> (Tensor, Tensor)");
  m.def(
      "w4a4_linear(Tensor x_q, Tensor x_scale, Tensor blocks, Tensor col_sum, Tensor w_scale, int k, Tensor? bias, Tensor? x_zero, int way) -> Tensor");
  m.def("kv4_append(Tensor(a!) cache_q, Tensor(b!) cache_scale, Tensor(c!) cache_zero, Tensor x, int position, float clip) -> ()");
  m.def(
      "qkv_append(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? q_transform, Tensor? k_transform, int q_exponent, int k_exponent, Tensor(a!) k_q, Tensor(b!) k_scale, Tensor(c!) k_zero, "
      "Tensor(d!) v_q, Tensor(e!) v_scale, Tensor(f!) v_zero, int position, float k_clip, float v_clip) -> Tensor");
  m.def(
      "kv4_attention(Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, int length, Tensor? start, "
      "float scaling, Tensor? shared=None) -> (Tensor, Tensor)");
  m.def(
      "kv4_paged_attention(Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, Tensor table, Tensor length, "
      "float scaling, Tensor? shared=None) -> (Tensor, Tensor)");
#ifdef QUOTA_EMULATED
  m.def("use_device(int arch, int processors) -> ()");
#else
  m.def("check_device(int index) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(QUOTA_LIBRARY, QUOTA_KEY, m) {
  m.impl("transform", TORCH_BOX(&transform));
  m.impl("quantize_act", TORCH_BOX(&quantize_act));
  m.impl("w4a4_pack", TORCH_BOX(&w4a4_pack));
  m.impl("w4a4_linear", TORCH_BOX(&w4a4_linear));
  m.impl("kv4_append", TORCH_BOX(&kv4_append));
  m.impl("qkv_append", TORCH_BOX(&qkv_append));
  m.impl("kv4_attention", TORCH_BOX(&kv4_attention));
  m.impl("kv4_paged_attention", TORCH_BOX(&kv4_paged_attention));
}

STABLE_TORCH_LIBRARY_IMPL(QUOTA_LIBRARY, CompositeExplicitAutograd, m) {
#ifdef QUOTA_EMULATED
  m.impl("use_device", TORCH_BOX(&use_device));
#else
  m.impl("check_device", TORCH_BOX(&check_device));
#endif
}
