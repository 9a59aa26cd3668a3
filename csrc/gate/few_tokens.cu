// Gate forward for few tokens: one warp per token, its row in registers. What counts here is the chain of
// dependent steps of a single token, not instructions per token.
//
// Selection works on ordered integer keys (0: not a candidate), so NaN, infinities and ties need no case of
// their own: the K-th largest of the 32 lanes' largest keys bounds the K-th largest key from below, the keys
// that reach it are listed and ranked by counting; of ties at the bound only the K lowest experts are listed.
#include <algorithm>

#include "dispatch.cuh"
#include "ling/gate.h"
#include "ling/launch.h"
#include "order.cuh"

namespace ling::gate {
namespace {

constexpr int kLanes = 32;
constexpr int kMostGroups = 32;
constexpr int kMostChoices = 16;  // beyond, too many keys reach the bound
constexpr int kListed = 32;       // keys that are ranked without looking for ties

// Shared memory of one warp.
template <int C>
struct Scratch {
  alignas(16) float row[4 * C * kLanes];               // unbiased scores or logits, in expert order
  alignas(16) uint64_t survivors[4 * C * kLanes + 4];  // and zeros behind them
  alignas(16) uint32_t maxima[kLanes];                 // of the lanes' keys
  alignas(16) uint32_t group_keys[kMostGroups];
  int chosen[kMostChoices];
};

// How groups of experts lie in the lanes.
struct Grouping {
  int quads;  // lanes of a group within a chunk, a power of two; 0: selection is not limited to groups
  int shift;  // log2(quads)
};

// Whether rows can be read four elements at a time.
struct Vectors {
  bool logits;
  bool bias;
};

__device__ inline void count_above(int& count, uint32_t a, uint32_t b) {
  asm("{\n\t.reg .pred p;\n\tsetp.gt.u32 p, %1, %2;\n\t@p add.s32 %0, %0, 1;\n\t}" : "+r"(count) : "r"(a), "r"(b));
}

// The two largest of a set.
struct Two {
  uint32_t best;
  uint32_t next;
};

__device__ inline Two merge(Two a, Two b) {
  return {max(a.best, b.best), max(min(a.best, b.best), max(a.next, b.next))};
}

// Sets the keys of all but the best groups to 0.
template <int C>
__device__ void mask_groups(uint32_t (&key)[4 * C], const GateParams& p, const Grouping& grouping, uint32_t* group_keys,
                            int lane) {
  Two two[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const uint32_t* four = key + 4 * c;
    two[c] = merge({max(four[0], four[1]), min(four[0], four[1])}, {max(four[2], four[3]), min(four[2], four[3])});
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    if (step >= grouping.quads) break;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      two[c] = merge(two[c], {__shfl_xor_sync(kWarp, two[c].best, step), __shfl_xor_sync(kWarp, two[c].next, step)});
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int group = (c * kLanes + lane) >> grouping.shift;
    if ((lane & (grouping.quads - 1)) == 0 && group < p.num_groups) {
      group_keys[group] = ordered_key(key_value(two[c].best) + key_value(two[c].next));
    }
  }
  __syncwarp();
  const uint32_t own = group_keys[lane];
  int rank = 0;
#pragma unroll 2
  for (int g = 0; g < p.num_groups; g += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(group_keys + g);
    // Equal keys: the lower group is ahead. Keys of groups are at least 1.
    count_above(rank, four.x, own - (g < lane));
    count_above(rank, four.y, own - (g + 1 < lane));
    count_above(rank, four.z, own - (g + 2 < lane));
    count_above(rank, four.w, own - (g + 3 < lane));
  }
  const unsigned kept = __ballot_sync(kWarp, lane < p.num_groups && rank < p.topk_groups);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (kept >> ((c * kLanes + lane) >> grouping.shift) & 1) continue;
    key[4 * c] = key[4 * c + 1] = key[4 * c + 2] = key[4 * c + 3] = 0;
  }
}

// The K-th largest of the lanes' largest keys, at least 1.
template <int V>
__device__ uint32_t lower_bound(const uint32_t (&key)[V], uint32_t* maxima, int choices, int lane) {
  uint32_t largest[V / 4];
#pragma unroll
  for (int c = 0; c < V / 4; ++c) {
    largest[c] = max(max(key[4 * c], key[4 * c + 1]), max(key[4 * c + 2], key[4 * c + 3]));
  }
#pragma unroll
  for (int half = V / 8; half > 0; half /= 2) {
#pragma unroll
    for (int c = 0; c < half; ++c) largest[c] = max(largest[c], largest[c + half]);
  }
  const uint32_t own = largest[0];
  maxima[lane] = own;
  __syncwarp();
  int rank[4] = {};
#pragma unroll
  for (int i = 0; i < kLanes; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(maxima + i);
    count_above(rank[0], four.x, own);
    count_above(rank[1], four.y, own);
    count_above(rank[2], four.z, own);
    count_above(rank[3], four.w, own);
  }
  const bool ahead = (rank[0] + rank[1]) + (rank[2] + rank[3]) < choices;
  return max(__reduce_min_sync(kWarp, ahead ? own : ~0u), 1u);
}

// Where a lane's survivors go in the list, and how many there are in all.
struct Place {
  int first;
  int total;
};

template <int V>
__device__ Place place_of(unsigned survivors, int lane) {
  const int own = __popc(survivors);
  const unsigned below = (1u << lane) - 1;
  Place place = {};
#pragma unroll
  for (int bit = 0; 1 << bit <= V; ++bit) {
    const unsigned vote = __ballot_sync(kWarp, own >> bit & 1);
    place.first += __popc(vote & below) << bit;
    place.total += __popc(vote) << bit;
  }
  return place;
}

// Fills scratch.chosen with the K best experts.
template <int C>
__device__ void select(const uint32_t (&key)[4 * C], Scratch<C>& scratch, int choices, int lane) {
  constexpr int V = 4 * C;
  const uint32_t bound = lower_bound<V>(key, scratch.maxima, choices, lane);
  unsigned survivors = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) survivors |= key[v] >= bound ? 1u << v : 0;
  Place place = place_of<V>(survivors, lane);
  if (place.total > kListed) {
    unsigned equal = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) equal |= key[v] == bound ? 1u << v : 0;
    survivors ^= equal ^ first_ties<kLanes, C>(equal, choices, lane);
    place = place_of<V>(survivors, lane);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (survivors >> v & 1) {
      scratch.survivors[place.first + __popc(survivors & ((1u << v) - 1))] =
          candidate(key[v], expert_of<kLanes>(lane, v));
    }
  }
  if (lane < 4) scratch.survivors[place.total + lane] = 0;
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < place.total; i += kLanes) {
    const uint64_t own = scratch.survivors[i];
    int rank[2] = {};
#pragma unroll 3
    for (int j = 0; j < place.total; j += 4) {
      const ulonglong2 one = *reinterpret_cast<const ulonglong2*>(scratch.survivors + j);
      const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(scratch.survivors + j + 2);
      count_greater(rank[0], one.x, own);
      count_greater(rank[1], one.y, own);
      count_greater(rank[0], two.x, own);
      count_greater(rank[1], two.y, own);
    }
    if (rank[0] + rank[1] < choices) scratch.chosen[rank[0] + rank[1]] = expert_of_candidate(own);
  }
  __syncwarp();
}

// Sum over the lanes below `choices`; the others hold 0. The order is that of fewer lanes per token.
__device__ inline float sum_of_choices(float value, int choices) {
  return choices <= 8 ? group_sum<8>(value) : group_sum<kMostChoices>(value);
}

// The keys of a token's experts; 0 from expert E on.
template <int C>
__device__ void make_keys(uint32_t (&key)[4 * C], const float (&x)[4 * C], int experts, int lane) {
#pragma unroll
  for (int v = 0; v < 4 * C; ++v) key[v] = ordered_key(x[v]);
  if (experts == kLanes * 4 * C) return;
#pragma unroll
  for (int v = 0; v < 4 * C; ++v) key[v] = expert_of<kLanes>(lane, v) < experts ? key[v] : 0;
}

// Weight of the lane's choice, whose score or logit is `score`; 0 in lanes that have none.
template <int C, Keys kKeys>
__device__ float weight_of(const GateParams& p, const Scratch<C>& scratch, float score, bool active, bool has_nan,
                           int lane) {
  if constexpr (kKeys != Keys::kLogits) {
    const float own = active ? score : 0.0f;
    return p.renormalize ? renormalized(own, sum_of_choices(own, p.choices)) : own;
  }
  const float best = __shfl_sync(kWarp, score, 0);
  const float largest = has_nan ? NAN : best;
  const float numerator = active ? expf(score - largest) : 0.0f;
  const float sum =
      p.renormalize ? sum_of_choices(numerator, p.choices) : exp_sum<kLanes, C>(scratch.row, largest, lane);
  return divide(numerator, sum, reciprocal(sum));
}

template <int C, Keys kKeys>
__global__ void few_tokens_kernel(const GateParams p, const Grouping grouping, const Vectors vectors) {
  constexpr int V = 4 * C;
  constexpr bool kScored = kKeys != Keys::kLogits;
  constexpr float kPad = kKeys == Keys::kSigmoid ? 0.0f : -INFINITY;
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kLanes;
  const int warps = blockDim.x / kLanes;
  Scratch<C>& scratch = reinterpret_cast<Scratch<C>*>(shared)[threadIdx.x / kLanes];
  int* histogram = reinterpret_cast<int*>(shared + warps * sizeof(Scratch<C>));
  // Warps past the last token repeat it and write nothing.
  const int64_t place = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kLanes;
  const int64_t token = min(place, p.tokens - 1);
  wait_for_previous();

  float x[V];
  load_row<kLanes, C>(x, p.logits, p.dtype, token * p.row_stride, p.experts, vectors.logits, kPad, scratch.row, lane);
  const bool biased = kScored && p.expert_bias != nullptr;
  float bias[V];
  if (biased) {
    load_row<kLanes, C>(bias, p.expert_bias, DType::kFloat32, 0, p.experts, vectors.bias, 0.0f, scratch.row, lane);
  }
  if (kScored) scratch.group_keys[lane] = 0;
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) histogram[e] = 0;
  __syncthreads();

  if constexpr (kKeys == Keys::kSigmoid) sigmoid_row<kLanes, C>(x, scratch.row, lane);
  if constexpr (kKeys == Keys::kSoftmax) softmax_row<kLanes>(x, x);
  store_shared<kLanes, C>(x, scratch.row, lane);
  const bool has_nan = !kScored && __any_sync(kWarp, isnan(max_nan_of<V>(x)));
  if (biased) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] += bias[v];
  }
  uint32_t key[V];
  make_keys<C>(key, x, p.experts, lane);
  if (kScored && grouping.quads > 0) mask_groups<C>(key, p, grouping, scratch.group_keys, lane);
  select<C>(key, scratch, p.choices, lane);

  const bool active = lane < p.choices;
  const int expert = active ? scratch.chosen[lane] : 0;
  const float weight = weight_of<C, kKeys>(p, scratch, scratch.row[expert], active, has_nan, lane);
  if (place < p.tokens && active) {
    p.weights[token * p.choices + lane] = weight * p.scale;
    p.indices[token * p.choices + lane] = expert;
    atomicAdd(histogram + expert, 1);
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

// Warps of a block. One block needs no second kernel for the counts; small blocks hinder their warps less, but
// many of them take turns where the counts are added up.
template <int C>
int warps_of(int64_t tokens, int experts) {
  constexpr int64_t kOneBlock = 12;
  constexpr int64_t kLeast = 4;
  constexpr int64_t kFewBlocks = 128;
  const auto most = static_cast<int64_t>((kSharedLimit - experts * sizeof(int)) / sizeof(Scratch<C>));
  const int64_t wanted = tokens <= std::min(kOneBlock, most) ? std::max(tokens, kLeast)
                         : tokens <= kFewBlocks * kLeast     ? kLeast
                                                             : 2 * kLeast;
  return static_cast<int>(std::min(wanted, most));
}

template <int C, Keys kKeys>
void launch(const GateParams& p, const Grouping& grouping, cudaStream_t stream) {
  const int warps = warps_of<C>(p.tokens, p.experts);
  LaunchShape shape = {};
  shape.blocks = static_cast<unsigned>(ceil_div<int64_t>(p.tokens, warps));
  shape.threads = static_cast<unsigned>(warps * kLanes);
  shape.shared_bytes = warps * sizeof(Scratch<C>) + p.experts * sizeof(int);
  shape.overlap = true;
  if (shape.blocks > 1) zero_counts(p, stream);
  const Vectors vectors = {rows_of_four(p.logits, p.dtype, p.row_stride, p.experts),
                           rows_of_four(p.expert_bias, DType::kFloat32, p.experts, p.experts)};
  launch_kernel<few_tokens_kernel<C, kKeys>>("gate", shape, stream, p, grouping, vectors);
}

template <int C>
void launch_keys(const GateParams& p, const Grouping& grouping, cudaStream_t stream) {
  switch (keys_of(p)) {
    case Keys::kLogits: return launch<C, Keys::kLogits>(p, grouping, stream);
    case Keys::kSoftmax: return launch<C, Keys::kSoftmax>(p, grouping, stream);
    case Keys::kSigmoid: return launch<C, Keys::kSigmoid>(p, grouping, stream);
  }
}

}  // namespace

bool launch_few_tokens(const GateParams& p, cudaStream_t stream) {
  const int chunks = ceil_div(p.experts, 4 * kLanes);
  // More tokens fill the device; then the number of instructions counts.
  if (p.tokens > (chunks <= 2 ? 2048 : 1024) || p.choices > kMostChoices) return false;
  Grouping grouping = {0, 0};
  if (p.topk_groups < p.num_groups) {
    const int size = p.experts / p.num_groups;
    grouping.quads = size / 4;
    if (size % 4 != 0 || grouping.quads > kLanes || (grouping.quads & (grouping.quads - 1)) != 0) return false;
    if (p.num_groups > kMostGroups) return false;
    while (1 << grouping.shift < grouping.quads) ++grouping.shift;
  }
  if (chunks <= 1) {
    launch_keys<1>(p, grouping, stream);
  } else if (chunks <= 2) {
    launch_keys<2>(p, grouping, stream);
  } else if (chunks <= 4) {
    launch_keys<4>(p, grouping, stream);
  } else {
    launch_keys<8>(p, grouping, stream);
  }
  return true;
}

}  // namespace ling::gate
