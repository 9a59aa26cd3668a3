// The weighted sum of a token's rows. A block walks one token; eight rows are in flight per thread.
#include "ling/launch.h"
#include "ling/permute.h"

#include "vector.cuh"

namespace ling {
namespace combine {
namespace {

constexpr int kBatch = 8;

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads) combine_kernel(const CombineParams p, const int64_t columns) {
  wait_for_previous();
  const int64_t token = blockIdx.x;
  const int32_t* sources = p.token_row + token * p.choices;
  const float* weights = p.weights == nullptr ? nullptr : p.weights + token * p.choices;

  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
    float sum[N] = {};
    if (p.residual != nullptr) {
      unpack(row_of<T, N>(p.residual, token, columns)[c], sum);
    }
    for (int first = 0; first < p.choices; first += kBatch) {
      Vector<T, N> batch[kBatch];
      bool present[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const uint32_t row = first + k < p.choices ? sources[first + k] : ~0u;
        present[k] = row < p.num_rows;
        if (present[k]) batch[k] = row_of<T, N>(p.rows, row, columns)[c];
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (!present[k]) continue;
        const float weight = weights == nullptr ? 1.0f : weights[first + k];
        float row[N];
        unpack(batch[k], row);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = fmaf(weight, row[i], sum[i]);
      }
    }
    row_of<T, N>(p.out, token, columns)[c] = pack<T, N>(sum);
  }
}

}  // namespace
}  // namespace combine

void launch_combine(const CombineParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.hidden == 0) return;
  const bool aligned = combine::aligned(p.rows) && combine::aligned(p.residual) && combine::aligned(p.out);
  combine::dispatch(p.dtype, p.hidden, aligned, "combine", [&]<typename Kind>(Kind) {
    const int64_t columns = p.hidden / Kind::kWidth;
    LaunchShape shape = {static_cast<unsigned>(p.tokens), static_cast<unsigned>(combine::threads_for(columns))};
    shape.overlap = true;
    launch_kernel<combine::combine_kernel<typename Kind::Element, Kind::kWidth>>("combine", shape, stream, p, columns);
  });
}

}  // namespace ling
