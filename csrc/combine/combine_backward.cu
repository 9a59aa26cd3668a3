// Gradients of combine. A block reads a token's gradient once and serves all rows of the token.
#include "ling/permute.h"

#include "vector.cuh"

namespace ling {
namespace combine {
namespace {

constexpr int kBatch = 8;
constexpr int kWarps = kMaxThreads / 32;

template <int N>
__device__ float dot(const float (&a)[N], const float (&b)[N], float sum) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

template <typename T, int N>
__device__ Vector<T, N> scaled(const float (&a)[N], float factor) {
  float result[N];
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = factor * a[i];
  return pack<T, N>(result);
}

// Sums `value` over the block in a fixed order; the result is valid in thread 0.
__device__ inline float block_sum(float value, float* warp_sums) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += warp_sums[w];
  return sum;
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads, 3)
    by_token_kernel(const CombineBackwardParams p, const int64_t columns) {
  __shared__ float warp_sums[kBatch][kWarps];
  const int64_t token = blockIdx.x;
  const int warp = threadIdx.x / 32;

  for (int first = 0; first < p.choices; first += kBatch) {
    const int batch_size = min(kBatch, p.choices - first);
    float sums[kBatch] = {};
    for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
      float grad[N];
      unpack(row_of<T, N>(p.grad_out, token, columns)[c], grad);
      Vector<T, N> batch[kBatch];
      uint32_t row[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        row[k] = k < batch_size ? p.token_row[token * p.choices + first + k] : ~0u;
        if (row[k] < p.pairs) batch[k] = row_of<T, N>(p.rows, row[k], columns)[c];
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (row[k] >= p.pairs) continue;
        const float weight = p.weights == nullptr ? 1.0f : p.weights[token * p.choices + first + k];
        float values[N];
        unpack(batch[k], values);
        sums[k] = dot(grad, values, sums[k]);
        row_of<T, N>(p.grad_rows, row[k], columns)[c] = scaled<T, N>(grad, weight);
      }
    }
    // Reduce all choices of the batch with two barriers.
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], step);
      if (threadIdx.x % 32 == 0) warp_sums[k][warp] = sums[k];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < batch_size) {
      float sum = 0.0f;
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += warp_sums[threadIdx.x][w];
      p.grad_weights[token * p.choices + first + threadIdx.x] = sum;
    }
    __syncthreads();
  }
  zero_rows<T, N>(p.grad_rows, *p.num_rows, p.pairs, columns);
}

// grad_weights starts at zero, which is right for dropped pairs.
template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads) by_row_kernel(const CombineBackwardParams p, const int64_t columns) {
  __shared__ float warp_sums[kWarps];
  const int64_t row = blockIdx.x;
  const uint32_t pair = p.row_pair[row];
  Vector<T, N>* target = row_of<T, N>(p.grad_rows, row, columns);
  if (row >= *p.num_rows || pair >= p.pairs) {
    for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) target[c] = zeros<T, N>();
    return;
  }
  const float weight = p.weights == nullptr ? 1.0f : p.weights[pair];
  float sum = 0.0f;
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
    float grad[N];
    float values[N];
    unpack(row_of<T, N>(p.grad_out, pair / p.choices, columns)[c], grad);
    unpack(row_of<T, N>(p.rows, row, columns)[c], values);
    sum = dot(grad, values, sum);
    target[c] = scaled<T, N>(grad, weight);
  }
  sum = block_sum(sum, warp_sums);
  if (threadIdx.x == 0) p.grad_weights[pair] = sum;
}

}  // namespace
}  // namespace combine

void launch_combine_backward(const CombineBackwardParams& p, cudaStream_t stream) {
  if (p.pairs == 0) return;
  if (p.token_row == nullptr || p.hidden == 0) {
    check(cudaMemsetAsync(p.grad_weights, 0, p.pairs * sizeof(float), stream), "combine_backward: memset");
  }
  if (p.hidden == 0) return;
  const bool aligned = combine::aligned(p.grad_out) && combine::aligned(p.rows) && combine::aligned(p.grad_rows);
  combine::dispatch(p.dtype, p.hidden, aligned, "combine_backward", [&]<typename Kind>(Kind) {
    using T = typename Kind::Element;
    constexpr int N = Kind::kWidth;
    const int64_t columns = p.hidden / N;
    const int threads = combine::threads_for(columns);
    if (p.token_row != nullptr) {
      combine::by_token_kernel<T, N><<<static_cast<unsigned>(p.tokens), threads, 0, stream>>>(p, columns);
    } else {
      combine::by_row_kernel<T, N><<<static_cast<unsigned>(p.pairs), threads, 0, stream>>>(p, columns);
    }
  });
  check_launch("combine_backward");
}

}  // namespace ling
