// kv4_attention: the arithmetic of csrc/cpu/kv4_attention.h and codes.h on tensor cores. Queries, and per block of 64 slots the weights of the values, are
// 24-bit fixed point in three signed bytes, so every dot product with codes is an exact integer; what is float happens in the CPU's order. Up to
// kSplitSlots slots the output has the CPU's bits; longer rows are split there, at places that depend on the slots alone, and merged in order.
//
// A block has up to 8 rows (queries times the heads of one KV head) of one split. It goes through passes of 8 blocks of 64 slots: scores, one block a warp;
// weights and exact sums, likewise, because a block needs of those before it only their maxima; then the running sums, block after block.
#include "kernels.h"
#include "values.h"

namespace quota::cuda {
namespace {

constexpr int kRows = 8, kWarps = 4, kThreads = 32 * kWarps, kSlots = 64, kPassBlocks = 8, kPassSlots = kPassBlocks * kSlots, kLanes = 16;
constexpr float kLargestFixed = 8355710.0f;
constexpr int kMiddle = 8;

// Fixed-point values of a row: their unit, their sum, and 8 times the sum in three parts, which centres the codes.
struct Fixed {
  float unit, sum;
  int middle[3];
};

__device__ inline Fixed fixed_row(float reach, int64_t sum) {
  const int64_t middle = kMiddle * sum, high = (middle + (1 << 15)) >> 16, rest = middle - (high << 16), mid = (rest + 128) >> 8;
  return {__fdiv_rn(reach, kLargestFixed), static_cast<float>(sum), {static_cast<int>(rest - (mid << 8)), static_cast<int>(mid), static_cast<int>(high)}};
}
__device__ inline float fixed_factor(float reach) { return reach == 0.0f ? 0.0f : __fdiv_rn(kLargestFixed, reach); }

// The three signed bytes of a fixed-point value, lowest first; the fourth byte is of no use.
__device__ inline uint32_t limbs_of(int fixed) { return (static_cast<uint32_t>(fixed) + 0x808080u) ^ 0x808080u; }

// Byte `limb` of four words.
__device__ inline uint32_t gather(uint32_t a, uint32_t b, uint32_t c, uint32_t d, int limb) {
  const uint32_t pick = static_cast<uint32_t>(limb | (4 + limb) << 4);
  return __byte_perm(__byte_perm(a, b, pick), __byte_perm(c, d, pick), 0x5410);
}

// Operand a of both products: rows 0..7 are limb 0 and rows 8..15 limb 1 of the same rows; then limb 2 alone.
struct LimbOperand {
  uint32_t both[4], last[4];
};
__device__ inline LimbOperand operand(const uint32_t (&limbs)[8]) {
  LimbOperand out{};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t *v = limbs + 4 * h;
    out.both[2 * h] = gather(v[0], v[1], v[2], v[3], 0);
    out.both[2 * h + 1] = gather(v[0], v[1], v[2], v[3], 1);
    out.last[2 * h] = gather(v[0], v[1], v[2], v[3], 2);
  }
  return out;
}

// Sums of codes with limbs 0, 1 and 2 -> the sum of (code - 8) times the row's fixed-point values.
__device__ inline float centred(int a, int b, int c, const int (&middle)[3]) {
  const float high = __int2float_rn(c - middle[2]), mid = __int2float_rn(b - middle[1]), low = __int2float_rn(a - middle[0]);
  return __fmaf_rn(high, 65536.0f, __fmaf_rn(mid, 256.0f, low));
}

__device__ inline float middle_of(float zero, float scale) { return __fadd_rn(zero, __fmul_rn(static_cast<float>(kMiddle), scale)); }

// Where one (batch, KV head) of a cache lies.
struct Head {
  const Kv4<const uint8_t, const float>& kv;
  const Pages& pages;
  int64_t b, h;

  __device__ void find(int64_t slot, int64_t& unit, int64_t& place) const {
    unit = pages.table ? pages.table[b * pages.width + slot / pages.places] : b;
    place = pages.table ? slot % pages.places : slot;
  }
  __device__ const uint8_t* codes(int64_t slot, int64_t row_bytes) const {
    int64_t unit, place;
    find(slot, unit, place);
    return kv.q + unit * kv.q_batch + h * kv.q_head + place * row_bytes;
  }
  __device__ void scales(int64_t slot, float& scale, float& zero) const {
    int64_t unit, place;
    find(slot, unit, place);
    scale = kv.scale[unit * kv.scale_batch + h * kv.scale_head + place], zero = kv.zero[unit * kv.zero_batch + h * kv.zero_head + place];
  }
};

// kWords words from word `first` on of a row of `words`; zeros past its end.
template <int kWords>
__device__ inline void read_row(uint32_t (&to)[kWords], const uint8_t* row, int first, int words, bool whole) {
  const uint32_t* from = reinterpret_cast<const uint32_t*>(row) + first;
  if (whole && kWords == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    to[0] = v.x, to[1 % kWords] = v.y, to[2 % kWords] = v.z, to[3 % kWords] = v.w;
  } else if (whole && kWords == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1 % kWords] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = first + i < words ? from[i] : 0;
  }
}

// Shared memory of a block, for `rows` rows.
struct Memory {
  float* scores;  // [rows][kPassSlots], then weights
  float* parts;   // [kPassBlocks][rows][stride]: centred sums of the values
  float* sums;    // [rows][stride]
  float* best;    // [rows] maximum before the pass
  float* tops;    // [kPassBlocks][rows]: maximum of each block
  float* units;   // [kPassBlocks][rows]
  Fixed* fixed;   // [rows] of queries
  int* query;     // [rows][padded] fixed-point queries; only before the first pass, where parts are later
  int stride;

  __device__ Memory(unsigned char* memory, int rows, int padded) : stride(padded + 8) {
    scores = reinterpret_cast<float*>(memory);
    parts = scores + rows * kPassSlots;
    query = reinterpret_cast<int*>(parts);
    sums = parts + kPassBlocks * rows * stride;
    best = sums + rows * stride;
    tops = best + rows, units = tops + kPassBlocks * rows;
    fixed = reinterpret_cast<Fixed*>(units + kPassBlocks * rows);
  }
};
size_t memory_bytes(int rows, int padded) {
  const int stride = padded + 8;
  return sizeof(float) * rows * (kPassSlots + kPassBlocks * stride + stride + 1 + 2 * kPassBlocks) + sizeof(Fixed) * rows;
}

__device__ inline float larger(float a, float b) { return a > b ? a : b; }

// The queries of a launch: from a multiple of eight on, a multiple of eight or up to the last one, so tiles of eight rows end where they do.
struct Queries {
  int64_t first, count, first_tile;
};

// kWide: the head size in units of 64.
template <int kWide>
__global__ void __launch_bounds__(kThreads) attention_kernel(AttentionArgs args, Pages pages, Queries part, int64_t tiles, int64_t splits, int most_rows, float* partial) {
  constexpr int kPadded = 64 * kWide, kSteps = 2 * kWide;  // of 32 dims
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group_row = lane / 4, in_group = lane % 4;
  const int64_t split = blockIdx.x % splits, tile = part.first_tile + blockIdx.x / splits % tiles, kv_head = blockIdx.x / splits / tiles % args.kv_heads;
  const int64_t batch = blockIdx.x / splits / tiles / args.kv_heads;
  const int64_t group = args.heads / args.kv_heads, d = args.dim, wide = d + args.extra, row_bytes = d / 2, first_row = tile * kRows;
  const int words = static_cast<int>(d / 8), rows = static_cast<int>(args.tokens * group - first_row < kRows ? args.tokens * group - first_row : kRows);
  const bool whole = d == kPadded;
  const int64_t start = args.start ? args.start[batch] : 0, length = pages.length ? pages.length[batch] : args.length;
  const auto query_of = [&](int i) { return (first_row + i) / group; };
  const auto flat_row = [&](int i) { return (batch * args.heads + kv_head * group + (first_row + i) % group) * args.tokens + query_of(i); };
  // Slots that row i sees, counted from `start`, and up to where this split goes.
  const auto seen_by = [&](int i) { return length - args.tokens + query_of(i) + 1 - start; };
  const int64_t begin = split * kSplitSlots, most = splits == 1 ? seen_by(rows - 1) : begin + kSplitSlots;
  const int64_t end = seen_by(rows - 1) < most ? seen_by(rows - 1) : most;
  const Head k{args.k, pages, batch, kv_head}, v{args.v, pages, batch, kv_head};
  const Memory memory(shared_memory(), most_rows, kPadded);

  // Queries as fixed point, a warp per row.
  for (int i = warp; i < rows; i += kWarps) {
    const float* q = args.q + flat_row(i) * wide;
    int bits = 0;
    for (int c = lane; c < d; c += 32) bits = largest(bits, magnitude_bits(q[c]));
    const float reach = __int_as_float(across_warp(bits, largest)), factor = fixed_factor(reach);
    int64_t sum = 0;
    for (int c = lane; c < kPadded; c += 32) {
      const int fixed = c < d ? __float2int_rn(__fmul_rn(q[c], factor)) : 0;
      memory.query[i * kPadded + c] = fixed, sum += fixed;
    }
    sum = across_warp(sum, [](int64_t a, int64_t b) { return a + b; });
    if (lane == 0) memory.fixed[i] = fixed_row(reach, sum), memory.best[i] = -infinity();
  }
  for (int i = threadIdx.x; i < rows * memory.stride; i += kThreads) memory.sums[i] = 0.0f;
  __syncthreads();
  // Operand a of the scores: step s has word in_group * kSteps + s of a key's row, even nibbles then odd ones.
  LimbOperand query[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t limbs[8] = {};
    if (group_row < rows)
#pragma unroll
      for (int e = 0; e < 8; ++e) limbs[e % 2 * 4 + e / 2] = limbs_of(memory.query[group_row * kPadded + (in_group * kSteps + s) * 8 + e]);
    query[s] = operand(limbs);
  }
  __syncthreads();

  const int sum_row = threadIdx.x / kLanes, sum_lane = threadIdx.x % kLanes;  // of the running sums
  float total = 0.0f, middles = 0.0f;
  const int64_t sees = group_row < rows ? seen_by(group_row) : 0;
  for (int64_t pass = begin; pass < end; pass += kPassSlots) {
    const int blocks = static_cast<int>(end - pass < kPassSlots ? ceil_div(end - pass, kSlots) : kPassBlocks);
    for (int block = warp; block < blocks; block += kWarps) {
      const int64_t base = pass + block * kSlots;
      float top = -infinity();
#pragma unroll 2
      for (int u = 0; u < kSlots / 8; ++u) {
        // Column n of the product is slot 8 u + 4 (n % 2) + n / 2: lane t of a row then holds slots 4 i + t, as operand a of the values wants them.
        const int64_t column = base + 8 * u + group_row % 2 * 4 + group_row / 2;
        uint32_t code[kSteps];
        if (column < end)
          read_row<kSteps>(code, k.codes(start + column, row_bytes), in_group * kSteps, words, whole);
        else
#pragma unroll
          for (int s = 0; s < kSteps; ++s) code[s] = 0;
        int both[4] = {}, last[4] = {};
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const uint32_t b[2] = {code[s] & 0x0f0f0f0fu, code[s] >> 4 & 0x0f0f0f0fu};
          ptx::mma_s8u8(both, query[s].both, b), ptx::mma_s8u8(last, query[s].last, b);
        }
        if (group_row < rows)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int64_t slot = base + 8 * u + 4 * c + in_group;
            float score = -infinity();
            if (slot < sees && slot < end) {
              const Fixed& row = memory.fixed[group_row];
              float scale, zero;
              k.scales(start + slot, scale, zero);
              const float codes = __fmul_rn(scale, centred(both[c], both[2 + c], last[c], row.middle));
              score = __fmul_rn(__fmaf_rn(middle_of(zero, scale), row.sum, codes), __fmul_rn(row.unit, args.scaling));
              if (args.extra) {
                const float* q = args.q + flat_row(group_row) * wide + d;
                const float* keys = args.shared + batch * args.extra * args.shared_slots + start + slot;
                float chain = 0.0f;
                for (int64_t e = 0; e < args.extra; ++e) chain = __fmaf_rn(q[e], keys[e * args.shared_slots], chain);
                score = __fadd_rn(score, __fmul_rn(chain, args.scaling));
              }
            }
            memory.scores[group_row * kPassSlots + slot - pass] = score;
            top = larger(top, score);
          }
      }
      top = larger(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = larger(top, __shfl_xor_sync(0xffffffffu, top, 2));
      if (group_row < rows && in_group == 0) memory.tops[block * rows + group_row] = top;
    }
    __syncthreads();

    for (int block = warp; block < blocks; block += kWarps) {
      const int64_t base = pass + block * kSlots;
      const bool any = sees > base;  // a row that sees nothing of a block is left as it is
      float best = -infinity();
      if (any) {
        best = memory.best[group_row];
        for (int i = 0; i <= block; ++i) best = larger(best, memory.tops[i * rows + group_row]);
      }
      float weight[16];
      int bits = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int64_t slot = base + 4 * i + in_group;
        weight[i] = 0.0f;
        if (!any) continue;
        float* score = memory.scores + group_row * kPassSlots + slot - pass;
        const float p = exponential(__fsub_rn(*score, best));
        *score = p;
        if (slot < sees && slot < end) {
          float scale, zero;
          v.scales(start + slot, scale, zero);
          weight[i] = __fmul_rn(p, scale);
        }
        bits = largest(bits, magnitude_bits(weight[i]));
      }
      bits = largest(bits, __shfl_xor_sync(0xffffffffu, bits, 1));
      bits = largest(bits, __shfl_xor_sync(0xffffffffu, bits, 2));
      const float reach = __int_as_float(bits), factor = fixed_factor(reach);
      int sum = 0;
      LimbOperand a[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t limbs[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int fixed = __float2int_rn(__fmul_rn(weight[8 * half + i], factor));
          limbs[i] = limbs_of(fixed), sum += fixed;
        }
        a[half] = operand(limbs);
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const Fixed row = fixed_row(reach, sum);
      if (group_row < rows && in_group == 0) memory.units[block * rows + group_row] = row.unit;
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        uint32_t code[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int64_t slot = base + 4 * i + in_group;
          const int word = group_row * kWide + w;
          code[i] = slot < end && word < words ? reinterpret_cast<const uint32_t*>(v.codes(start + slot, row_bytes))[word] : 0;
        }
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          uint32_t pair[2][2];  // [half of the slots][register]: one byte, so two dims, of four slots
#pragma unroll
          for (int i = 0; i < 4; ++i) pair[i / 2][i % 2] = gather(code[4 * i], code[4 * i + 1], code[4 * i + 2], code[4 * i + 3], byte);
#pragma unroll
          for (int high = 0; high < 2; ++high) {
            int both[4] = {}, last[4] = {};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint32_t b[2] = {pair[half][0] >> 4 * high & 0x0f0f0f0fu, pair[half][1] >> 4 * high & 0x0f0f0f0fu};
              ptx::mma_s8u8(both, a[half].both, b), ptx::mma_s8u8(last, a[half].last, b);
            }
            // Column n of this product is dim 8 (n kWide + w) + 2 byte + high, kept at place 8 (8 w + 2 byte + high) + n.
            if (any) {
              float* part = memory.parts + (block * rows + group_row) * memory.stride + (8 * w + 2 * byte + high) * 8 + in_group * 2;
              part[0] = centred(both[0], both[2], last[0], row.middle), part[1] = centred(both[1], both[3], last[1], row.middle);
            }
          }
        }
      }
    }
    __syncthreads();

    // What was summed before a block is multiplied by e^(old maximum - new one), then the block is added.
    const auto sum_blocks = [&](int row, auto&& add) {
      float best = memory.best[row];
      for (int block = 0; block < blocks && seen_by(row) > pass + block * kSlots; ++block) {
        const float top = larger(best, memory.tops[block * rows + row]);
        add(block, top != best ? exponential(__fsub_rn(best, top)) : 1.0f);
        best = top;
      }
      return best;
    };
    for (int i = threadIdx.x; i < rows * kPadded; i += kThreads) {
      const int row = i / kPadded, place = i % kPadded;
      float sum = memory.sums[row * memory.stride + place];
      sum_blocks(row, [&](int block, float correction) {
        const float part = memory.parts[(block * rows + row) * memory.stride + place];
        sum = __fmaf_rn(part, memory.units[block * rows + row], __fmul_rn(sum, correction));
      });
      memory.sums[row * memory.stride + place] = sum;
    }
    float best = 0.0f;
    if (sum_row < rows)
      best = sum_blocks(sum_row, [&](int block, float correction) {
        total = __fmul_rn(total, correction), middles = __fmul_rn(middles, correction);
        for (int i = 0; i < kSlots / kLanes; ++i) {
          const int64_t slot = pass + block * kSlots + i * kLanes + sum_lane;
          float scale = 0.0f, zero = 0.0f;
          if (slot < seen_by(sum_row) && slot < end) v.scales(start + slot, scale, zero);
          const float p = memory.scores[sum_row * kPassSlots + slot - pass];
          total = __fadd_rn(total, p), middles = __fmaf_rn(p, middle_of(zero, scale), middles);
        }
      });
    __syncthreads();
    if (sum_row < rows && sum_lane == 0) memory.best[sum_row] = best;
    __syncthreads();
  }

  // The sixteen lanes in ascending order.
  float* lanes = memory.scores;
  if (sum_row < rows) lanes[sum_row * 2 * kLanes + sum_lane] = total, lanes[sum_row * 2 * kLanes + kLanes + sum_lane] = middles;
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kPadded; i += kThreads) {
    const int row = i / kPadded, place = i % kPadded;
    const int dim = 8 * (place % 8 * kWide + place / 64) + place / 8 % 8;
    float whole_total = 0.0f, offset = 0.0f;
    for (int j = 0; j < kLanes; ++j) {
      whole_total = __fadd_rn(whole_total, lanes[row * 2 * kLanes + j]);
      offset = __fadd_rn(offset, lanes[row * 2 * kLanes + kLanes + j]);
    }
    const bool blind = seen_by(row) <= 0;
    const float sum = __fadd_rn(memory.sums[row * memory.stride + place], offset), best = memory.best[row];
    if (partial) {
      const int64_t head = batch * args.heads + kv_head * group + (first_row + row) % group;
      float* to = partial + ((head * part.count + query_of(row) - part.first) * splits + split) * (d + 2);
      if (dim < d) to[2 + dim] = sum;
      if (place == 0) to[0] = best, to[1] = whole_total;
      continue;
    }
    if (dim < d)
      args.out[((batch * args.tokens + query_of(row)) * args.heads + kv_head * group + (first_row + row) % group) * d + dim] =
          blind ? 0.0f : __fdiv_rn(sum, whole_total);
    if (place == 0) args.lse[flat_row(row)] = blind ? -infinity() : __fadd_rn(best, logf(whole_total));
  }
}

// Block: the splits of one row, in ascending order.
__global__ void __launch_bounds__(kThreads) merge_kernel(AttentionArgs args, Queries part, const float* partial, int64_t splits) {
  const int64_t d = args.dim, query = part.first + blockIdx.x % part.count, flat_head = blockIdx.x / part.count;
  const int64_t head = flat_head % args.heads, batch = flat_head / args.heads;
  const float* parts = partial + int64_t{blockIdx.x} * splits * (d + 2);
  for (int64_t c = threadIdx.x; c < d; c += kThreads) {
    float best = -infinity(), total = 0.0f, sum = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      const float* one = parts + s * (d + 2);
      if (one[0] == -infinity()) continue;  // this row sees nothing of it
      const float top = larger(best, one[0]), old = exponential(__fsub_rn(best, top)), now = exponential(__fsub_rn(one[0], top));
      total = __fmaf_rn(one[1], now, __fmul_rn(total, old)), sum = __fmaf_rn(one[2 + c], now, __fmul_rn(sum, old));
      best = top;
    }
    const bool blind = best == -infinity();
    args.out[((batch * args.tokens + query) * args.heads + head) * d + c] = blind ? 0.0f : __fdiv_rn(sum, total);
    if (c == 0) args.lse[flat_head * args.tokens + query] = blind ? -infinity() : __fadd_rn(best, logf(total));
  }
}

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& args, int64_t batch) {
  const int64_t splits = args.length > kSplitSlots ? ceil_div(args.length, kSplitSlots) : 1;
  if (splits == 1) return {1, args.tokens, 0};
  const int64_t per_token = batch * args.heads * splits * (args.dim + 2), eights = per_token ? kWorkspaceFloats / per_token / 8 : 0;
  const int64_t most = 8 * (eights > 0 ? eights : 1), tokens = args.tokens < most ? args.tokens : most;
  return {static_cast<int>(splits), tokens, tokens * per_token};
}

void kv4_attention(const AttentionArgs& args, const Pages& pages, int64_t batch, const AttentionPlan& plan, float* workspace, cudaStream_t stream) {
  const int64_t group = args.heads / args.kv_heads;
  if (batch * args.kv_heads * args.tokens * group == 0) return;
  const int wide = args.dim <= 64 ? 1 : args.dim <= 128 ? 2 : 4, rows = static_cast<int>(args.tokens * group < kRows ? args.tokens * group : kRows);
  const auto kernel = wide == 1 ? attention_kernel<1> : wide == 2 ? attention_kernel<2> : attention_kernel<4>;
  float* partial = plan.splits > 1 ? workspace : nullptr;
  for (int64_t first = 0; first < args.tokens; first += plan.tokens) {
    const Queries part{first, args.tokens - first < plan.tokens ? args.tokens - first : plan.tokens, first * group / kRows};
    const int64_t tiles = ceil_div(part.count * group, kRows), blocks = batch * args.kv_heads * tiles * plan.splits;
    launch(kernel, blocks, kThreads, memory_bytes(rows, 64 * wide), stream, args, pages, part, tiles, plan.splits, rows, partial);
    if (partial) launch(merge_kernel, batch * args.heads * part.count, kThreads, 0, stream, args, part, partial, plan.splits);
  }
}

}  // namespace quota::cuda
