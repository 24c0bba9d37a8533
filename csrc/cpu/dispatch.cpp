// The choice of instruction set, and what needs none.
#include <atomic>
#include <bit>
#include <cstring>

#include "quota/kernels.h"

#if defined(QUOTA_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quota {

#ifdef QUOTA_X86
extern const Linear linear_amx, linear_avxvnni;
extern const Kernels kernels_avx512vnni, kernels_avx2;
#endif
extern const Kernels kernels_portable;

namespace {

struct Tables {
  Kernels all[5];
  int count = 0;
  void add(const Kernels& table) { all[count++] = table; }
};

#ifdef QUOTA_X86
// Tile registers are large, so Linux gives them to a process that asks.
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// A table that differs in w4a4_linear alone.
Kernels with_linear(const Kernels& table, const char* name, const Linear& linear) {
  Kernels out = table;
  out.name = name, out.linear = linear;
  return out;
}
#endif

Tables find_tables() {
  Tables tables;
#ifdef QUOTA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    if (__builtin_cpu_supports("amx-int8") && tiles_granted()) tables.add(with_linear(kernels_avx512vnni, "amx", linear_amx));
    tables.add(kernels_avx512vnni);
  }
  if (avx2 && __builtin_cpu_supports("avxvnni")) tables.add(with_linear(kernels_avx2, "avxvnni", linear_avxvnni));
  if (avx2) tables.add(kernels_avx2);
#endif
  tables.add(kernels_portable);
  return tables;
}

}  // namespace

const Kernels* supported(int i) {
  static const Tables tables = find_tables();
  return i < tables.count ? &tables.all[i] : nullptr;
}

static std::atomic<const Kernels*> active{nullptr};

const Kernels& kernels() {
  const Kernels* table = active.load(std::memory_order_acquire);
  if (table == nullptr) active.store(table = supported(0), std::memory_order_release);
  return *table;
}

bool use(const char* name) {
  for (int i = 0; const Kernels* table = supported(i); ++i)
    if (std::strcmp(table->name, name) == 0) {
      active.store(table, std::memory_order_release);
      return true;
    }
  return false;
}

int64_t row_blocks(const Linear& linear, int64_t m, int64_t panels, int64_t threads) {
  constexpr int64_t kPiecesPerThread = 4, kLeastRows = 96;  // fewer rows would not repay the unpacking of the weights
  const int64_t cached = (m + linear.block - 1) / linear.block;
  int64_t spread = (kPiecesPerThread * threads + panels - 1) / panels;
  if (spread > m / kLeastRows) spread = m / kLeastRows;
  return spread > cached ? spread : cached;
}

namespace {

static_assert(std::endian::native == std::endian::little, "blocks are written four bytes at a time");

// Four nibbles, two's complement -> four bytes w + 8.
uint32_t spread_nibbles(uint32_t four) { return ((four & 0xf) | (four & 0xf0) << 4 | (four & 0xf00) << 8 | (four & 0xf000) << 12) ^ 0x08080808u; }

// Sum of four bytes.
int32_t sum_bytes(uint32_t four) { return static_cast<int32_t>(four * 0x01010101u >> 24); }

// One column of a panel into its place in every group; columns from 32h + 16 on are the high nibbles. Returns the sum of its weights.
int32_t pack_column(const uint8_t* w, int64_t k, uint32_t* out, bool high) {
  int32_t sum = 0;
  for (int64_t group = 0; kGroup * group < k; ++group) {
    const int64_t left = k - kGroup * group;
    uint32_t four = spread_nibbles(w[2 * group] | (left > 2 ? w[2 * group + 1] : 0) << 8);
    if (left < kGroup) four &= (1u << 8 * left) - 1;
    sum += sum_bytes(four);
    uint32_t& place = out[group * (2 * kPanel / kGroup)];
    place = high ? place | four << 4 : four;
  }
  return sum - static_cast<int32_t>(8 * k);
}

}  // namespace

void pack_weight(const PackArgs& args, int64_t panel_begin, int64_t panel_end) {
  const int64_t block = padded_k(args.k) * kPanel / 2, row_bytes = (args.k + 1) / 2;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    std::memset(args.blocks + panel * block, 0, static_cast<size_t>(block));  // padding is 0, as the activations' is
    uint32_t* out = reinterpret_cast<uint32_t*>(args.blocks + panel * block);
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t n = panel * kPanel + c;
      args.col_sum[n] = n < args.n ? pack_column(args.w_q + n * row_bytes, args.k, out + c / 32 * 16 + c % 16, c % 32 >= 16) : 0;
    }
  }
}

}  // namespace quota
