// Gate forward: one kernel for scores, bias, group limits, selection, weights and the histogram. Few
// tokens make one cluster of blocks, which adds up its histograms; else a kernel that zeroes the counts
// runs in front, and the two overlap.
#include "ling/gate.h"

#include <cooperative_groups.h>

#include <algorithm>

#include "dispatch.cuh"
#include "ling/launch.h"
#include "select.cuh"

namespace ling {
namespace gate {
namespace {

constexpr int kWarps = 8;          // of a block, at most
constexpr int kMostChunks = 8;
constexpr int kSmallTokens = 64;   // up to here latency counts: a token is spread over more lanes
constexpr int kSmallChunks = 2;
constexpr int kMaxCluster = 8;     // blocks
constexpr size_t kSharedLimit = 48 * 1024;

// Blocks that a multiprocessor should hold: what registers allow without spills.
template <int C, bool kScored>
constexpr int kBlocksPerSm = C <= 4 ? 4 : kScored ? 3 : 4;

template <int L>
constexpr int kSurvivorSlots = kSurvivors<L> + 2;

// Shared memory of one warp, in bytes.
template <int L, int C>
__host__ __device__ constexpr size_t warp_bytes(int group_slots) {
  return 32 / L * (L * 4 * C * sizeof(float) + kSurvivorSlots<L> * sizeof(uint64_t) + L * sizeof(int) +
                   2 * round_up(group_slots, 2) * sizeof(uint32_t));
}

// The histogram comes first, then the warps' scratch.
__host__ __device__ constexpr size_t histogram_bytes(int experts) { return round_up(experts, 4) * sizeof(int); }

template <int L, int C>
__device__ Scratch token_scratch(unsigned char* warp_base, int group_slots, int slot) {
  constexpr int kTokens = 32 / L;
  Scratch scratch;
  float* rows = reinterpret_cast<float*>(warp_base);
  uint64_t* survivors = reinterpret_cast<uint64_t*>(rows + kTokens * L * 4 * C);
  int* chosen = reinterpret_cast<int*>(survivors + kTokens * kSurvivorSlots<L>);
  uint32_t* groups = reinterpret_cast<uint32_t*>(chosen + kTokens * L);
  scratch.row = rows + slot * L * 4 * C;
  scratch.survivors = survivors + slot * kSurvivorSlots<L>;
  scratch.chosen = chosen + slot * L;
  scratch.group_keys = groups + slot * group_slots;
  scratch.group_kept = groups + (kTokens + slot) * group_slots;
  return scratch;
}

template <int L, int N>
__device__ float exp_sum(const float (&x)[N], float largest) {
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < N; ++v) sum += expf(x[v] - largest);
  return group_sum<L>(sum);
}

// Turns logits into selection keys: fp32 scores plus bias; experts from E on get -inf.
template <int L, int C>
__device__ Softmax score_row(float (&x)[4 * C], const GateParams& p, bool vector_bias, int lane) {
  Softmax softmax = {};
  if (p.sigmoid) {
    sigmoid(x);
  } else {
    softmax = softmax_row<L>(x, x);
  }
  if (p.expert_bias != nullptr) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int e = 4 * (c * L + lane);
      if (vector_bias && e < p.experts) {
        const float4 four = load_four(p.expert_bias, DType::kFloat32, e);
        x[4 * c] += four.x;
        x[4 * c + 1] += four.y;
        x[4 * c + 2] += four.z;
        x[4 * c + 3] += four.w;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) x[4 * c + j] += e + j < p.experts ? p.expert_bias[e + j] : 0.0f;
      }
    }
  }
  if (p.experts < 4 * C * L) {
#pragma unroll
    for (int v = 0; v < 4 * C; ++v) {
      if (expert_of<L>(lane, v) >= p.experts) x[v] = -INFINITY;
    }
  }
  return softmax;
}

// Demand of all blocks from the histograms of each. In a cluster a block sums every cluster-th expert;
// otherwise the counts start at zero, set by the kernel in front.
template <bool kCluster>
__device__ void add_up(const GateParams& p, int* histogram) {
  if constexpr (kCluster) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    const int blocks = gridDim.x;
    cluster.sync();
    for (int e = threadIdx.x * blocks + blockIdx.x; e < p.experts; e += blockDim.x * blocks) {
      int sum = 0;
      for (int block = 0; block < blocks; ++block) sum += *cluster.map_shared_rank(histogram + e, block);
      p.expert_counts[e] = sum;
    }
    cluster.sync();
#endif
  } else {
    __syncthreads();
    wait_for_previous();
    for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
      const int count = histogram[e];
      if (count != 0) atomicAdd(p.expert_counts + e, count);
    }
  }
}

__global__ void zero_counts_kernel(int32_t* counts, const int experts) {
  allow_next();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
}

// kScored: keys are scores (+ bias), possibly limited to groups; otherwise the logits themselves.
// kCluster: the grid is one cluster.
template <int L, int C, bool kScored, bool kCluster>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm<C, kScored>)
gate_kernel(const GateParams p, const bool vector, const bool vector_bias) {
  constexpr int kTokens = 32 / L;
  extern __shared__ __align__(16) unsigned char shared[];
  int* histogram = reinterpret_cast<int*>(shared);
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int lane = threadIdx.x % L;
  const int slot = threadIdx.x % 32 / L;
  const bool grouped = kScored && p.topk_groups < p.num_groups;
  const int group_slots = grouped ? round_up(p.num_groups, 2) : 0;
  const int group_size = grouped ? p.experts / p.num_groups : 0;
  const Scratch scratch = token_scratch<L, C>(
      shared + histogram_bytes(p.experts) + warp * warp_bytes<L, C>(group_slots), group_slots, slot);
  const bool renormalize = p.renormalize && p.choices > 1;
  const float pad = kScored && p.sigmoid ? 0.0f : -INFINITY;

  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) histogram[e] = 0;
  __syncthreads();

  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps * kTokens;
  for (int64_t base = (static_cast<int64_t>(blockIdx.x) * warps + warp) * kTokens; base < p.tokens; base += stride) {
    // Lanes past the last token repeat it and write nothing.
    const bool valid = base + slot < p.tokens;
    const int64_t token = valid ? base + slot : p.tokens - 1;
    float x[4 * C];
    load_row<L, C>(x, p.logits, p.dtype, token * p.row_stride, p.experts, vector, pad, lane);

    [[maybe_unused]] Softmax softmax = {};
    if constexpr (kScored) softmax = score_row<L, C>(x, p, vector_bias, lane);
    store_shared<L, C>(x, scratch.row, lane);
    if (grouped) {
      __syncwarp();
      mask_groups<L>(scratch, p.experts, p.num_groups, p.topk_groups, lane);
      load_shared<L, C>(x, scratch.row, lane);
    }
    const bool has_nan = select<L, C>(x, scratch, p.choices, p.experts, group_size, lane);

    const bool active = lane < p.choices;
    const int expert = active ? scratch.chosen[lane] : 0;
    float weight = 0.0f;
    if constexpr (kScored) {
      const float logit = active ? load_scalar(p.logits, p.dtype, token * p.row_stride + expert) : 0.0f;
      if (active) weight = p.sigmoid ? sigmoid_one(logit) : softmax_one(logit, softmax);
      if (renormalize) weight = weight / (group_sum<L>(weight) + kRenormalizeEpsilon);
    } else {
      // The chosen scores' sum is at least 1/E, so neither the epsilon nor the softmax denominator shows.
      const float logit = scratch.row[expert];
      const float best = __shfl_sync(kWarp, logit, 0, L);
      const float largest = has_nan ? NAN : best;
      const float numerator = active ? expf(logit - largest) : 0.0f;
      if (!renormalize) load_shared<L, C>(x, scratch.row, lane);
      weight = numerator / (renormalize ? group_sum<L>(numerator) : exp_sum<L>(x, largest));
    }
    if (valid && active) {
      p.weights[token * p.choices + lane] = weight * p.scale;
      p.indices[token * p.choices + lane] = expert;
      atomicAdd(histogram + expert, 1);
    }
    __syncwarp();
  }

  add_up<kCluster>(p, histogram);
}

template <int L, int C, bool kScored>
void launch(const GateParams& p, cudaStream_t stream) {
  constexpr int kTokens = 32 / L;
  const int group_slots = kScored && p.topk_groups < p.num_groups ? round_up(p.num_groups, 2) : 0;
  const auto bytes = [&](int warps) { return histogram_bytes(p.experts) + warps * warp_bytes<L, C>(group_slots); };
  int warps = kWarps;
  while (bytes(warps) > kSharedLimit && warps > 1) warps /= 2;
  require(bytes(warps) <= kSharedLimit, "gate: too many groups");
  const bool vector = rows_of_four(p.logits, p.dtype, p.row_stride, p.experts);
  const bool vector_bias = rows_of_four(p.expert_bias, DType::kFloat32, 0, p.experts);
  const int64_t wanted = ceil_div<int64_t>(p.tokens, kTokens * warps);

  if constexpr (C <= kSmallChunks) {
    if (wanted <= kMaxCluster && has_sm90_code<gate_kernel<L, C, kScored, true>>()) {
      const unsigned blocks = wanted <= 1 ? 1 : wanted <= 2 ? 2 : wanted <= 4 ? 4 : 8;
      const LaunchShape shape = {blocks, static_cast<unsigned>(warps * 32), bytes(warps), blocks};
      launch_kernel<gate_kernel<L, C, kScored, true>>("gate", shape, stream, p, vector, vector_bias);
      return;
    }
  }
  launch_kernel<zero_counts_kernel>("gate: zero", {1, 256}, stream, p.expert_counts, p.experts);
  const int most = sm_count() * kBlocksPerSm<C, kScored> * kWarps / warps;
  const LaunchShape shape = {static_cast<unsigned>(std::min<int64_t>(wanted, most)), static_cast<unsigned>(warps * 32),
                             bytes(warps), 1, true};
  launch_kernel<gate_kernel<L, C, kScored, false>>("gate", shape, stream, p, vector, vector_bias);
}

}  // namespace
}  // namespace gate

void launch_gate(const GateParams& p, cudaStream_t stream) {
  require(p.experts >= 1 && p.experts <= kMaxGateExperts, "gate: E must be in [1, 1024]");
  require(p.choices >= 1 && p.choices <= kMaxGateChoices && p.choices <= p.experts, "gate: K must be in [1, min(32, E)]");
  require(p.num_groups >= 1 && p.experts % p.num_groups == 0 && p.topk_groups >= 1 &&
              p.topk_groups <= p.num_groups && p.choices <= p.experts / p.num_groups * p.topk_groups,
          "gate: groups must divide E and the kept ones hold K experts");
  if (p.tokens == 0) {
    check(cudaMemsetAsync(p.expert_counts, 0, p.experts * sizeof(int32_t), stream), "gate: memset");
    return;
  }
  const bool scored = p.sigmoid || p.expert_bias != nullptr || p.num_groups > 1;
  const int most_chunks = p.tokens <= gate::kSmallTokens ? gate::kSmallChunks : gate::kMostChunks;
  gate::dispatch_layout(p.experts, p.choices, most_chunks, [&]<typename Shape>(Shape) {
    if (scored) {
      gate::launch<Shape::kLanes, Shape::kChunks, true>(p, stream);
    } else {
      gate::launch<Shape::kLanes, Shape::kChunks, false>(p, stream);
    }
  });
}

}  // namespace ling
