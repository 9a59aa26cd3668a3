// Host side of one kernel: attributes, grid, cluster.
#pragma once

#include <algorithm>

#include "kernel.cuh"

namespace ling::gemm {

// `tiles` bounds the number of cluster tiles from above; offsets live on the device, so the exact number is not known.
// The kernel may start before the one in front has ended, unless the counter's zeroing stands between them.
template <class Config, template <class> class Product, template <class, class> class Epilogue>
void launch_kernel(const KernelParams<Epilogue<Config, Product<Config>>>& params, int64_t tiles, cudaStream_t stream,
                   bool counter_is_zero = false) {
  const auto kernel = &gemm_kernel<Config, Product, Epilogue>;
  constexpr int kBytes = sizeof(typename Config::Shared);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "gemm shared memory");

  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = Config::kCluster;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(Config::kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  // A persistent grid must be resident as a whole; graphics clusters of odd size leave some SMs without a cluster.
  int resident = 0;
  check(cudaOccupancyMaxActiveClusters(&resident, kernel, &config), "counting resident clusters");
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(tiles, resident)) * Config::kCluster);
  config.numAttrs = 2;
  if (!counter_is_zero) {
    check(cudaMemsetAsync(params.schedule.counter, 0, sizeof(int32_t), stream), "zeroing the tile counter");
  }
  check(cudaLaunchKernelEx(&config, kernel, params), "grouped GEMM");
}

inline int checked_int(int64_t value, const char* what) {
  require(value >= 0 && value < (int64_t{1} << 31) - 512, what, " is out of range for the GEMM kernels");
  return static_cast<int>(value);
}

// m-tiles swept together: with tiles of 256 x 256 and 66 pairs of blocks, 8 makes a wave about square.
constexpr int kSweep = 8;

// Tiles where the rows of experts are the rows of the output.
template <class Config>
Schedule row_schedule(const int32_t* offsets, int32_t* counter, int64_t rows, int64_t experts, int64_t n_tiles) {
  return {offsets,
          counter,
          checked_int(experts, "experts"),
          checked_int(rows, "rows"),
          Config::kRowTile,
          0,
          checked_int(n_tiles, "columns"),
          kSweep,
          0};
}

// Never less than the tiles of such a schedule.
template <class Config>
int64_t row_tiles(int64_t rows, int64_t experts, int64_t n_tiles) {
  const int64_t tiles = (rows / Config::kRowTile + std::min(experts, rows)) * n_tiles;
  checked_int(tiles, "the number of tiles");
  return tiles;
}

}  // namespace ling::gemm
