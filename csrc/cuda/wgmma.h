// wgmma for signed bytes: d [64 x kTokens] (+)= a [64 x 32] in registers times b [kTokens x 32] in shared memory, by the 128 threads of a warpgroup.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quota::ptx {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QUOTA_HAS_WGMMA 1
#endif

__device__ inline void wgmma_fence() {
#ifdef QUOTA_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void wgmma_commit() {
#ifdef QUOTA_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void wgmma_wait() {
#ifdef QUOTA_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// What reads the accumulators stays behind the wait before it.
template <int kCount>
__device__ inline void settle(int (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Sixteen accumulators: operand numbers, and the operands themselves.
#define QUOTA_N0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define QUOTA_N1 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QUOTA_N2 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QUOTA_N3 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QUOTA_N4 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define QUOTA_N5 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define QUOTA_D(i)                                                                                                                                  \
  "+r"(d[16 * i]), "+r"(d[16 * i + 1]), "+r"(d[16 * i + 2]), "+r"(d[16 * i + 3]), "+r"(d[16 * i + 4]), "+r"(d[16 * i + 5]), "+r"(d[16 * i + 6]),    \
      "+r"(d[16 * i + 7]), "+r"(d[16 * i + 8]), "+r"(d[16 * i + 9]), "+r"(d[16 * i + 10]), "+r"(d[16 * i + 11]), "+r"(d[16 * i + 12]),              \
      "+r"(d[16 * i + 13]), "+r"(d[16 * i + 14]), "+r"(d[16 * i + 15])
// The operands after the accumulators: a in four registers, the descriptor of b, and whether d is added to (else it is overwritten).
#define QUOTA_WGMMA(n, numbers, a0, a1, a2, a3, b, add, ...)                                                                                        \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" numbers "}, {%" #a0 ",%" #a1 ",%" \
               #a2 ",%" #a3 "}, %" #b ", p;}"                                                                                                       \
               : __VA_ARGS__                                                                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(accumulate))

template <int kTokens>
__device__ inline void wgmma_s8(int (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t descriptor, int accumulate) {
  static_assert(kTokens % 32 == 0 && kTokens <= 192);
#ifdef QUOTA_HAS_WGMMA
  if constexpr (kTokens == 32) QUOTA_WGMMA(32, QUOTA_N0, 16, 17, 18, 19, 20, 21, QUOTA_D(0));
  if constexpr (kTokens == 64) QUOTA_WGMMA(64, QUOTA_N0 "," QUOTA_N1, 32, 33, 34, 35, 36, 37, QUOTA_D(0), QUOTA_D(1));
  if constexpr (kTokens == 96) QUOTA_WGMMA(96, QUOTA_N0 "," QUOTA_N1 "," QUOTA_N2, 48, 49, 50, 51, 52, 53, QUOTA_D(0), QUOTA_D(1), QUOTA_D(2));
  if constexpr (kTokens == 128)
    QUOTA_WGMMA(128, QUOTA_N0 "," QUOTA_N1 "," QUOTA_N2 "," QUOTA_N3, 64, 65, 66, 67, 68, 69, QUOTA_D(0), QUOTA_D(1), QUOTA_D(2), QUOTA_D(3));
  if constexpr (kTokens == 160)
    QUOTA_WGMMA(160, QUOTA_N0 "," QUOTA_N1 "," QUOTA_N2 "," QUOTA_N3 "," QUOTA_N4, 80, 81, 82, 83, 84, 85, QUOTA_D(0), QUOTA_D(1), QUOTA_D(2),
                QUOTA_D(3), QUOTA_D(4));
  if constexpr (kTokens == 192)
    QUOTA_WGMMA(192, QUOTA_N0 "," QUOTA_N1 "," QUOTA_N2 "," QUOTA_N3 "," QUOTA_N4 "," QUOTA_N5, 96, 97, 98, 99, 100, 101, QUOTA_D(0), QUOTA_D(1),
                QUOTA_D(2), QUOTA_D(3), QUOTA_D(4), QUOTA_D(5));
#else
  __trap();
#endif
}

}  // namespace quota::ptx
