// What a kernel file includes: CUDA and the instructions of ptx.h, or (QUOTA_EMULATED) a processor that plays both, tests/native/emulation.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace quota::cuda {

// A grid's first dimension has 31 bits.
inline unsigned grid(int64_t blocks) {
  if (blocks < 1 || blocks > INT32_MAX)
    throw std::runtime_error("launch of a kernel: expected 1 to 2147483647 blocks, got " + std::to_string(blocks) + "; give fewer rows at a time");
  return static_cast<unsigned>(blocks);
}

}  // namespace quota::cuda

#ifdef QUOTA_EMULATED
#include "emulation.h"
#else

#include <cuda_runtime.h>

namespace quota::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace quota::cuda

#ifdef __CUDACC__  // the bindings are plain C++
#include "ptx.h"

namespace quota::cuda {

// The dynamic shared memory of a block; 128-byte swizzled tiles need the alignment.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// One launch; nothing else in this library starts a kernel. Above 48 KiB of shared memory a kernel has to ask first.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > (48u << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), "shared memory of a kernel");
  kernel<<<grid(blocks), threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), "launch of a kernel");
}

}  // namespace quota::cuda
#endif

#endif
