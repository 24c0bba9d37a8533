// The ops as torch sees them: torch's stable ABI only, so one binary serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "quota/kernels.h"

namespace {

using torch::stable::parallel_for;

constexpr int64_t kFreshFloats = 32 << 18;  // from 32 MiB on malloc maps memory anew at every call: 4 KiB pages would be handed out one by one

Tensor make(std::initializer_list<int64_t> sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Ask for pages of 2 MiB, before the memory is written. Only whole large pages inside are asked for, so nothing else grows; a system that has none
// goes on with small ones.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t size_bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(size_bytes)) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Work per nanosecond of one core, about: multiply-adds on bytes and on floats, bytes that are copied. Attention at one query per head unpacks more than it
// multiplies.
enum Rate : int64_t { kByteProducts = 128, kFloatProducts = 16, kAttention = 8, kCopies = 8 };

// Rows per piece of parallel work. Another thread is worth waking for 8 microseconds of it: small models run faster on one.
int64_t grain(int64_t work_per_row, Rate rate) { return 1 + 8000 * rate / (work_per_row + 1); }

int64_t transform_work(const quota::TransformArgs& t) { return t.l * t.r * ((t.left ? t.l : 0) + (t.right ? t.r : 0) + 1); }

Tensor transform(Tensor x, MaybeTensor left, MaybeTensor right, int64_t l, int64_t exponent) {
  check(x, "x", ScalarType::Float, {kFree, kFree});
  auto args = transform_args(x, x.size(1), left, right, l, exponent, check_panels);
  if (!left && !right) return x;
  Tensor y = make({x.size(0), x.size(1)}, ScalarType::Float);
  args.y = static_cast<float*>(y.mutable_data_ptr());
  const auto run = quota::kernels().transform;
  parallel_for(0, x.size(0), grain(transform_work(args), kFloatProducts), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return y;
}

constexpr int64_t kPrologueWork = 16;  // multiply-adds per value

std::tuple<Tensor, Tensor> quantize_act(Tensor x, MaybeTensor left, MaybeTensor right, int64_t l, int64_t exponent, double clip, int64_t prologue) {
  check(x, "x", ScalarType::Float, {kFree, kFree});
  STD_TORCH_CHECK(prologue >= 0 && prologue <= static_cast<int64_t>(quota::Prologue::kGelu), "prologue: unknown number ", prologue);
  const auto first = static_cast<quota::Prologue>(prologue);
  const int64_t m = x.size(0), k = first == quota::Prologue::kSiluMul ? x.size(1) / 2 : x.size(1);
  STD_TORCH_CHECK(first != quota::Prologue::kSiluMul || 2 * k == x.size(1), "x: expected gate and up halves of one size, got ", x.size(1), " features");
  const auto transform = transform_args(x, k, left, right, l, exponent, check_panels);
  Tensor q = make({m, (k + 1) / 2}, ScalarType::Byte), scale = make({m}, ScalarType::Float);
  const quota::QuantizeArgs args{
      transform, static_cast<float>(clip), static_cast<uint8_t*>(q.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr()), first};
  const auto run = quota::kernels().quantize_act;
  const int64_t work = transform_work(transform) + (first == quota::Prologue::kNone ? 0 : kPrologueWork * k);
  parallel_for(0, m, grain(work, kFloatProducts), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {q, scale};
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  check(x, "x", ScalarType::Float, {kFree, kFree});
  check(weight, "weight", ScalarType::Float, {x.size(1)});
  Tensor y = make({x.size(0), x.size(1)}, ScalarType::Float);
  const quota::NormArgs args{floats(x), floats(weight), x.size(1), static_cast<float>(eps), static_cast<float*>(y.mutable_data_ptr())};
  const auto run = quota::kernels().rms_norm;
  parallel_for(0, x.size(0), grain(2 * x.size(1), kFloatProducts), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> w4a4_pack(Tensor w_q, int64_t k) {
  check(w_q, "w_q", ScalarType::Byte, {kFree, (k + 1) / 2});
  const int64_t n = w_q.size(0), panels = (n + quota::kPanel - 1) / quota::kPanel;
  Tensor blocks = make({panels, quota::padded_k(k) / quota::kGroup, 2 * quota::kPanel}, ScalarType::Byte);
  prefer_huge_pages(blocks.mutable_data_ptr(), blocks.numel());  // every decode step streams them: fewer addresses to translate
  Tensor col_sum = make({panels * quota::kPanel}, ScalarType::Int);
  const quota::PackArgs args{bytes(w_q), n, k, static_cast<uint8_t*>(blocks.mutable_data_ptr()), static_cast<int32_t*>(col_sum.mutable_data_ptr())};
  parallel_for(0, panels, grain(quota::kPanel * k / 2, kCopies), [&](int64_t begin, int64_t end) { quota::pack_weight(args, begin, end); });
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
  if (y.numel() >= kFreshFloats) prefer_huge_pages(y.mutable_data_ptr(), 4 * y.numel());

  quota::LinearArgs args{
      bytes(x_q), nullptr, nullptr, floats(x_scale), x_zero ? ints(*x_zero) : nullptr, bytes(blocks), ints(col_sum), floats(w_scale),
      bias ? floats(*bias) : nullptr, static_cast<float*>(y.mutable_data_ptr()), m, n, k};
  const quota::Linear& linear = quota::kernels().linear;
  if (m <= linear.few) {
    parallel_for(0, panels, grain(m * k * quota::kPanel, kByteProducts), [&](int64_t begin, int64_t end) { linear.few_rows(args, begin, end); });
    return y;
  }
  Tensor a = make({round_up(m, linear.multiple), lda}, ScalarType::Char), row_sum = make({m}, ScalarType::Int);
  const quota::UnpackArgs unpack{args.x_q, k, static_cast<int8_t*>(a.mutable_data_ptr()), static_cast<int32_t*>(row_sum.mutable_data_ptr())};
  parallel_for(0, m, grain(k, kCopies), [&](int64_t begin, int64_t end) { linear.unpack(unpack, begin, end); });
  args.a = unpack.a, args.row_sum = unpack.row_sum;

  const int64_t row_blocks = quota::row_blocks(linear, m, panels, torch::stable::get_num_threads());
  const int64_t block = round_up((m + row_blocks - 1) / row_blocks, linear.multiple);
  // Work in the order of row blocks, then panels: each thread's share is a run of panels of one block, perhaps the end of it and the next one's begin.
  parallel_for(0, row_blocks * panels, grain(block * k * quota::kPanel, kByteProducts), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / panels * block, panel = begin % panels, count = panels - panel < end - begin ? panels - panel : end - begin;
      if (row < m) linear.multiply(args, {panel, panel + count, row, row + block < m ? row + block : m});
      begin += count;
    }
  });
  return y;
}

void kv4_append(Tensor cache_q, Tensor cache_scale, Tensor cache_zero, Tensor x, int64_t position, double clip) {
  check(x, "x", ScalarType::Float, {kFree, kFree, kFree, kFree});
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), dim = x.size(3);
  const auto cache = kv4<uint8_t, float>(cache_q, cache_scale, cache_zero, batch, heads, dim, "cache");
  STD_TORCH_CHECK(position >= 0 && position + tokens <= cache_q.size(2), "kv4_append: expected room for slots ", position, "..", position + tokens,
                  ", the cache holds ", cache_q.size(2));
  const quota::AppendArgs args{cache, floats(x), heads, tokens, dim, position, static_cast<float>(clip)};
  const auto run = quota::kernels().append;
  parallel_for(0, batch * heads * tokens, grain(4 * dim, kFloatProducts), [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

Tensor qkv_append(
    Tensor qkv, MaybeTensor cos, MaybeTensor sin, MaybeTensor q_transform, MaybeTensor k_transform, int64_t q_exponent, int64_t k_exponent, Tensor k_q,
    Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, int64_t position, double k_clip, double v_clip) {
  quota::HeadsArgs args = heads_args(qkv, cos, sin, q_transform, k_transform, {k_q, k_scale, k_zero}, {v_q, v_scale, v_zero}, position, check_panels);
  args.q_exponent = static_cast<int>(q_exponent), args.k_exponent = static_cast<int>(k_exponent);
  args.k_clip = static_cast<float>(k_clip), args.v_clip = static_cast<float>(v_clip);
  Tensor q = make({qkv.size(0), args.heads, args.tokens, args.dim}, ScalarType::Float);
  args.q = static_cast<float*>(q.mutable_data_ptr());
  const int64_t all = args.heads + 2 * args.kv_heads;
  const auto run = quota::kernels().heads;
  parallel_for(0, qkv.size(0) * args.tokens * all, grain(args.dim * args.dim, kFloatProducts), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return q;
}

// All tiles of query rows by `run`, a kernel of `Args`.
template <class Args, class Run>
std::tuple<Tensor, Tensor> attention(Args args, const quota::Pages& pages, int64_t batch, Run run) {
  const int64_t heads = args.heads, tokens = args.tokens, kv_heads = args.kv_heads;
  Tensor out = make({batch, tokens, heads, args.dim}, ScalarType::Float), lse = make({batch, heads, tokens}, ScalarType::Float);
  args.out = static_cast<float*>(out.mutable_data_ptr()), args.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t tiles = (tokens * (heads / kv_heads) + quota::kQueryTile - 1) / quota::kQueryTile;
  parallel_for(0, batch * kv_heads * tiles, grain(2 * args.length * args.dim, kAttention), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // Later tiles see more slots: early and late ones take turns, so that a contiguous share of the pieces is an even share of the work.
      const int64_t turn = i / (batch * kv_heads), tile = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
      run(args, pages, i / kv_heads % batch, i % kv_heads, tile);
    }
  });
  return {out, lse};
}

void check_start(const MaybeTensor& start, int64_t batch) {
  for (int64_t b = 0; start && b < batch; ++b) STD_TORCH_CHECK(ints(*start)[b] >= 0, "start: expected a slot for row ", b, ", got ", ints(*start)[b]);
}

// Every slot a row may read lies in the pool.
void check_tables(const Tensor& table, const Tensor& length, int64_t capacity, int64_t places, int64_t units) {
  const int64_t width = table.size(1);
  for (int64_t b = 0; b < table.size(0); ++b) {
    const int64_t slots = ints(length)[b];
    STD_TORCH_CHECK(slots >= 0 && slots <= capacity && slots <= width * places, "length: expected at most ", capacity, " slots in ", width,
                    " pages for row ", b, ", got ", slots);
    for (int64_t i = 0; i * places < slots; ++i) {
      const int64_t unit = ints(table)[b * width + i];
      STD_TORCH_CHECK(unit >= 0 && unit < units, "table: expected 0 <= unit < ", units, ", got ", unit);
    }
  }
}

std::tuple<Tensor, Tensor> kv4_attention(
    Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, int64_t length, MaybeTensor start, double scaling,
    MaybeTensor shared) {
  auto args = attention_args(q, {k_q, k_scale, k_zero}, {v_q, v_scale, v_zero}, length, start, shared);
  check_start(start, q.size(0));
  args.scaling = static_cast<float>(scaling);
  return attention(args, {}, q.size(0), quota::kernels().attention);
}

std::tuple<Tensor, Tensor> kv4_paged_attention(
    Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, Tensor table, Tensor length, double scaling,
    MaybeTensor shared) {
  auto args = paged_args(q, {k_q, k_scale, k_zero}, {v_q, v_scale, v_zero}, table, length, shared);
  const int64_t batch = q.size(0), width = table.size(1), places = k_q.size(2);
  check_tables(table, length, args.length, places, k_q.size(0));
  args.scaling = static_cast<float>(scaling);
  return attention(args, {ints(table), ints(length), width, places}, batch, quota::kernels().attention);
}

std::tuple<Tensor, Tensor> kv16_attention(Tensor q, Tensor k, Tensor v, int64_t length, MaybeTensor start, double scaling) {
  const auto args = attention16_args(q, k, v, q.size(0), length, start, scaling);
  STD_TORCH_CHECK(args.tokens <= length && length <= k.size(2) && length <= v.size(2), "length: expected at least the ", args.tokens,
                  " new tokens and at most the cache's ", k.size(2), " slots, got ", length);
  check_start(start, q.size(0));
  return attention(args, {}, q.size(0), quota::kernels().attention16);
}

std::tuple<Tensor, Tensor> kv16_paged_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor length, double scaling) {
  const int64_t batch = q.size(0);
  check(table, "table", ScalarType::Int, {batch, kFree});
  check(length, "length", ScalarType::Int, {batch});
  const int64_t width = table.size(1), places = k.dim() == 4 ? k.size(2) : 0;
  const auto args = attention16_args(q, k, v, kFree, width * places, {}, scaling);
  STD_TORCH_CHECK(v.size(2) == places && v.size(0) == k.size(0), "v: expected ", k.size(0), " units of ", places, " places, got ", v.size(0), " of ", v.size(2));
  check_tables(table, length, args.length, places, k.size(0));
  return attention(args, {ints(table), ints(length), width, places}, batch, quota::kernels().attention16);
}

// The true slots of one row of a mask [B, S].
std::vector<int64_t> slots_of(const Tensor& mask, int64_t row) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < mask.size(1); ++i)
    if (bytes(mask)[row * mask.size(1) + i]) found.push_back(i);
  return found;
}

// Keys are floats `k`, or codes with scales and zeros.
std::tuple<Tensor, Tensor> token_score(
    Tensor q, MaybeTensor k, MaybeTensor k_q, MaybeTensor k_scale, MaybeTensor k_zero, Tensor lse, Tensor text, Tensor visual, double scaling) {
  check(q, "q", ScalarType::Float, {kFree, kFree, kFree, kFree});
  const int64_t batch = q.size(0), heads = q.size(1), slots = q.size(2), dim = q.size(3);
  STD_TORCH_CHECK(k.has_value() != (k_q && k_scale && k_zero), "k: expected floats or codes with scales and zeros");
  const Tensor& keys = k ? *k : *k_q;
  const int64_t kv_heads = keys.dim() == 4 ? keys.size(1) : 0;
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "k: expected [B, Hkv, S, D] with Hkv dividing the ", heads, " heads of q, got Hkv = ", kv_heads);
  quota::ScoreArgs common{nullptr, nullptr, {}, nullptr, heads, kv_heads, slots, dim, static_cast<float>(scaling)};
  if (k) {
    check(*k, "k", ScalarType::Float, {batch, kv_heads, slots, dim});
  } else {
    common.packed = kv4<const uint8_t, const float>(*k_q, *k_scale, *k_zero, batch, kv_heads, dim, "k");
    STD_TORCH_CHECK(k_q->size(2) == slots, "k: expected ", slots, " slots, got ", k_q->size(2));
  }
  check(lse, "lse", ScalarType::Float, {batch, heads, slots});
  check(text, "text", ScalarType::Bool, {batch, slots});
  check(visual, "visual", ScalarType::Bool, {batch, slots});
  Tensor inter = make({batch, slots}, ScalarType::Float), intra = make({batch, slots}, ScalarType::Float);
  float* outs[2] = {static_cast<float*>(inter.mutable_data_ptr()), static_cast<float*>(intra.mutable_data_ptr())};
  std::vector<float> sums(2 * batch * heads * slots);  // [2, B, H, number of columns]
  std::vector<std::vector<int64_t>> queries[2];
  for (int64_t b = 0; b < batch; ++b) queries[0].push_back(slots_of(text, b)), queries[1].push_back(slots_of(visual, b));
  const auto tokens = [&](int set, int64_t b) { return quota::Tokens{queries[set][b].data(), static_cast<int64_t>(queries[set][b].size())}; };

  const auto run = quota::kernels().score;
  parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads;
      auto args = common;
      args.q = floats(q) + b * heads * slots * dim, args.lse = floats(lse) + b * heads * slots;
      if (k)
        args.k = floats(*k) + b * kv_heads * slots * dim;
      else
        args.packed.q += b * args.packed.q_batch, args.packed.scale += b * args.packed.scale_batch, args.packed.zero += b * args.packed.zero_batch;
      for (int set = 0; set < 2; ++set) run(args, i % heads, tokens(set, b), tokens(1, b), sums.data() + (set * batch * heads + i) * slots);
    }
  });
  for (int set = 0; set < 2; ++set)
    for (int64_t b = 0; b < batch; ++b) {
      const auto columns = tokens(1, b);
      const float terms = static_cast<float>(queries[set][b].empty() ? 1 : heads * tokens(set, b).count);
      for (int64_t i = 0; i < slots; ++i) outs[set][b * slots + i] = 0.0f;
      for (int64_t c = 0; c < columns.count; ++c) {
        float total = 0.0f;  // heads in ascending order
        for (int64_t h = 0; h < heads; ++h) total += sums[((set * batch + b) * heads + h) * slots + c];
        outs[set][b * slots + columns.at[c]] = total / terms;
      }
    }
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
  parallel_for(0, batch * taken, grain(row_bytes, kCopies), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(out + i * row_bytes, bytes(x) + (i / taken * slots + from[i]) * row_bytes, static_cast<size_t>(row_bytes));
  });
  return y;
}

Tensor float_linear(Tensor x, Tensor panels, int64_t n) {
  check(x, "x", ScalarType::Float, {kFree, kFree});
  const int64_t m = x.size(0), k = x.size(1), count = (n + quota::kPanel - 1) / quota::kPanel;
  const bool bfloat16 = panels.scalar_type() == ScalarType::BFloat16;
  check(panels, "panels", bfloat16 ? ScalarType::BFloat16 : ScalarType::Float, {count, k, quota::kPanel});
  Tensor y = make({m, n}, ScalarType::Float);
  const quota::FloatLinearArgs args{floats(x), panels.const_data_ptr(), bfloat16, m, n, k, static_cast<float*>(y.mutable_data_ptr())};
  const auto run = quota::kernels().float_linear;
  parallel_for(0, count, grain(m * k * quota::kPanel, kFloatProducts), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) run(args, panel);
  });
  return y;
}

Tensor w4a16_linear(Tensor x, Tensor words, Tensor params, int64_t n, MaybeTensor bias) {
  check(x, "x", ScalarType::Float, {kFree, kFree});
  const int64_t m = x.size(0), k = x.size(1), panels = (n + quota::kPanel - 1) / quota::kPanel;
  check(words, "words", ScalarType::Int, {panels, (k + 7) / 8, quota::kPanel});
  check(params, "params", ScalarType::Float, {panels, (k + quota::kWeightGroup - 1) / quota::kWeightGroup, 2, quota::kPanel});
  if (bias) check(*bias, "bias", ScalarType::Float, {n});
  Tensor y = make({m, n}, ScalarType::Float);
  const quota::GroupedArgs args{floats(x), ints(words), floats(params), bias ? floats(*bias) : nullptr, static_cast<float*>(y.mutable_data_ptr()), m, n, k};
  const auto run = quota::kernels().grouped_linear;
  parallel_for(0, panels, grain(m * k * quota::kPanel, kFloatProducts), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) run(args, panel);
  });
  return y;
}

Tensor w8a8_linear(Tensor x, Tensor blocks, Tensor w_scale, MaybeTensor bias) {
  check(x, "x", ScalarType::Float, {kFree, kFree});
  check(w_scale, "w_scale", ScalarType::Float, {kFree});
  const int64_t m = x.size(0), k = x.size(1), n = w_scale.size(0), panels = (n + quota::kPanel - 1) / quota::kPanel, lda = quota::padded_k(k);
  check(blocks, "blocks", ScalarType::Char, {panels, lda / quota::kGroup, quota::kPanel, quota::kGroup});
  STD_TORCH_CHECK(k <= 131000, "x: expected at most 131000 columns, whose sums of products of bytes stay below 2^31, got ", k);
  if (bias) check(*bias, "bias", ScalarType::Float, {n});
  Tensor y = make({m, n}, ScalarType::Float), q = make({m, lda}, ScalarType::Char), scale = make({m}, ScalarType::Float), sum = make({m}, ScalarType::Int);
  const quota::Quantize8Args rows{floats(x), k, static_cast<int8_t*>(q.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr()),
                                  static_cast<int32_t*>(sum.mutable_data_ptr())};
  const auto& kernels = quota::kernels();
  parallel_for(0, m, grain(4 * k, kFloatProducts), [&](int64_t begin, int64_t end) { kernels.quantize8(rows, begin, end); });
  const quota::Linear8Args args{
      rows, static_cast<const int8_t*>(blocks.const_data_ptr()), floats(w_scale), bias ? floats(*bias) : nullptr, static_cast<float*>(y.mutable_data_ptr()), m, n};
  parallel_for(0, panels, grain(m * k * quota::kPanel, kByteProducts), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) kernels.linear8(args, panel);
  });
  return y;
}

// The pages of a 4-bit pool: q [U, Hkv, P, R] bytes, scale and zero [U, Hkv, P].
struct Pages {
  int64_t units, heads, places, row_bytes;
};

Pages pages_of(const Tensor& q, const Tensor& scale, const Tensor& zero) {
  check(q, "pages_q", ScalarType::Byte, {kFree, kFree, kFree, kFree});
  const Pages pages{q.size(0), q.size(1), q.size(2), q.size(3)};
  check(scale, "pages_scale", ScalarType::Float, {pages.units, pages.heads, pages.places});
  check(zero, "pages_zero", ScalarType::Float, {pages.units, pages.heads, pages.places});
  return pages;
}

// Row m of a packed cache [1, Hkv, M, R] goes to place slot % P of unit slot / P; a negative slot is not stored.
void kv4_page_write(Tensor pages_q, Tensor pages_scale, Tensor pages_zero, Tensor q, Tensor scale, Tensor zero, Tensor slot) {
  const Pages pages = pages_of(pages_q, pages_scale, pages_zero);
  check(slot, "slot", ScalarType::Long, {kFree});
  const int64_t rows = slot.size(0), row_bytes = pages.row_bytes;
  check(q, "q", ScalarType::Byte, {1, pages.heads, rows, row_bytes});
  check(scale, "scale", ScalarType::Float, {1, pages.heads, rows});
  check(zero, "zero", ScalarType::Float, {1, pages.heads, rows});
  const auto* slots = static_cast<const int64_t*>(slot.const_data_ptr());
  for (int64_t m = 0; m < rows; ++m) STD_TORCH_CHECK(slots[m] < pages.units * pages.places, "slot: expected below ", pages.units * pages.places, ", got ", slots[m]);
  auto* to_q = static_cast<uint8_t*>(pages_q.mutable_data_ptr());
  auto* to_scale = static_cast<float*>(pages_scale.mutable_data_ptr());
  auto* to_zero = static_cast<float*>(pages_zero.mutable_data_ptr());
  for (int64_t m = 0; m < rows; ++m) {
    if (slots[m] < 0) continue;
    for (int64_t h = 0; h < pages.heads; ++h) {
      const int64_t to = (slots[m] / pages.places * pages.heads + h) * pages.places + slots[m] % pages.places, from = h * rows + m;
      std::memcpy(to_q + to * row_bytes, bytes(q) + from * row_bytes, static_cast<size_t>(row_bytes));
      to_scale[to] = floats(scale)[from], to_zero[to] = floats(zero)[from];
    }
  }
}

// The first length[b] slots of each table row, moved to the right end of `capacity` contiguous slots; zero before them.
std::tuple<Tensor, Tensor, Tensor> kv4_page_read(Tensor pages_q, Tensor pages_scale, Tensor pages_zero, Tensor table, Tensor length, int64_t capacity) {
  const Pages pages = pages_of(pages_q, pages_scale, pages_zero);
  check(table, "table", ScalarType::Int, {kFree, kFree});
  const int64_t batch = table.size(0), width = table.size(1), row_bytes = pages.row_bytes, heads = pages.heads;
  check(length, "length", ScalarType::Int, {batch});
  check_tables(table, length, capacity, pages.places, pages.units);
  Tensor q = make({batch, heads, capacity, row_bytes}, ScalarType::Byte), scale = make({batch, heads, capacity}, ScalarType::Float);
  Tensor zero = make({batch, heads, capacity}, ScalarType::Float);
  auto* to_q = static_cast<uint8_t*>(q.mutable_data_ptr());
  auto* to_scale = static_cast<float*>(scale.mutable_data_ptr());
  auto* to_zero = static_cast<float*>(zero.mutable_data_ptr());
  parallel_for(0, batch * heads, grain(capacity * row_bytes, kCopies), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads, slots = ints(length)[b], pad = capacity - slots;
      const auto put = [&](auto* to, const auto* from, int64_t width_of_slot) {
        const auto size = sizeof(*to) * static_cast<size_t>(width_of_slot);
        auto* row = to + i * capacity * width_of_slot;
        std::memset(row, 0, static_cast<size_t>(pad) * size);
        for (int64_t j = 0; j < slots; j += pages.places) {
          const int64_t count = slots - j < pages.places ? slots - j : pages.places, unit = ints(table)[b * width + j / pages.places];
          std::memcpy(row + (pad + j) * width_of_slot, from + (unit * heads + h) * pages.places * width_of_slot, static_cast<size_t>(count) * size);
        }
      };
      put(to_q, bytes(pages_q), row_bytes);
      put(to_scale, floats(pages_scale), 1);
      put(to_zero, floats(pages_zero), 1);
    }
  });
  return {q, scale, zero};
}

bool use_isa(std::string name) { return quota::use(name.c_str()); }

// The instruction sets this CPU can run, best first, comma-separated; the one in use is named by `isa`.
std::string isas() {
  std::string names;
  for (int i = 0; const auto* table = quota::supported(i); ++i) {
    if (i) names += ",";
    names += table->name;
  }
  return names;
}

std::string isa() { return quota::kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(quota_cpu, m) {
  m.def("transform(Tensor x, Tensor? left, Tensor? right, int l, int exponent) -> Tensor");
  m.def("quantize_act(Tensor x, Tensor? left, Tensor? right, int l, int exponent, float clip, int prologue) -> (Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("w4a4_pack(Tensor w_q, int k) -> (Tensor, Tensor)");
  m.def("w4a4_linear(Tensor x_q, Tensor x_scale, Tensor blocks, Tensor col_sum, Tensor w_scale, int k, Tensor? bias, Tensor? x_zero) -> Tensor");
  m.def("kv4_append(Tensor(a!) cache_q, Tensor(b!) cache_scale, Tensor(c!) cache_zero, Tensor x, int position, float clip) -> ()");
  m.def(
      "kv4_attention(Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, int length, Tensor? start, "
      "float scaling, Tensor? shared=None) -> (Tensor, Tensor)");
  m.def(
      "kv4_paged_attention(Tensor q, Tensor k_q, Tensor k_scale, Tensor k_zero, Tensor v_q, Tensor v_scale, Tensor v_zero, Tensor table, Tensor length, "
      "float scaling, Tensor? shared=None) -> (Tensor, Tensor)");
  m.def("kv16_attention(Tensor q, Tensor k, Tensor v, int length, Tensor? start, float scaling) -> (Tensor, Tensor)");
  m.def("kv16_paged_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor length, float scaling) -> (Tensor, Tensor)");
  m.def(
      "qkv_append(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? q_transform, Tensor? k_transform, int q_exponent, int k_exponent, Tensor(a!) k_q, Tensor(b!) k_scale, Tensor(c!) k_zero, "
      "Tensor(d!) v_q, Tensor(e!) v_scale, Tensor(f!) v_zero, int position, float k_clip, float v_clip) -> Tensor");
  m.def(
      "token_score(Tensor q, Tensor? k, Tensor? k_q, Tensor? k_scale, Tensor? k_zero, Tensor lse, Tensor text, Tensor visual, float scaling) "
      "-> (Tensor, Tensor)");
  m.def("token_select(Tensor score, Tensor eligible, Tensor keep) -> Tensor");
  m.def("token_gather(Tensor x, Tensor index) -> Tensor");
  m.def("float_linear(Tensor x, Tensor panels, int n) -> Tensor");
  m.def("w4a16_linear(Tensor x, Tensor words, Tensor params, int n, Tensor? bias) -> Tensor");
  m.def("w8a8_linear(Tensor x, Tensor blocks, Tensor w_scale, Tensor? bias) -> Tensor");
  m.def(
      "kv4_page_write(Tensor(a!) pages_q, Tensor(b!) pages_scale, Tensor(c!) pages_zero, Tensor q, Tensor scale, Tensor zero, Tensor slot) -> ()");
  m.def(
      "kv4_page_read(Tensor pages_q, Tensor pages_scale, Tensor pages_zero, Tensor table, Tensor length, int capacity) -> (Tensor, Tensor, Tensor)");
  m.def("use_isa(str name) -> bool");
  m.def("isas() -> str");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(quota_cpu, CPU, m) {
  m.impl("transform", TORCH_BOX(&transform));
  m.impl("quantize_act", TORCH_BOX(&quantize_act));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("qkv_append", TORCH_BOX(&qkv_append));
  m.impl("w4a4_pack", TORCH_BOX(&w4a4_pack));
  m.impl("w4a4_linear", TORCH_BOX(&w4a4_linear));
  m.impl("kv4_append", TORCH_BOX(&kv4_append));
  m.impl("kv4_attention", TORCH_BOX(&kv4_attention));
  m.impl("kv4_paged_attention", TORCH_BOX(&kv4_paged_attention));
  m.impl("kv16_attention", TORCH_BOX(&kv16_attention));
  m.impl("kv16_paged_attention", TORCH_BOX(&kv16_paged_attention));
  m.impl("token_score", TORCH_BOX(&token_score));
  m.impl("token_select", TORCH_BOX(&token_select));
  m.impl("token_gather", TORCH_BOX(&token_gather));
  m.impl("float_linear", TORCH_BOX(&float_linear));
  m.impl("w4a16_linear", TORCH_BOX(&w4a16_linear));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
  m.impl("kv4_page_write", TORCH_BOX(&kv4_page_write));
  m.impl("kv4_page_read", TORCH_BOX(&kv4_page_read));
}

STABLE_TORCH_LIBRARY_IMPL(quota_cpu, CompositeExplicitAutograd, m) {
  m.impl("use_isa", TORCH_BOX(&use_isa));
  m.impl("isas", TORCH_BOX(&isas));
  m.impl("isa", TORCH_BOX(&isa));
}
