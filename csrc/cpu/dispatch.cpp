// The choice of instruction set, and what needs none.
#include <atomic>
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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
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
  constexpr int64_t kPiecesPerThread = 4, kWorthUnpacking = 96;  // rows
  const int64_t needed = (m + linear.block - 1) / linear.block, spread = (kPiecesPerThread * threads + panels - 1) / panels;
  const int64_t most = m / kWorthUnpacking;
  return needed > spread ? needed : spread < most ? spread : most > needed ? most : needed;
}

void pack_weight(const PackArgs& args, int64_t panel_begin, int64_t panel_end) {
  const int64_t groups = padded_k(args.k) / kGroup, row_bytes = (args.k + 1) / 2;
  const auto nibble = [&](int64_t n, int64_t k) -> int {  // w + 8; padding is 0, and the activations' padding is 0 too
    if (n >= args.n || k >= args.k) return 0;
    const int byte = args.w_q[n * row_bytes + k / 2];
    return ((k & 1 ? byte >> 4 : byte) & 15) ^ 8;
  };
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    uint8_t* block = args.blocks + panel * groups * 2 * kPanel;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t c = 0; c < 16; ++c)
          for (int64_t i = 0; i < kGroup; ++i) {
            const int64_t n = panel * kPanel + 32 * h + c, k = group * kGroup + i;
            *block++ = static_cast<uint8_t>(nibble(n, k) | nibble(n + 16, k) << 4);
          }
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t n = panel * kPanel + c;
      int32_t sum = 0;
      for (int64_t k = 0; n < args.n && k < args.k; ++k) sum += nibble(n, k) - 8;
      args.col_sum[n] = sum;
    }
  }
}

}  // namespace quota
