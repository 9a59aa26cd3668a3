// Gate backward: one kernel. With p the softmax, s the sigmoid scores, q either of them, D the chosen
// scores' sum + 1e-20 (1 without renormalisation) and y the upstream gradient of the weights:
//   d/dq_i   a_i = scale / D * (y_i - sum_k y_k q_k / D)        for chosen experts i, else 0
//   softmax  dz_j = p_j (a_j + g_j - sum_i (a_i + g_i) p_i + z lse)
//   sigmoid  dz_j = s_j (1 - s_j) (a_j + (g_j - sum_i g_i s_i / S) / S) + z lse softmax_j,  S = sum s + 1e-20
// where g is the token's row of `balance` and z is z_scale, both 0 for a masked token.
#include "dispatch.cuh"
#include "ling/gate.h"
#include "row.cuh"

namespace ling {
namespace gate {
namespace {

constexpr int kWarps = 8;
constexpr int kMostChunks = 4;

// What lane k < K knows of the expert that it stands for.
struct Choice {
  int expert;  // -1: none
  float logit;
  float upstream;
};

__device__ inline Choice load_choice(const GateBackwardParams& p, int64_t token, int lane) {
  Choice choice = {-1, 0.0f, 0.0f};
  if (lane >= p.choices) return choice;
  const int id = p.indices[token * p.choices + lane];
  if (static_cast<unsigned>(id) < static_cast<unsigned>(p.experts)) {
    choice.expert = id;
    choice.logit = load_scalar(p.logits, p.dtype, token * p.row_stride + id);
    choice.upstream = p.grad_weights[token * p.grad_token_stride + lane * p.grad_choice_stride];
  }
  return choice;
}

// d loss / d q of the lane's choice, and the sum over choices of that times q.
struct Slope {
  float slope;
  float dot;
};

template <int L>
__device__ Slope slope_of(const GateBackwardParams& p, const Choice& choice, const Softmax& softmax) {
  float score = 0.0f;
  if (choice.expert >= 0) score = p.sigmoid ? sigmoid_one(choice.logit) : softmax_one(choice.logit, softmax);
  float own = p.scale * choice.upstream;
  if (p.renormalize && p.choices > 1) {
    const float denominator = group_sum<L>(score) + kRenormalizeEpsilon;
    own = p.scale * (choice.upstream - group_sum<L>(choice.upstream * score) / denominator) / denominator;
    if (choice.expert < 0) own = 0.0f;
  }
  Slope result = {0.0f, group_sum<L>(own * score)};
  // An expert that was chosen twice gets both slopes.
  for (int k = 0; k < p.choices; ++k) {
    const int other = __shfl_sync(kWarp, choice.expert, k, L);
    const float other_slope = __shfl_sync(kWarp, own, k, L);
    if (other == choice.expert) result.slope += other_slope;
  }
  return result;
}

template <int L, int C>
__device__ void store_row(const float (&x)[4 * C], void* base, DType dtype, int64_t offset, int experts, bool vector,
                          int lane) {
  if (vector) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int e = 4 * (c * L + lane);
      if (e >= experts) continue;
      if (dtype == DType::kFloat32) {
        *reinterpret_cast<float4*>(static_cast<float*>(base) + offset + e) =
            make_float4(x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]);
      } else if (dtype == DType::kBFloat16) {
        __nv_bfloat162 two[2] = {__floats2bfloat162_rn(x[4 * c], x[4 * c + 1]),
                                 __floats2bfloat162_rn(x[4 * c + 2], x[4 * c + 3])};
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + offset + e) = reinterpret_cast<uint2&>(two);
      } else {
        __half2 two[2] = {__floats2half2_rn(x[4 * c], x[4 * c + 1]), __floats2half2_rn(x[4 * c + 2], x[4 * c + 3])};
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + offset + e) = reinterpret_cast<uint2&>(two);
      }
    }
    return;
  }
#pragma unroll
  for (int v = 0; v < 4 * C; ++v) {
    const int e = expert_of<L>(lane, v);
    if (e >= experts) continue;
    if (dtype == DType::kFloat32) static_cast<float*>(base)[offset + e] = x[v];
    if (dtype == DType::kBFloat16) static_cast<__nv_bfloat16*>(base)[offset + e] = __float2bfloat16_rn(x[v]);
    if (dtype == DType::kFloat16) static_cast<__half*>(base)[offset + e] = __float2half_rn(x[v]);
  }
}

struct Vectors {
  bool logits;
  bool balance;
  bool grad;
};

// Adds the balancing loss's gradient to `rest`; nothing for a masked token.
template <int L, int C>
__device__ void add_balance(const GateBackwardParams& p, const float (&q)[4 * C], float (&rest)[4 * C], int64_t token,
                            bool live, bool vector, float* row, int lane) {
  const int64_t sequence = min(token / p.sequence_length, p.sequences - 1);
  float balance[4 * C];
  load_row<L, C>(balance, p.balance, DType::kFloat32, sequence * p.experts, p.experts, vector, 0.0f, row, lane);
  float dot = 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < 4 * C; ++v) {
    dot = fmaf(balance[v], q[v], dot);
    sum += q[v];
  }
  dot = group_sum<L>(dot);
  const float factor = p.sigmoid ? 1.0f / (group_sum<L>(sum) + kRenormalizeEpsilon) : 1.0f;
  dot *= factor;
#pragma unroll
  for (int v = 0; v < 4 * C; ++v) {
    const float inner = p.sigmoid ? q[v] * (1.0f - q[v]) * factor : q[v];
    if (live) rest[v] = fmaf(inner, balance[v] - dot, rest[v]);
  }
}

template <int L, int C>
__global__ void __launch_bounds__(kWarps * 32, C <= 4 ? 3 : 2)
    gate_backward_kernel(const GateBackwardParams p, const Vectors vectors) {
  constexpr int V = 4 * C;
  constexpr int kTokens = 32 / L;
  __shared__ __align__(16) float rows[kWarps * 32 * V];
  const int lane = threadIdx.x % L;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kWarps * kTokens + threadIdx.x / L;
  const bool valid = place < p.tokens;
  const int64_t token = valid ? place : p.tokens - 1;
  float* row = rows + threadIdx.x / L * L * V;
  const bool live = p.token_mask == nullptr || p.token_mask[token];
  const float z_scale = p.z_scale != nullptr && live ? *p.z_scale : 0.0f;
  const Choice choice = load_choice(p, token, lane);

  // Scores q: p or s. The losses' gradient gathers in `rest`.
  float q[V];
  load_row<L, C>(q, p.logits, p.dtype, token * p.row_stride, p.experts, vectors.logits, -INFINITY, row, lane);
  float rest[V] = {};
  Softmax softmax = {};
  if (!p.sigmoid) {
    softmax = softmax_row<L>(q, q);
    if (z_scale != 0.0f) {
      const float slope = z_scale * (softmax.largest + logf(softmax.sum));
#pragma unroll
      for (int v = 0; v < V; ++v) rest[v] = q[v] * slope;
    }
  } else {
    if (p.z_scale != nullptr) {
      softmax = softmax_row<L>(q, rest);
      const float slope = z_scale * (softmax.largest + logf(softmax.sum));
#pragma unroll
      for (int v = 0; v < V; ++v) rest[v] = live ? rest[v] * slope : 0.0f;
    }
    mask_pads<L>(q, p.experts, lane);
    sigmoid_row<L, C>(q, row, lane);
    mask_pads<L>(q, p.experts, lane);
  }
  if (p.balance != nullptr) add_balance<L, C>(p, q, rest, token, live, vectors.balance, row, lane);

  // The chosen experts' slopes a, spread over the row through shared memory.
  const float zeros[V] = {};
  store_shared<L, C>(zeros, row, lane);
  const Slope chosen = slope_of<L>(p, choice, softmax);
  __syncwarp();
  if (choice.expert >= 0) row[choice.expert] = chosen.slope;
  __syncwarp();
  float slope[V];
  load_shared<L, C>(slope, row, lane);
  const float dot = p.sigmoid ? 0.0f : chosen.dot;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float inner = p.sigmoid ? q[v] * (1.0f - q[v]) : q[v];
    q[v] = fmaf(inner, slope[v] - dot, rest[v]);
  }
  if (valid) store_row<L, C>(q, p.grad_logits, p.dtype, token * p.experts, p.experts, vectors.grad, lane);
}

}  // namespace
}  // namespace gate

void launch_gate_backward(const GateBackwardParams& p, cudaStream_t stream) {
  require(p.experts >= 1 && p.experts <= kMaxGateExperts, "gate backward: E must be in [1, 1024]");
  require(p.choices >= 1 && p.choices <= kMaxGateChoices, "gate backward: K must be in [1, 32]");
  require(p.balance == nullptr || (p.sequence_length > 0 && p.sequences > 0),
          "gate backward: balance needs a sequence length and a row");
  if (p.tokens == 0) return;
  const gate::Vectors vectors = {gate::rows_of_four(p.logits, p.dtype, p.row_stride, p.experts),
                                 gate::rows_of_four(p.balance, DType::kFloat32, p.experts, p.experts),
                                 gate::rows_of_four(p.grad_logits, p.dtype, p.experts, p.experts)};
  gate::dispatch_layout(p.experts, p.choices, gate::kMostChunks, [&]<typename Shape>(Shape) {
    constexpr int L = Shape::kLanes;
    constexpr int kTokens = gate::kWarps * 32 / L;
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(p.tokens, kTokens));
    gate::gate_backward_kernel<L, Shape::kChunks><<<blocks, gate::kWarps * 32, 0, stream>>>(p, vectors);
  });
  check_launch("gate backward");
}

}  // namespace ling
