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
constexpr int kMostChunks = 2;

// d loss / d q of the expert that lane k < K chose, and the sum over choices of that times q.
struct ChosenGradient {
  int expert;  // -1: none
  float slope;
  float dot;
};

template <int L>
__device__ ChosenGradient chosen_gradient(const GateBackwardParams& p, int64_t token, const Softmax& softmax, int lane) {
  ChosenGradient chosen = {-1, 0.0f, 0.0f};
  float score = 0.0f;
  float upstream = 0.0f;
  if (lane < p.choices) {
    const int id = p.indices[token * p.choices + lane];
    if (static_cast<unsigned>(id) < static_cast<unsigned>(p.experts)) {
      chosen.expert = id;
      const float logit = load_scalar(p.logits, p.dtype, token * p.row_stride + id);
      score = p.sigmoid ? sigmoid_one(logit) : softmax_one(logit, softmax);
      upstream = p.grad_weights[token * p.grad_token_stride + lane * p.grad_choice_stride];
    }
  }
  float slope = p.scale * upstream;
  if (p.renormalize && p.choices > 1) {
    const float denominator = group_sum<L>(score) + kRenormalizeEpsilon;
    slope = p.scale * (upstream - group_sum<L>(upstream * score) / denominator) / denominator;
    if (chosen.expert < 0) slope = 0.0f;
  }
  chosen.dot = group_sum<L>(slope * score);
  // An expert that was chosen twice gets both slopes.
  for (int k = 0; k < p.choices; ++k) {
    const int other = __shfl_sync(kWarp, chosen.expert, k, L);
    const float other_slope = __shfl_sync(kWarp, slope, k, L);
    if (other == chosen.expert) chosen.slope += other_slope;
  }
  return chosen;
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

template <int L, int C>
__global__ void __launch_bounds__(kWarps * 32, 1)
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

  float x[V];  // softmax: p; sigmoid: first the logits, then s
  load_row<L, C>(x, p.logits, p.dtype, token * p.row_stride, p.experts, vectors.logits, -INFINITY, lane);
  float extra[V];  // z lse softmax of sigmoid gates
  const float z_scale = p.z_scale != nullptr && live ? *p.z_scale : 0.0f;
  Softmax softmax = {};
  float z_slope = 0.0f;
  if (p.sigmoid) {
#pragma unroll
    for (int v = 0; v < V; ++v) extra[v] = 0.0f;
    if (p.z_scale != nullptr) {
      softmax = softmax_row<L>(x, extra);
      z_slope = z_scale * (softmax.largest + logf(softmax.sum));
#pragma unroll
      for (int v = 0; v < V; ++v) extra[v] = live ? extra[v] * z_slope : 0.0f;
    }
    if (p.experts < L * V) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = expert_of<L>(lane, v) < p.experts ? x[v] : 0.0f;
    }
    sigmoid(x);
    if (p.experts < L * V) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = expert_of<L>(lane, v) < p.experts ? x[v] : 0.0f;
    }
  } else {
    softmax = softmax_row<L>(x, x);
    if (p.z_scale != nullptr && live) z_slope = z_scale * (softmax.largest + logf(softmax.sum));
  }

  // The chosen experts' slopes, spread over the row through shared memory.
  const float zero[V] = {};
  store_shared<L, C>(zero, row, lane);
  const ChosenGradient chosen = chosen_gradient<L>(p, token, softmax, lane);
  __syncwarp();
  if (chosen.expert >= 0) row[chosen.expert] = chosen.slope;
  __syncwarp();
  float slope[V];
  load_shared<L, C>(slope, row, lane);

  float offset = p.sigmoid ? 0.0f : z_slope - chosen.dot;
  if (p.balance != nullptr) {
    const int64_t sequence = min(token / p.sequence_length, p.sequences - 1);
    float balance[V];
    load_row<L, C>(balance, p.balance, DType::kFloat32, sequence * p.experts, p.experts, vectors.balance, 0.0f, lane);
    float dot = 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dot = fmaf(balance[v], x[v], dot);
      sum += x[v];
    }
    dot = group_sum<L>(dot);
    const float factor = p.sigmoid ? 1.0f / (group_sum<L>(sum) + kRenormalizeEpsilon) : 1.0f;
    dot *= factor;
    if (live) {
#pragma unroll
      for (int v = 0; v < V; ++v) slope[v] = fmaf(balance[v] - dot, factor, slope[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    x[v] = p.sigmoid ? fmaf(x[v] * (1.0f - x[v]), slope[v], extra[v]) : x[v] * (slope[v] + offset);
  }
  if (valid) store_row<L, C>(x, p.grad_logits, p.dtype, token * p.experts, p.experts, vectors.grad, lane);
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
