// One token's row of logits in the registers of L lanes, and the arithmetic on it.
//
// A warp holds 32 / L tokens. Lane l of a token holds V = 4 * C values: value 4 * c + j is expert
// 4 * (c * L + l) + j. A token's cross-lane steps thus serve 32 / L tokens per instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "ling/common.h"

namespace ling::gate {

constexpr unsigned kWarp = 0xffffffffu;

// Expert of value v of a lane.
template <int L>
__device__ int expert_of(int lane, int v) {
  return 4 * ((v >> 2) * L + lane) + (v & 3);
}

__device__ inline float load_scalar(const void* base, DType dtype, int64_t offset) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[offset];
  if (dtype == DType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[offset]);
  return __half2float(static_cast<const __half*>(base)[offset]);
}

// Four neighbours at an address aligned to four elements.
__device__ inline float4 load_four(const void* base, DType dtype, int64_t offset) {
  if (dtype == DType::kFloat32) return *reinterpret_cast<const float4*>(static_cast<const float*>(base) + offset);
  const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(base) + offset);
  float2 low;
  float2 high;
  if (dtype == DType::kBFloat16) {
    low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.x));
    high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.y));
  } else {
    low = __half22float2(reinterpret_cast<const __half2&>(raw.x));
    high = __half22float2(reinterpret_cast<const __half2&>(raw.y));
  }
  return make_float4(low.x, low.y, high.x, high.y);
}

template <int L, int C>
__device__ void store_shared(const float (&x)[4 * C], float* row, int lane) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    reinterpret_cast<float4*>(row)[c * L + lane] = make_float4(x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]);
  }
}

template <int L, int C>
__device__ void load_shared(float (&x)[4 * C], const float* row, int lane) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const float4 four = reinterpret_cast<const float4*>(row)[c * L + lane];
    x[4 * c] = four.x;
    x[4 * c + 1] = four.y;
    x[4 * c + 2] = four.z;
    x[4 * c + 3] = four.w;
  }
}

// Calls `body(e)` for each expert e < `experts` of the lane. Rolled: for what is rare.
template <int L, int C, typename Body>
__device__ void for_own_experts(int experts, int lane, Body body) {
#pragma unroll 1
  for (int quad = lane; quad < C * L; quad += L) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (4 * quad + j < experts) body(4 * quad + j);
    }
  }
}

// Loads the lane's values of a row that starts at element `offset`; `pad` fills experts from E on.
// `vector`: E and every row start are multiples of four elements, aligned to four elements. Otherwise
// the values go by way of `row`, the token's row in shared memory.
template <int L, int C>
__device__ void load_row(float (&x)[4 * C], const void* base, DType dtype, int64_t offset, int experts, bool vector,
                         float pad, float* row, int lane) {
  const auto load_vectors = [&](auto load) {
    if (experts == 4 * C * L) {
#pragma unroll
      for (int c = 0; c < C; ++c) load(c, 4 * (c * L + lane));
    } else {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int e = 4 * (c * L + lane);
        x[4 * c] = x[4 * c + 1] = x[4 * c + 2] = x[4 * c + 3] = pad;
        if (e < experts) load(c, e);
      }
    }
  };
  const auto load_as = [&](DType type) {
    load_vectors([&](int c, int e) {
      const float4 four = load_four(base, type, offset + e);
      x[4 * c] = four.x;
      x[4 * c + 1] = four.y;
      x[4 * c + 2] = four.z;
      x[4 * c + 3] = four.w;
    });
  };
  if (!vector) {
#pragma unroll
    for (int v = 0; v < 4 * C; ++v) x[v] = pad;
    store_shared<L, C>(x, row, lane);
    for_own_experts<L, C>(experts, lane, [&](int e) { row[e] = load_scalar(base, dtype, offset + e); });
    load_shared<L, C>(x, row, lane);
  } else if (dtype == DType::kFloat32) {
    load_as(DType::kFloat32);
  } else if (dtype == DType::kBFloat16) {
    load_as(DType::kBFloat16);
  } else {
    load_as(DType::kFloat16);
  }
}

// Zeroes the values from expert E on.
template <int L, int N>
__device__ void mask_pads(float (&x)[N], int experts, int lane) {
  if (experts == L * N) return;
#pragma unroll
  for (int v = 0; v < N; ++v) x[v] = expert_of<L>(lane, v) < experts ? x[v] : 0.0f;
}

// Largest; NaN if either is NaN.
__device__ inline float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

template <int L>
__device__ float group_sum(float value) {
#pragma unroll
  for (int step = L / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step);
  return value;
}

template <int L>
__device__ float group_max_nan(float value) {
#pragma unroll
  for (int step = L / 2; step > 0; step /= 2) value = max_nan(value, __shfl_xor_sync(kWarp, value, step));
  return value;
}

template <int N>
__device__ float max_nan_of(const float* x) {
  float largest = x[0];
#pragma unroll
  for (int v = 1; v < N; ++v) largest = max_nan(largest, x[v]);
  return largest;
}

// Sum over a lane's chunks. The order of all sums over a row is by halves, chunks first, then lanes: the same
// for every number of lanes, so that a token's result does not depend on how many tokens there are.
template <int C>
__device__ float chunk_sum(float (&part)[C]) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
#pragma unroll
    for (int c = 0; c < half; ++c) {
      if (c + half < C) part[c] += part[c + half];
    }
  }
  return part[0];
}

// Nearly correctly rounded 1 / d for d in [2^-100, 2^126).
__device__ inline float reciprocal(float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return fmaf(r, fmaf(-d, r, 1.0f), r);
}

// numerator / d with r = reciprocal(d).
__device__ inline float divide(float numerator, float d, float r) {
  const float quotient = numerator * r;
  return fmaf(fmaf(-quotient, d, numerator), r, quotient);
}

__device__ inline float sigmoid_exact(float x) { return 1.0f / (1.0f + expf(-x)); }

// From here down 1 + exp(-x) may pass 2^126, where reciprocal() stops.
constexpr float kSigmoidFastLimit = -87.0f;

// The same value for one logit as sigmoid_row() gives it in any row.
__device__ inline float sigmoid_one(float x) {
  return x >= kSigmoidFastLimit ? reciprocal(1.0f + expf(-x)) : sigmoid_exact(x);
}

// `row` is the token's row in shared memory, for rows that hold very negative logits.
template <int L, int C>
__device__ void sigmoid_row(float (&x)[4 * C], float* row, int lane) {
  float least = x[0];
#pragma unroll
  for (int v = 1; v < 4 * C; ++v) least = fminf(least, x[v]);
  const bool slow = least < kSigmoidFastLimit;
  if (slow) store_shared<L, C>(x, row, lane);
#pragma unroll
  for (int v = 0; v < 4 * C; ++v) x[v] = reciprocal(1.0f + expf(-x[v]));
  if (slow) {
    for_own_experts<L, C>(4 * C * L, lane, [&](int e) { row[e] = sigmoid_one(row[e]); });
    load_shared<L, C>(x, row, lane);
  }
}

constexpr float kRenormalizeEpsilon = 1e-20f;

// A chosen score over the sum of all chosen ones.
__device__ inline float renormalized(float score, float sum) {
  const float d = sum + kRenormalizeEpsilon;
  return divide(score, d, reciprocal(d));
}

// Softmax over a row: the largest logit (NaN if one is NaN) and the sum of exp(x - largest).
struct Softmax {
  float largest;
  float sum;
};

__device__ inline float softmax_one(float x, const Softmax& softmax) {
  return divide(expf(x - softmax.largest), softmax.sum, reciprocal(softmax.sum));
}

// Leaves the probabilities in `out`; equal to softmax_one() of each value.
template <int L, int N>
__device__ Softmax softmax_row(const float (&x)[N], float (&out)[N]) {
  Softmax softmax = {group_max_nan<L>(max_nan_of<N>(x)), 0.0f};
  float part[N / 4];
#pragma unroll
  for (int c = 0; c < N / 4; ++c) {
#pragma unroll
    for (int v = 4 * c; v < 4 * c + 4; ++v) out[v] = expf(x[v] - softmax.largest);
    part[c] = (out[4 * c] + out[4 * c + 1]) + (out[4 * c + 2] + out[4 * c + 3]);
  }
  softmax.sum = group_sum<L>(chunk_sum<N / 4>(part));
  const float r = reciprocal(softmax.sum);
#pragma unroll
  for (int v = 0; v < N; ++v) out[v] = divide(out[v], softmax.sum, r);
  return softmax;
}

// Sum of exp(x - largest) over the row in shared memory.
template <int L, int C>
__device__ float exp_sum(const float* row, float largest, int lane) {
  float part[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const float4 four = reinterpret_cast<const float4*>(row)[c * L + lane];
    part[c] = (expf(four.x - largest) + expf(four.y - largest)) + (expf(four.z - largest) + expf(four.w - largest));
  }
  return group_sum<L>(chunk_sum<C>(part));
}

// Unsigned integers in the order of floats: NaN is 1, -0.0 equals +0.0; 0 is left for "no candidate".
__device__ inline uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return isnan(x) ? 1u : key;
}

__device__ inline float key_value(uint32_t key) {
  if (key <= 1u) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

}  // namespace ling::gate
