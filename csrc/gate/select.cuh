// Selection of the K best experts of each token, by keys that lie in registers and shared memory.
//
// Fast path. Each lane splits its values in two segments. The L-th largest of the token's 2L segment
// maxima is a lower bound of the L-th largest value, hence of the K-th (K <= L): only about 1.3 L
// values reach it. These survivors are compacted and ranked by counting. Where there are more than the list
// holds, ties at the bound are cut to the K lowest experts. Rows with NaN, or with more survivors even then,
// take the slow path: K rounds of an argmax.
#pragma once

#include "order.cuh"

namespace ling::gate {

// One token's scratch in shared memory.
struct Scratch {
  float* row;            // [L * V] keys in expert order
  uint64_t* survivors;   // [kSurvivors + 1, rounded to 2]
  int* chosen;           // [L]
  uint32_t* group_keys;  // [G]
  uint32_t* group_kept;  // [G]
};

template <int L>
constexpr int kSurvivors = 4 * L;

__device__ inline float min_or_max(float a, float b, bool take_min) { return take_min ? fminf(a, b) : fmaxf(a, b); }

// The L-th largest of the 2L values (high, low) of a token's lanes, without NaN.
template <int L>
__device__ float middle_of_pairs(float a, float b, int lane) {
  float high = fmaxf(a, b);
  float low = fminf(a, b);
  // Bitonic merges of descending runs; a run of w lanes holds elements 2 * lane, 2 * lane + 1.
#pragma unroll
  for (int w = 1; w < L / 2; w *= 2) {
    const float other_high = __shfl_xor_sync(kWarp, high, 2 * w - 1);
    const float other_low = __shfl_xor_sync(kWarp, low, 2 * w - 1);
    bool upper = lane & w;
    float first = min_or_max(high, other_low, upper);
    float second = min_or_max(low, other_high, upper);
#pragma unroll
    for (int step = w / 2; step > 0; step /= 2) {
      upper = lane & step;
      first = min_or_max(first, __shfl_xor_sync(kWarp, first, step), upper);
      second = min_or_max(second, __shfl_xor_sync(kWarp, second, step), upper);
    }
    high = fmaxf(first, second);
    low = fminf(first, second);
  }
  // Element i of one half against element L - 1 - i of the other: the larger ones are the best L.
  const float other_high = __shfl_xor_sync(kWarp, high, L - 1);
  const float other_low = __shfl_xor_sync(kWarp, low, L - 1);
  float least = fminf(fmaxf(high, other_low), fmaxf(low, other_high));
#pragma unroll
  for (int step = L / 4; step > 0; step /= 2) least = fminf(least, __shfl_xor_sync(kWarp, least, step));
  return least;
}

// The experts' groups as a lane sees them: it scores groups lane, lane + L, ...
struct Groups {
  int size;   // experts of a group; 0: selection is not limited to groups
  int start;  // where the lane starts in a group, so that lanes read different banks
};

template <int L>
__device__ Groups make_groups(int experts, int num_groups, int topk_groups, int lane) {
  if (topk_groups >= num_groups) return {0, 0};
  const int size = experts / num_groups;
  return {size, size % 4 == 0 ? 4 * (lane % (size / 4)) : 0};
}

// Sum of the two largest keys of a group as an ordered key; NaN counts as the lowest key.
__device__ inline uint32_t group_score(const float* values, const Groups& groups) {
  float first = -INFINITY;
  float second = -INFINITY;
  if (groups.size % 4 == 0) {
    int at = groups.start;
#pragma unroll 4
    for (int i = 0; i < groups.size; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(values + at);
      const float high = max_nan(max_nan(four.x, four.y), max_nan(four.z, four.w));
      const float low = fmaxf(fminf(four.x, four.y), fminf(four.z, four.w));
      const float middle = fminf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
      second = fmaxf(fmaxf(second, fmaxf(low, middle)), fminf(first, high));
      first = max_nan(first, high);
      at += 4;
      if (at == groups.size) at = 0;
    }
  } else {
    first = NAN;
  }
  if (isnan(first)) {
    uint32_t best = 0;
    uint32_t next = 0;
#pragma unroll 1
    for (int i = 0; i < groups.size; ++i) {
      const uint32_t key = ordered_key(values[i]);
      next = max(next, min(best, key));
      best = max(best, key);
    }
    first = key_value(best);
    second = key_value(next);
  }
  return ordered_key(groups.size == 1 ? first : first + second);
}

// Keeps the best groups of a token: marks them, and overwrites the keys of the others with -inf.
template <int L>
__device__ void mask_groups(const Scratch& scratch, const Groups& groups, int num_groups, int topk_groups, int lane) {
#pragma unroll 1
  for (int g = lane; g < num_groups; g += L) {
    scratch.group_keys[g] = group_score(scratch.row + g * groups.size, groups);
  }
  __syncwarp();
#pragma unroll 1
  for (int g = lane; g < num_groups; g += L) {
    const uint32_t own = scratch.group_keys[g];
    int rank = 0;
#pragma unroll 2
    for (int other = 0; other < num_groups; ++other) {
      const uint32_t key = scratch.group_keys[other];
      rank += key > own || (key == own && other < g);
    }
    scratch.group_kept[g] = rank < topk_groups;
    if (rank < topk_groups) continue;
    float* values = scratch.row + g * groups.size;
    if (groups.size % 4 == 0) {
      int at = groups.start;
#pragma unroll 2
      for (int i = 0; i < groups.size; i += 4) {
        *reinterpret_cast<float4*>(values + at) = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        at += 4;
        if (at == groups.size) at = 0;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < groups.size; ++i) values[i] = -INFINITY;
    }
  }
  __syncwarp();
}

// mask |= bit if x >= bound. Written out so that it takes two instructions, not three.
__device__ inline void mark_survivor(unsigned& mask, float x, float bound, unsigned bit) {
  asm("{\n\t.reg .pred p;\n\tsetp.ge.f32 p, %1, %2;\n\t@p or.b32 %0, %0, %3;\n\t}"
      : "+r"(mask)
      : "f"(x), "f"(bound), "r"(bit));
}

// What select_slow writes over the keys of groups that are out. Arithmetic never yields this NaN, and keys
// that are limited to groups come from arithmetic.
constexpr uint32_t kOut = 0xffffffffu;

// K rounds, each the best candidate below the last one. Every lane of the warp takes part.
template <int L, int C>
__device__ void select_slow(const Scratch& scratch, bool write, int choices, int experts, int group_size, int lane) {
  if (group_size != 0) {
#pragma unroll 1
    for (int e = lane; e < experts; e += L) {
      if (!scratch.group_kept[e / group_size]) scratch.row[e] = __uint_as_float(kOut);
    }
  }
  __syncwarp();
  uint64_t last = ~0ull;
#pragma unroll 1
  for (int round = 0; round < choices; ++round) {
    uint64_t best = 0;
#pragma unroll 1
    for (int c = 0; c < C; ++c) {
      const float4 four = reinterpret_cast<const float4*>(scratch.row)[c * L + lane];
      const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int e = expert_of<L>(lane, 4 * c + j);
        const bool out = e >= experts || (group_size != 0 && __float_as_uint(values[j]) == kOut);
        const uint64_t own = out ? 0 : candidate(ordered_key(values[j]), e);
        if (own < last && own > best) best = own;
      }
    }
#pragma unroll
    for (int step = L / 2; step > 0; step /= 2) {
      const uint64_t other = __shfl_xor_sync(kWarp, best, step);
      best = other > best ? other : best;
    }
    if (write && lane == 0) scratch.chosen[round] = expert_of_candidate(best);
    last = best;
  }
}

// Where a lane's survivors go in the list, and how many its token has in all.
struct Place {
  int first;
  int total;
};

template <int L>
__device__ Place place_of(unsigned survivors, int lane) {
  const int own = __popc(survivors);
  int end = own;
#pragma unroll
  for (int step = 1; step < L; step *= 2) {
    const int before = __shfl_up_sync(kWarp, end, step, L);
    if (lane >= step) end += before;
  }
  return {end - own, __shfl_sync(kWarp, end, L - 1, L)};
}

// Of the survivors, those above the bound and the K lowest experts at it. Rolled: for what is rare.
template <int L, int C>
__device__ unsigned cut_ties(unsigned survivors, float bound, const Scratch& scratch, int choices, int experts,
                             int group_size, int lane) {
  unsigned ties = 0;
#pragma unroll 1
  for (int c = 0; c < C; ++c) {
    const float4 four = reinterpret_cast<const float4*>(scratch.row)[c * L + lane];
    unsigned bits = (four.x == bound) | (four.y == bound) << 1 | (four.z == bound) << 2 | (four.w == bound) << 3;
    survivors &= ~(bits << 4 * c);
    if (bound == -INFINITY) {
      // What is no candidate has this key too.
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const int e = expert_of<L>(lane, 4 * c + j);
        if (e >= experts || (group_size != 0 && !scratch.group_kept[e / group_size])) bits &= ~(1u << j);
      }
    }
    ties |= bits << 4 * c;
  }
  return survivors | first_ties<L, C>(ties, choices, lane);
}

// Fills scratch.chosen with the K best experts. `x` holds what scratch.row holds. Returns whether the
// token's row has a NaN among its candidates.
template <int L, int C>
__device__ bool select(const float (&x)[4 * C], const Scratch& scratch, int choices, int experts, int group_size,
                       int lane) {
  constexpr int V = 4 * C;
  // Both segments take part of every chunk, hence of every group that is limited to whole chunks.
  float first = x[0];
  float second = x[2];
#pragma unroll
  for (int v = 1; v < V; ++v) {
    if (v % 4 < 2) first = max_nan(first, x[v]);
    if (v % 4 == 3 || (v % 4 == 2 && v > 2)) second = max_nan(second, x[v]);
  }
  const float bound = middle_of_pairs<L>(first, second, lane);
  const unsigned nan_lanes = __ballot_sync(kWarp, isnan(first) || isnan(second));
  const unsigned own_lanes = L == 32 ? kWarp : ((1u << (L & 31)) - 1u) << (threadIdx.x & 31 & ~(L - 1));
  const bool has_nan = nan_lanes & own_lanes;

  unsigned mask = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    mark_survivor(mask, x[v], bound, 1u << v);
  }
  Place place = place_of<L>(mask, lane);
  const bool crowded = place.total > kSurvivors<L> || bound == -INFINITY;
  if (__any_sync(kWarp, crowded)) {
    mask = cut_ties<L, C>(mask, bound, scratch, choices, experts, group_size, lane);
    place = place_of<L>(mask, lane);
  }
  const int total = place.total;
  const bool slow = has_nan || total > kSurvivors<L>;

  if (__any_sync(kWarp, slow)) select_slow<L, C>(scratch, slow, choices, experts, group_size, lane);
  if (!slow) {
    while (mask != 0) {
      const int e = expert_of<L>(lane, __ffs(mask) - 1);
      scratch.survivors[place.first++] = candidate(ordered_key(scratch.row[e]), e);
      mask &= mask - 1;
    }
    if (lane == 0) scratch.survivors[total] = 0;  // read in pairs below
  }
  __syncwarp();
  if (!slow) {
    // Two survivors per lane at once: more than 2 L are rare.
#pragma unroll 1
    for (int i = lane; i < total; i += 2 * L) {
      const uint64_t one = scratch.survivors[i];
      const uint64_t two = scratch.survivors[min(i + L, total)];  // the 0 at `total` where there is none
      int rank_one = 0;
      int rank_two = 0;
#pragma unroll 2
      for (int j = 0; j < total; j += 2) {
        const ulonglong2 pair = *reinterpret_cast<const ulonglong2*>(scratch.survivors + j);
        count_greater(rank_one, pair.x, one);
        count_greater(rank_one, pair.y, one);
        count_greater(rank_two, pair.x, two);
        count_greater(rank_two, pair.y, two);
      }
      if (rank_one < choices) scratch.chosen[rank_one] = expert_of_candidate(one);
      if (rank_two < choices && i + L < total) scratch.chosen[rank_two] = expert_of_candidate(two);
    }
  }
  __syncwarp();
  return has_nan;
}

}  // namespace ling::gate
