// Dynamic capacity. One block each: the inputs are a few thousand numbers at most.
//   dynamic_capacity_kernel   tries eight capacities at a time, each step leaving an eighth of the interval
//   running_capacity_kernel   ranks the window's slots by counting
#include "ling/capacity.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "pairs.cuh"

namespace ling {
namespace route {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kTries = 8;  // capacities tried with one barrier

__device__ inline int warp_sum(int value) { return __reduce_add_sync(kWarp, value); }

__device__ inline int64_t warp_sum(int64_t value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step);
  return value;
}

__device__ inline int64_t warp_max(int64_t value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    value = max(value, static_cast<int64_t>(__shfl_xor_sync(kWarp, value, step)));
  return value;
}

// 32-bit sums are native in shared memory; 64-bit ones are loops.
template <typename Sum>
using Cell = std::conditional_t<sizeof(Sum) == 4, unsigned, unsigned long long>;

// The least capacity in [low, high] that leaves at most `budget` over; `high` does. Sum holds all demand.
// `over` is that of the last, this and the next step, zero in this one. The sums are of integers, so that the
// order of the atomics is of no account.
template <typename Sum, typename Count>
__device__ int64_t search(const Count* counts, int64_t n, Sum low, Sum high, Sum budget, Cell<Sum> (*over)[kTries]) {
  for (int step_index = 0; low < high; ++step_index) {
    const Sum step = ceil_div<Sum>(high - low, kTries);
    Sum own[kTries] = {};
    for (int64_t e = threadIdx.x; e < n; e += blockDim.x) {
      const auto count = static_cast<Sum>(counts[e]);
#pragma unroll
      for (int t = 0; t < kTries; ++t) own[t] += max(count - low - t * step, Sum{0});
    }
    Cell<Sum>* sums = over[step_index % 3];
#pragma unroll
    for (int t = 0; t < kTries; ++t) {
      const Sum sum = warp_sum(own[t]);
      if (threadIdx.x % 32 == t) atomicAdd(sums + t, static_cast<Cell<Sum>>(sum));
    }
    if (threadIdx.x < kTries) over[(step_index + 1) % 3][threadIdx.x] = 0;
    __syncthreads();
    int rejected = 0;
#pragma unroll
    for (int t = 0; t < kTries; ++t) rejected += low + t * step<high&& static_cast<Sum>(sums[t])> budget;
    if (rejected == 0) break;
    high = min(high, low + rejected * step);
    low += (rejected - 1) * step + 1;
  }
  return low;
}

template <typename Count>
__global__ void __launch_bounds__(kMaxThreads) dynamic_capacity_kernel(const DynamicCapacityParams p) {
  __shared__ int64_t totals[32];
  __shared__ int64_t maxima[32];
  __shared__ unsigned over[3][kTries];
  __shared__ unsigned long long wide_over[3][kTries];
  const auto* counts = static_cast<const Count*>(p.expert_counts);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < kTries) over[0][threadIdx.x] = wide_over[0][threadIdx.x] = 0;
  int64_t total = 0;
  int64_t largest = 0;
  for (int64_t e = threadIdx.x; e < p.counts; e += blockDim.x) {
    total += counts[e];
    largest = max(largest, static_cast<int64_t>(counts[e]));
  }
  total = warp_sum(total);
  largest = warp_max(largest);
  if (lane == 0) {
    totals[threadIdx.x / 32] = total;
    maxima[threadIdx.x / 32] = largest;
  }
  __syncthreads();
  const bool is_warp = lane < static_cast<int>(blockDim.x) / 32;
  total = warp_sum(is_warp ? totals[lane] : 0);
  largest = warp_max(is_warp ? maxima[lane] : 0);

  const auto budget = static_cast<int64_t>(floor(__dmul_rn(static_cast<double>(total), p.target_drop_rate)));
  int64_t capacity;
  // C * counts covers all but the budget; at the largest demand nothing is over.
  if (total <= INT32_MAX / 2) {
    const int low = max(ceil_div(static_cast<int>(total - budget), static_cast<int>(p.counts)), 0);
    capacity = search<int>(counts, p.counts, low, max(static_cast<int>(largest), low), static_cast<int>(budget), over);
  } else {
    const int64_t low = max(ceil_div<int64_t>(total - budget, p.counts), static_cast<int64_t>(0));
    capacity = search<int64_t>(counts, p.counts, low, max(largest, low), budget, wide_over);
  }
  if (threadIdx.x == 0) *p.capacity = static_cast<int32_t>(min(capacity, static_cast<int64_t>(INT32_MAX)));
}

// Position of slot `i` in ascending order, NaN last, ties by slot.
__device__ inline int rank_of(const float* window, int slots, int i) {
  const float value = window[i];
  int rank = 0;
#pragma unroll 4
  for (int j = 0; j < slots; ++j) {
    const float other = window[j];
    const bool equal = other == value || (isnan(other) && isnan(value));
    rank += other < value || (isnan(value) && !isnan(other)) || (equal && j < i);
  }
  return rank;
}

__global__ void __launch_bounds__(kMaxCapacityWindow) running_capacity_kernel(const RunningCapacityParams p) {
  __shared__ float window[kMaxCapacityWindow];
  __shared__ float neighbours[2];
  const int slot = threadIdx.x;
  if (slot < p.slots) window[slot] = p.window[slot];
  __syncthreads();
  const int64_t filled = min(*p.steps, static_cast<int64_t>(p.slots));
  const double at = fmax(__dmul_rn(p.quantile, static_cast<double>(filled - 1)), 0.0);
  if (slot < p.slots) {
    const int rank = rank_of(window, p.slots, slot);
    if (rank == static_cast<int>(floor(at))) neighbours[0] = window[slot];
    if (rank == static_cast<int>(ceil(at))) neighbours[1] = window[slot];
  }
  __syncthreads();
  if (slot != 0) return;
  // Rounded operation by operation, as the reference is: a fused multiply-add could tip the ceiling.
  const double low = neighbours[0];
  const double rise = __dmul_rn(__dsub_rn(neighbours[1], low), __dsub_rn(at, floor(at)));
  const double past = __dmul_rn(__dadd_rn(low, rise), __dadd_rn(1.0, p.margin));
  const double factor = filled > 0 ? fmin(fmax(past, 1.0), p.max_factor) : p.max_factor;
  const double rows = ceil(__dmul_rn(factor, p.mean));
  *p.capacity = rows < INT32_MAX ? static_cast<int32_t>(rows) : INT32_MAX;
}

}  // namespace
}  // namespace route

void launch_dynamic_capacity(const DynamicCapacityParams& p, cudaStream_t stream) {
  require(p.counts >= 1, "dynamic_capacity: expert_counts must not be empty");
  const auto threads = static_cast<unsigned>(std::min<int64_t>(round_up<int64_t>(p.counts, 32), route::kMaxThreads));
  if (p.dtype == DType::kInt64) {
    route::dynamic_capacity_kernel<int64_t><<<1, threads, 0, stream>>>(p);
  } else {
    route::dynamic_capacity_kernel<int32_t><<<1, threads, 0, stream>>>(p);
  }
  check_launch("dynamic_capacity");
}

void launch_running_capacity(const RunningCapacityParams& p, cudaStream_t stream) {
  require(p.slots >= 1 && p.slots <= kMaxCapacityWindow, "running_capacity: the window must have 1 to 1024 slots");
  route::running_capacity_kernel<<<1, static_cast<unsigned>(round_up(p.slots, 32)), 0, stream>>>(p);
  check_launch("running_capacity");
}

}  // namespace ling
