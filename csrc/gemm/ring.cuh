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

  // A stage is full when its loaders have arrived and its bytes have landed; it may be loaded again when every math
  // warp of the cluster has let it go, since each block loads weights for all blocks.
  __device__ static void initialise(typename Config::Shared& shared, int loaders) {
    for (int i = 0; i < Config::kStagesA; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&shared.full[i]), loaders);
      ptx::mbarrier_init(ptx::shared_address(&shared.empty[i]), Config::kCluster * kMathWarpgroups * 4);
    }
    ptx::fence_mbarrier_init();
  }

  __device__ int stage() const { return stage_; }
  // The same of the weights, which may have fewer stages.
  __device__ int weight_stage() const { return kSplit ? weight_stage_ : stage_; }
  __device__ uint32_t full_barrier() const { return full_ + stage_ * 8; }

  __device__ void advance() {
    if (++stage_ == Config::kStagesA) {
      stage_ = 0;
      phase_ ^= 1;
    }
    if (kSplit && ++weight_stage_ == Config::kStages) weight_stage_ = 0;
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

  // By the loading role, at the end: every stage has been let go, so that no arrival from a neighbour is under way.
  __device__ void drain() {
    for (int i = 0; i < Config::kStagesA; ++i) {
      wait_empty();
      advance();
    }
  }

  // By all lanes of a math warp: the stage `back` steps ago is no longer read.
  __device__ void release(int back) const {
    const int stage = stage_ >= back ? stage_ - back : stage_ - back + Config::kStagesA;
    if constexpr (Config::kCluster > 1) {
      if (threadIdx.x % 32 < Config::kCluster) ptx::mbarrier_arrive_cluster(release_ + stage * 8);
    } else {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty_ + stage * 8);
    }
  }

 private:
  static constexpr bool kSplit = Config::kStagesA != Config::kStages;

  uint32_t full_;
  uint32_t empty_;
  uint32_t release_ = 0;  // the empty barriers of the block that this lane notifies
  int stage_ = 0;
  int weight_stage_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace ling::gemm
