// What both libraries' bindings share: checks of tensors, with the shape expected and the shape given in the message.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "quota/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kFree = -1;  // a size that is not checked

std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  for (int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += size == kFree ? "any" : std::to_string(size);
  }
  return text + "]";
}

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (i) text += ", ";
    text += std::to_string(t.size(i));
  }
  return text + "]";
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (int64_t size : sizes)
    if (t.size(i++) != size && size != kFree) return false;
  return true;
}

void check(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> sizes, bool contiguous = true) {
  STD_TORCH_CHECK(has_shape(t, sizes), name, ": expected shape ", shape_text(sizes), ", got ", shape_text(t));
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected dtype ", torch::headeronly::toString(type), ", got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(!contiguous || t.is_contiguous(), name, ": expected a contiguous tensor");
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
const uint8_t* bytes(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }
const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// A factor of size n in one of the two layouts of quota.ops.weights.Factor.
void check_rows(const Tensor& t, const char* name, int64_t n) { check(t, name, ScalarType::Short, {n, n + n % 2}); }
void check_panels(const Tensor& t, const char* name, int64_t n) { check(t, name, ScalarType::Short, {(n + 15) / 16, (n + 1) / 2, 16, 2}); }

const int16_t* shorts(const MaybeTensor& t) { return t ? static_cast<const int16_t*>(t->const_data_ptr()) : nullptr; }

// x [M, width] whose rows give k features, matrices of l rows; `check_right` is one of the above.
quota::TransformArgs transform_args(const Tensor& x, int64_t k, const MaybeTensor& left, const MaybeTensor& right, int64_t l, int64_t exponent,
                                    void (*check_right)(const Tensor&, const char*, int64_t)) {
  STD_TORCH_CHECK(l > 0 && k % l == 0, "left: size ", l, " does not divide the ", k, " features of x");
  if (left) check_rows(*left, "left", l);
  if (right) check_right(*right, "right", k / l);
  return {floats(x), shorts(left), shorts(right), l, k / l, static_cast<int>(exponent), nullptr};
}

// The checks and strides that a cache (or a view of one along the batch) has to meet: slots contiguous within a head.
template <class Byte, class Float>
quota::Kv4<Byte, Float> kv4(const Tensor& q, const Tensor& scale, const Tensor& zero, int64_t batch, int64_t heads, int64_t dim, const char* name) {
  STD_TORCH_CHECK(dim % 2 == 0, name, ": expected an even head size, got ", dim);
  check(q, name, ScalarType::Byte, {batch, heads, kFree, dim / 2}, false);
  for (const Tensor* t : {&scale, &zero}) {
    check(*t, name, ScalarType::Float, {batch, heads, q.size(2)}, false);
    STD_TORCH_CHECK(t->size(2) <= 1 || t->stride(2) == 1, name, ": expected scale and zero contiguous along slots");
  }
  STD_TORCH_CHECK((dim <= 2 || q.stride(3) == 1) && (q.size(2) <= 1 || q.stride(2) == dim / 2), name, ": expected codes contiguous along slots");
  const auto pointer = [](const Tensor& t) { return std::is_const_v<Byte> ? const_cast<void*>(t.const_data_ptr()) : t.mutable_data_ptr(); };
  return {static_cast<Byte*>(pointer(q)), static_cast<Float*>(pointer(scale)), static_cast<Float*>(pointer(zero)),
          q.stride(0), q.stride(1), scale.stride(0), scale.stride(1), zero.stride(0), zero.stride(1)};
}

struct KvTensors {  // a cache: codes, scales, zeros
  const Tensor &q, &scale, &zero;
};

// Everything of qkv_append but q, the exponents and the clips.
quota::HeadsArgs heads_args(const Tensor& qkv, const MaybeTensor& cos, const MaybeTensor& sin, const MaybeTensor& q_transform, const MaybeTensor& k_transform,
                            const KvTensors& keys, const KvTensors& values, int64_t position, void (*check_right)(const Tensor&, const char*, int64_t)) {
  check(qkv, "qkv", ScalarType::Float, {kFree, kFree, kFree});
  const bool whole = keys.q.dim() == 4;
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), kv_heads = whole ? keys.q.size(1) : 0, dim = whole ? 2 * keys.q.size(3) : 0;
  STD_TORCH_CHECK(dim > 0 && qkv.size(2) % dim == 0, "qkv: expected heads of ", dim, " values, got ", qkv.size(2), " features");
  const int64_t all = qkv.size(2) / dim, heads = all - 2 * kv_heads;
  STD_TORCH_CHECK(kv_heads > 0 && heads > 0, "qkv: expected heads of q and twice the ", kv_heads, " of the cache, got ", all);
  const auto k = kv4<uint8_t, float>(keys.q, keys.scale, keys.zero, batch, kv_heads, dim, "k");
  const auto v = kv4<uint8_t, float>(values.q, values.scale, values.zero, batch, kv_heads, dim, "v");
  STD_TORCH_CHECK(position >= 0 && position + tokens <= keys.q.size(2) && position + tokens <= values.q.size(2), "qkv_append: expected room for slots ",
                  position, "..", position + tokens, ", the cache holds ", keys.q.size(2));
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos, sin: expected both or none");
  if (cos) {
    STD_TORCH_CHECK(cos->dim() == 3 && (cos->size(0) == 1 || cos->size(0) == batch), "cos: expected a batch of 1 or ", batch);
    check(*cos, "cos", ScalarType::Float, {kFree, tokens, dim});
    check(*sin, "sin", ScalarType::Float, {cos->size(0), tokens, dim});
  }
  if (q_transform) check_right(*q_transform, "q_transform", dim);
  if (k_transform) check_right(*k_transform, "k_transform", dim);
  const auto maybe = [](const MaybeTensor& t) { return t ? floats(*t) : nullptr; };
  return {floats(qkv), maybe(cos), maybe(sin), shorts(q_transform), shorts(k_transform), nullptr, k, v,
          cos && cos->size(0) > 1 ? tokens * dim : 0, heads, kv_heads, tokens, dim, position, 0, 0, 0.0f, 0.0f};
}

// Everything of kv4_attention but the outputs and the scaling; the values of `start` are not looked at.
quota::AttentionArgs attention_args(const Tensor& q, const KvTensors& keys, const KvTensors& values, int64_t length, const MaybeTensor& start,
                                    const MaybeTensor& shared) {
  check(q, "q", ScalarType::Float, {kFree, kFree, kFree, kFree});
  const int64_t extra = shared && shared->dim() == 3 ? shared->size(1) : 0, slots = shared && shared->dim() == 3 ? shared->size(2) : 0;
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3) - extra, kv_heads = keys.q.dim() == 4 ? keys.q.size(1) : 0;
  if (shared) check(*shared, "shared", ScalarType::Float, {batch, kFree, kFree});
  STD_TORCH_CHECK(!shared || slots >= length, "shared: expected at least ", length, " slots, got ", slots);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "k: expected [B, Hkv, C, D/2] with Hkv dividing the ", heads, " heads of q, got Hkv = ", kv_heads);
  const auto k = kv4<const uint8_t, const float>(keys.q, keys.scale, keys.zero, batch, kv_heads, dim, "k");
  const auto v = kv4<const uint8_t, const float>(values.q, values.scale, values.zero, batch, kv_heads, dim, "v");
  if (start) check(*start, "start", ScalarType::Int, {batch});
  STD_TORCH_CHECK(tokens <= length && length <= keys.q.size(2) && length <= values.q.size(2), "length: expected at least the ", tokens,
                  " new tokens and at most the cache's ", keys.q.size(2), " slots, got ", length);
  return {floats(q), k, v, start ? ints(*start) : nullptr, shared ? floats(*shared) : nullptr, nullptr, nullptr, heads, kv_heads, tokens, dim, extra, slots,
          length, 0.0f};
}

// Everything of kv4_paged_attention but the outputs and the scaling; the values of `table` and `length` are not looked at.
quota::AttentionArgs paged_args(const Tensor& q, const KvTensors& keys, const KvTensors& values, const Tensor& table, const Tensor& length,
                                const MaybeTensor& shared) {
  check(q, "q", ScalarType::Float, {kFree, kFree, kFree, kFree});
  const int64_t extra = shared && shared->dim() == 3 ? shared->size(1) : 0, slots = shared && shared->dim() == 3 ? shared->size(2) : 0;
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3) - extra, kv_heads = keys.q.dim() == 4 ? keys.q.size(1) : 0;
  if (shared) check(*shared, "shared", ScalarType::Float, {batch, kFree, kFree});
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "k: expected [U, Hkv, P, D/2] with Hkv dividing the ", heads, " heads of q, got Hkv = ", kv_heads);
  check(table, "table", ScalarType::Int, {batch, kFree});
  check(length, "length", ScalarType::Int, {batch});
  const int64_t places = keys.q.size(2), most = table.size(1) * places;
  const auto k = kv4<const uint8_t, const float>(keys.q, keys.scale, keys.zero, kFree, kv_heads, dim, "k");
  const auto v = kv4<const uint8_t, const float>(values.q, values.scale, values.zero, kFree, kv_heads, dim, "v");
  STD_TORCH_CHECK(values.q.size(2) == places, "v: expected pages of ", places, " places, got ", values.q.size(2));
  STD_TORCH_CHECK(values.q.size(0) == keys.q.size(0), "v: expected ", keys.q.size(0), " units, got ", values.q.size(0));
  // rows are never longer than what both the table and the shared channels have room for
  return {floats(q), k, v, nullptr, shared ? floats(*shared) : nullptr, nullptr, nullptr, heads, kv_heads, tokens, dim, extra, slots,
          shared && slots < most ? slots : most, 0.0f};
}

// A 16-bit cache (or a view of one along the batch): slots contiguous within a head.
quota::Kv16 kv16(const Tensor& x, int64_t batch, int64_t heads, int64_t dim, const char* name) {
  check(x, name, ScalarType::Half, {batch, heads, kFree, dim}, false);
  STD_TORCH_CHECK((dim <= 1 || x.stride(3) == 1) && (x.size(2) <= 1 || x.stride(2) == dim), name, ": expected values contiguous along slots");
  return {static_cast<const quota::Float16*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

// Everything of kv16_attention but the outputs: `batch` rows of a cache, or units of a pool (kFree). Values of `start` are not looked at.
quota::Attention16Args attention16_args(const Tensor& q, const Tensor& keys, const Tensor& values, int64_t batch, int64_t length, const MaybeTensor& start,
                                        double scaling) {
  check(q, "q", ScalarType::Float, {kFree, kFree, kFree, kFree});
  const int64_t heads = q.size(1), tokens = q.size(2), dim = q.size(3), kv_heads = keys.dim() == 4 ? keys.size(1) : 0;
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "k: expected [B, Hkv, C, D] with Hkv dividing the ", heads, " heads of q, got Hkv = ", kv_heads);
  const auto k = kv16(keys, batch, kv_heads, dim, "k"), v = kv16(values, batch, kv_heads, dim, "v");
  if (start) check(*start, "start", ScalarType::Int, {q.size(0)});
  return {floats(q), k, v, start ? ints(*start) : nullptr, nullptr, nullptr, heads, kv_heads, tokens, dim, length, static_cast<float>(scaling)};
}

}  // namespace
