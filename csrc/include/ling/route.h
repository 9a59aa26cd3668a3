// Routing: a stable sort of (token, choice) pairs by expert, under an optional capacity.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ling/common.h"

namespace ling {

constexpr int kMaxRouteExperts = 4096;
constexpr int64_t kMaxRoutePairs = 2147483647;

// pair = token * K + choice. Pairs with an id outside [0,E) or of a masked token are skipped.
struct RouteParams {
  const void* indices;      // [T,K] contiguous
  DType index_dtype;        // int32, int64
  const int32_t* capacity;  // [1] or [E], or null; negative counts as 0
  int capacity_stride;      // 0 for [1], 1 for [E]
  const float* weights;     // [T,K], for by_probability
  const bool* token_mask;   // [T], false: skip the token; or null
  int32_t* expert_counts;   // [E] demand before any drop
  int32_t* expert_offsets;  // [E+1]
  int32_t* row_token;       // [T*K], -1 past the last row
  int32_t* row_pair;        // [T*K], -1 past the last row
  int32_t* token_row;       // [T,K], -1 where dropped or skipped
  int32_t* workspace;       // [route_workspace()]
  int64_t tokens;           // T; T * K <= kMaxRoutePairs
  int choices;              // K
  int experts;              // E <= kMaxRouteExperts
  bool by_probability;      // who stays: the largest weights (ties: lower pair, NaN last), else the first pairs
};

// int32 elements of workspace that launch_route needs.
int64_t route_workspace(int64_t tokens, int choices, int experts, bool by_probability);

// One launch where one block holds all pairs, two otherwise; one more by probability.
void launch_route(const RouteParams& params, cudaStream_t stream);

constexpr int kMaxRerouteChoices = 32;

// Rounds in which overflowing pairs ask for their token's best-scored expert with room.
struct RerouteParams {
  const void* scores;       // [T,E] contiguous
  DType score_dtype;        // fp32, bf16, fp16
  const float* weights;     // [T,K]
  const void* indices;      // [T,K] contiguous
  DType index_dtype;        // int32, int64
  const int32_t* capacity;  // [1] or [E]; negative counts as 0
  int capacity_stride;      // 0 for [1], 1 for [E]
  float* new_weights;       // [T,K]
  void* new_indices;        // [T,K] in index_dtype
  bool* moved;              // [T,K]
  int32_t* workspace;       // [reroute_workspace()]
  int64_t tokens;           // T; T * K <= kMaxRoutePairs
  int choices;              // K <= kMaxRerouteChoices
  int experts;              // E <= kMaxRouteExperts
  int rounds;
};

// int32 elements of workspace that launch_reroute needs.
int64_t reroute_workspace(int64_t tokens, int choices, int experts);

// One routing, then one launch and one routing a round, then one launch.
void launch_reroute(const RerouteParams& params, cudaStream_t stream);

}  // namespace ling
