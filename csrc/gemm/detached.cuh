// Accumulators, rounded, on their way from the math warpgroups to the warps that complete the tile while the products
// of the next run.
#pragma once

#include "epilogue.cuh"

namespace ling::gemm {

template <class Config>
class Handoff {
  using Shared = typename Config::Shared;
  static constexpr int kBoxes = Config::kOutputBoxes;

 public:
  __device__ explicit Handoff(Shared& shared)
      : boxes_(ptx::shared_address(shared.staging)),
        staged_(ptx::shared_address(shared.staged)),
        taken_(ptx::shared_address(shared.taken)) {}

  // Both sides arrive warp by warp.
  __device__ static void initialise(Shared& shared) {
    for (int half = 0; half < kMathWarpgroups; ++half) {
      ptx::mbarrier_init(ptx::shared_address(&shared.staged[half]), 4);
      ptx::mbarrier_init(ptx::shared_address(&shared.taken[half]), Config::kDetachedWarps);
    }
    ptx::fence_mbarrier_init();
  }

  // By a math warpgroup: leaves its 64 rows of the tile, once those of the tile before have been read.
  template <class Accumulators>
  __device__ void give(int half, const Accumulators& accumulators) {
    wait(taken_, half, 1);
    CUTE_UNROLL
    for (int i = 0; i < kBoxes; ++i) {
      fill_box(box(half, i), rounded<typename Config::Element>(accumulators, i));
    }
    arrive(staged_, half);
    flip(half);
  }

  // By the other side: a half of the tile may be read, and has been read.
  __device__ void await(int half) const { wait(staged_, half, 0); }
  __device__ void release(int half) {
    arrive(taken_, half);
    flip(half);
  }

  __device__ uint32_t box(int half, int index) const { return boxes_ + (half * kBoxes + index) * kBoxBytes; }

 private:
  __device__ void wait(uint32_t barriers, int half, uint32_t flipped) const {
    while (!ptx::mbarrier_try_wait(barriers + half * 8, (phases_ >> half & 1) ^ flipped)) {
    }
  }
  __device__ static void arrive(uint32_t barriers, int half) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barriers + half * 8);
  }
  __device__ void flip(int half) { phases_ ^= 1u << half; }

  uint32_t boxes_;
  uint32_t staged_;
  uint32_t taken_;
  uint32_t phases_ = 0;  // bit h: parity of half h's next handover
};

}  // namespace ling::gemm
