// One block per expert: radix select of the C-th largest weight, then a stable compaction.
#include "keep_largest.cuh"

#include "pairs.cuh"

namespace ling::route {
namespace {

constexpr int kThreads = 512;
constexpr int kDigits = 256;

struct Threshold {
  uint32_t key;  // pairs above it stay
  int ties;      // and so many of the first ones that equal it
};

// The `wanted`-th largest key of a segment, 1 <= wanted <= count.
__device__ Threshold radix_select(const RouteParams& p, const int32_t* segment, int count, int wanted, int* digits,
                                  int* result) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < kDigits; d += kThreads) digits[d] = 0;
    __syncthreads();
    const uint32_t mask = shift == 24 ? 0u : ~0u << (shift + 8);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t key = ordered_key(p.weights[segment[i]]);
      if ((key & mask) == prefix) atomicAdd(digits + (key >> shift & 255u), 1);
    }
    __syncthreads();
    // The first warp walks the digits from the top; lane l sums digits 255 - 8 l - 7 .. 255 - 8 l.
    if (threadIdx.x < 32) {
      const int top = kDigits - 1 - 8 * static_cast<int>(threadIdx.x);
      int sum = 0;
      for (int d = 0; d < 8; ++d) sum += digits[top - d];
      int above = sum;
      for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(kWarp, above, step);
        if (threadIdx.x >= step) above += before;
      }
      above -= sum;
      if (above < wanted && wanted <= above + sum) {
        int d = top;
        while (above + digits[d] < wanted) above += digits[d--];
        result[0] = d;
        result[1] = wanted - above;
      }
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(result[0]) << shift;
    wanted = result[1];
    __syncthreads();
  }
  return {prefix, wanted};
}

__global__ void __launch_bounds__(kThreads) keep_largest_kernel(const RouteParams p, const int32_t* all_offsets) {
  __shared__ int digits[kDigits];
  __shared__ int result[2];
  __shared__ int warp_sums[32];
  const int expert = blockIdx.x;
  const int32_t* segment = all_offsets + p.experts + 1 + all_offsets[expert];
  const int count = all_offsets[expert + 1] - all_offsets[expert];
  const int first_row = p.expert_offsets[expert];
  const int kept = p.expert_offsets[expert + 1] - first_row;

  Threshold threshold = {0u, count};
  if (kept < count && kept > 0) threshold = radix_select(p, segment, count, kept, digits, result);

  int rows = 0;
  int ties = 0;
  for (int begin = 0; begin < count; begin += kThreads) {
    const int i = begin + threadIdx.x;
    const int pair = i < count ? segment[i] : 0;
    const uint32_t key = i < count && kept < count ? ordered_key(p.weights[pair]) : 0u;
    const bool tie = i < count && key == threshold.key;
    int tile_ties;
    const int tie_rank = ties + block_exclusive_sum(tie, warp_sums, tile_ties);
    const bool keep = i < count && kept > 0 && (key > threshold.key || (tie && tie_rank < threshold.ties));
    int tile_rows;
    const int row = first_row + rows + block_exclusive_sum(keep, warp_sums, tile_rows);
    if (i < count) p.token_row[pair] = keep ? row : -1;
    if (keep) {
      p.row_pair[row] = pair;
      p.row_token[row] = static_cast<int32_t>(static_cast<uint32_t>(pair) / p.choices);
    }
    ties += tile_ties;
    rows += tile_rows;
  }
}

}  // namespace

void launch_keep_largest(const RouteParams& p, const int32_t* all_offsets, cudaStream_t stream) {
  keep_largest_kernel<<<p.experts, kThreads, 0, stream>>>(p, all_offsets);
  check_launch("route: keep largest");
}

}  // namespace ling::route
