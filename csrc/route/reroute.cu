// Rerouting. Who overflows and who of the askers is served are both questions of rank inside an expert, so
// launch_route answers them: first over the ids, then in each round over what the pairs ask for, with the
// free slots as capacities. Between them a warp per token settles the last answers and asks again.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>

#include "ling/launch.h"
#include "ling/route.h"
#include "pairs.cuh"

namespace ling {
namespace route {
namespace {

constexpr int kSettled = -1;      // asks for nothing
constexpr int kWithoutRoom = -2;  // overflows, and no expert has room
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kSharedKeys = 8192;  // of all warps of a block
constexpr float kRenormalizeEpsilon = 1e-20f;

// Parts of the workspace.
struct State {
  int32_t* route_workspace;  // first, where it is aligned
  int32_t* ids;              // [T,K] present expert, -1 where the id is none
  int32_t* asked;            // [T,K] expert asked for, kSettled or kWithoutRoom
  int32_t* free_slots;       // [2,E] by parity of the round
  int32_t* counts;           // [E] outputs of launch_route
  int32_t* offsets;          // [E+1]
  int32_t* row_token;        // [T*K]
  int32_t* row_pair;         // [T*K]
  int32_t* token_row;        // [T,K]

  explicit State(const RerouteParams& p)
      : route_workspace(p.workspace),
        ids(route_workspace + ling::route_workspace(p.tokens, p.choices, p.experts, false)),
        asked(ids + p.tokens * p.choices),
        free_slots(asked + p.tokens * p.choices),
        counts(free_slots + 2 * p.experts),
        offsets(counts + p.experts),
        row_token(offsets + p.experts + 1),
        row_pair(row_token + p.tokens * p.choices),
        token_row(row_pair + p.tokens * p.choices) {}
};

__device__ inline float score_at(const float* scores, int64_t i) { return scores[i]; }
__device__ inline float score_at(const __nv_bfloat16* scores, int64_t i) { return __bfloat162float(scores[i]); }
__device__ inline float score_at(const __half* scores, int64_t i) { return __half2float(scores[i]); }

__device__ inline int64_t given_id(const RerouteParams& p, int64_t pair) {
  return p.index_dtype == DType::kInt64 ? static_cast<const int64_t*>(p.indices)[pair]
                                        : static_cast<const int32_t*>(p.indices)[pair];
}

// A lane's pair after the last answers.
struct Pair {
  int id;
  bool overflows;
};

__device__ inline Pair settle(const RerouteParams& p, const State& s, int64_t pair, bool first_round) {
  const bool served = s.token_row[pair] >= 0;
  if (first_round) {
    const int64_t given = given_id(p, pair);
    const bool valid = static_cast<uint64_t>(given) < static_cast<uint64_t>(p.experts);
    return {valid ? static_cast<int>(given) : -1, valid && !served};
  }
  const int asked = s.asked[pair];
  if (asked == kSettled || !served) return {s.ids[pair], asked != kSettled};
  return {asked, false};
}

// Free slots after the last answers, by every block for itself; block 0 writes them for the next routing.
__device__ void count_free(const RerouteParams& p, const State& s, bool first_round, int parity, unsigned* has_room) {
  for (int e = threadIdx.x; e < round_up(p.experts, 32); e += blockDim.x) {
    int slots = 0;
    if (e < p.experts) {
      const int before =
          first_round ? max(p.capacity[e * p.capacity_stride], 0) : s.free_slots[(parity ^ 1) * p.experts + e];
      slots = max(before - s.counts[e], 0);
      if (blockIdx.x == 0) s.free_slots[parity * p.experts + e] = slots;
    }
    const unsigned open = __ballot_sync(kWarp, slots > 0);
    if (threadIdx.x % 32 == 0) has_room[e / 32] = open;
  }
}

// The `wanted` best experts of a token that have room and that it does not hold: lane n returns the n-th, or
// kWithoutRoom. `keys` [E] is the warp's own.
template <typename Score>
__device__ int best_with_room(const Score* scores, int experts, int held, int wanted, const unsigned* has_room,
                              uint32_t* keys) {
  const int lane = threadIdx.x % 32;
  for (int e = lane; e < experts; e += 32) {
    // 0 stands for no candidate; NaN comes right above it.
    keys[e] = has_room[e / 32] >> lane & 1 ? max(ordered_key(score_at(scores, e)), 1u) : 0u;
  }
  __syncwarp();
  if (held >= 0) keys[held] = 0u;
  __syncwarp();

  int found = kWithoutRoom;
  uint32_t own_key = 0;
  int own = 0;
  bool stale = true;
  for (int n = 0; n < wanted; ++n) {
    if (stale) {
      own_key = 0;
      for (int e = lane; e < experts; e += 32) {
        if (keys[e] > own_key) {
          own_key = keys[e];
          own = e;
        }
      }
    }
    const uint32_t best_key = __reduce_max_sync(kWarp, own_key);
    if (best_key == 0) break;
    const int best = __reduce_min_sync(kWarp, own_key == best_key ? own : INT32_MAX);
    if (lane == n) found = best;
    stale = own == best && own_key == best_key;
    if (stale) keys[best] = 0u;
  }
  __syncwarp();
  return found;
}

template <typename Score>
__global__ void __launch_bounds__(256) ask_kernel(const RerouteParams p, const State s, const int round) {
  extern __shared__ uint32_t all_keys[];  // [warps, E]
  __shared__ unsigned has_room[kMaxRouteExperts / 32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  count_free(p, s, round == 0, round & 1, has_room);
  __syncthreads();
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * warps + warp; token < p.tokens;
       token += static_cast<int64_t>(gridDim.x) * warps) {
    const int64_t pair = token * p.choices + lane;
    const Pair mine = lane < p.choices ? settle(p, s, pair, round == 0) : Pair{-1, false};
    const unsigned overflowing = __ballot_sync(kWarp, mine.overflows);
    int asked = kSettled;
    if (overflowing != 0) {
      const auto* scores = static_cast<const Score*>(p.scores) + token * p.experts;
      const int found =
          best_with_room(scores, p.experts, mine.id, __popc(overflowing), has_room, all_keys + warp * p.experts);
      const int nth = __popc(overflowing & ((1u << lane) - 1));
      const int candidate = __shfl_sync(kWarp, found, nth);
      if (mine.overflows) asked = candidate;
    }
    if (lane < p.choices) {
      s.ids[pair] = mine.id;
      s.asked[pair] = asked;
    }
  }
}

// Sum over a token's choices in their order, as the reference adds. A token has `lanes` lanes.
__device__ inline float sum_in_order(float value, int choices, int lanes) {
  float sum = __shfl_sync(kWarp, value, 0, lanes);
  for (int k = 1; k < choices; ++k) sum = __fadd_rn(sum, __shfl_sync(kWarp, value, k, lanes));
  return sum;
}

// A thread per choice; a token has the power of two of lanes that holds its choices.
template <typename Score>
__global__ void __launch_bounds__(256) finish_kernel(const RerouteParams p, const State s, const int lanes) {
  const int choice = threadIdx.x % lanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const bool present = token < p.tokens && choice < p.choices;
  const int64_t pair = token * p.choices + choice;
  const int64_t given = present ? given_id(p, pair) : -1;
  const bool valid = static_cast<uint64_t>(given) < static_cast<uint64_t>(p.experts);
  const int id = present ? settle(p, s, pair, p.rounds == 0).id : -1;
  const bool moved = valid && id != static_cast<int>(given);
  float weight = present ? p.weights[pair] : 0.0f;
  if (__any_sync(kWarp, moved)) {
    const auto* scores = static_cast<const Score*>(p.scores) + token * p.experts;
    const float weights = sum_in_order(valid ? weight : 0.0f, p.choices, lanes);
    const float old_scores = sum_in_order(valid ? score_at(scores, given) : 0.0f, p.choices, lanes);
    const float factor = __fdiv_rn(weights, __fadd_rn(old_scores, kRenormalizeEpsilon));
    if (moved) weight = __fmul_rn(score_at(scores, id), factor);
  }
  if (!present) return;
  p.new_weights[pair] = weight;
  p.moved[pair] = moved;
  if (p.index_dtype == DType::kInt64) {
    static_cast<int64_t*>(p.new_indices)[pair] = moved ? id : given;
  } else {
    static_cast<int32_t*>(p.new_indices)[pair] = static_cast<int32_t>(moved ? id : given);
  }
}

// Ranks of pairs with ids `indices` under `capacity`: into s.token_row and s.counts.
void rank(const RerouteParams& p, const State& s, const void* indices, DType index_dtype, const int32_t* capacity,
          int capacity_stride, cudaStream_t stream) {
  launch_route({.indices = indices,
                .index_dtype = index_dtype,
                .capacity = capacity,
                .capacity_stride = capacity_stride,
                .weights = nullptr,
                .token_mask = nullptr,
                .expert_counts = s.counts,
                .expert_offsets = s.offsets,
                .row_token = s.row_token,
                .row_pair = s.row_pair,
                .token_row = s.token_row,
                .workspace = s.route_workspace,
                .tokens = p.tokens,
                .choices = p.choices,
                .experts = p.experts,
                .by_probability = false},
               stream);
}

template <typename Score>
void launch(const RerouteParams& p, cudaStream_t stream) {
  const State s(p);
  const int warps = std::clamp(kSharedKeys / p.experts, 1, 8);
  const int64_t most = static_cast<int64_t>(sm_count()) * kBlocksPerMultiprocessor;
  const LaunchShape ask = {.blocks = static_cast<unsigned>(std::min(most, ceil_div<int64_t>(p.tokens, warps))),
                           .threads = static_cast<unsigned>(warps * 32),
                           .shared_bytes = warps * p.experts * sizeof(uint32_t)};
  const int lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(p.choices)));
  const LaunchShape finish = {.blocks = static_cast<unsigned>(ceil_div<int64_t>(p.tokens, 256 / lanes)),
                              .threads = 256};
  rank(p, s, p.indices, p.index_dtype, p.capacity, p.capacity_stride, stream);
  for (int round = 0; round < p.rounds; ++round) {
    launch_kernel<ask_kernel<Score>>("reroute: ask", ask, stream, p, s, round);
    rank(p, s, s.asked, DType::kInt32, s.free_slots + (round & 1) * p.experts, 1, stream);
  }
  launch_kernel<finish_kernel<Score>>("reroute: finish", finish, stream, p, s, lanes);
}

}  // namespace
}  // namespace route

int64_t reroute_workspace(int64_t tokens, int choices, int experts) {
  return route_workspace(tokens, choices, experts, false) + 5 * tokens * choices + 4 * experts + 1;
}

void launch_reroute(const RerouteParams& p, cudaStream_t stream) {
  require(p.choices >= 1 && p.choices <= kMaxRerouteChoices, "reroute: K must be in [1, 32]");
  require(p.rounds >= 0, "reroute: rounds must be at least 0");
  if (p.tokens == 0) return;
  switch (p.score_dtype) {
    case DType::kFloat32: return route::launch<float>(p, stream);
    case DType::kBFloat16: return route::launch<__nv_bfloat16>(p, stream);
    case DType::kFloat16: return route::launch<__half>(p, stream);
    default: require(false, "reroute: scores must be float32, bfloat16 or float16");
  }
}

}  // namespace ling
