// One multiprocessor played by a CPU, so that the kernels' own source runs in tests: threads of a block are fibers, collective instructions wait
// for all their lanes and then do what the operand tables of the PTX ISA 9.0 say, asynchronous copies and wgmma happen when they are waited
// for (not when they are issued), and shared memory is poisoned. QUOTA_EMULATION_ORDER (0: ascending, 1: descending, else the seed of a shuffle)
// is the order in which threads get their turns: a missing barrier shows as a difference.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return x != x ? 0 : x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : int(__builtin_nearbyintf(x)); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

namespace emulation {

constexpr size_t kStack = 256 << 10;

struct Gathering {  // lanes on their way into one collective instruction
  int arrived = 0;
  unsigned round = 0;
  void* lanes[128];
};

struct Pending {  // a copy under way
  void* to;
  const void* from;
  size_t bytes;
  uint64_t* barrier;
};

struct WarpgroupOp {
  int* d;
  const uint32_t* a;
  uint64_t descriptor;
  int accumulate, tokens;
};

struct Thread {
  ucontext_t context;
  bool done;
  std::vector<Pending> open;                 // cp.async, not yet committed
  std::deque<std::vector<Pending>> groups;   // committed
  std::vector<WarpgroupOp> matrix, matrix_open;
};

struct Barrier {
  int expected, arrived;
  int64_t bytes;
  unsigned phase;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<char> stacks;
  std::vector<unsigned char> shared;
  ucontext_t scheduler;
  std::map<int, Gathering> gatherings;
  std::map<uint64_t*, Barrier> barriers;
  std::vector<Pending> bulk;
  int current = 0, count = 0, live = 0;
  uint64_t events = 0;
  std::function<void()> body;
};
inline Machine machine;

inline void yield() {
  Thread& self = machine.threads[machine.current];
  swapcontext(&self.context, &machine.scheduler);
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %d)\n", what, blockIdx.x, machine.current);
  std::abort();
}

// All `count` threads from `first` on meet; the last one to come does the work of all. `key` tells kinds of meetings apart.
inline void meet(int key, int first, int count, void* mine, const std::function<void(void**)>& work) {
  Gathering& g = machine.gatherings[key * 4096 + first];
  g.lanes[machine.current - first < 128 ? machine.current - first : 0] = mine;
  const unsigned round = g.round;
  ++machine.events;
  if (++g.arrived == count) {
    work(g.lanes);
    g.arrived = 0, ++g.round;
    return;
  }
  while (g.round == round) yield();
}

inline int lane() { return machine.current % 32; }
inline int warp_first() { return machine.current / 32 * 32; }

inline void entry() {
  machine.body();
  machine.threads[machine.current].done = true;
  --machine.live, ++machine.events;
  yield();
  fail("a finished thread ran again");
}

inline void run_block(int threads, size_t shared_bytes) {
  machine.threads = std::vector<Thread>(threads);
  if (machine.stacks.size() < threads * kStack) machine.stacks.resize(threads * kStack);
  machine.shared.assign(shared_bytes + 2048, 0xa5);
  machine.gatherings.clear(), machine.barriers.clear(), machine.bulk.clear();
  machine.count = machine.live = threads;
  for (int i = 0; i < threads; ++i) {
    Thread& t = machine.threads[i];
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = machine.stacks.data() + i * kStack, t.context.uc_stack.ss_size = kStack, t.context.uc_link = nullptr;
    t.done = false;
    makecontext(&t.context, reinterpret_cast<void (*)()>(entry), 0);
  }
  const char* order_text = std::getenv("QUOTA_EMULATION_ORDER");
  const int order = order_text ? std::atoi(order_text) : 0;
  std::vector<int> turns(threads);
  for (int i = 0; i < threads; ++i) turns[i] = order == 1 ? threads - 1 - i : i;
  std::mt19937 random(order);
  while (machine.live) {
    if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
    const uint64_t before = machine.events;
    for (const int i : turns) {
      if (machine.threads[i].done) continue;
      machine.current = i, threadIdx.x = static_cast<unsigned>(i);
      swapcontext(&machine.scheduler, &machine.threads[i].context);
    }
    if (machine.events == before) fail("deadlock: no thread can go on");
  }
  for (Thread& t : machine.threads)
    if (!t.matrix.empty() || !t.matrix_open.empty()) fail("wgmma was never waited for");
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(1, 0, emulation::machine.live, nullptr, [](void**) {}); }
inline void __syncwarp() { emulation::meet(2, emulation::warp_first(), 32, nullptr, [](void**) {}); }

template <class T>
inline T __shfl_xor_sync(uint32_t, T x, int distance) {
  struct Lane {
    T in, out;
  } mine{x, x};
  emulation::meet(3, emulation::warp_first(), 32, &mine, [&](void** lanes) {
    for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->out = static_cast<Lane*>(lanes[i ^ distance])->in;
  });
  return mine.out;
}

namespace quota::ptx {

struct MmaLane {
  int* d;
  const uint32_t* a;
  const uint32_t* b;
};

inline int nibble(const uint32_t* registers, int i) { return static_cast<int>(registers[i / 8] >> 4 * (i % 8) & 15 ^ 8) - 8; }
inline int signed_byte(const uint32_t* registers, int i) { return static_cast<int8_t>(registers[i / 4] >> 8 * (i % 4)); }
inline int unsigned_byte(const uint32_t* registers, int i) { return static_cast<uint8_t>(registers[i / 4] >> 8 * (i % 4)); }

// d += a b from the operand tables of mma.m16n8k64 (nibbles, `per` = 8 elements of a register) and mma.m16n8k32 (bytes, 4).
template <class A, class B>
inline void mma(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int per, A element_a, B element_b) {
  MmaLane mine{d, a, b};
  emulation::meet(4, emulation::warp_first(), 32, &mine, [&](void** lanes) {
    const int k = 8 * per;
    std::vector<int> whole_a(16 * k), whole_b(k * 8);
    for (int lane = 0; lane < 32; ++lane) {
      const auto& l = *static_cast<MmaLane*>(lanes[lane]);
      const int group = lane / 4, in_group = lane % 4;
      for (int i = 0; i < 4 * per; ++i) {  // a: registers 0 and 2 are row `group`, 1 and 3 row group + 8; 0 and 1 the first half of k
        const int row = group + (i / per % 2 ? 8 : 0), column = in_group * per + i % per + (i < 2 * per ? 0 : k / 2);
        whole_a[row * k + column] = element_a(l.a, i);
      }
      for (int i = 0; i < 2 * per; ++i) whole_b[(in_group * per + i % per + (i < per ? 0 : k / 2)) * 8 + group] = element_b(l.b, i);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
        int sum = 0;
        for (int j = 0; j < k; ++j) sum += whole_a[row * k + j] * whole_b[j * 8 + column];
        static_cast<MmaLane*>(lanes[lane])->d[i] += sum;
      }
  });
}
inline void mma_s4(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(d, a, b, 8, nibble, nibble); }
inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(d, a, b, 4, signed_byte, signed_byte); }
inline void mma_s8u8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(d, a, b, 4, signed_byte, unsigned_byte); }
inline void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(d, a, b, 4, unsigned_byte, signed_byte); }
inline void mma_u8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(d, a, b, 4, unsigned_byte, unsigned_byte); }

inline emulation::Thread& self() { return emulation::machine.threads[emulation::machine.current]; }

inline uint32_t shared_address(const void* p) {
  const auto base = reinterpret_cast<uintptr_t>(emulation::machine.shared.data()) + 1023 & ~uintptr_t{1023};
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) - base);
}
inline const unsigned char* shared_at(uint32_t address) {
  return reinterpret_cast<const unsigned char*>((reinterpret_cast<uintptr_t>(emulation::machine.shared.data()) + 1023 & ~uintptr_t{1023}) + address);
}

inline void aligned(const void* p, size_t to) {
  if (reinterpret_cast<uintptr_t>(p) % to) emulation::fail("a copy is not aligned");
}
inline void copy_16(void* shared, const void* global, bool valid) {
  aligned(shared, 16), aligned(global, 16);
  self().open.push_back({shared, valid ? global : nullptr, 16, nullptr});
}
inline void copy_commit() { self().groups.push_back(std::move(self().open)), self().open.clear(); }
template <int kGroups>
inline void copy_wait() {
  auto& groups = self().groups;
  for (; groups.size() > kGroups; groups.pop_front())
    for (const auto& copy : groups.front()) copy.from ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
}

inline void complete(emulation::Barrier& b) {
  if (b.arrived == b.expected && b.bytes == 0) b.arrived = 0, ++b.phase, ++emulation::machine.events;
}
inline void barrier_init(uint64_t* barrier, uint32_t arrivals) { emulation::machine.barriers[barrier] = {static_cast<int>(arrivals), 0, 0, 0}; }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) {
  auto& b = emulation::machine.barriers.at(barrier);
  ++b.arrived, ++emulation::machine.events, complete(b);
}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulation::machine.barriers.at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  aligned(shared, 16), aligned(global, 16);
  if (bytes % 16) emulation::fail("a bulk copy is not of whole 16 bytes");
  emulation::machine.bulk.push_back({shared, global, bytes, barrier});
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  auto& b = emulation::machine.barriers.at(barrier);
  while ((b.phase & 1) == parity) {
    auto& bulk = emulation::machine.bulk;
    for (size_t i = 0; i < bulk.size(); ++i)
      if (bulk[i].barrier == barrier) {
        std::memcpy(bulk[i].to, bulk[i].from, bulk[i].bytes);
        b.bytes -= static_cast<int64_t>(bulk[i].bytes);
        bulk.erase(bulk.begin() + static_cast<int64_t>(i--));
        ++emulation::machine.events, complete(b);
      }
    if ((b.phase & 1) == parity) emulation::yield();
  }
}

inline void wgmma_fence() {}
template <int kCount>
inline void settle(int (&)[kCount]) {}
inline void wgmma_commit() {
  auto& t = self();
  t.matrix.insert(t.matrix.end(), t.matrix_open.begin(), t.matrix_open.end());
  t.matrix_open.clear();
}
template <int kTokens>
inline void wgmma_s8(int (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t descriptor, int accumulate) {
  self().matrix_open.push_back({d, a, descriptor, accumulate, kTokens});
}

// b[token][k] of a K-major operand with 128-byte swizzle: 16-byte chunks of a row are exchanged by the address bits 7 to 9.
inline int swizzled_element(uint64_t descriptor, int token, int k) {
  if (descriptor >> 62 != 1) emulation::fail("the descriptor is not one of 128-byte swizzle");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4, stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start + static_cast<uint32_t>(token / 8) * stride + static_cast<uint32_t>(token % 8) * 128 + static_cast<uint32_t>(k);
  address ^= (address >> 7 & 7) << 4;
  return static_cast<int8_t>(*shared_at(address));
}

inline void wgmma_wait() {
  const int first = emulation::machine.current / 128 * 128;
  emulation::meet(5, first, 128, &self(), [](void** lanes) {
    const auto thread = [&](int i) { return static_cast<emulation::Thread*>(lanes[i]); };
    for (size_t op = 0; op < thread(0)->matrix.size(); ++op) {
      std::vector<int> a(64 * 32), sums(64 * 256);
      const auto shared = thread(0)->matrix[op];
      for (int i = 0; i < 128; ++i) {  // figure "WGMMA .m64nNk32 register fragment layout for matrix A"
        const auto& mine = thread(i)->matrix[op];
        if (mine.descriptor != shared.descriptor) emulation::fail("threads of a warpgroup disagree on a descriptor");
        for (int e = 0; e < 16; ++e)
          a[(i / 32 * 16 + i % 32 / 4 + (e / 4 % 2 ? 8 : 0)) * 32 + i % 4 * 4 + e % 4 + (e < 8 ? 0 : 16)] = signed_byte(mine.a, e);
      }
      for (int token = 0; token < shared.tokens; ++token) {
        int b[32];
        for (int k = 0; k < 32; ++k) b[k] = swizzled_element(shared.descriptor, token, k);
        for (int row = 0; row < 64; ++row) {
          int sum = 0;
          for (int k = 0; k < 32; ++k) sum += a[row * 32 + k] * b[k];
          sums[row * 256 + token] = sum;
        }
      }
      for (int i = 0; i < 128; ++i) {  // figure "WGMMA .m64nNk32 register fragment layout for accumulator matrix D"
        const auto& mine = thread(i)->matrix[op];
        for (int e = 0; e < shared.tokens / 2; ++e) {
          const int row = i / 32 * 16 + i % 32 / 4 + (e / 2 % 2 ? 8 : 0), token = e / 4 * 8 + i % 4 * 2 + e % 2;
          mine.d[e] = (mine.accumulate ? mine.d[e] : 0) + sums[row * 256 + token];
        }
      }
    }
    for (int i = 0; i < 128; ++i) thread(i)->matrix.clear();
  });
}

}  // namespace quota::ptx

namespace quota::cuda {

inline unsigned char* shared_memory() { return const_cast<unsigned char*>(ptx::shared_at(0)); }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  if (threads % 32 || threads > 1024 || shared_bytes > (227u << 10)) emulation::fail("a launch that no device takes");
  blockDim = {static_cast<unsigned>(threads), 1, 1}, gridDim = {grid(blocks), 1, 1};
  emulation::machine.body = [=] { kernel(static_cast<Parameters>(arguments)...); };
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    emulation::run_block(threads, shared_bytes);
  }
}

}  // namespace quota::cuda
