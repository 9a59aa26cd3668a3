// Heads made ready for attention over a static cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ling/common.h"

namespace ling {

constexpr int kMaxHeadDim = 256;

// Queries and keys are normalised over the head (x / sqrt(mean(x^2) + eps) * weight, where there are weights) and
// rotated: of the first 2 * half elements, i and i + half turn by the angle i of the token's position, which is
// row % positions. Queries go to `query`, keys and values to row `row` of the caches; a row outside them is not
// written, and its query stands at position 0. Of a row that several tokens have, any of them remains, element by
// element. fp32 arithmetic, one rounding. All pointers but `rows` 16-byte aligned.
struct HeadsParams {
  const void* projected;     // [N, Q + 2 KV, D] queries, keys, values
  const void* query_weight;  // [D], or null: queries are not normalised
  const void* key_weight;    // [D], or null
  const float* cos;          // [positions, half]
  const float* sin;          // [positions, half]
  const int64_t* rows;       // [N]
  void* query;               // [N, Q, D]
  void* key_cache;           // [cache_rows, KV, D]
  void* value_cache;         // [cache_rows, KV, D]
  int64_t tokens;            // N
  int64_t cache_rows;        // below 2^32
  int64_t positions;         // 1 to 2^32 - 1
  int query_heads;           // Q
  int kv_heads;              // KV
  int head_dim;              // D, a multiple of 8, at most kMaxHeadDim
  int half;                  // 0 to D / 2
  float eps;
  bool float_weights;  // the weights are fp32 whatever `dtype` is
  DType dtype;         // of projected, query, caches and weights: fp32, bf16, fp16
};
void launch_heads(const HeadsParams& params, cudaStream_t stream);

}  // namespace ling
