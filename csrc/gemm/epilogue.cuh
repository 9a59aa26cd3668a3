// From accumulators to global memory: 64 x 64 boxes through swizzled shared memory, stored by the copy engine while
// the warpgroup goes on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "operands.cuh"

namespace ling::gemm {

template <class Element>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, cute::bfloat16_t>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// The output boxes of one math warpgroup. All are written by all its threads, then stored by one.
class Staging {
 public:
  __device__ Staging(void* boxes, int warpgroup)
      : boxes_(ptx::shared_address(boxes)), barrier_(1 + warpgroup), leader_(threadIdx.x % kWarpgroup == 0) {}

  __device__ uint32_t box(int index) const { return boxes_ + index * kBoxBytes; }

  // Waits until the boxes may be written again.
  __device__ void acquire() {
    if (leader_) ptx::wait_stores_read<0>();
    ptx::sync_threads(barrier_, kWarpgroup);
  }

  // Runs `store` in one thread, once all threads have written.
  template <class Store>
  __device__ void commit(Store&& store) {
    ptx::fence_async_proxy();
    ptx::sync_threads(barrier_, kWarpgroup);
    if (leader_) {
      store();
      ptx::commit_stores();
    }
  }

  __device__ void drain() {
    if (leader_) ptx::wait_stores_read<0>();
  }

 private:
  uint32_t boxes_;
  uint32_t barrier_;
  bool leader_;
};

// Writes a quarter of a warpgroup's 64 x 64 values into a box: columns 16 * quarter and on. `pair(i)` gives two
// neighbouring columns of this thread, packed: pair 2 * j + r is columns 8 j + 2 (lane % 4) of row lane / 4 + 8 r of
// the warp, the order of the m64 fragment.
template <class Pair>
__device__ void fill_quarter(uint32_t box, int quarter, Pair&& pair) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
  const int unit = (2 * quarter + lane / 16) ^ (row % 8);
  const int first = 4 * quarter;
  ptx::store_matrix(box + row * 128 + unit * 16, pair(first), pair(first + 1), pair(first + 2), pair(first + 3));
}

template <class Pair>
__device__ void fill_box(uint32_t box, Pair&& pair) {
  CUTE_UNROLL
  for (int quarter = 0; quarter < 4; ++quarter) fill_quarter(box, quarter, pair);
}

// Pairs of the fragment's columns 64 * chunk and on, rounded.
template <class Element, class Accumulators>
__device__ auto rounded(const Accumulators& accumulators, int chunk) {
  return [&accumulators, chunk](int i) {
    return pack<Element>(accumulators(32 * chunk + 2 * i), accumulators(32 * chunk + 2 * i + 1));
  };
}

// The plain epilogue: the accumulators, rounded once.
template <class Config, class Product>
struct StoreTile {
  struct Params {
    CUtensorMap out;
  };

  // What the tile needs beside the accumulators, fetched before the products so that its latency is hidden.
  __device__ StoreTile(const Params& params, const Work& work, int half) : params_(params), work_(work), half_(half) {}

  template <class Accumulators>
  __device__ void run(Staging& staging, const Accumulators& accumulators) const {
    CUTE_UNROLL
    for (int chunk = 0; chunk < Config::kTileN / kBoxColumns; chunk += kStagingBoxes) {
      staging.acquire();
      CUTE_UNROLL
      for (int i = 0; i < kStagingBoxes; ++i) {
        fill_box(staging.box(i), rounded<typename Config::Element>(accumulators, chunk + i));
      }
      staging.commit([&] {
        CUTE_UNROLL
        for (int i = 0; i < kStagingBoxes; ++i) {
          const OutputBox at = Product::output_box(work_, half_ * kHalfRows, (chunk + i) * kBoxColumns);
          if (at.x < work_.columns) ptx::store_3d(&params_.out, staging.box(i), at.x, at.y, at.z);
        }
      });
    }
  }

 private:
  const Params& params_;
  const Work& work_;
  int half_;
};

}  // namespace ling::gemm
