// The ring of stages between the loading and the multiplying warps: a full and an empty barrier per stage.
#pragma once

#include "config.cuh"
#include "ptx.cuh"

namespace ling::gemm {

// One role's position in the ring.
template <class Config>
class Ring {
 public:
  __device__ explicit Ring(typename Config::Shared& shared)
      : full_(ptx::shared_address(shared.full)), empty_(ptx::shared_address(shared.empty)) {
    if constexpr (Config::kCluster > 1) release_ = ptx::map_to_block(empty_, threadIdx.x % Config::kCluster);
  }

  // A stage is full when its loaders have arrived and its bytes have landed; it is empty when every math warp of
  // every block that its bytes go to or that writes into it has let it go.
  __device__ static void initialise(typename Config::Shared& shared, int loaders) {
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&shared.full[i]), loaders);
      ptx::mbarrier_init(ptx::shared_address(&shared.empty[i]), Config::kCluster * kMathWarpgroups * 4);
    }
    ptx::mbarrier_init(ptx::shared_address(&shared.lead), 4);
    ptx::fence_mbarrier_init();
  }

  __device__ int stage() const { return stage_; }
  __device__ uint32_t full_barrier() const { return full_ + stage_ * 8; }

  __device__ void advance() {
    if (++stage_ == Config::kStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

  __device__ void wait_full() const {
    while (!ptx::mbarrier_try_wait(full_barrier(), phase_)) {
    }
  }

  // The first pass over the ring finds every stage empty.
  __device__ void wait_empty() const {
    while (!ptx::mbarrier_try_wait(empty_ + stage_ * 8, phase_ ^ 1)) {
    }
  }

  // By all lanes of a math warp: the stage `back` steps ago is no longer read.
  __device__ void release(int back) const {
    const int stage = stage_ >= back ? stage_ - back : stage_ - back + Config::kStages;
    const int lane = threadIdx.x % 32;
    if constexpr (Config::kCluster > 1) {
      if (lane < Config::kCluster) ptx::mbarrier_arrive_cluster(release_ + stage * 8);
    } else {
      if (lane == 0) ptx::mbarrier_arrive(empty_ + stage * 8);
    }
  }

 private:
  uint32_t full_;
  uint32_t empty_;
  uint32_t release_ = 0;  // the empty barriers of the block that this lane notifies
  int stage_ = 0;
  uint32_t phase_ = 0;
};

// Holds the second math warpgroup back at the start of a tile until the first is kLead stages into it. Only for tiles
// longer than the ring: there the first cannot be a whole tile ahead, so that one barrier tells the tiles apart.
template <class Config>
class Stagger {
 public:
  __device__ Stagger(typename Config::Shared& shared, int half)
      : barrier_(ptx::shared_address(&shared.lead)), half_(half) {}

  __device__ void begin_tile(int halves, int k_blocks) {
    if constexpr (Config::kLead > 0) {
      active_ = halves == kMathWarpgroups && k_blocks >= Config::kStages;
      if (active_ && half_ == 1) {
        while (!ptx::mbarrier_try_wait(barrier_, phase_)) {
        }
        phase_ ^= 1;
      }
    }
  }

  // After the first warpgroup has issued the products of stage `block` of its tile.
  __device__ void after(int block) const {
    if constexpr (Config::kLead > 0) {
      if (active_ && half_ == 0 && block == Config::kLead - 1 && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier_);
    }
  }

 private:
  uint32_t barrier_;
  int half_;
  bool active_ = false;
  uint32_t phase_ = 0;
};

}  // namespace ling::gemm
