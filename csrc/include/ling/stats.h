// Measures of a routing: balance of the demand, and what a capacity dropped.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ling/common.h"

namespace ling {

// max_vio, cv, entropy, dead experts, drop rate, tokens dropped, share of the gate weights dropped
constexpr int kRoutingMeasures = 7;
constexpr int kRoutingSums = 6;
constexpr int kRoutingStatsBlocks = 512;  // at most, on every device: they fix the order of the sums

struct RoutingStatsParams {
  const int32_t* expert_counts;  // [E] demand before any drop
  const int32_t* token_row;      // [T,K], -1 where dropped or skipped
  const void* indices;           // [T,K]: an id outside [0,E) is no demand; or null, then all are
  DType index_dtype;             // int32, int64
  const float* weights;          // [T,K], or null
  const bool* token_mask;        // [T], false: no demand; or null
  double* partial;               // [kRoutingStatsBlocks, kRoutingSums] scratch
  float* stats;                  // [E + kRoutingMeasures]: demand of an expert / tokens with demand, then the measures
  int64_t tokens;
  int choices;  // K
  int experts;  // E
};

// Two launches. Sums are exact or in a fixed order.
void launch_routing_stats(const RoutingStatsParams& params, cudaStream_t stream);

}  // namespace ling
