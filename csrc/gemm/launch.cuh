// Host side of one kernel: attributes, grid, cluster.
#pragma once

#include <algorithm>

#include "kernel.cuh"

namespace ling::gemm {

// `tiles` bounds the number of cluster tiles from above; offsets live on the device, so the exact number is not known.
template <class Config, template <class> class Product, class Epilogue>
void launch_kernel(const KernelParams<Epilogue>& params, int64_t tiles, cudaStream_t stream) {
  const auto kernel = &gemm_kernel<Config, Product, Epilogue>;
  constexpr int kBytes = sizeof(typename Config::Shared);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "gemm shared memory");

  const int64_t clusters = std::min<int64_t>(tiles, sm_count() / Config::kCluster);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = Config::kCluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * Config::kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, params), "grouped GEMM");
}

inline int checked_int(int64_t value, const char* what) {
  require(value >= 0 && value < (int64_t{1} << 31) - 512, std::string(what) + " is out of range for the GEMM kernels");
  return static_cast<int>(value);
}

// m-tiles swept together: with tiles of 256 x 256 and 66 pairs of blocks, 8 makes a wave about square.
constexpr int kSweep = 8;

}  // namespace ling::gemm
