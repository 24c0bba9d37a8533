// The ops as torch sees them: torch's stable ABI only, so one binary serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "quota/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kFree = -1;  // a size that is not checked

std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + (size == kFree ? std::string("any") : std::to_string(size));
  return text + "]";
}

void check(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> sizes, bool contiguous = true) {
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  std::string got = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    got += (i ? ", " : "") + std::to_string(t.size(i));
    if (fits) {
      const int64_t want = sizes.begin()[i];
      fits = want == kFree || want == t.size(i);
    }
  }
  STD_TORCH_CHECK(fits, name, ": expected shape ", shape_text(sizes), ", got ", got, "]");
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected dtype ", torch::headeronly::toString(type), ", got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(!contiguous || t.is_contiguous(), name, ": expected a contiguous tensor");
}

Tensor make(std::initializer_list<int64_t> sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
const uint8_t* bytes(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }
const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// Rows per piece of parallel work: about 16 thousand multiply-adds, the cost of waking a thread.
int64_t grain(int64_t work_per_row) { return 1 + (1 << 14) / (work_per_row + 1); }

quota::TransformArgs transform_args(const Tensor& x, const MaybeTensor& left, const MaybeTensor& right) {
  check(x, "x", ScalarType::Float, {kFree, kFree});
  const int64_t k = x.size(1);
  int64_t l = 1;
  if (left) {
    l = left->size(0);
    check(*left, "left", ScalarType::Float, {l, l});
  } else if (right && right->size(0) > 0) {
    l = k / right->size(0);
  }
  STD_TORCH_CHECK(l > 0 && k % l == 0, "left: size ", l, " does not divide the ", k, " features of x");
  if (right) check(*right, "right", ScalarType::Float, {k / l, k / l});
  return {floats(x), left ? floats(*left) : nullptr, right ? floats(*right) : nullptr, l, k / l, nullptr};
}

int64_t transform_work(const quota::TransformArgs& t) { return t.l * t.r * ((t.left ? t.l : 0) + (t.right ? t.r : 0) + 1); }

Tensor transform(Tensor x, MaybeTensor left, MaybeTensor right) {
  auto args = transform_args(x, left, right);
  if (!left && !right) return x;
  Tensor y = make({x.size(0), x.size(1)}, ScalarType::Float);
  args.y = static_cast<float*>(y.mutable_data_ptr());
  const auto run = quota::kernels().transform;
  parallel_for(0, x.size(0), grain(transform_work(args)), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> quantize_act(Tensor x, MaybeTensor left, MaybeTensor right, double clip) {
  const auto transform = transform_args(x, left, right);
  Tensor q = make({x.size(0), (x.size(1) + 1) / 2}, ScalarType::Byte), scale = make({x.size(0)}, ScalarType::Float);
  const quota::QuantizeArgs args{transform, static_cast<float>(clip), static_cast<uint8_t*>(q.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr())};
  const auto run = quota::kernels().quantize_act;
  parallel_for(0, x.size(0), grain(transform_work(transform)), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {q, scale};
}

std::tuple<Tensor, Tensor> w4a4_pack(Tensor w_q, int64_t k) {
  check(w_q, "w_q", ScalarType::Byte, {kFree, (k + 1) / 2});
  const int64_t n = w_q.size(0), panels = (n + quota::kPanel - 1) / quota::kPanel;
  Tensor blocks = make({panels, quota::padded_k(k) / quota::kGroup, 2 * quota::kPanel}, ScalarType::Byte);
  Tensor col_sum = make({panels * quota::kPanel}, ScalarType::Int);
  const quota::PackArgs args{bytes(w_q), n, k, static_cast<uint8_t*>(blocks.mutable_data_ptr()), static_cast<int32_t*>(col_sum.mutable_data_ptr())};
  parallel_for(0, panels, grain(quota::kPanel * k), [&](int64_t begin, int64_t end) { quota::pack_weight(args, begin, end); });
  return {blocks, col_sum};
}

Tensor w4a4_linear(Tensor x_q, Tensor x_scale, Tensor blocks, Tensor col_sum, Tensor w_scale, int64_t k, MaybeTensor bias, MaybeTensor x_zero) {
  const int64_t m = x_q.size(0), n = w_scale.size(0), panels = (n + quota::kPanel - 1) / quota::kPanel, lda = quota::padded_k(k);
  check(x_q, "x_q", ScalarType::Byte, {kFree, (k + 1) / 2});
  check(x_scale, "x_scale", ScalarType::Float, {m});
  check(w_scale, "w_scale", ScalarType::Float, {kFree});
  check(blocks, "blocks", ScalarType::Byte, {panels, lda / quota::kGroup, 2 * quota::kPanel});
  check(col_sum, "col_sum", ScalarType::Int, {panels * quota::kPanel});
  if (bias) check(*bias, "bias", ScalarType::Float, {n});
  if (x_zero) check(*x_zero, "x_zero", ScalarType::Int, {m});
  Tensor y = make({m, n}, ScalarType::Float);
  if (m == 0 || n == 0) return y;

  const auto& table = quota::kernels();
  Tensor a = make({m, lda}, ScalarType::Char), row_sum = make({m}, ScalarType::Int);
  const quota::UnpackArgs unpack{bytes(x_q), k, static_cast<int8_t*>(a.mutable_data_ptr()), static_cast<int32_t*>(row_sum.mutable_data_ptr())};
  parallel_for(0, m, grain(k / 8), [&](int64_t begin, int64_t end) { table.unpack_act(unpack, begin, end); });

  const quota::LinearArgs args{
      unpack.a, unpack.row_sum, floats(x_scale), x_zero ? ints(*x_zero) : nullptr, bytes(blocks), ints(col_sum), floats(w_scale),
      bias ? floats(*bias) : nullptr, static_cast<float*>(y.mutable_data_ptr()), m, n, k};
  // Pieces of work: a panel times a share of the rows, enough of them to occupy the threads but no share so short that unpacking dominates.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t shares = (4 * threads + panels - 1) / panels;
  if (shares > m / 96) shares = m / 96;
  if (shares < 1) shares = 1;
  const int64_t share_rows = ((m + shares - 1) / shares + 5) / 6 * 6;
  parallel_for(0, panels * shares, grain((m + shares - 1) / shares * k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % shares * share_rows, last = first + share_rows < m ? first + share_rows : m;
      if (first < last) table.linear(args, i / shares, first, last);
    }
  });
  return y;
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

void kv4_append(Tensor cache_q, Tensor cache_scale, Tensor cache_zero, Tensor x, int64_t position, double clip) {
  check(x, "x", ScalarType::Float, {kFree, kFree, kFree, kFree});
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), dim = x.size(3);
  const auto cache = kv4<uint8_t, float>(cache_q, cache_scale, cache_zero, batch, heads, dim, "cache");
  STD_TORCH_CHECK(position >= 0 && position + tokens <= cache_q.size(2), "kv4_append: expected room for slots ", position, "..", position + tokens,
                  ", the cache holds ", cache_q.size(2));
  const quota::AppendArgs args{cache, floats(x), heads, tokens, dim, position, static_cast<float>(clip)};
  const auto run = quota::kernels().append;
  parallel_for(0, batch * heads * tokens, grain(4 * dim), [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

std::tuple<Tensor, Tensor> kv4_attention(
    Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, int64_t length, Tensor start, double scaling,
    MaybeTensor shared) {
  check(q, "q", ScalarType::Float, {kFree, kFree, kFree, kFree});
  const int64_t extra = shared && shared->dim() == 3 ? shared->size(1) : 0;
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3) - extra, kv_heads = k_q.dim() == 4 ? k_q.size(1) : 0;
  const int64_t slots = shared && shared->dim() == 3 ? shared->size(2) : 0;
  if (shared) check(*shared, "shared", ScalarType::Float, {batch, kFree, kFree});
  STD_TORCH_CHECK(!shared || slots >= length, "shared: expected at least ", length, " slots, got ", slots);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "k: expected [B, Hkv, C, D/2] with Hkv dividing the ", heads, " heads of q, got Hkv = ", kv_heads);
  const auto k = kv4<const uint8_t, const float>(k_q, k_scale, k_zero, batch, kv_heads, dim, "k");
  const auto v = kv4<const uint8_t, const float>(v_q, v_scale, v_zero, batch, kv_heads, dim, "v");
  check(start, "start", ScalarType::Int, {batch});
  STD_TORCH_CHECK(tokens <= length && length <= k_q.size(2) && length <= v_q.size(2), "length: expected at least the ", tokens,
                  " new tokens and at most the cache's ", k_q.size(2), " slots, got ", length);
  for (int64_t b = 0; b < batch; ++b) STD_TORCH_CHECK(ints(start)[b] >= 0, "start: expected a slot for row ", b, ", got ", ints(start)[b]);
  Tensor out = make({batch, tokens, heads, dim}, ScalarType::Float), lse = make({batch, heads, tokens}, ScalarType::Float);
  const quota::AttentionArgs args{
      floats(q), k, v, ints(start), shared ? floats(*shared) : nullptr, static_cast<float*>(out.mutable_data_ptr()),
      static_cast<float*>(lse.mutable_data_ptr()), heads, kv_heads, tokens, dim, extra, slots, length, static_cast<float>(scaling)};
  const int64_t tiles = (tokens * (heads / kv_heads) + quota::kQueryTile - 1) / quota::kQueryTile;
  const auto run = quota::kernels().attention;
  parallel_for(0, batch * kv_heads * tiles, grain(2 * length * dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // Later tiles see more slots: early and late ones take turns, so that a contiguous share of the pieces is an even share of the work.
      const int64_t turn = i / (batch * kv_heads), tile = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
      run(args, i / kv_heads % batch, i % kv_heads, tile);
    }
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> token_score(Tensor q, Tensor k, Tensor lse, Tensor text, Tensor visual, double scaling) {
  check(q, "q", ScalarType::Float, {kFree, kFree, kFree, kFree});
  const int64_t batch = q.size(0), heads = q.size(1), slots = q.size(2), dim = q.size(3), kv_heads = k.dim() == 4 ? k.size(1) : 0;
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "k: expected [B, Hkv, S, D] with Hkv dividing the ", heads, " heads of q, got Hkv = ", kv_heads);
  check(k, "k", ScalarType::Float, {batch, kv_heads, slots, dim});
  check(lse, "lse", ScalarType::Float, {batch, heads, slots});
  check(text, "text", ScalarType::Bool, {batch, slots});
  check(visual, "visual", ScalarType::Bool, {batch, slots});
  Tensor inter = make({batch, slots}, ScalarType::Float), intra = make({batch, slots}, ScalarType::Float);
  float* outs[2] = {static_cast<float*>(inter.mutable_data_ptr()), static_cast<float*>(intra.mutable_data_ptr())};
  for (float* out : outs)
    for (int64_t i = 0; i < batch * slots; ++i) out[i] = 0.0f;

  struct Piece {
    int64_t batch, column;
  };
  std::vector<std::vector<int64_t>> texts(batch), visuals(batch);
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < slots; ++i) {
      if (bytes(text)[b * slots + i]) texts[b].push_back(i);
      if (bytes(visual)[b * slots + i]) visuals[b].push_back(i);
    }
    for (size_t c = 0; c < visuals[b].size(); c += quota::kScoreColumns) pieces.push_back({b, static_cast<int64_t>(c)});
  }
  const auto run = quota::kernels().score;
  parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [b, column] = pieces[i];
      const auto& columns = visuals[b];
      const int64_t left = static_cast<int64_t>(columns.size()) - column, count = left < quota::kScoreColumns ? left : quota::kScoreColumns;
      const quota::ScoreArgs args{
          floats(q) + b * heads * slots * dim, floats(k) + b * kv_heads * slots * dim, floats(lse) + b * heads * slots,
          heads, kv_heads, slots, dim, static_cast<float>(scaling)};
      run(args, texts[b].data(), static_cast<int64_t>(texts[b].size()), columns.data() + column, count, outs[0] + b * slots);
      run(args, columns.data(), static_cast<int64_t>(columns.size()), columns.data() + column, count, outs[1] + b * slots);
    }
  });
  return {inter, intra};
}

Tensor token_select(Tensor score, Tensor eligible, Tensor keep) {
  check(score, "score", ScalarType::Float, {kFree, kFree});
  const int64_t batch = score.size(0), slots = score.size(1);
  check(eligible, "eligible", ScalarType::Bool, {batch, slots});
  check(keep, "keep", ScalarType::Long, {batch});
  Tensor mask = make({batch, slots}, ScalarType::Bool);
  const auto* counts = static_cast<const int64_t*>(keep.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    quota::select_tokens(floats(score) + b * slots, bytes(eligible) + b * slots, slots, counts[b], static_cast<uint8_t*>(mask.mutable_data_ptr()) + b * slots);
  return mask;
}

// x: rows of bytes.
Tensor token_gather(Tensor x, Tensor index) {
  check(x, "x", ScalarType::Byte, {kFree, kFree, kFree});
  const int64_t batch = x.size(0), slots = x.size(1), row_bytes = x.size(2);
  check(index, "index", ScalarType::Long, {batch, kFree});
  const int64_t taken = index.size(1);
  const auto* from = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < batch * taken; ++i)
    STD_TORCH_CHECK(from[i] >= 0 && from[i] < slots, "index: expected 0 <= index < ", slots, ", got ", from[i]);
  Tensor y = make({batch, taken, row_bytes}, ScalarType::Byte);
  auto* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  parallel_for(0, batch * taken, grain(row_bytes / 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(out + i * row_bytes, bytes(x) + (i / taken * slots + from[i]) * row_bytes, static_cast<size_t>(row_bytes));
  });
  return y;
}

bool use_isa(std::string name) { return quota::use(name.c_str()); }

// The instruction sets this CPU can run, best first, comma-separated; the one in use is named by `isa`.
std::string isas() {
  std::string names;
  for (int i = 0; const auto* table = quota::supported(i); ++i) names += (i ? "," : "") + std::string(table->name);
  return names;
}

std::string isa() { return quota::kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(quota_cpu, m) {
  m.def("transform(Tensor x, Tensor? left, Tensor? right) -> Tensor");
  m.def("quantize_act(Tensor x, Tensor? left, Tensor? right, float clip) -> (Tensor, Tensor)");
  m.def("w4a4_pack(Tensor w_q, int k) -> (Tensor, Tensor)");
  m.def("w4a4_linear(Tensor x_q, Tensor x_scale, Tensor blocks, Tensor col_sum, Tensor w_scale, int k, Tensor? bias, Tensor? x_zero) -> Tensor");
  m.def("kv4_append(Tensor(a!) cache_q, Tensor(b!) cache_scale, Tensor(c!) cache_zero, Tensor x, int position, float clip) -> ()");
  m.def(
      "kv4_attention(Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, int length, Tensor start, "
      "float scaling, Tensor? shared=None) -> (Tensor, Tensor)");
  m.def("token_score(Tensor q, Tensor k, Tensor lse, Tensor text, Tensor visual, float scaling) -> (Tensor, Tensor)");
  m.def("token_select(Tensor score, Tensor eligible, Tensor keep) -> Tensor");
  m.def("token_gather(Tensor x, Tensor index) -> Tensor");
  m.def("use_isa(str name) -> bool");
  m.def("isas() -> str");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(quota_cpu, CPU, m) {
  m.impl("transform", TORCH_BOX(&transform));
  m.impl("quantize_act", TORCH_BOX(&quantize_act));
  m.impl("w4a4_pack", TORCH_BOX(&w4a4_pack));
  m.impl("w4a4_linear", TORCH_BOX(&w4a4_linear));
  m.impl("kv4_append", TORCH_BOX(&kv4_append));
  m.impl("kv4_attention", TORCH_BOX(&kv4_attention));
  m.impl("token_score", TORCH_BOX(&token_score));
  m.impl("token_select", TORCH_BOX(&token_select));
  m.impl("token_gather", TORCH_BOX(&token_gather));
}

STABLE_TORCH_LIBRARY_IMPL(quota_cpu, CompositeExplicitAutograd, m) {
  m.impl("use_isa", TORCH_BOX(&use_isa));
  m.impl("isas", TORCH_BOX(&isas));
  m.impl("isa", TORCH_BOX(&isa));
}
