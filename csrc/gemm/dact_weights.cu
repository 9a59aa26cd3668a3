// The last step of the activation's backward: each row's partial sums, one per kDactSumColumns columns, become the
// gradient of its pair's routing weight.
#include "ling/gemm.h"
#include "tile_shape.h"

namespace ling {
namespace {

constexpr int kBlock = 256;

__global__ void sum_partials(const MoeDactParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= p.rows || row >= p.offsets[p.experts]) return;
  const int64_t pair = p.row_pair[row];
  if (pair < 0 || pair >= p.pairs) return;
  float sum = 0.0f;
  for (int64_t i = 0; i < ceil_div<int64_t>(p.columns, gemm::kDactSumColumns); ++i) sum += p.partial[i * p.rows + row];
  p.grad_weights[pair] = sum;
}

}  // namespace

int64_t dact_partials(int64_t columns) { return ceil_div<int64_t>(columns, gemm::kDactSumColumns); }

namespace gemm {
void sum_dact_partials(const MoeDactParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.rows, kBlock);
  sum_partials<<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(p);
  check_launch("sum_partials");
}
}  // namespace gemm
}  // namespace ling
