// Gate forward: one kernel for scores, bias, group limits, selection, weights and the histogram.
#include "ling/gate.h"

#include <algorithm>

#include "dispatch.cuh"
#include "select.cuh"

namespace ling {
namespace gate {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kWarps = 8;
// What registers allow for the widest rows.
template <bool kScored>
constexpr int kBlocksPerSm = kScored ? 2 : 3;
constexpr int kMostChunks = 8;
constexpr size_t kSharedLimit = 48 * 1024;

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
    float bias[4 * C];
    load_row<L, C>(bias, p.expert_bias, DType::kFloat32, 0, p.experts, vector_bias, 0.0f, lane);
#pragma unroll
    for (int v = 0; v < 4 * C; ++v) x[v] += bias[v];
  }
  if (p.experts < 4 * C * L) {
#pragma unroll
    for (int v = 0; v < 4 * C; ++v) {
      if (expert_of<L>(lane, v) >= p.experts) x[v] = -INFINITY;
    }
  }
  return softmax;
}

// kScored: keys are scores (+ bias), possibly limited to groups; otherwise the logits themselves.
template <int L, int C, bool kScored>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
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
      weight = numerator / (renormalize ? group_sum<L>(numerator) : exp_sum<L>(x, largest));
    }
    if (valid && active) {
      p.weights[token * p.choices + lane] = weight * p.scale;
      p.indices[token * p.choices + lane] = expert;
      atomicAdd(histogram + expert, 1);
    }
    __syncwarp();
  }

  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    const int count = histogram[e];
    if (gridDim.x == 1) {
      p.expert_counts[e] = count;
    } else if (count != 0) {
      atomicAdd(p.expert_counts + e, count);
    }
  }
}

template <int L, int C, bool kScored>
void launch(const GateParams& p, cudaStream_t stream) {
  constexpr int kTokens = 32 / L;
  const int group_slots = kScored && p.topk_groups < p.num_groups ? round_up(p.num_groups, 2) : 0;
  const bool small = p.tokens <= kMaxWarps * kTokens;
  int warps = small ? static_cast<int>(ceil_div<int64_t>(p.tokens, kTokens)) : kWarps;
  const auto bytes = [&] { return histogram_bytes(p.experts) + warps * warp_bytes<L, C>(group_slots); };
  while (bytes() > kSharedLimit && warps > 1) warps = ceil_div(warps, 2);
  require(bytes() <= kSharedLimit, "gate: too many groups");

  const int64_t wanted = ceil_div<int64_t>(p.tokens, kTokens * warps);
  const int blocks = small ? 1 : static_cast<int>(std::min<int64_t>(wanted, sm_count() * kBlocksPerSm<kScored> * kWarps / warps));
  if (blocks > 1) {
    check(cudaMemsetAsync(p.expert_counts, 0, p.experts * sizeof(int32_t), stream), "gate: memset");
  }
  const bool vector = rows_of_four(p.logits, p.dtype, p.row_stride, p.experts);
  const bool vector_bias = rows_of_four(p.expert_bias, DType::kFloat32, 0, p.experts);
  gate_kernel<L, C, kScored><<<blocks, warps * 32, bytes(), stream>>>(p, vector, vector_bias);
  check_launch("gate");
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
  gate::dispatch_layout(p.experts, p.choices, gate::kMostChunks, [&]<typename Shape>(Shape) {
    if (scored) {
      gate::launch<Shape::kLanes, Shape::kChunks, true>(p, stream);
    } else {
      gate::launch<Shape::kLanes, Shape::kChunks, false>(p, stream);
    }
  });
}

}  // namespace ling
