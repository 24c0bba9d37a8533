// w4a4_linear on AMX tiles: 16 x 64 int8 times 64 x 16 int8 -> 16 x 16 int32 in one instruction, 16 cycles.
// Two by two tiles of sums, because then a tile load is used twice and the four loads of a step hide behind its four products.
#include <immintrin.h>

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace quota {
extern const Kernels kernels_avx512vnni;
}  // namespace quota

namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr int64_t kPairRows = 2 * kTileRows;
constexpr int64_t kHalf = quota::kPanel / 2;                         // columns of two tiles: what one 64-byte line of packed weights holds
constexpr int64_t kPackedStep = quota::kStep / quota::kGroup * 128;  // packed bytes of a step of a panel
constexpr int64_t kStepBlock = 8;           // 512 values of k: 16 KiB of unpacked weights, a third of the first-level cache
constexpr int64_t kUnpackAhead = 4;         // steps from unpacking to use: a tile load that overtakes a store to its lines has to start again
constexpr int64_t kCachedBytes = 1 << 20;   // activations that the second-level cache keeps from panel to panel
constexpr int64_t kPanelGroup = 4;          // panels that share one pass over larger activations
constexpr int64_t kRowBlock = 320;          // more rows share an unpacking, but their sums crowd the second-level cache
// Vectors against tiles: 0.50 and 0.51 ms at M = 8, 0.65 and 0.57 ms at M = 12 (4096 x 4096); 7 and 9 us at M = 8 (192 x 576).
constexpr int64_t kFewRows = 8;

// Activations as tiles [ceil(M/16)][padded_k/64][16][64].
inline int64_t tile_row(int64_t m, int64_t steps) { return m / kTileRows * steps * kTileBytes + m % kTileRows * quota::kStep; }

// 32 bytes of nibbles -> 64 values.
inline __m512i unpack_step(__m256i nibbles) {
  const __m512i x = _mm512_cvtepu8_epi16(nibbles), eight = _mm512_set1_epi8(8);
  const __m512i codes = _mm512_or_si512(_mm512_and_si512(x, _mm512_set1_epi16(15)), _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(15 << 8)));
  return _mm512_sub_epi8(_mm512_xor_si512(codes, eight), eight);
}

void unpack_tiles(const quota::UnpackArgs& args, int64_t begin, int64_t end) {
  const int64_t bytes = (args.k + 1) / 2, whole = args.k / quota::kStep, tail = args.k % quota::kStep, steps = quota::padded_k(args.k) / quota::kStep;
  const __mmask64 tail_mask = (uint64_t{1} << tail) - 1;
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t m = begin; m < end; ++m) {
    const uint8_t* x = args.x_q + m * bytes;
    int8_t* a = args.a + tile_row(m, steps);
    __m512i sum = _mm512_setzero_si512();
    const auto put = [&](int64_t step, __m512i values) {
      sum = _mm512_dpbusd_epi32(sum, ones, values);
      _mm512_storeu_si512(a + step * kTileBytes, values);
    };
    for (int64_t step = 0; step < whole; ++step) put(step, unpack_step(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + step * 32))));
    if (tail) {
      const __m256i nibbles = _mm256_maskz_loadu_epi8(static_cast<__mmask32>((uint64_t{1} << (tail + 1) / 2) - 1), x + whole * 32);
      put(whole, _mm512_maskz_mov_epi8(tail_mask, unpack_step(nibbles)));
    }
    args.row_sum[m] = _mm512_reduce_add_epi32(sum);
  }
}

// Every tile register 16 rows of 64 bytes. Others in the process configure tiles too, so each task does it anew.
struct TileConfig {
  struct alignas(64) Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  TileConfig() {
    const Layout layout;
    _tile_loadconfig(&layout);
  }
  ~TileConfig() { _tile_release(); }
};

// One step of half a panel: 16 groups of packed lines -> the two tiles of columns c and 16 + c.
inline void unpack_weights(const uint8_t* packed, uint8_t* w) {
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int group = 0; group < 16; ++group, packed += 128, w += 64) {
    const __m512i x = _mm512_loadu_si512(packed);
    _mm512_store_si512(w, _mm512_and_si512(x, low));
    _mm512_store_si512(w + kTileBytes, _mm512_and_si512(_mm512_srli_epi16(x, 4), low));
  }
}

// Cache lines that later work wants, asked for a few per step so that they do not queue up in front of the tile loads.
struct Ahead {
  const uint8_t* weights;  // packed, from here to weights_end
  const uint8_t* weights_end;
  int64_t weight_lines;  // per step
  float* y = nullptr;    // outputs of a panel, a row per step; null for none
  int64_t y_row = 0;

  void step() {
    for (int64_t i = 0; i < weight_lines && weights < weights_end; ++i, weights += 64) _mm_prefetch(reinterpret_cast<const char*>(weights), _MM_HINT_T1);
    if (y == nullptr) return;
    for (int64_t i = 0; i < quota::kPanel; i += 16) __builtin_prefetch(y + i, 1, 2);
    y += y_row;
  }
};

// Two rows of activation tiles (`next_row` bytes apart) times half a panel.
struct Pair {
  const int8_t* a;
  int64_t next_row;
  const uint8_t* packed;
  uint8_t* w;
  int64_t steps;
  int32_t* sums;  // [32][64], of which 32 columns
};

inline void load_sums(const int32_t* sums) {
  constexpr int64_t kStride = quota::kPanel * sizeof(int32_t);
  _tile_loadd(0, sums, kStride);
  _tile_loadd(1, sums + 16, kStride);
  _tile_loadd(2, sums + kTileRows * quota::kPanel, kStride);
  _tile_loadd(3, sums + kTileRows * quota::kPanel + 16, kStride);
}

inline void store_sums(int32_t* sums) {
  constexpr int64_t kStride = quota::kPanel * sizeof(int32_t);
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  _tile_stored(2, sums + kTileRows * quota::kPanel, kStride);
  _tile_stored(3, sums + kTileRows * quota::kPanel + 16, kStride);
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// kUnpack: the first pair of a block unpacks its weights, a little ahead of their use.
template <bool kUnpack>
void multiply_pair(const Pair& pair, bool go_on, Ahead& ahead) {
  const auto unpack = [&](int64_t step) {
    if (kUnpack && step < pair.steps) unpack_weights(pair.packed + step * kPackedStep, pair.w + step * 2 * kTileBytes);
  };
  for (int64_t step = 0; step < kUnpackAhead; ++step) unpack(step);
  go_on ? load_sums(pair.sums) : zero_sums();
  for (int64_t step = 0; step < pair.steps; ++step) {
    unpack(step + kUnpackAhead);
    ahead.step();
    const int8_t* a = pair.a + step * kTileBytes;
    const uint8_t* w = pair.w + step * 2 * kTileBytes;
    _tile_stream_loadd(4, a, 64);  // activations pass through, weights stay in the first-level cache
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kTileBytes, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_stream_loadd(5, a + pair.next_row, 64);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  store_sums(pair.sums);
}

void finish(const quota::LinearArgs& args, const int32_t* sums, int64_t panel, int64_t row, int64_t rows) {
  quota::kernels_avx512vnni.linear.finish(args, sums, panel, row, rows);
}

// k block by k block over a group of panels, so that the activations of a block come from the second-level cache.
void multiply_tiles(const quota::LinearArgs& args, const quota::LinearTask& task) {
  const TileConfig config;
  const int64_t steps = quota::padded_k(args.k) / quota::kStep, rows = task.row_end - task.row_begin, padded_rows = round_up(rows, kPairRows);
  const int64_t group = padded_rows * steps * quota::kStep <= kCachedBytes ? 1 : kPanelGroup;
  const int64_t block_lines = kStepBlock * kPackedStep / 64, block_steps = kStepBlock * 2 * (padded_rows / kPairRows);
  const auto packed = [&](int64_t panel, int64_t step) { return args.blocks + (panel * steps + step) * kPackedStep; };
  alignas(64) uint8_t w[kStepBlock * 2 * kTileBytes];
  const Scratch<int32_t> sums(group * padded_rows * quota::kPanel);
  for (int64_t first = task.panel_begin; first < task.panel_end; first += group) {
    const int64_t end = first + group < task.panel_end ? first + group : task.panel_end;
    for (int64_t step = 0; step < steps; step += kStepBlock) {
      const int64_t count = steps - step < kStepBlock ? steps - step : kStepBlock;
      const bool last = step + count == steps;
      for (int64_t panel = first; panel < end; ++panel) {
        const uint8_t* next = panel + 1 < end ? packed(panel + 1, step) : last ? packed(end, 0) : packed(first, step + count);
        Ahead ahead{next, packed(task.panel_end, 0), (block_lines + block_steps - 1) / block_steps};
        for (int64_t half = 0; half < 2; ++half)
          for (int64_t i = 0; i < rows; i += kPairRows) {
            const int64_t row = task.row_begin + i;
            int32_t* pair_sums = sums + ((panel - first) * padded_rows + i) * quota::kPanel;
            if (last) ahead.y = args.y + (row + half * kTileRows) * args.n + panel * quota::kPanel, ahead.y_row = args.n;
            const int8_t* a = args.a + tile_row(row, steps) + step * kTileBytes;
            const Pair pair{a, steps * kTileBytes, packed(panel, step) + half * 64, w, count, pair_sums + half * kHalf};
            (i == 0 ? multiply_pair<true> : multiply_pair<false>)(pair, step > 0, ahead);
            if (last && half == 1) finish(args, pair_sums, panel, row, rows - i < kPairRows ? rows - i : kPairRows);
          }
      }
    }
  }
}

// A few rows are bound by the weights' way from memory: vector instructions on the packed weights are as fast and need no tiles.
void few_rows(const quota::LinearArgs& args, int64_t panel_begin, int64_t panel_end) {
  quota::kernels_avx512vnni.linear.few_rows(args, panel_begin, panel_end);
}

}  // namespace

namespace quota {
extern const Linear linear_amx;
const Linear linear_amx = {kFewRows, kPairRows, kRowBlock, unpack_tiles, few_rows, multiply_tiles, finish};
}  // namespace quota
