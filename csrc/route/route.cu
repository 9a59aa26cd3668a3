// Stable counting sort of pairs by expert. Blocks own contiguous chunks of pairs:
//   count_kernel    demand of each expert in each chunk
//   scatter_kernel  every block adds up the chunks before its own, then places its pairs in order
// No atomic decides an order: atomics only add integers whose sum is read after a barrier.
#include <algorithm>
#include <type_traits>

#include "keep_largest.cuh"
#include "ling/launch.h"
#include "pairs.cuh"

namespace ling {
namespace route {
namespace {

constexpr int kRounds = 4;  // pairs per thread and tile
constexpr int kMaxBlocks = 128;
constexpr int64_t kMaxTable = 1 << 17;  // entries of the chunk demand table that each block reads

struct Plan {
  int warps;  // of a scatter block
  int blocks;
  int64_t chunk;  // pairs of a block, a multiple of its tile
};

Plan make_plan(int64_t pairs, int experts) {
  Plan plan;
  plan.warps = experts <= 1024 ? 16 : experts <= 2048 ? 8 : 4;
  const int64_t tile = plan.warps * 32 * kRounds;
  const int64_t most = std::clamp<int64_t>(kMaxTable / experts, 1, kMaxBlocks);
  plan.blocks = pairs <= tile ? 1 : static_cast<int>(std::min(most, ceil_div(pairs, tile)));
  plan.chunk = round_up(ceil_div<int64_t>(std::max<int64_t>(pairs, 1), plan.blocks), tile);
  return plan;
}

// The demand table [blocks, round_up(E, 2)] at the start of the workspace: 16-bit where a chunk allows it.
template <typename Count>
struct Table {
  using Two = std::conditional_t<sizeof(Count) == 2, ushort2, int2>;
  Count* counts;
  int stride;

  __device__ explicit Table(const RouteParams& p)
      : counts(reinterpret_cast<Count*>(p.workspace)), stride(round_up(p.experts, 2)) {}
  __device__ Two two(int block, int pair) const {
    return reinterpret_cast<const Two*>(counts + static_cast<int64_t>(block) * stride)[pair];
  }
};

int64_t table_size(const Plan& plan, int experts) { return static_cast<int64_t>(plan.blocks) * round_up(experts, 2); }

__device__ void count_chunk(const RouteParams& p, int64_t begin, int64_t end, int* counts) {
  for (int64_t pair = begin + threadIdx.x; pair < end; pair += blockDim.x) {
    const int expert = expert_of_pair(p, pair);
    if (expert >= 0) atomicAdd(counts + expert, 1);
  }
}

template <typename Count>
__global__ void __launch_bounds__(1024) count_kernel(const RouteParams p, const int64_t chunk) {
  extern __shared__ int counts[];  // [E]
  allow_next();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * chunk;
  count_chunk(p, begin, min(begin + chunk, p.tokens * p.choices), counts);
  __syncthreads();
  const Table<Count> table(p);
  Count* own = table.counts + static_cast<int64_t>(blockIdx.x) * table.stride;
  for (int e = threadIdx.x; e < table.stride; e += blockDim.x) {
    own[e] = static_cast<Count>(e < p.experts ? counts[e] : 0);
  }
}

// before[e]: demand in the chunks before this block's; total[e]: in all. Both start at zero.
template <typename Count>
__device__ void add_up_chunks(const RouteParams& p, int* before, int* total) {
  const Table<Count> table(p);
  const int columns = table.stride / 2;
  const int parts = max(static_cast<int>(blockDim.x) / columns, 1);
  for (int i = threadIdx.x; i < parts * columns; i += blockDim.x) {
    const int column = i % columns;
    int2 earlier = {0, 0};
    int2 all = {0, 0};
#pragma unroll 16
    for (int block = i / columns; block < static_cast<int>(gridDim.x); block += parts) {
      const typename Table<Count>::Two two = table.two(block, column);
      all.x += two.x;
      all.y += two.y;
      earlier.x += block < static_cast<int>(blockIdx.x) ? two.x : 0;
      earlier.y += block < static_cast<int>(blockIdx.x) ? two.y : 0;
    }
    atomicAdd(total + 2 * column, all.x);
    atomicAdd(before + 2 * column, earlier.x);
    if (2 * column + 1 < p.experts) {
      atomicAdd(total + 2 * column + 1, all.y);
      atomicAdd(before + 2 * column + 1, earlier.y);
    }
  }
}

// In: demand before this block, and in all. Out: the next row of each expert for this block, and the row
// at which the expert is full. Block 0 writes counts and offsets. Returns the number of rows.
// `all_offsets` [E+1], by probability: the offsets before any drop.
__device__ int64_t place_experts(const RouteParams& p, int* next, int* end, int* warp_sums, int32_t* all_offsets) {
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
        if (p.by_probability) all_offsets[e] = all_offset;
      }
    }
    kept_carry += kept_total;
    all_carry += all_total;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.expert_offsets[p.experts] = kept_carry;
    if (p.by_probability) all_offsets[p.experts] = all_carry;
  }
  __syncthreads();
  return kept_carry;
}

// Lanes whose pairs have the lane's expert, for each round, by one ballot per bit of the id. (MATCH.ANY
// takes about 200 cycles of a whole multiprocessor.)
__device__ void match_experts(const int (&expert)[kRounds], int bits, unsigned (&same)[kRounds]) {
#pragma unroll
  for (int r = 0; r < kRounds; ++r) same[r] = __ballot_sync(kWarp, expert[r] >= 0);
#pragma unroll 2
  for (int bit = 0; bit < bits; ++bit) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const bool set = expert[r] >> bit & 1;
      const unsigned with = __ballot_sync(kWarp, set);
      same[r] &= set ? with : ~with;
    }
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) same[r] = expert[r] >= 0 ? same[r] : 0u;
}

// Shared memory of a scatter block.
template <int kWarps>
struct Scatter {
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTile = kThreads * kRounds;
  int* warp_sums;    // [32]
  int* tile_pairs;   // [kTile] pairs of the tile in expert order
  int* tile_rows;    // [kTile] and their rows, -1 where dropped
  int* next;         // [E] next row
  int* end;          // [E] row at which the expert is full
  int* tile_start;   // [E] first place in the tile
  uint16_t* counts;  // [kWarps + 1, E] pairs of earlier warps in the tile; last, of all warps

  __device__ Scatter(int* shared, int experts)
      : warp_sums(shared),
        tile_pairs(shared + 32),
        tile_rows(tile_pairs + kTile),
        next(tile_rows + kTile),
        end(next + experts),
        tile_start(end + experts),
        counts(reinterpret_cast<uint16_t*>(tile_start + experts)) {}
  static size_t bytes(int experts) {
    return (32 + 2 * kTile + 3 * experts) * sizeof(int) + (kWarps + 1) * experts * sizeof(uint16_t);
  }
};

// Turns the warps' counts of the tile into what lies in front of each warp. Returns the pairs of the tile.
template <int kWarps>
__device__ int scan_tile(const Scatter<kWarps>& s, int experts) {
  int pairs = 0;
  for (int first = 0; first < experts; first += kWarps * 32) {
    const int e = first + threadIdx.x;
    int sum = 0;
    if (e < experts) {
      int of_warp[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) of_warp[w] = s.counts[w * experts + e];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        s.counts[w * experts + e] = static_cast<uint16_t>(sum);
        sum += of_warp[w];
      }
      s.counts[kWarps * experts + e] = static_cast<uint16_t>(sum);
    }
    int total;
    const int before = pairs + block_exclusive_sum(sum, s.warp_sums, total);
    if (e < experts) s.tile_start[e] = before;
    pairs += total;
  }
  __syncthreads();
  return pairs;
}

// by_probability: rows go to a temporary list that keep_largest_kernel thins out; nothing is dropped here.
template <typename Count, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 1) scatter_kernel(const RouteParams p, const int64_t chunk) {
  extern __shared__ int shared[];
  constexpr int kThreads = kWarps * 32;
  constexpr int kTile = kThreads * kRounds;
  const Scatter<kWarps> s(shared, p.experts);
  const int warp = threadIdx.x >> 5;
  const int lane = threadIdx.x & 31;
  uint16_t* own_counts = s.counts + warp * p.experts;
  const int bits = 32 - __clz(p.experts - 1);
  const int64_t chunk_begin = blockIdx.x * chunk;
  const int64_t chunk_end = min(chunk_begin + chunk, p.tokens * p.choices);
  int32_t* all_offsets = p.workspace + static_cast<int64_t>(gridDim.x) * round_up(p.experts, 2);
  int32_t* listed = all_offsets + p.experts + 1;

  // A warp's pairs are contiguous. Those of the first tile are read ahead.
  const int own = warp * 32 * kRounds + lane;
  int expert[kRounds];
  const auto read_experts = [&](int64_t begin) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t pair = begin + own + 32 * r;
      expert[r] = pair < chunk_end ? expert_of_pair(p, pair) : -1;
    }
  };
  read_experts(chunk_begin);

  // Where each expert's rows of this block begin. A single block has a single tile.
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    s.next[e] = s.end[e] = s.counts[kWarps * p.experts + e] = 0;
  }
  __syncthreads();
  if (gridDim.x == 1) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (expert[r] >= 0) atomicAdd(s.end + expert[r], 1);
    }
  } else {
    wait_for_previous();
    add_up_chunks<Count>(p, s.next, s.end);
  }
  __syncthreads();
  const int64_t rows = place_experts(p, s.next, s.end, s.warp_sums, all_offsets);

  for (int64_t begin = chunk_begin; begin < chunk_end; begin += kTile) {
    if (begin > chunk_begin) read_experts(begin);
    for (int i = threadIdx.x; i < kWarps * p.experts / 2; i += kThreads) reinterpret_cast<uint32_t*>(s.counts)[i] = 0;
    for (int e = threadIdx.x; e < p.experts; e += kThreads) s.next[e] += s.counts[kWarps * p.experts + e];
    __syncthreads();

    // Rank among the warp's earlier pairs of the same expert.
    int rank[kRounds];
    unsigned same[kRounds];
    match_experts(expert, bits, same);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const unsigned before = same[r] & ((1u << lane) - 1u);
      const int seen = same[r] != 0 ? own_counts[expert[r]] : 0;
      rank[r] = seen + __popc(before);
      __syncwarp();
      if (same[r] != 0 && before == 0) own_counts[expert[r]] = static_cast<uint16_t>(seen + __popc(same[r]));
      __syncwarp();
    }
    __syncthreads();
    const int tile_pairs = scan_tile(s, p.experts);

    // Rows; the tile's pairs change to expert order in shared memory, so that rows are written in runs.
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      int row = -1;
      if (expert[r] >= 0) {
        const int place = own_counts[expert[r]] + rank[r];
        row = s.next[expert[r]] + place;
        if (row >= s.end[expert[r]]) row = -1;
        s.tile_pairs[s.tile_start[expert[r]] + place] = own + 32 * r;
        s.tile_rows[s.tile_start[expert[r]] + place] = row;
      }
      const int64_t pair = begin + own + 32 * r;
      if (pair < chunk_end && (row < 0 || !p.by_probability)) p.token_row[pair] = row;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile_pairs; i += kThreads) {
      const int row = s.tile_rows[i];
      const auto pair = static_cast<uint32_t>(begin + s.tile_pairs[i]);
      if (row < 0) continue;
      if (p.by_probability) {
        listed[row] = static_cast<int32_t>(pair);
      } else {
        p.row_pair[row] = static_cast<int32_t>(pair);
        p.row_token[row] = static_cast<int32_t>(pair / p.choices);
      }
    }
    __syncthreads();
  }
  fill_tail(p, rows);
}

template <typename Count, int kWarps>
void launch(const RouteParams& p, const Plan& plan, cudaStream_t stream) {
  const size_t bytes = Scatter<kWarps>::bytes(p.experts);
  const auto blocks = static_cast<unsigned>(plan.blocks);
  if (plan.blocks > 1) {
    launch_kernel<count_kernel<Count>>("route: count", {blocks, 1024, p.experts * sizeof(int)}, stream, p, plan.chunk);
  }
  const LaunchShape shape = {blocks, kWarps * 32, bytes, plan.blocks > 1};
  launch_kernel<scatter_kernel<Count, kWarps>>("route: scatter", shape, stream, p, plan.chunk);
}

template <typename Count>
void launch(const RouteParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.warps == 16) return launch<Count, 16>(p, plan, stream);
  if (plan.warps == 8) return launch<Count, 8>(p, plan, stream);
  return launch<Count, 4>(p, plan, stream);
}

}  // namespace
}  // namespace route

int64_t route_workspace(int64_t tokens, int choices, int experts, bool by_probability) {
  const int64_t pairs = tokens * choices;
  const int64_t table = route::table_size(route::make_plan(pairs, experts), experts);
  return by_probability ? table + experts + 1 + pairs : table;
}

void launch_route(const RouteParams& p, cudaStream_t stream) {
  const int64_t pairs = p.tokens * p.choices;
  require(p.experts >= 1 && p.experts <= kMaxRouteExperts, "route: E must be in [1, 4096]");
  require(p.choices >= 1 && pairs <= kMaxRoutePairs, "route: K must be at least 1 and T * K at most 2^31 - 1");
  const route::Plan plan = route::make_plan(pairs, p.experts);
  if (plan.chunk <= UINT16_MAX) {
    route::launch<uint16_t>(p, plan, stream);
  } else {
    route::launch<int>(p, plan, stream);
  }
  if (p.by_probability) {
    route::launch_keep_largest(p, p.workspace + route::table_size(plan, p.experts), stream);
  }
}

}  // namespace ling
