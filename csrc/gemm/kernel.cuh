// The one kernel of all grouped products: persistent blocks, one loading and two multiplying warpgroups.
#pragma once

#include "epilogue.cuh"
#include "operands.cuh"
#include "ring.cuh"

namespace ling::gemm {

template <class Epilogue>
struct KernelParams {
  CUtensorMap a;
  CUtensorMap b;
  CUtensorMap out;
  Schedule schedule;
  Extents extents;
  void* zeroed;        // [M, N] whose rows without an expert must become zero, or null
  int output_columns;  // columns of `out`
  typename Epilogue::Params epilogue;
};

constexpr int kLoadRegisters = 40;
constexpr int kMathRegisters = 232;

// Zeroes rows [begin, end) of a contiguous matrix, 16 bytes a thread, over the whole grid.
__device__ inline void zero_rows(void* matrix, int64_t columns, int begin, int end) {
  auto* first = reinterpret_cast<uint4*>(static_cast<char*>(matrix) + begin * columns * 2);
  const int64_t count = (end - begin) * columns / 8;
  const int math_threads = kMathWarpgroups * kWarpgroup;
  for (int64_t i = blockIdx.x * math_threads + threadIdx.x - kWarpgroup; i < count; i += gridDim.x * math_threads) {
    first[i] = make_uint4(0, 0, 0, 0);
  }
}

// One pass over a tile's contraction. The sum runs over k in steps of 16 in ascending order, whatever the tile.
template <class Config, class Mma, class FragmentA, class FragmentB, class Accumulators>
__device__ void multiply(Ring<Config>& ring, const Stagger<Config>& stagger, Mma& mma, const FragmentA& tCrA, const FragmentB& tCrB,
                         Accumulators& accumulators, int k_blocks) {
  mma.accumulate_ = cute::SM90::GMMA::ScaleOut::Zero;
  cute::warpgroup_fence_operand(accumulators);
  for (int block = 0; block < k_blocks; ++block) {
    ring.wait_full();
    cute::warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < cute::size<2>(tCrA); ++k) {
      cute::gemm(mma, tCrA(cute::_, cute::_, k, ring.stage()), tCrB(cute::_, cute::_, k, ring.stage()), accumulators);
      mma.accumulate_ = cute::SM90::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
    stagger.after(block);
    // One product stays in flight while the stage before it is given back.
    cute::warpgroup_wait<1>();
    if (block > 0) ring.release(1);
    ring.advance();
  }
  cute::warpgroup_wait<0>();
  cute::warpgroup_fence_operand(accumulators);
  if (k_blocks > 0) ring.release(1);
}

template <class Config, template <class> class ProductOf, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ KernelParams<Epilogue> params) {
  using Product = ProductOf<Config>;
  using Shared = typename Config::Shared;
  static_assert((kLoadRegisters + kMathWarpgroups * kMathRegisters) * kWarpgroup <= 65536);

  // ---- shared memory
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

  // ---- barriers
  const int block = Config::kCluster > 1 ? ptx::block_in_cluster() : 0;
  if (threadIdx.x == 0) {
    Ring<Config>::initialise(shared, 1);
    ptx::prefetch_map(&params.a);
    ptx::prefetch_map(&params.b);
    ptx::prefetch_map(&params.out);
  }
  __syncthreads();
  if constexpr (Config::kCluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }

  // ---- scheduler
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  Scheduler scheduler(params.schedule, blockIdx.x / Config::kCluster, gridDim.x / Config::kCluster);
  Ring<Config> ring(shared);
  Tile tile;

  if (warpgroup == 0) {
    // ---- load branch
    ptx::shrink_registers<kLoadRegisters>();
    if (threadIdx.x < 32) {
      const uint32_t a = ptx::shared_address(shared.a);
      const uint32_t b = ptx::shared_address(shared.b);
      while (scheduler.next(tile)) {
        const Work work = Product::work(tile, params.extents, block);
        if (threadIdx.x == 0) {
          const uint32_t bytes = work.halves * kBoxBytes + Config::kStageBytesB;
          for (int k = work.k_begin; k < work.k_end; k += kTileK) {
            ring.wait_empty();
            ptx::mbarrier_arrive_expect_bytes(ring.full_barrier(), bytes);
            Product::load_a(&params.a, ring.full_barrier(), a + ring.stage() * Config::kStageBytesA, work, k);
            Product::load_b(&params.b, ring.full_barrier(), b + ring.stage() * Config::kStageBytesB, work, k, block);
            ring.advance();
          }
        }
        __syncwarp();
      }
    }
  } else {
    // ---- math branch
    ptx::grow_registers<kMathRegisters>();
    const int half = warpgroup - 1;
    typename Config::Mma mma;
    auto thread_mma = mma.get_slice(half * kWarpgroup);
    cute::Tensor sA = cute::make_tensor(cute::make_smem_ptr(shared.a), typename Config::LayoutA{});  // (BLK_M,BLK_K,PIPE)
    cute::Tensor sB = cute::make_tensor(cute::make_smem_ptr(shared.b), typename Config::LayoutB{});  // (BLK_N,BLK_K,PIPE)
    cute::Tensor tCrA = thread_mma.make_fragment_A(thread_mma.partition_A(sA));  // (MMA,MMA_M,MMA_K,PIPE)
    cute::Tensor tCrB = thread_mma.make_fragment_B(thread_mma.partition_B(sB));  // (MMA,MMA_N,MMA_K,PIPE)
    Staging staging(shared.staging[half], half);
    Stagger<Config> stagger(shared, half);

    while (scheduler.next(tile)) {
      const Work work = Product::work(tile, params.extents, block);
      if (half < work.halves) {
        auto accumulators = cute::partition_fragment_C(mma, cute::take<0, 2>(typename Config::Tile{}));  // (MMA,1,1)
        if (work.k_end > work.k_begin) {
          stagger.begin_tile(work.halves, work.k_blocks());
          multiply<Config>(ring, stagger, mma, tCrA, tCrB, accumulators, work.k_blocks());
        } else {
          cute::clear(accumulators);
        }
        // ---- epilogue
        Epilogue::template run<Config, Product>(params.epilogue, &params.out, work, half, params.output_columns, staging,
                                                accumulators);
      } else {
        for (int k = work.k_begin; k < work.k_end; k += kTileK) {
          ring.wait_full();
          ring.advance();
          ring.release(1);
        }
      }
    }
    if (params.zeroed != nullptr) {
      zero_rows(params.zeroed, params.output_columns, 0, scheduler.first_row());
      zero_rows(params.zeroed, params.output_columns, scheduler.end_row(), params.schedule.rows);
    }
    staging.drain();
  }

  // A block's shared memory must outlive what its neighbour sends there.
  if constexpr (Config::kCluster > 1) {
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace ling::gemm
