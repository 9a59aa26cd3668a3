// The smallest capacity for a target drop rate, of a batch or from past steps.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ling/common.h"

namespace ling {

constexpr int kMaxCapacityWindow = 1024;

struct DynamicCapacityParams {
  const void* expert_counts;  // [counts] demand, >= 0
  DType dtype;                // of expert_counts: int32, int64
  int64_t counts;             // at least 1
  double target_drop_rate;    // share of the demand that may be dropped, in [0,1]
  int32_t* capacity;          // [1]
};

// The least C with sum over e of max(n_e - C, 0) <= floor(target * sum of n_e). One launch of one block.
void launch_dynamic_capacity(const DynamicCapacityParams& params, cudaStream_t stream);

struct RunningCapacityParams {
  const float* window;   // [slots] C* / mean of past steps; NaN where not filled yet
  const int64_t* steps;  // [] steps put in so far
  int slots;             // 1 .. kMaxCapacityWindow
  double mean;           // rows per expert of this step
  double quantile;
  double margin;
  double max_factor;
  int32_t* capacity;  // [1]
};

// ceil(mean * clip((1 + margin) * quantile of the window, 1, max_factor)) in float64. One launch of one block.
void launch_running_capacity(const RunningCapacityParams& params, cudaStream_t stream);

}  // namespace ling
