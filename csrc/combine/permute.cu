// Rows in expert order. A block copies one token to all its rows, so that x is read once.
#include "ling/permute.h"

#include "vector.cuh"

namespace ling {
namespace combine {
namespace {

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads) permute_by_token_kernel(const PermuteParams p, const int64_t columns) {
  const int64_t token = blockIdx.x;
  const Vector<T, N>* source = row_of<T, N>(p.x, token, columns);
  const int32_t* targets = p.token_row + token * p.choices;
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
    const Vector<T, N> value = source[c];
#pragma unroll 8
    for (int k = 0; k < p.choices; ++k) {
      const uint32_t row = targets[k];
      if (row < p.pairs) store_streaming(row_of<T, N>(p.rows, row, columns) + c, value);
    }
  }
  zero_rows<T, N>(p.rows, *p.num_rows, p.pairs, columns);
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads) permute_by_row_kernel(const PermuteParams p, const int64_t columns) {
  const int64_t row = blockIdx.x;
  const uint32_t token = p.row_token[row];
  const bool present = row < *p.num_rows && token < p.tokens;
  const Vector<T, N>* source = row_of<T, N>(p.x, present ? token : 0, columns);
  Vector<T, N>* target = row_of<T, N>(p.rows, row, columns);
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) target[c] = present ? source[c] : zeros<T, N>();
}

}  // namespace
}  // namespace combine

void launch_permute(const PermuteParams& p, cudaStream_t stream) {
  if (p.pairs == 0 || p.hidden == 0) return;
  const bool aligned = combine::aligned(p.x) && combine::aligned(p.rows);
  combine::dispatch(p.dtype, p.hidden, aligned, "permute", [&]<typename Kind>(Kind) {
    using T = typename Kind::Element;
    constexpr int N = Kind::kWidth;
    const int64_t columns = p.hidden / N;
    const int threads = combine::threads_for(columns);
    const auto grid = static_cast<unsigned>(p.token_row != nullptr ? p.tokens : p.pairs);
    if (p.token_row != nullptr) {
      combine::permute_by_token_kernel<T, N><<<grid, threads, 0, stream>>>(p, columns);
    } else {
      combine::permute_by_row_kernel<T, N><<<grid, threads, 0, stream>>>(p, columns);
    }
  });
  check_launch("permute");
}

}  // namespace ling
