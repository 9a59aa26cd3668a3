// Kernel launches that may overlap on sm_90 and later, where the kernel's code was compiled for it.
//
// Overlap ("programmatic dependent launch"): a kernel starts before the one in front of it in the stream has
// ended; wait_for_previous() returns once that one has ended and its writes can be seen. Two ways to use it:
//   - every thread calls wait_for_previous() before it touches global memory. Then anything may lie in front, and
//     only the start of the kernel is hidden; a kernel in front that calls allow_next() hides more of it.
//   - a kernel touches what older kernels wrote and only then waits for the one in front. That one must call
//     allow_next(), must itself have been launched without overlap or have waited before that call, and nothing but it
//     may lie between.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "ling/common.h"

namespace ling {

__device__ inline void allow_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the code that the current device runs for a kernel was compiled for sm_90 or later. PTX of an
// earlier virtual architecture, compiled by the driver for a later device, has none of the features.
template <auto kKernel>
bool has_sm90_code() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices] = {};  // 0: not asked yet, 1: no, 2: yes
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kMaxDevices) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes attributes = {};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)), "cudaFuncGetAttributes");
    answer = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90 ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

constexpr size_t kSharedLimit = 48 << 10;  // what a block may have without asking

// Lets a kernel without static shared memory have more than that: all that the device gives, since a limit of this
// call's size could be lowered by another thread's call before the launch.
template <auto kKernel>
void allow_shared_memory(const char* name) {
  int device = 0;
  int most = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
}

struct LaunchShape {
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  bool overlap = false;  // with the previous kernel, where has_sm90_code()
};

template <auto kKernel, typename... Args>
void launch_kernel(const char* name, const LaunchShape& shape, cudaStream_t stream, Args... args) {
  if (shape.shared_bytes > kSharedLimit) allow_shared_memory<kKernel>(name);
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  if (shape.overlap && has_sm90_code<kKernel>()) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kKernel, args...), name);
}

}  // namespace ling
