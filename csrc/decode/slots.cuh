// Which experts have work, and on which pairs: worked out by every block for itself from the ids, since a kernel of
// its own would cost more than the few hundred cycles that this takes.
#pragma once

#include "ling/decode.h"

namespace ling::decode {

constexpr int kGroup = 8;  // pairs of an expert that pass by its weights together: the columns of one product

// A slot is one expert with up to `kGroup` of its pairs. In shared memory. In which order a slot has them does not
// matter: a pair is a column of a product, and no column's result depends on another.
struct Slots {
  int count;                            // slots in use
  int warp_sum[32];                     // of the scan
  int16_t expert[kDecodeMaxPairs];      // of the slot
  int16_t begin[kDecodeMaxPairs];       // the slot's first place in `pairs`
  int16_t size[kDecodeMaxPairs];        // how many places it has
  int16_t group[kDecodeMaxPairs];       // its expert's first slot; an expert's slots follow one another
  int16_t group_size[kDecodeMaxPairs];  // and how many it has
  int16_t pairs[kDecodeMaxPairs];       // grouped by expert
  int16_t expert_of[kDecodeMaxPairs];   // of a pair; -1 where skipped

  // The slot of an expert's places from `place` on, of `places` in all. `before`: the places (low half) and slots (high
  // half) of the experts in front.
  __device__ void set(int before, int place, int its_expert, int places) {
    const int slot = (before >> 16) + place / kGroup;
    expert[slot] = static_cast<int16_t>(its_expert);
    begin[slot] = static_cast<int16_t>((before & 0xffff) + place);
    size[slot] = static_cast<int16_t>(min(kGroup, places - place));
    group[slot] = static_cast<int16_t>(before >> 16);
    group_size[slot] = static_cast<int16_t>(ceil_div(places, kGroup));
  }
};

// `pair` counts a token's own choices, then the parts of the shared expert.
__device__ inline int expert_of_pair(const MoeDecodeParams& p, int pair) {
  if (p.shared > 0) {
    const int token = pair / p.per_token();
    const int k = pair - token * p.per_token();
    if (k >= p.choices) return p.experts + k - p.choices;
    pair = token * p.choices + k;
  }
  const int64_t id = p.long_ids ? __ldcg(static_cast<const long long*>(p.indices) + pair)
                                : __ldcg(static_cast<const int*>(p.indices) + pair);
  const bool dropped = p.token_row != nullptr && __ldcg(p.token_row + pair) < 0;
  return id >= 0 && id < p.experts && !dropped ? static_cast<int>(id) : -1;
}

// Exclusive sum over the block of one value per thread. `warp_sum` is free for another use after the next barrier.
__device__ inline int exclusive_sum(int value, int* warp_sum) {
  const int lane = threadIdx.x % 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  int base = 0;
  for (int warp = 0; warp < static_cast<int>(threadIdx.x) / 32; ++warp) base += warp_sum[warp];
  return base + sum - value;
}

// A lane per pair of one token: every pair is a slot. An expert that a token names twice is read twice.
__device__ inline void find_slots_of_token(Slots& slots, int expert) {
  const int lane = threadIdx.x;
  const unsigned valid = __ballot_sync(~0u, expert >= 0);
  const int slot = __popc(valid & ((1u << lane) - 1));
  if (expert >= 0) {
    slots.pairs[slot] = static_cast<int16_t>(lane);
    slots.set(slot + (slot << 16), 0, expert, 1);
  }
  if (lane == 0) slots.count = __popc(valid);
}

// A lane per pair. What is summed up over the experts has pairs in the low half and slots in the high half.
__device__ inline void find_slots_of_tokens(Slots& slots, int expert) {
  const int lane = threadIdx.x;
  const unsigned mates = __match_any_sync(~0u, expert);
  const int size = __popc(mates);
  const int place = __popc(mates & ((1u << lane) - 1));
  const int own = expert >= 0 && place == 0 ? size + (ceil_div(size, kGroup) << 16) : 0;
  int end = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(~0u, end, step);
    if (lane >= step) end += left;
  }
  const int before = __shfl_sync(~0u, end - own, __ffs(mates) - 1);
  if (expert >= 0) slots.pairs[(before & 0xffff) + place] = static_cast<int16_t>(lane);
  if (expert >= 0 && place % kGroup == 0) slots.set(before, place, expert, size);
  if (lane == 31) slots.count = end >> 16;
}

// find_slots for at most 32 pairs, by one warp and without a barrier but the last: fewer cycles ahead of the first
// load.
__device__ inline void find_few_slots(const MoeDecodeParams& p, Slots& slots) {
  const int lane = threadIdx.x;
  if (lane < 32) {
    const int expert = lane < p.pairs() ? expert_of_pair(p, lane) : -1;
    slots.expert_of[lane] = static_cast<int16_t>(expert);
    p.tokens == 1 ? find_slots_of_token(slots, expert) : find_slots_of_tokens(slots, expert);
  }
  __syncthreads();
}

// Fills `slots`, the same in every block. `demand` [experts + shared] is scratch in shared memory.
template <int kThreads>
__device__ inline void find_slots(const MoeDecodeParams& p, Slots& slots, int* demand) {
  const int pairs = p.pairs();
  const int experts = p.experts + p.shared;
  if (pairs <= 32) return find_few_slots(p, slots);
  for (int e = threadIdx.x; e < experts; e += kThreads) demand[e] = 0;
  __syncthreads();

  constexpr int kPairsPerThread = ceil_div(kDecodeMaxPairs, kThreads);
  int expert[kPairsPerThread];
  int place[kPairsPerThread];
#pragma unroll
  for (int i = 0; i < kPairsPerThread; ++i) {
    const int pair = threadIdx.x + i * kThreads;
    expert[i] = pair < pairs ? expert_of_pair(p, pair) : -1;
    if (pair < pairs) slots.expert_of[pair] = static_cast<int16_t>(expert[i]);
    if (expert[i] >= 0) place[i] = atomicAdd(&demand[expert[i]], 1);
  }
  __syncthreads();

  // A thread's run of experts; pairs are summed in the low half, slots in the high half.
  const int run = ceil_div(experts, kThreads);
  const int first = min(static_cast<int>(threadIdx.x) * run, experts);
  const int last = min(first + run, experts);
  int own = 0;
  for (int e = first; e < last; ++e) own += demand[e] + (ceil_div(demand[e], kGroup) << 16);
  int sum = exclusive_sum(own, slots.warp_sum);
  if (threadIdx.x == kThreads - 1) slots.count = (sum + own) >> 16;
  bool crowded = false;
  for (int e = first; e < last; ++e) {
    const int size = demand[e];
    crowded |= size > kGroup;
    demand[e] = (size << 16) + (sum & 0xffff);  // from here on: how many, and the first place
    for (int place = 0; place < size; place += kGroup) slots.set(sum, place, e, size);
    sum += size + (ceil_div(size, kGroup) << 16);
  }
  const bool any_crowded = __syncthreads_or(crowded);

  const auto put = [&] {
#pragma unroll
    for (int i = 0; i < kPairsPerThread; ++i) {
      if (expert[i] < 0) continue;
      slots.pairs[(demand[expert[i]] & 0xffff) + place[i]] = static_cast<int16_t>(threadIdx.x + i * kThreads);
    }
    __syncthreads();
  };
  put();
  if (!any_crowded) return;

  // An expert of several slots: all blocks must agree on which pair is in which, so places are given by pair.
#pragma unroll
  for (int i = 0; i < kPairsPerThread; ++i) {
    if (expert[i] < 0) continue;
    const int begin = demand[expert[i]] & 0xffff;
    const int size = demand[expert[i]] >> 16;
    place[i] = 0;
    for (int other = begin; other < begin + size; ++other) {
      place[i] += slots.pairs[other] < static_cast<int>(threadIdx.x) + i * kThreads;
    }
  }
  __syncthreads();
  put();
}

}  // namespace ling::decode
