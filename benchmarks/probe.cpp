// What one core of this machine can do: multiply-add rates with every operand in a register, and streaming reads.
// Built by roofline.py with the system's compiler; instruction sets are chosen per function, so it compiles for any x86-64.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace {
volatile float sink_float;
volatile int sink_int;
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ISA(names) __attribute__((target(names)))
// The compiler must believe that every step changes its register, or it hoists the whole loop.
#define KEEP(x) asm volatile("" : "+v"(x))

// Twelve independent accumulators (latency times ports, and no spills), each a variable of its own so that it stays in a register.
#define TWELVE(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
constexpr double kChains = 12;

EXPORT ISA("avx512f,avx512vnni") double operations_vpdpbusd(int64_t passes) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1);
#define START(c) __m512i acc##c = _mm512_setzero_si512();
#define STEP(c) acc##c = _mm512_dpbusd_epi32(acc##c, a, b); KEEP(acc##c);
#define TOTAL(c) total = _mm512_add_epi32(total, acc##c);
  TWELVE(START)
  for (int64_t i = 0; i < passes; ++i) { TWELVE(STEP) }
  __m512i total = _mm512_setzero_si512();
  TWELVE(TOTAL)
#undef START
#undef STEP
#undef TOTAL
  sink_int = _mm512_reduce_add_epi32(total);
  return 2.0 * 64 * kChains * passes;
}

// Without VNNI a byte product takes vpmaddubsw and an int16 addition.
EXPORT ISA("avx2") double operations_vpmaddubsw(int64_t passes) {
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(1);
#define START(c) __m256i acc##c = _mm256_setzero_si256();
#define STEP(c) { __m256i product = _mm256_maddubs_epi16(a, b); KEEP(product); acc##c = _mm256_add_epi16(acc##c, product); }
#define TOTAL(c) total = _mm256_add_epi16(total, acc##c);
  TWELVE(START)
  for (int64_t i = 0; i < passes; ++i) { TWELVE(STEP) }
  __m256i total = _mm256_setzero_si256();
  TWELVE(TOTAL)
#undef START
#undef STEP
#undef TOTAL
  sink_int = _mm256_extract_epi16(total, 0);
  return 2.0 * 32 * kChains * passes;
}

EXPORT ISA("avx512f") double operations_fma512(int64_t passes) {
  const __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(1e-9f);
#define START(c) __m512 acc##c = _mm512_setzero_ps();
#define STEP(c) acc##c = _mm512_fmadd_ps(a, b, acc##c); KEEP(acc##c);
#define TOTAL(c) total = _mm512_add_ps(total, acc##c);
  TWELVE(START)
  for (int64_t i = 0; i < passes; ++i) { TWELVE(STEP) }
  __m512 total = _mm512_setzero_ps();
  TWELVE(TOTAL)
#undef START
#undef STEP
#undef TOTAL
  sink_float = _mm512_reduce_add_ps(total);
  return 2.0 * 16 * kChains * passes;
}

EXPORT ISA("avx512f,avx512bf16") double operations_vdpbf16ps(int64_t passes) {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x3080);  // 1 and about 1e-9
#define START(c) __m512 acc##c = _mm512_setzero_ps();
#define STEP(c) acc##c = _mm512_dpbf16_ps(acc##c, a, b); KEEP(acc##c);
#define TOTAL(c) total = _mm512_add_ps(total, acc##c);
  TWELVE(START)
  for (int64_t i = 0; i < passes; ++i) { TWELVE(STEP) }
  __m512 total = _mm512_setzero_ps();
  TWELVE(TOTAL)
#undef START
#undef STEP
#undef TOTAL
  sink_float = _mm512_reduce_add_ps(total);
  return 2.0 * 32 * kChains * passes;
}

EXPORT ISA("avx2,fma") double operations_fma256(int64_t passes) {
  const __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(1e-9f);
#define START(c) __m256 acc##c = _mm256_setzero_ps();
#define STEP(c) acc##c = _mm256_fmadd_ps(a, b, acc##c); KEEP(acc##c);
#define TOTAL(c) total = _mm256_add_ps(total, acc##c);
  TWELVE(START)
  for (int64_t i = 0; i < passes; ++i) { TWELVE(STEP) }
  __m256 total = _mm256_setzero_ps();
  TWELVE(TOTAL)
#undef START
#undef STEP
#undef TOTAL
  sink_float = _mm256_cvtss_f32(total);
  return 2.0 * 8 * kChains * passes;
}

namespace {
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Linux hands out tile registers on request (arch_prctl ARCH_REQ_XCOMP_PERM, component 18).
bool tiles_granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

const TileConfig kFullTiles = [] {
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = 16;
  return config;
}();
alignas(64) uint8_t tile_memory[1024] = {};

// Tiles 0..3 accumulate, 4..5 hold rows, 6..7 columns: the 2 x 2 blocking that keeps the unit busy.
#define FOUR_TILES(product) product(0, 4, 6); product(1, 4, 7); product(2, 5, 6); product(3, 5, 7)
#define LOAD_TILES() \
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); \
  _tile_loadd(4, tile_memory, 64); _tile_loadd(5, tile_memory, 64); _tile_loadd(6, tile_memory, 64); _tile_loadd(7, tile_memory, 64)
}  // namespace

EXPORT ISA("amx-tile,amx-int8") double operations_tdpbusd(int64_t passes) {
  if (!tiles_granted()) return 0;
  _tile_loadconfig(&kFullTiles);
  LOAD_TILES();
  for (int64_t i = 0; i < passes; ++i) { FOUR_TILES(_tile_dpbusd); }
  _tile_release();
  return 2.0 * 16 * 16 * 64 * 4 * passes;
}

EXPORT ISA("amx-tile,amx-bf16") double operations_tdpbf16ps(int64_t passes) {
  if (!tiles_granted()) return 0;
  _tile_loadconfig(&kFullTiles);
  LOAD_TILES();
  for (int64_t i = 0; i < passes; ++i) { FOUR_TILES(_tile_dpbf16ps); }
  _tile_release();
  return 2.0 * 16 * 16 * 32 * 4 * passes;
}

// Brings `bytes` (a multiple of 512) into the core, one load per line; returns the bytes moved.
EXPORT ISA("avx2") double stream_read(const uint8_t* data, int64_t bytes) {
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i + 512 <= bytes; i += 512) {
#define LINE(c) total = _mm256_xor_si256(total, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 64 * c)));  // one load per cache line
    LINE(0) LINE(1) LINE(2) LINE(3) LINE(4) LINE(5) LINE(6) LINE(7)
#undef LINE
  }
  sink_int = _mm256_extract_epi32(total, 0);
  return static_cast<double>(bytes / 512 * 512);
}
