// Gate forward: one kernel for scores, bias, group limits, selection, weights and the histogram. Where one
// block does not hold all tokens, a kernel that zeroes the counts runs in front. Each overlaps with what is in
// front of it. Few tokens go another way: few_tokens.cu.
#include "ling/gate.h"

#include <algorithm>

#include "dispatch.cuh"
#include "ling/launch.h"
#include "select.cuh"

namespace ling {
namespace gate {
namespace {

constexpr int kWarps = 8;        // of a block
constexpr int kSmallWarps = 4;   // of a block where there are too few tokens to fill the device
constexpr int kLargeWarps = 16;  // of a block where there are many tokens and few registers are needed
constexpr int kMostChunks = 8;

// Blocks of kWarps that a multiprocessor should hold, and the registers that this leaves a thread.
template <int L, int C, Keys kKeys>
constexpr int kBlocksPerSm = kKeys == Keys::kLogits || C <= 2 ? 4
                             : L * C < 256                    ? 3
                                                              : 2;
template <int L, int C, Keys kKeys>
constexpr int kRegisters = kBlocksPerSm<L, C, kKeys> == 4   ? 64
                           : kBlocksPerSm<L, C, kKeys> == 3 ? 80
                                                            : 128;

template <int L>
constexpr int kSurvivorSlots = kSurvivors<L> + 2;

// Shared memory of one warp, in bytes.
template <int L, int C>
__host__ __device__ constexpr size_t warp_bytes(int group_slots) {
  return 32 / L *
         (L * 4 * C * sizeof(float) + kSurvivorSlots<L> * sizeof(uint64_t) + L * sizeof(int) +
          2 * round_up(group_slots, 2) * sizeof(uint32_t));
}

// The histogram comes first, then the bias, zero from E on, then the warps' scratch.
template <int L, int C, Keys kKeys>
__host__ __device__ constexpr size_t block_bytes() {
  return L * 4 * C * (sizeof(int) + (kKeys == Keys::kLogits ? 0 : sizeof(float)));
}

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

// Turns logits into selection keys: fp32 scores plus bias; experts from E on get -inf.
template <int L, int C, Keys kKeys>
__device__ Softmax score_row(float (&x)[4 * C], const GateParams& p, const float* bias, float* row, int lane) {
  Softmax softmax = {};
  if constexpr (kKeys == Keys::kSigmoid) {
    sigmoid_row<L, C>(x, row, lane);
  } else {
    softmax = softmax_row<L>(x, x);
  }
  if (p.expert_bias != nullptr) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float4 four = reinterpret_cast<const float4*>(bias)[c * L + lane];
      x[4 * c] += four.x;
      x[4 * c + 1] += four.y;
      x[4 * c + 2] += four.z;
      x[4 * c + 3] += four.w;
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

__global__ void zero_counts_kernel(int32_t* counts, const int experts) {
  allow_next();
  wait_for_previous();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
}

template <int L, int C, Keys kKeys>
__global__ void __maxnreg__((kRegisters<L, C, kKeys>)) gate_kernel(const GateParams p, const bool vector) {
  constexpr int kTokens = 32 / L;
  constexpr bool kScored = kKeys != Keys::kLogits;
  constexpr bool kSigmoid = kKeys == Keys::kSigmoid;
  extern __shared__ __align__(16) unsigned char shared[];
  int* histogram = reinterpret_cast<int*>(shared);
  float* bias = reinterpret_cast<float*>(shared) + L * 4 * C;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int lane = threadIdx.x % L;
  const int slot = threadIdx.x % 32 / L;
  Groups groups = {};
  if constexpr (kScored) groups = make_groups<L>(p.experts, p.num_groups, p.topk_groups, lane);
  const int group_slots = groups.size > 0 ? round_up(p.num_groups, 2) : 0;
  const Scratch scratch = token_scratch<L, C>(
      shared + block_bytes<L, C, kKeys>() + warp * warp_bytes<L, C>(group_slots), group_slots, slot);
  constexpr float kPad = kSigmoid ? 0.0f : -INFINITY;

  // Lanes past the last token repeat it and write nothing.
  wait_for_previous();
  const auto tokens = static_cast<uint32_t>(p.tokens);
  const uint32_t stride = gridDim.x * warps * kTokens;
  uint32_t base = (blockIdx.x * warps + warp) * kTokens;
  const auto token_of = [&](uint32_t first) -> int64_t { return min(first + slot, tokens - 1); };
  float x[4 * C];
  const auto load = [&](uint32_t first) {
    const int64_t offset = token_of(first) * p.row_stride;
    load_row<L, C>(x, p.logits, p.dtype, offset, p.experts, vector, kPad, scratch.row, lane);
  };
  if (base < tokens) load(base);

  for (int e = threadIdx.x; e < L * 4 * C; e += blockDim.x) {
    histogram[e] = 0;
    if constexpr (kScored) bias[e] = p.expert_bias != nullptr && e < p.experts ? p.expert_bias[e] : 0.0f;
  }
  __syncthreads();

  for (; base < tokens; base += stride) {
    const bool valid = base + slot < tokens;
    const int64_t token = token_of(base);
    [[maybe_unused]] Softmax softmax = {};
    if constexpr (kScored) softmax = score_row<L, C, kKeys>(x, p, bias, scratch.row, lane);
    store_shared<L, C>(x, scratch.row, lane);
    if constexpr (kScored) {
      if (groups.size > 0) {
        __syncwarp();
        mask_groups<L>(scratch, groups, p.num_groups, p.topk_groups, lane);
        load_shared<L, C>(x, scratch.row, lane);
      }
    }
    const bool has_nan = select<L, C>(x, scratch, p.choices, p.experts, groups.size, lane);

    const bool active = lane < p.choices;
    const int expert = active ? scratch.chosen[lane] : 0;
    float weight = 0.0f;
    if constexpr (kScored) {
      const float logit = active ? load_scalar(p.logits, p.dtype, token * p.row_stride + expert) : 0.0f;
      if (active) weight = kSigmoid ? sigmoid_one(logit) : softmax_one(logit, softmax);
      if (p.renormalize) weight = renormalized(weight, group_sum<L>(weight));
    } else {
      // The chosen scores' sum is at least 1/E, so neither the epsilon nor the softmax denominator shows.
      const float logit = scratch.row[expert];
      const float best = __shfl_sync(kWarp, logit, 0, L);
      const float largest = has_nan ? NAN : best;
      const float numerator = active ? expf(logit - largest) : 0.0f;
      const float sum = p.renormalize ? group_sum<L>(numerator) : exp_sum<L, C>(scratch.row, largest, lane);
      weight = divide(numerator, sum, reciprocal(sum));
    }
    if (valid && active) {
      p.weights[token * p.choices + lane] = weight * p.scale;
      p.indices[token * p.choices + lane] = expert;
      atomicAdd(histogram + expert, 1);
    }
    __syncwarp();
    if (base + stride < tokens) load(base + stride);
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

template <int L, int C, Keys kKeys>
void launch(const GateParams& p, cudaStream_t stream) {
  constexpr int kTokens = 32 / L;
  const int group_slots = kKeys != Keys::kLogits && p.topk_groups < p.num_groups ? round_up(p.num_groups, 2) : 0;
  const auto bytes = [&](int warps) { return block_bytes<L, C, kKeys>() + warps * warp_bytes<L, C>(group_slots); };
  const int sms = sm_count();
  // The blocks' counts are added up address by address, so that many blocks take turns; few tokens, on the other
  // hand, are better spread.
  int warps = kWarps;
  if (p.tokens < sms * kSmallWarps * kTokens) {
    warps = kSmallWarps;
  } else if (kKeys == Keys::kLogits && p.tokens >= sms * kWarps * kTokens) {
    warps = kLargeWarps;
  }
  const size_t limit = warps > kWarps ? 2 * kSharedLimit : kSharedLimit;
  while (bytes(warps) > limit && warps > 1) warps = ceil_div(warps, 2);
  require(bytes(warps) <= limit, "gate: too many groups");

  const int64_t most = static_cast<int64_t>(sms) * kBlocksPerSm<L, C, kKeys> * kWarps / warps;
  LaunchShape shape = {};
  shape.blocks = static_cast<unsigned>(std::min(ceil_div<int64_t>(p.tokens, kTokens * warps), most));
  shape.threads = warps * 32;
  shape.shared_bytes = bytes(warps);
  shape.overlap = true;
  if (shape.blocks > 1) zero_counts(p, stream);
  launch_kernel<gate_kernel<L, C, kKeys>>("gate", shape, stream, p,
                                          rows_of_four(p.logits, p.dtype, p.row_stride, p.experts));
}

}  // namespace

void zero_counts(const GateParams& p, cudaStream_t stream) {
  launch_kernel<zero_counts_kernel>("gate: zero", {1, 256, 0, true}, stream, p.expert_counts, p.experts);
}

}  // namespace gate

void launch_gate(const GateParams& params, cudaStream_t stream) {
  GateParams p = params;
  p.renormalize = p.renormalize && p.choices > 1;
  require(p.experts >= 1 && p.experts <= kMaxGateExperts, "gate: E must be in [1, 1024]");
  require(p.choices >= 1 && p.choices <= kMaxGateChoices, "gate: K must be in [1, 32]");
  require(p.num_groups >= 1 && p.experts % p.num_groups == 0 && p.topk_groups >= 1 && p.topk_groups <= p.num_groups &&
              p.choices <= p.experts / p.num_groups * p.topk_groups,
          "gate: groups must divide E and the kept ones hold K experts");
  require(p.tokens <= kMaxGateTokens, "gate: T must be at most 2^31 - 1");
  if (p.tokens == 0) {
    check(cudaMemsetAsync(p.expert_counts, 0, p.experts * sizeof(int32_t), stream), "gate: memset");
    return;
  }
  if (gate::launch_few_tokens(p, stream)) return;
  gate::dispatch_layout(p.experts, p.choices, gate::kMostChunks, [&]<typename Shape>(Shape) {
    constexpr int L = Shape::kLanes;
    constexpr int C = Shape::kChunks;
    switch (gate::keys_of(p)) {
      case gate::Keys::kSigmoid: return gate::launch<L, C, gate::Keys::kSigmoid>(p, stream);
      case gate::Keys::kSoftmax: return gate::launch<L, C, gate::Keys::kSoftmax>(p, stream);
      case gate::Keys::kLogits: return gate::launch<L, C, gate::Keys::kLogits>(p, stream);
    }
  });
}

}  // namespace ling
