// Reading pairs, and scans over a block.
#pragma once

#include <cstdint>

#include "ling/route.h"

namespace ling::route {

constexpr unsigned kWarp = 0xffffffffu;

// Expert of a pair, -1 where the pair is skipped.
__device__ inline int expert_of_pair(const RouteParams& p, int64_t pair) {
  const int64_t id = p.index_dtype == DType::kInt64 ? static_cast<const int64_t*>(p.indices)[pair]
                                                    : static_cast<const int32_t*>(p.indices)[pair];
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(p.experts)) return -1;
  if (p.token_mask != nullptr && !p.token_mask[static_cast<uint32_t>(pair) / p.choices]) return -1;
  return static_cast<int>(id);
}

// Unsigned integers in the order of floats; NaN is the lowest (0), -0.0 equals +0.0.
__device__ inline uint32_t ordered_key(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return isnan(value) ? 0u : key;
}

__device__ inline int capacity_of(const RouteParams& p, int expert) {
  return p.capacity == nullptr ? INT32_MAX : max(p.capacity[expert * p.capacity_stride], 0);
}

// Sum of `value` over the threads before this one; `total` becomes the block's sum.
// `warp_sums` holds 32 ints. All threads call it; it ends with a barrier.
__device__ inline int block_exclusive_sum(int value, int* warp_sums, int& total) {
  const int lane = threadIdx.x & 31;
  const int warp = threadIdx.x >> 5;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kWarp, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  const int warps = blockDim.x >> 5;
  int sums = lane < warps ? warp_sums[lane] : 0;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kWarp, sums, step);
    if (lane >= step) sums += before;
  }
  total = __shfl_sync(kWarp, sums, 31);
  const int earlier = __shfl_sync(kWarp, sums, max(warp - 1, 0));
  __syncthreads();
  return inclusive - value + (warp == 0 ? 0 : earlier);
}

// Rows from `begin` on are no rows: -1, by all threads of the grid.
__device__ inline void fill_tail(const RouteParams& p, int64_t begin) {
  const int64_t pairs = p.tokens * p.choices;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < pairs; row += stride) {
    p.row_token[row] = -1;
    p.row_pair[row] = -1;
  }
}

}  // namespace ling::route
