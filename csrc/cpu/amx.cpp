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
constexpr int64_t kHalf = quota::kPanel / 2;                        // columns of two tiles: what one 64-byte line of packed weights holds
constexpr int64_t kPackedStep = quota::kStep / quota::kGroup * 128;  // packed bytes of a step of a panel
constexpr int64_t kStepBlock = 16;                                  // 1024 values of k: 32 KiB of unpacked weights stay in the first-level cache
constexpr int64_t kUnpackAhead = 2;                                 // steps between unpacking and use, so that tile loads never wait for stores
constexpr int64_t kCachedBytes = 1 << 20;                           // activations that the second-level cache keeps from panel to panel
constexpr int64_t kFewRows = 4;
constexpr int64_t kRowBlock = 320;
constexpr int64_t kPanelGroup = 8;                                  // panels that share one pass over larger activations

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
    _mm_prefetch(reinterpret_cast<const char*>(packed + 16384), _MM_HINT_T1);
    _mm512_store_si512(w, _mm512_and_si512(x, low));
    _mm512_store_si512(w + kTileBytes, _mm512_and_si512(_mm512_srli_epi16(x, 4), low));
  }
}

// Sums [32][64 (32 of them)] of two rows of activation tiles with the unpacked weights of half a panel; kUnpack: which it first unpacks,
// a little ahead of their use.
template <bool kUnpack>
void multiply_pair(const int8_t* a, int64_t a_row, uint8_t* w, const uint8_t* packed, int64_t steps, int32_t* sums, bool go_on) {
  constexpr int64_t kRow = quota::kPanel * sizeof(int32_t);
  if constexpr (kUnpack)
    for (int64_t step = 0; step < kUnpackAhead && step < steps; ++step) unpack_weights(packed + step * kPackedStep, w + step * 2 * kTileBytes);
  if (go_on) {
    _tile_loadd(0, sums, kRow);
    _tile_loadd(1, sums + 16, kRow);
    _tile_loadd(2, sums + 16 * quota::kPanel, kRow);
    _tile_loadd(3, sums + 16 * quota::kPanel + 16, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a += kTileBytes, w += 2 * kTileBytes) {
    if constexpr (kUnpack)
      if (step + kUnpackAhead < steps) unpack_weights(packed + (step + kUnpackAhead) * kPackedStep, w + kUnpackAhead * 2 * kTileBytes);
    _tile_stream_loadd(4, a, 64);  // activations pass through, weights stay in the first-level cache
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kTileBytes, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_stream_loadd(5, a + a_row, 64);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + 16, kRow);
  _tile_stored(2, sums + 16 * quota::kPanel, kRow);
  _tile_stored(3, sums + 16 * quota::kPanel + 16, kRow);
}

// k block by k block over a group of panels, so that the activations of a block come from the second-level cache.
void multiply_tiles(const quota::LinearArgs& args, const quota::LinearTask& task) {
  const TileConfig config;
  const int64_t steps = quota::padded_k(args.k) / quota::kStep, a_row = steps * kTileBytes;
  const int64_t rows = task.row_end - task.row_begin, padded_rows = round_up(rows, kPairRows);
  const int64_t at_once = padded_rows * steps * quota::kStep <= kCachedBytes ? 1 : kPanelGroup;
  alignas(64) uint8_t w[kStepBlock * 2 * kTileBytes];
  const Scratch<int32_t> sums(at_once * padded_rows * quota::kPanel);
  for (int64_t first = task.panel_begin; first < task.panel_end; first += at_once)
    for (int64_t step = 0; step < steps; step += kStepBlock)
      for (int64_t panel = first; panel < first + at_once && panel < task.panel_end; ++panel) {
        const int64_t count = steps - step < kStepBlock ? steps - step : kStepBlock;
        const uint8_t* packed = args.blocks + (panel * steps + step) * kPackedStep;
        int32_t* panel_sums = sums + (panel - first) * padded_rows * quota::kPanel;
        for (int64_t half = 0; half < 2; ++half)
          for (int64_t i = 0; i < rows; i += kPairRows) {
            const int8_t* a = args.a + tile_row(task.row_begin + i, steps) + step * kTileBytes;
            int32_t* pair = panel_sums + i * quota::kPanel;
            (i == 0 ? multiply_pair<true> : multiply_pair<false>)(a, a_row, w, packed + half * 64, count, pair + half * kHalf, step > 0);
            if (half == 1 && step + count == steps)
              quota::kernels_avx512vnni.linear.finish(args, pair, panel, task.row_begin + i, rows - i < kPairRows ? rows - i : kPairRows);
          }
      }
}

// A few rows are bound by the weights' way from memory: vector instructions on the packed weights are as fast and need no tiles.
void few_rows(const quota::LinearArgs& args, int64_t panel_begin, int64_t panel_end) { quota::kernels_avx512vnni.linear.few_rows(args, panel_begin, panel_end); }

void finish(const quota::LinearArgs& args, const int32_t* sums, int64_t panel, int64_t row, int64_t rows) {
  quota::kernels_avx512vnni.linear.finish(args, sums, panel, row, rows);
}

}  // namespace

namespace quota {
extern const Linear linear_amx;
const Linear linear_amx = {kFewRows, kPairRows, kRowBlock, unpack_tiles, few_rows, multiply_tiles, finish};
}  // namespace quota
