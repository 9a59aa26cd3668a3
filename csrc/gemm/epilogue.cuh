// From accumulators to global memory: 64 x 64 boxes through swizzled shared memory, stored by the copy engine while
// the warpgroup goes on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "config.cuh"
#include "ptx.cuh"

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

// The output boxes of one math warpgroup, used in turn. A box is written by all its threads and stored by one.
class Staging {
 public:
  __device__ Staging(void* boxes, int warpgroup)
      : boxes_(ptx::shared_address(boxes)), barrier_(1 + warpgroup), leader_(threadIdx.x % kWarpgroup == 0) {}

  // Waits until the next box may be written; gives its address.
  __device__ uint32_t acquire() {
    if (leader_) ptx::wait_stores_read<kStagingBoxes - 1>();
    ptx::sync_threads(barrier_, kWarpgroup);
    return boxes_ + next_ * kBoxBytes;
  }

  // Stores the box that acquire() gave, once all threads have written it.
  template <class Store>
  __device__ void commit(Store&& store) {
    ptx::fence_async_proxy();
    ptx::sync_threads(barrier_, kWarpgroup);
    if (leader_) {
      store(boxes_ + next_ * kBoxBytes);
      ptx::commit_stores();
    }
    next_ = (next_ + 1) % kStagingBoxes;
  }

  __device__ void drain() {
    if (leader_) ptx::wait_stores_read<0>();
  }

 private:
  uint32_t boxes_;
  uint32_t barrier_;
  bool leader_;
  int next_ = 0;
};

// Writes columns 64 * chunk .. of a warpgroup's 64 rows into a box. `value(i)` is the i-th accumulator of this thread:
// i = 4 * (column / 8) + 2 * (row / 8 % 2) + column % 2 in the m64 fragment.
template <class Element, class Value>
__device__ void fill_box(uint32_t box, int chunk, Value&& value) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
  CUTE_UNROLL
  for (int pair = 0; pair < 4; ++pair) {
    const int first = 32 * chunk + 8 * pair;
    const int unit = (2 * pair + lane / 16) ^ (row % 8);
    ptx::store_matrix(box + row * 128 + unit * 16, pack<Element>(value(first), value(first + 1)),
                      pack<Element>(value(first + 2), value(first + 3)),
                      pack<Element>(value(first + 4), value(first + 5)),
                      pack<Element>(value(first + 6), value(first + 7)));
  }
}

// The plain epilogue: the accumulators, rounded once.
struct StoreTile {
  struct Params {};

  template <class Config, class Product, class Work, class Accumulators>
  __device__ static void run(const Params&, const CUtensorMap* map, const Work& work, int half, int columns,
                             Staging& staging, const Accumulators& accumulators) {
    using Element = typename Config::Element;
    CUTE_UNROLL
    for (int chunk = 0; chunk < Config::kTileN / kBoxColumns; ++chunk) {
      if (work.column + chunk * kBoxColumns >= columns) break;
      fill_box<Element>(staging.acquire(), chunk, [&](int i) { return accumulators(i); });
      staging.commit([&](uint32_t box) {
        const auto at = Product::output_box(work, half * kHalfRows, chunk * kBoxColumns);
        ptx::store_3d(map, box, at.x, at.y, at.z);
      });
    }
  }
};

}  // namespace ling::gemm
