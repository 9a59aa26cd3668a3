// Values of the gate's losses: one pass over the logits. With p a token's probabilities (softmax, or sigmoid
// scores over their sum + 1e-20), g its row of slopes and sums over the tokens that are not masked:
//   sum_t <balance, p_t>,  sum_t <sequence_balance of t's sequence, p_t>,  sum_t logsumexp(z_t)^2
// Each block adds up its tokens and leaves three partial sums; another kernel adds those up in fixed order.
#include <algorithm>

#include "dispatch.cuh"
#include "ling/gate.h"
#include "ling/launch.h"
#include "row.cuh"

namespace ling {
namespace gate {
namespace {

constexpr int kWarps = 8;
constexpr int kMostChunks = 4;

struct Vectors {
  bool logits;
  bool balance;
  bool sequence_balance;
};

// The lane's part of the dot product of q and a row of slopes.
template <int L, int C>
__device__ float dot_row(const float (&q)[4 * C], const float* slopes, int64_t offset, int experts, bool vector,
                         float* row, int lane) {
  float slope[4 * C];
  load_row<L, C>(slope, slopes, DType::kFloat32, offset, experts, vector, 0.0f, row, lane);
  float dot = 0.0f;
#pragma unroll
  for (int v = 0; v < 4 * C; ++v) dot = fmaf(slope[v], q[v], dot);
  return dot;
}

// Partial sums of the block's tokens: one of three, in lane order and then in warp order.
__device__ inline void store_partial(float value, float* out, float* scratch) {
  value = group_sum<32>(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = scratch[0];
    for (int warp = 1; warp < kWarps; ++warp) sum += scratch[warp];
    *out = sum;
  }
  __syncthreads();
}

template <int L, int C>
__global__ void __launch_bounds__(kWarps * 32, C <= 4 ? 4 : 2)
    gate_losses_kernel(const GateLossesParams p, const Vectors vectors) {
  constexpr int V = 4 * C;
  constexpr int kTokens = kWarps * 32 / L;
  __shared__ __align__(16) float rows[kWarps * 32 * V];
  __shared__ float scratch[kWarps];
  allow_next();
  wait_for_previous();
  const int lane = threadIdx.x % L;
  float* row = rows + threadIdx.x / L * L * V;
  const bool balanced = p.balance != nullptr || p.sequence_balance != nullptr;
  float balance = 0.0f;
  float sequence_balance = 0.0f;
  float squares = 0.0f;
  // Lanes past the last token repeat it and add nothing: every lane takes part in the warp's steps.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens; first < p.tokens;
       first += static_cast<int64_t>(gridDim.x) * kTokens) {
    const int64_t place = first + threadIdx.x / L;
    const int64_t token = min(place, p.tokens - 1);
    const bool live = place < p.tokens && (p.token_mask == nullptr || p.token_mask[token]);
    float q[V];
    load_row<L, C>(q, p.logits, p.dtype, token * p.row_stride, p.experts, vectors.logits, -INFINITY, row, lane);
    float factor = 1.0f;
    if (p.squares || !p.sigmoid) {
      float softmax_values[V];
      const Softmax softmax = softmax_row<L>(q, softmax_values);
      const float lse = softmax.largest + logf(softmax.sum);
      if (live && lane == 0 && p.squares) squares = fmaf(lse, lse, squares);
      if (!p.sigmoid) {
#pragma unroll
        for (int v = 0; v < V; ++v) q[v] = softmax_values[v];
      }
    }
    if (!balanced) continue;
    if (p.sigmoid) {
      mask_pads<L>(q, p.experts, lane);
      sigmoid_row<L, C>(q, row, lane);
      mask_pads<L>(q, p.experts, lane);
      float sum = 0.0f;
#pragma unroll
      for (int v = 0; v < V; ++v) sum += q[v];
      factor = 1.0f / (group_sum<L>(sum) + kRenormalizeEpsilon);
    }
    if (p.balance != nullptr) {
      const float dot = dot_row<L, C>(q, p.balance, 0, p.experts, vectors.balance, row, lane);
      if (live) balance = fmaf(dot, factor, balance);
    }
    if (p.sequence_balance != nullptr) {
      const int64_t sequence = min(token / p.sequence_length, p.sequences - 1);
      const float dot =
          dot_row<L, C>(q, p.sequence_balance, sequence * p.experts, p.experts, vectors.sequence_balance, row, lane);
      if (live) sequence_balance = fmaf(dot, factor, sequence_balance);
    }
  }
  float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * kGateLosses;
  store_partial(balance, partial, scratch);
  store_partial(sequence_balance, partial + 1, scratch);
  store_partial(squares, partial + 2, scratch);
}

// One warp per loss: partial sums in lane order, in float64.
__global__ void sum_partials_kernel(const float* partial, const int blocks, float* sums) {
  wait_for_previous();
  const int loss = threadIdx.x / 32;
  double sum = 0.0;
  for (int block = threadIdx.x % 32; block < blocks; block += 32) sum += partial[block * kGateLosses + loss];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kWarp, sum, step);
  if (threadIdx.x % 32 == 0) sums[loss] = static_cast<float>(sum);
}

}  // namespace
}  // namespace gate

void launch_gate_losses(const GateLossesParams& p, cudaStream_t stream) {
  require(p.experts >= 1 && p.experts <= kMaxGateExperts, "gate losses: E must be in [1, 1024]");
  require(p.sequence_balance == nullptr || p.tokens == 0 || (p.sequence_length > 0 && p.sequences > 0),
          "gate losses: sequence_balance needs a sequence length and a row");
  const gate::Vectors vectors = {gate::rows_of_four(p.logits, p.dtype, p.row_stride, p.experts),
                                 gate::rows_of_four(p.balance, DType::kFloat32, p.experts, p.experts),
                                 gate::rows_of_four(p.sequence_balance, DType::kFloat32, p.experts, p.experts)};
  unsigned blocks = 0;
  gate::dispatch_layout(p.experts, 1, gate::kMostChunks, [&]<typename Shape>(Shape) {
    constexpr int L = Shape::kLanes;
    constexpr int kTokens = gate::kWarps * 32 / L;
    blocks = static_cast<unsigned>(
        std::min<int64_t>(std::max<int64_t>(ceil_div<int64_t>(p.tokens, kTokens), 1), kGateLossBlocks));
    launch_kernel<gate::gate_losses_kernel<L, Shape::kChunks>>("gate losses", {blocks, gate::kWarps * 32, 0, true},
                                                               stream, p, vectors);
  });
  launch_kernel<gate::sum_partials_kernel>("gate losses: sum", {1, 32 * kGateLosses, 0, true}, stream, p.partial,
                                           static_cast<int>(blocks), p.sums);
}

}  // namespace ling
