// The one kernel of all grouped products: persistent blocks, one loading and two multiplying warpgroups.
#pragma once

#include "detached.cuh"
#include "epilogue.cuh"
#include "gather_contraction.cuh"
#include "ling/launch.h"
#include "load.cuh"

namespace ling::gemm {

// A contiguous output of 16-bit elements whose uncovered rows must become zero, or null. Where rows are the
// contraction, a row stands for the matrix of an expert.
struct ZeroedRows {
  void* matrix;
  int64_t columns;
};

template <class Epilogue>
struct KernelParams {
  CUtensorMap a;  // unused where rows are gathered
  CUtensorMap b;
  typename Epilogue::Params epilogue;
  Gather gather;  // unused where rows are contiguous
  Schedule schedule;
  Extents extents;
  ZeroedRows zeroed[2];
  // Whether all but `a` was complete before the kernel in front began, so that the first weights need not wait for it.
  bool weights_first;
};

// Registers a thread: what the branches need, out of the 168 that each of 384 threads starts with.
template <class Config>
constexpr int kLoadRegisters = Config::kDetached                    ? 136
                               : Config::kRows == Rows::kContiguous ? 56
                               : Config::kContractsRows             ? 96
                                                                    : 72;
template <class Config>
constexpr int kMathRegisters = Config::kDetached                    ? 184
                               : Config::kRows == Rows::kContiguous ? 224
                               : Config::kContractsRows             ? 200
                                                                    : 216;

// Zeroes rows [begin, end), 16 bytes a thread, over the math threads of the whole grid.
__device__ inline void zero_rows(const ZeroedRows& zeroed, int64_t begin, int64_t end) {
  auto* first = reinterpret_cast<uint4*>(static_cast<char*>(zeroed.matrix) + begin * zeroed.columns * 2);
  const int64_t count = (end - begin) * zeroed.columns / 8;
  constexpr int math_threads = kMathWarpgroups * kWarpgroup;
  const int64_t step = static_cast<int64_t>(gridDim.x) * math_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * math_threads + threadIdx.x - kWarpgroup; i < count; i += step) {
    first[i] = make_uint4(0, 0, 0, 0);
  }
}

// Zeroes the part of the output that no tile covers: rows without an expert, or, where rows are the contraction, the
// matrices of experts without rows.
__device__ inline void zero_uncovered(const Schedule& schedule, const ZeroedRows& zeroed, const Tile& covered) {
  if (zeroed.matrix == nullptr) return;
  if (schedule.row_tile != 0) {
    zero_rows(zeroed, 0, covered.row_begin);
    zero_rows(zeroed, covered.row_end, schedule.rows);
    return;
  }
  ExpertScan experts(schedule);
  for (int first = 0; first < schedule.experts; first += 32) {
    experts.load(first);
    unsigned empty = __ballot_sync(~0u, experts.exists() && experts.begin() == experts.end());
    for (; empty != 0; empty &= empty - 1) {
      const int expert = first + __ffs(empty) - 1;
      zero_rows(zeroed, expert, expert + 1);
    }
  }
}

// Issues the products of a stage's first kSteps steps of 16.
template <int kSteps, class Mma, class FragmentA, class FragmentB, class Accumulators>
__device__ void issue_products(Mma& mma, const FragmentA& tCrA, const FragmentB& tCrB, Accumulators& accumulators,
                               int stage, int weight_stage) {
  cute::warpgroup_arrive();
  CUTE_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    cute::gemm(mma, tCrA(cute::_, cute::_, k, stage), tCrB(cute::_, cute::_, k, weight_stage), accumulators);
    mma.accumulate_ = cute::SM90::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
}

// One pass over a tile's contraction. The sum runs over k in steps of 16 in ascending order, whatever the tile. Where
// rows are the contraction, it may end anywhere in a stage: steps beyond the last row are left out.
// `issued` runs while the last products are under way.
template <class Config, class Mma, class FragmentA, class FragmentB, class Accumulators, class Issued>
__device__ void multiply(Ring<Config>& ring, Mma& mma, const FragmentA& tCrA, const FragmentB& tCrB,
                         Accumulators& accumulators, int length, Issued&& issued) {
  mma.accumulate_ = cute::SM90::GMMA::ScaleOut::Zero;
  cute::warpgroup_fence_operand(accumulators);
  for (int k = 0; k < length; k += kTileK) {
    ring.wait_full();
    // Gathered rows were written through the ordinary proxy, the tensor cores read through the asynchronous one.
    if constexpr (Config::kRows == Rows::kGathered) ptx::fence_async_proxy();
    const int left = Config::kContractsRows ? length - k : kTileK;
    if (left > 48) {
      issue_products<4>(mma, tCrA, tCrB, accumulators, ring.stage(), ring.weight_stage());
    } else if (left > 32) {
      issue_products<3>(mma, tCrA, tCrB, accumulators, ring.stage(), ring.weight_stage());
    } else if (left > 16) {
      issue_products<2>(mma, tCrA, tCrB, accumulators, ring.stage(), ring.weight_stage());
    } else {
      issue_products<1>(mma, tCrA, tCrB, accumulators, ring.stage(), ring.weight_stage());
    }
    // One product stays in flight while the stage before it is given back.
    cute::warpgroup_wait<1>();
    if (k > 0) ring.release(1);
    ring.advance();
  }
  issued();
  cute::warpgroup_wait<0>();
  cute::warpgroup_fence_operand(accumulators);
  ring.release(1);
}

// Completes tile after tile in the warps of the loading warpgroup that do not load.
template <class Config, class Product, class Epilogue>
__device__ void complete_tiles(const KernelParams<Epilogue>& params, typename Config::Shared& shared, int warp,
                               int block) {
  Handoff<Config> handoff(shared);
  TileQueue<Config> queue(shared);
  Epilogue::specialise(params.epilogue, [&]<auto kCode>() {
    Epilogue epilogue(params.epilogue, warp - Config::kLoadWarps);
    for (Tile tile = queue.receive(); tile.expert >= 0; tile = queue.receive()) {
      const Work work = Product::work(tile, params.extents, block);
      if (work.active(0)) epilogue.template run<kCode>(handoff, work);
    }
  });
}

template <class Config, template <class> class ProductOf, template <class, class> class EpilogueOf>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ KernelParams<EpilogueOf<Config, ProductOf<Config>>> params) {
  using Product = ProductOf<Config>;
  using Epilogue = EpilogueOf<Config, Product>;
  using Shared = typename Config::Shared;
  constexpr bool gathered = Config::kRows == Rows::kGathered;
  constexpr int loaders = gathered ? 1 + 32 * Config::kLoadWarps : 1;
  static_assert((kLoadRegisters<Config> + kMathWarpgroups * kMathRegisters<Config>)*kWarpgroup <= kThreads * 168);

  // ---- shared memory
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

  // ---- barriers
  const int block = Config::kCluster > 1 ? ptx::block_in_cluster() : 0;
  if (threadIdx.x == 0) {
    TileQueue<Config>::initialise(shared, kMathWarpgroups * 4 + Config::kLoadWarps + Config::kDetachedWarps);
    if constexpr (Config::kDetached) Handoff<Config>::initialise(shared);
    Ring<Config>::initialise(shared, loaders);
  }
  __syncthreads();
  if constexpr (Config::kCluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  constexpr bool may_hurry = Config::kRows == Rows::kContiguous && !Config::kContractsRows;
  const bool hurries = may_hurry && params.weights_first;
  if (!hurries) wait_for_previous();
  allow_next();

  // ---- scheduler
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int warpgroup = warp / 4;
  Ring<Config> ring(shared);

  if (warpgroup == 0) {
    // ---- load branch
    ptx::shrink_registers<kLoadRegisters<Config>>();
    if (Config::kDetached && warp >= Config::kLoadWarps) {
      if constexpr (Config::kDetached) complete_tiles<Config, Product, Epilogue>(params, shared, warp, block);
    } else if constexpr (gathered) {
      using Params = KernelParams<Epilogue>;
      using Loader = std::conditional_t<Config::kContractsRows, GatheredContractionLoader<Config, Product, Params>,
                                        GatheredLoader<Config, Product, Params>>;
      Loader(params, shared, ring, block).run();
    } else {
      if (warp == 0) load_contiguous<Config, Product>(params, shared, ring, block);
    }
  } else {
    // ---- math branch
    if (hurries) wait_for_previous();
    ptx::grow_registers<kMathRegisters<Config>>();
    const int half = warpgroup - 1;
    typename Config::Mma mma;
    auto thread_mma = mma.get_slice(half * kWarpgroup);
    cute::Tensor sA =
        cute::make_tensor(cute::make_smem_ptr(shared.a), typename Config::LayoutA{});  // (block_M,block_K,PIPE)
    cute::Tensor sB =
        cute::make_tensor(cute::make_smem_ptr(shared.b), typename Config::LayoutB{});  // (block_N,block_K,PIPE)
    cute::Tensor tCrA = thread_mma.make_fragment_A(thread_mma.partition_A(sA));        // (MMA,MMA_M,MMA_K,PIPE)
    cute::Tensor tCrB = thread_mma.make_fragment_B(thread_mma.partition_B(sB));        // (MMA,MMA_N,MMA_K,PIPE)
    Staging staging(shared.staging[half], half);
    Handoff<Config> handoff(shared);

    TileQueue<Config> queue(shared);
    Tile tile = queue.receive();
    while (tile.expert >= 0) {
      // The next tile is fetched while the last products are under way, ahead of the epilogue's stores.
      Tile next;
      const Work work = Product::work(tile, params.extents, block);
      if (work.active(half)) {
        auto accumulators = cute::partition_fragment_C(mma, cute::take<0, 2>(typename Config::Tile{}));  // (MMA,1,1)
        const auto products = [&] {
          multiply<Config>(ring, mma, tCrA, tCrB, accumulators, work.k_end - work.k_begin,
                           [&] { next = queue.receive(); });
        };
        if constexpr (Config::kDetached) {
          products();
          handoff.give(half, accumulators);
        } else {
          Epilogue epilogue(params.epilogue, work, half);
          products();
          // ---- epilogue
          epilogue.run(staging, accumulators);
        }
      } else {
        for (int k = work.k_begin; k < work.k_end; k += kTileK) {
          ring.wait_full();
          ring.advance();
          ring.release(1);
        }
        next = queue.receive();
      }
      tile = next;
    }
    for (const ZeroedRows& zeroed : params.zeroed) zero_uncovered(params.schedule, zeroed, tile);
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
