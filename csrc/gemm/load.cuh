// The loading warpgroup: operands of tile after tile into the ring of stages.
#pragma once

#include "ling/launch.h"
#include "operands.cuh"
#include "ring.cuh"

namespace ling::gemm {

// Rows of a table that are gathered through an index.
struct Gather {
  const void* table;     // [table_rows, Kd] of 16-bit elements
  const int32_t* index;  // [M]
  int64_t stride;        // elements between table rows
  int table_rows;
};

// How many stages before the end of a tile its cluster takes the next one: late, so that tiles start in order, but
// for gathered rows early enough to have their indices at hand.
template <class Config>
constexpr int kAskAhead = Config::kRows == Rows::kGathered ? 6 : 2;

// The first block's first warp takes the cluster's next tile; every warp that loads receives it.
template <class Config>
class TileSource {
 public:
  __device__ TileSource(const Schedule& schedule, typename Config::Shared& shared, int block)
      : schedule_(schedule), scheduler_(schedule), queue_(shared), takes_(block == 0 && threadIdx.x < 32) {}

  __device__ Tile next() {
    if (takes_) {
      const int number = threadIdx.x == 0 ? atomicAdd(schedule_.counter, 1) : 0;
      queue_.publish(scheduler_.find(__shfl_sync(~0u, number, 0)));
    }
    return queue_.receive();
  }

  // No warp of the cluster will touch this block's queue any more.
  __device__ void drain() {
    if (takes_) queue_.drain();
  }

 private:
  const Schedule& schedule_;
  Scheduler scheduler_;
  TileQueue<Config> queue_;
  bool takes_;
};

// By one thread, with an untouched ring: the weights of a tile's first stages, and their rows once the kernel in front
// has ended. Returns where the contraction goes on: never at its end, short of which the next tile is asked for.
template <class Config, class Product, class Params>
__device__ int load_weights_first(const Params& params, uint32_t a, uint32_t b, Ring<Config>& ring, const Work& work,
                                  int block) {
  const int end = min(work.k_begin + Config::kStages * kTileK, (work.k_end - 1) / kTileK * kTileK);
  Ring<Config> rows = ring;
  for (int k = work.k_begin; k < end; k += kTileK) {
    const uint32_t full = ring.full_barrier();
    ptx::mbarrier_arrive_expect_bytes(full, work.halves * kBoxBytes + Config::kStageBytesB);
    Product::load_b(&params.b, full, b + ring.stage() * Config::kStageBytesB, work, k, block);
    ring.advance();
  }
  wait_for_previous();
  for (int k = work.k_begin; k < end; k += kTileK) {
    Product::load_a(&params.a, rows.full_barrier(), a + rows.stage() * Config::kStageBytesA, work, k);
    rows.advance();
  }
  return end;
}

// One warp; lane 0 issues the copies.
template <class Config, class Product, class Params>
__device__ void load_contiguous(const Params& params, typename Config::Shared& shared, Ring<Config>& ring, int block) {
  const uint32_t a = ptx::shared_address(shared.a);
  const uint32_t b = ptx::shared_address(shared.b);
  TileSource<Config> source(params.schedule, shared, block);
  Tile tile = source.next();
  bool hurries = params.weights_first && !Config::kContractsRows;
  while (tile.expert >= 0) {
    const Work work = Product::work(tile, params.extents, block);
    const int ask = max(work.k_begin, work.k_end - kAskAhead<Config> * kTileK);
    bool asked = false;
    int first = work.k_begin;
    if (hurries) {
      if (threadIdx.x == 0) first = load_weights_first<Config, Product>(params, a, b, ring, work, block);
      first = __shfl_sync(~0u, first, 0);
      hurries = false;
    }
    for (int k = first; k < work.k_end; k += kTileK) {
      if (!asked && k >= ask) {
        tile = source.next();
        asked = true;
      }
      if (threadIdx.x == 0) {
        const uint32_t full = ring.full_barrier();
        ring.wait_empty();
        ptx::mbarrier_arrive_expect_bytes(full, work.halves * kBoxBytes + Config::kStageBytesB);
        Product::load_a(&params.a, full, a + ring.stage() * Config::kStageBytesA, work, k);
        Product::load_b(&params.b, full, b + ring.stage() * Config::kStageBytesB, work, k, block);
        ring.advance();
      }
      __syncwarp();
    }
  }
  source.drain();
  if (threadIdx.x == 0) ring.drain();
  __syncwarp();
}

// One warp or four; eight threads copy the 128 bytes of a row, and thread 0 also brings the weights. A stage is full
// when the weights' bytes and every thread's copies have landed.
template <class Config, class Product, class Params>
class GatheredLoader {
  using Element = typename Config::Element;
  static constexpr int kThreadsPerRow = kTileK * 2 / 16;
  static constexpr int kRowStep = 32 * Config::kLoadWarps / kThreadsPerRow;
  static constexpr int kRowsPerThread = kTileM / kRowStep;
  static constexpr int kRowsPerHalf = kRowsPerThread / kMathWarpgroups;

 public:
  __device__ GatheredLoader(const Params& params, typename Config::Shared& shared, const Ring<Config>& ring, int block)
      : params_(params), shared_(shared), ring_(ring), block_(block) {}

  __device__ void run() {
    TileSource<Config> source(params_.schedule, shared_, block_);
    Tile tile = source.next();
    while (tile.expert >= 0) {
      const Work work = Product::work(tile, params_.extents, block_);
      const int ask = max(work.k_begin, work.k_end - kAskAhead<Config> * kTileK);
      bool asked = false;
      find_rows(work);
      for (int k = work.k_begin; k < work.k_end; k += kTileK) {
        if (!asked && k >= ask) {
          tile = source.next();
          asked = true;
          prefetch_index(Product::work(tile, params_.extents, block_));
        }
        load(work, k);
      }
      load_last_weights(work, work.k_begin + (work.k_end - work.k_begin - 1) / kTileK * kTileK);
    }
    source.drain();
    if (threadIdx.x == 0) ring_.drain();
    __syncwarp();
  }

 private:
  // Where this thread's part of its rows starts, and which rows are there at all: the others become zeros.
  __device__ void find_rows(const Work& work) {
    const auto* table = static_cast<const Element*>(params_.gather.table) + threadIdx.x % kThreadsPerRow * 8;
    present_ = 0;
    CUTE_UNROLL
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int row = work.row + threadIdx.x / kThreadsPerRow + i * kRowStep;
      const int token = row < work.row_end ? params_.gather.index[row] : -1;
      const bool present = static_cast<unsigned>(token) < static_cast<unsigned>(params_.gather.table_rows);
      present_ |= present << i;
      rows_[i] = table + (present ? token * params_.gather.stride : 0);
    }
  }

  // Brings the index of a tile's rows into the cache.
  __device__ void prefetch_index(const Work& work) const {
    const int row = work.row + threadIdx.x;
    if (row < work.row_end) ptx::prefetch(params_.gather.index + row);
  }

  // Rows have a stage more than weights where the two rings differ, so the weights of a step follow the rows of the
  // next: both then wait for the same stage to be let go.
  static constexpr bool kWeightsFollow = Config::kStagesA != Config::kStages;

  __device__ void load_weights(const Work& work, int k, uint32_t full, int stage) {
    if (threadIdx.x != 0) return;
    ptx::mbarrier_arrive_expect_bytes(full, Config::kStageBytesB);
    Product::load_b(&params_.b, full, ptx::shared_address(shared_.b) + stage * Config::kStageBytesB, work, k, block_);
  }

  __device__ void load_last_weights(const Work& work, int k) {
    if constexpr (kWeightsFollow) {
      ring_.wait_empty();
      load_weights(work, k, behind_full_, behind_stage_);
    }
  }

  __device__ void load(const Work& work, int k) {
    const uint32_t full = ring_.full_barrier();
    ring_.wait_empty();
    if constexpr (kWeightsFollow) {
      if (k > work.k_begin) load_weights(work, k - kTileK, behind_full_, behind_stage_);
      behind_full_ = full;
      behind_stage_ = ring_.weight_stage();
    } else {
      load_weights(work, k, full, ring_.stage());
    }
    const int unit = threadIdx.x % kThreadsPerRow;
    const int row = threadIdx.x / kThreadsPerRow;
    const uint32_t destination =
        ptx::shared_address(shared_.a) + ring_.stage() * Config::kStageBytesA + row * 128 + (unit ^ row % 8) * 16;
    const uint32_t present = k + unit * 8 < work.k_end ? present_ : 0;
    copy_half<0>(destination, present);
    if (work.halves > 1) copy_half<1>(destination, present);
    ptx::mbarrier_arrive_copies(full);
    ring_.advance();
  }

  // One 64-row half of this thread's rows; leaves the pointers at the next stage.
  template <int kHalf>
  __device__ void copy_half(uint32_t destination, uint32_t present) {
    CUTE_UNROLL
    for (int i = kHalf * kRowsPerHalf; i < (kHalf + 1) * kRowsPerHalf; ++i) {
      // The swizzle of a 128-byte row depends on row % 8.
      const uint32_t flip = i * kRowStep % 8 * 16;
      ptx::copy_16((destination ^ flip) + i * kRowStep * 128, rows_[i], present >> i & 1 ? 16 : 0);
      rows_[i] += kTileK;
    }
  }

  const Params& params_;
  typename Config::Shared& shared_;
  Ring<Config> ring_;
  int block_;
  const Element* rows_[kRowsPerThread];
  uint32_t present_ = 0;
  uint32_t behind_full_ = 0;  // the step whose weights are still to come: its barrier and its stage
  int behind_stage_ = 0;
};

}  // namespace ling::gemm
