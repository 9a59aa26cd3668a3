// Stable counting sort of pairs by expert. Blocks own contiguous chunks of pairs:
//   count_kernel    demand of each expert in each chunk
//   scatter_kernel  every block adds up the chunks before its own, then places its pairs in order
// No atomic decides an order: atomics only add integers whose sum is read after a barrier.
#include <algorithm>

#include "keep_largest.cuh"
#include "pairs.cuh"

namespace ling {
namespace route {
namespace {

constexpr int kRounds = 2;                    // pairs per thread and tile
constexpr int kMaxBlocks = 128;
constexpr int64_t kMaxTable = 1 << 17;        // entries of the chunk demand table that each block reads
constexpr int64_t kOneBlockPairs = 4096;
constexpr size_t kSharedLimit = 48 * 1024;

struct Plan {
  int warps;      // of a scatter block
  int blocks;
  int64_t chunk;  // pairs of a block, a multiple of its tile
};

Plan make_plan(int64_t pairs, int experts) {
  Plan plan;
  plan.warps = experts <= 512 ? 32 : experts <= 1024 ? 16 : experts <= 2048 ? 8 : 4;
  const int64_t tile = plan.warps * 32 * kRounds;
  const int64_t most = std::clamp<int64_t>(kMaxTable / experts, 1, kMaxBlocks);
  plan.blocks = pairs <= kOneBlockPairs ? 1 : static_cast<int>(std::min(most, ceil_div(pairs, tile)));
  plan.chunk = round_up(ceil_div<int64_t>(std::max<int64_t>(pairs, 1), plan.blocks), tile);
  return plan;
}

__device__ void count_chunk(const RouteParams& p, int64_t begin, int64_t end, int* counts) {
  for (int64_t pair = begin + threadIdx.x; pair < end; pair += blockDim.x) {
    const int expert = expert_of_pair(p, pair);
    if (expert >= 0) atomicAdd(counts + expert, 1);
  }
}

__global__ void __launch_bounds__(1024) count_kernel(const RouteParams p, const int64_t chunk) {
  extern __shared__ int counts[];  // [E]
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * chunk;
  count_chunk(p, begin, min(begin + chunk, p.tokens * p.choices), counts);
  __syncthreads();
  int* table = p.workspace + static_cast<int64_t>(blockIdx.x) * p.experts;
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) table[e] = counts[e];
}

// before[e]: demand in the chunks before this block's; total[e]: in all. Both start at zero.
__device__ void add_up_chunks(const RouteParams& p, int* before, int* total) {
  const int parts = max(static_cast<int>(blockDim.x) / p.experts, 1);
  for (int i = threadIdx.x; i < parts * p.experts; i += blockDim.x) {
    const int e = i % p.experts;
    int earlier = 0;
    int all = 0;
#pragma unroll 8
    for (int block = i / p.experts; block < gridDim.x; block += parts) {
      const int count = p.workspace[static_cast<int64_t>(block) * p.experts + e];
      all += count;
      earlier += block < blockIdx.x ? count : 0;
    }
    atomicAdd(total + e, all);
    atomicAdd(before + e, earlier);
  }
}

// In: demand before this block, and in all. Out: the next row of each expert for this block, and the row
// at which the expert is full. Block 0 writes counts and offsets. Returns the number of rows.
__device__ int64_t place_experts(const RouteParams& p, int* next, int* end, int* warp_sums) {
  int32_t* all_offsets = p.workspace;  // by probability: offsets before any drop
  int kept_carry = 0;
  int all_carry = 0;
  for (int first = 0; first < p.experts; first += blockDim.x) {
    const int e = first + threadIdx.x;
    const int demand = e < p.experts ? end[e] : 0;
    const int kept = e < p.experts ? min(demand, capacity_of(p, e)) : 0;
    int kept_total;
    const int offset = kept_carry + block_exclusive_sum(kept, warp_sums, kept_total);
    int all_offset = 0;
    int all_total = 0;
    if (p.by_probability) all_offset = all_carry + block_exclusive_sum(demand, warp_sums, all_total);
    if (e < p.experts) {
      next[e] += p.by_probability ? all_offset : offset;
      end[e] = p.by_probability ? all_offset + demand : offset + kept;
      if (blockIdx.x == 0) {
        p.expert_counts[e] = demand;
        p.expert_offsets[e] = offset;
        if (p.by_probability) all_offsets[static_cast<int64_t>(gridDim.x) * p.experts + e] = all_offset;
      }
    }
    kept_carry += kept_total;
    all_carry += all_total;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.expert_offsets[p.experts] = kept_carry;
    if (p.by_probability) all_offsets[static_cast<int64_t>(gridDim.x + 1) * p.experts] = all_carry;
  }
  __syncthreads();
  return kept_carry;
}

// Rank of the lane's pair among the warp's earlier pairs of the same expert.
__device__ int rank_in_warp(int expert, uint16_t* warp_counts) {
  const unsigned same = __match_any_sync(kWarp, expert);
  const unsigned below = same & ((1u << (threadIdx.x & 31)) - 1u);
  int rank = __popc(below);
  if (expert >= 0) rank += warp_counts[expert];
  __syncwarp();
  if (expert >= 0 && below == 0) warp_counts[expert] += static_cast<uint16_t>(__popc(same));
  __syncwarp();
  return rank;
}

// by_probability: rows go to a temporary list that keep_largest_kernel thins out; nothing is dropped here.
__global__ void __launch_bounds__(1024) scatter_kernel(const RouteParams p, const int64_t chunk) {
  extern __shared__ int shared[];
  const int warps = blockDim.x >> 5;
  const int warp = threadIdx.x >> 5;
  int* warp_sums = shared;                                                   // [32]
  int* next = shared + 32;                                                   // [E]
  int* end = next + p.experts;                                               // [E]
  uint16_t* counts = reinterpret_cast<uint16_t*>(end + p.experts);           // [warps + 1, E], last: the tile's
  const int64_t pairs = p.tokens * p.choices;
  const int64_t chunk_begin = blockIdx.x * chunk;
  const int64_t chunk_end = min(chunk_begin + chunk, pairs);
  int32_t* listed = p.workspace + static_cast<int64_t>(gridDim.x + 1) * p.experts + 1;

  // Where each expert's rows of this block begin.
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) next[e] = end[e] = counts[warps * p.experts + e] = 0;
  __syncthreads();
  if (gridDim.x == 1) {
    count_chunk(p, chunk_begin, chunk_end, end);
  } else {
    add_up_chunks(p, next, end);
  }
  __syncthreads();
  const int64_t rows = place_experts(p, next, end, warp_sums);

  const int tile = blockDim.x * kRounds;
  for (int64_t begin = chunk_begin; begin < chunk_end; begin += tile) {
    for (int i = threadIdx.x; i < warps * p.experts / 2; i += blockDim.x) reinterpret_cast<uint32_t*>(counts)[i] = 0;
    for (int e = threadIdx.x; e < p.experts; e += blockDim.x) next[e] += counts[warps * p.experts + e];
    __syncthreads();

    // Rank inside the warp; a warp's pairs are contiguous.
    int expert[kRounds];
    int rank[kRounds];
    const int64_t own = begin + warp * 32 * kRounds + (threadIdx.x & 31);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) expert[r] = own + 32 * r < chunk_end ? expert_of_pair(p, own + 32 * r) : -1;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) rank[r] = rank_in_warp(expert[r], counts + warp * p.experts);
    __syncthreads();

    // Earlier warps.
    for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
      int sum = 0;
#pragma unroll 8
      for (int w = 0; w < warps; ++w) {
        const int count = counts[w * p.experts + e];
        counts[w * p.experts + e] = static_cast<uint16_t>(sum);
        sum += count;
      }
      counts[warps * p.experts + e] = static_cast<uint16_t>(sum);
    }
    __syncthreads();

#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t pair = own + 32 * r;
      if (pair >= chunk_end) continue;
      int row = -1;
      if (expert[r] >= 0) {
        row = next[expert[r]] + counts[warp * p.experts + expert[r]] + rank[r];
        if (row >= end[expert[r]]) row = -1;
      }
      if (p.by_probability) {
        if (row >= 0) listed[row] = static_cast<int32_t>(pair);
        if (row < 0) p.token_row[pair] = -1;
        continue;
      }
      p.token_row[pair] = row;
      if (row >= 0) {
        p.row_pair[row] = static_cast<int32_t>(pair);
        p.row_token[row] = static_cast<int32_t>(static_cast<uint32_t>(pair) / p.choices);
      }
    }
    __syncthreads();
  }
  fill_tail(p, rows);
}

}  // namespace
}  // namespace route

int64_t route_workspace(int64_t tokens, int choices, int experts, bool by_probability) {
  const int64_t pairs = tokens * choices;
  const int64_t table = static_cast<int64_t>(route::make_plan(pairs, experts).blocks) * experts;
  return by_probability ? table + experts + 1 + pairs : table;
}

void launch_route(const RouteParams& p, cudaStream_t stream) {
  const int64_t pairs = p.tokens * p.choices;
  require(p.experts >= 1 && p.experts <= kMaxRouteExperts, "route: E must be in [1, 4096]");
  require(p.choices >= 1 && pairs <= kMaxRoutePairs, "route: K must be at least 1 and T * K at most 2^31 - 1");
  const route::Plan plan = route::make_plan(pairs, p.experts);
  const size_t table_bytes = p.experts * sizeof(int);
  const size_t bytes = 32 * sizeof(int) + 2 * table_bytes + (plan.warps + 1) * p.experts * sizeof(uint16_t);
  if (bytes > route::kSharedLimit) {
    check(cudaFuncSetAttribute(route::scatter_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "route: shared memory");
  }
  if (plan.blocks > 1) {
    route::count_kernel<<<plan.blocks, 1024, table_bytes, stream>>>(p, plan.chunk);
    check_launch("route: count");
  }
  route::scatter_kernel<<<plan.blocks, plan.warps * 32, bytes, stream>>>(p, plan.chunk);
  check_launch("route: scatter");
  if (p.by_probability) {
    const int32_t* all_offsets = p.workspace + static_cast<int64_t>(plan.blocks) * p.experts;
    route::launch_keep_largest(p, all_offsets, stream);
  }
}

}  // namespace ling
