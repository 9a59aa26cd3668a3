// Measures of a routing. One kernel sums over the pairs and leaves a row of partial sums per block, another of one
// block adds those up in fixed order and measures the experts' demand.
#include "ling/stats.h"

#include <algorithm>

#include "ling/launch.h"
#include "pairs.cuh"

namespace ling {
namespace route {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Of a thread, a block or all tokens. Counts are exact in float64.
enum Sum : int { kPairs, kPairsDropped, kTokens, kTokensDropped, kMass, kMassDropped };

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Max {
  __device__ double operator()(double a, double b) const { return max(a, b); }
};

// Every thread gets the block's results, in lane order and then in warp order. `scratch` is free after the call.
template <class Op, int N>
__device__ void reduce_block(double (&values)[N], double (*scratch)[kWarps]) {
  const Op op;
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) values[i] = op(values[i], __shfl_xor_sync(kWarp, values[i], step));
    if (threadIdx.x % 32 == 0) scratch[i][threadIdx.x / 32] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = scratch[i][0];
    for (int warp = 1; warp < kWarps; ++warp) values[i] = op(values[i], scratch[i][warp]);
  }
  __syncthreads();
}

template <typename Index>
__global__ void __launch_bounds__(kThreads) stats_of_pairs_kernel(const RoutingStatsParams p) {
  __shared__ double scratch[kRoutingSums][kWarps];
  allow_next();
  wait_for_previous();
  const auto* indices = static_cast<const Index*>(p.indices);
  double sums[kRoutingSums] = {};
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; token < p.tokens; token += step) {
    if (p.token_mask != nullptr && !p.token_mask[token]) continue;
    const int64_t first = token * p.choices;
    int wanted = 0;
    int dropped = 0;
    float mass = 0.0f;
    float mass_dropped = 0.0f;
#pragma unroll 4
    for (int k = 0; k < p.choices; ++k) {  // loads without a condition on another: all of them are on their way at once
      const int64_t id = indices == nullptr ? 0 : static_cast<int64_t>(indices[first + k]);
      const bool has_row = p.token_row[first + k] >= 0;
      const float weight = p.weights == nullptr ? 0.0f : p.weights[first + k];
      const bool wants = static_cast<uint64_t>(id) < static_cast<uint64_t>(p.experts);
      wanted += wants;
      dropped += wants && !has_row;
      if (wants) mass += weight;
      if (wants && !has_row) mass_dropped += weight;
    }
    sums[kPairs] += wanted;
    sums[kPairsDropped] += dropped;
    sums[kTokens] += wanted > 0;
    sums[kTokensDropped] += wanted > 0 && dropped == wanted;
    sums[kMass] += mass;
    sums[kMassDropped] += mass_dropped;
  }
  reduce_block<Add>(sums, scratch);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < kRoutingSums; ++i) p.partial[blockIdx.x * kRoutingSums + i] = sums[i];
}

// part / whole, `whole` being a count that is 0 only where `part` is: then 0.
__device__ inline double ratio(double part, double whole) { return part / max(whole, 1.0); }

__global__ void __launch_bounds__(kThreads) stats_of_experts_kernel(const RoutingStatsParams p, const int blocks) {
  __shared__ double scratch[kRoutingSums][kWarps];
  wait_for_previous();
  double sums[kRoutingSums] = {};
  for (int block = threadIdx.x; block < blocks; block += kThreads) {
#pragma unroll
    for (int i = 0; i < kRoutingSums; ++i) sums[i] += p.partial[block * kRoutingSums + i];
  }
  reduce_block<Add>(sums, scratch);

  double totals[2] = {};  // demand; experts without any
  double largest[1] = {};
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    const double count = p.expert_counts[e];
    totals[0] += count;
    totals[1] += count == 0.0;
    largest[0] = max(largest[0], count);
    p.stats[e] = static_cast<float>(ratio(count, sums[kTokens]));
  }
  reduce_block<Add>(totals, scratch);
  reduce_block<Max>(largest, scratch);
  const double total = totals[0];
  const double mean = total / p.experts;

  double spread[2] = {};  // squares of count - mean; -share log(share)
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    const double count = p.expert_counts[e];
    const double share = ratio(count, total);
    spread[0] += (count - mean) * (count - mean);
    spread[1] -= share > 0.0 ? share * log(share) : 0.0;
  }
  reduce_block<Add>(spread, scratch);
  if (threadIdx.x != 0) return;
  float* measures = p.stats + p.experts;
  measures[0] = static_cast<float>(total > 0.0 ? largest[0] * p.experts / total - 1.0 : 0.0);
  measures[1] = static_cast<float>(ratio(sqrt(spread[0] / p.experts) * p.experts, total));
  measures[2] = static_cast<float>(spread[1] / max(log(static_cast<double>(p.experts)), 1e-12));
  measures[3] = static_cast<float>(totals[1]);
  measures[4] = static_cast<float>(ratio(sums[kPairsDropped], sums[kPairs]));
  measures[5] = static_cast<float>(sums[kTokensDropped]);
  measures[6] = static_cast<float>(sums[kMass] == 0.0 ? 0.0 : sums[kMassDropped] / sums[kMass]);
}

}  // namespace
}  // namespace route

void launch_routing_stats(const RoutingStatsParams& p, cudaStream_t stream) {
  require(p.experts >= 1, "routing stats: there must be experts");
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(std::max<int64_t>(ceil_div<int64_t>(p.tokens, route::kThreads), 1), kRoutingStatsBlocks));
  const LaunchShape shape = {blocks, route::kThreads, 0, true};
  if (p.index_dtype == DType::kInt64) {
    launch_kernel<route::stats_of_pairs_kernel<int64_t>>("routing stats: pairs", shape, stream, p);
  } else {
    launch_kernel<route::stats_of_pairs_kernel<int32_t>>("routing stats: pairs", shape, stream, p);
  }
  launch_kernel<route::stats_of_experts_kernel>("routing stats: experts", {1, route::kThreads, 0, true}, stream, p,
                                                static_cast<int>(blocks));
}

}  // namespace ling
