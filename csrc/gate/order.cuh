// The order of selection: larger key first, then the lower expert.
#pragma once

#include "row.cuh"

namespace ling::gate {

// One integer per key and expert, larger for what is chosen first. No candidate is 0.
__device__ inline uint64_t candidate(uint32_t key, int expert) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~expert);
}

__device__ inline int expert_of_candidate(uint64_t c) { return static_cast<int>(~static_cast<uint32_t>(c)); }

// rank += a > b. Written out so that it takes three instructions, not four.
__device__ inline void count_greater(int& rank, uint64_t a, uint64_t b) {
  asm("{\n\t.reg .pred p;\n\tsetp.gt.u64 p, %1, %2;\n\t@p add.s32 %0, %0, 1;\n\t}" : "+r"(rank) : "l"(a), "l"(b));
}

// Of the values with equal keys that `equal` marks in each lane, those of a token's `most` lowest experts.
template <int L, int C>
__device__ unsigned first_ties(unsigned equal, int most, int lane) {
  const int first_lane = threadIdx.x % 32 & ~(L - 1);
  const unsigned before = ((1u << lane) - 1) << first_lane;
  const unsigned own = L == 32 ? kWarp : ((1u << (L & 31)) - 1) << first_lane;
  unsigned result = 0;
#pragma unroll 1
  for (int c = 0; c < C; ++c) {
    unsigned four = equal >> 4 * c & 0xf;
    const int ties = __popc(four);
    int room = most;
#pragma unroll
    for (int bit = 0; bit < 3; ++bit) {
      const unsigned vote = __ballot_sync(kWarp, ties >> bit & 1);
      room -= __popc(vote & before) << bit;
      most -= __popc(vote & own) << bit;
    }
#pragma unroll
    for (int j = 3; j >= 0; --j) {
      if (__popc(four) > room) four &= ~(1u << j);
    }
    result |= four << 4 * c;
  }
  return result;
}

}  // namespace ling::gate
