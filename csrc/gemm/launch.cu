// The launch functions of ling/gemm.h: limits, empty products, element type.
#include "dact.cuh"
#include "rows.cuh"
#include "up.cuh"
#include "weight_grad.cuh"

namespace ling {
namespace gemm {
void sum_dact_partials(const MoeDactParams& params, cudaStream_t stream);
}
namespace {

void require_aligned(const void* pointer, const char* what) {
  require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, what, " is not 16-byte aligned");
}

void require_sizes(int64_t columns, int64_t contraction, DType dtype) {
  require(columns % 8 == 0 && contraction % 8 == 0, "columns and contraction must be multiples of 8");
  require(dtype == DType::kBFloat16 || dtype == DType::kFloat16, "the GEMM kernels take bfloat16 and float16");
}

}  // namespace

void launch_grouped_gemm(const GroupedGemmParams& p, cudaStream_t stream) {
  require_sizes(p.columns, p.contraction, p.dtype);
  if (p.rows == 0 || p.columns == 0) return;
  if (p.contraction == 0 || p.experts == 0) {
    check(cudaMemsetAsync(p.out, 0, p.rows * p.columns * size_of(p.dtype), stream), "zeroing an empty product");
    return;
  }
  require_aligned(p.a, "a");
  require_aligned(p.b, "b");
  require_aligned(p.out, "out");
  require(p.a_stride % 8 == 0, "the row stride of a must be a multiple of 8");
  p.dtype == DType::kBFloat16 ? gemm::grouped_gemm<cute::bfloat16_t>(p, stream)
                              : gemm::grouped_gemm<cute::half_t>(p, stream);
}

void launch_grouped_weight_grad(const GroupedWeightGradParams& p, cudaStream_t stream) {
  require_sizes(p.columns, p.contraction, p.dtype);
  if (p.experts == 0 || p.columns == 0 || p.contraction == 0) return;
  if (p.rows == 0) {
    const int64_t bytes = p.experts * p.columns * p.contraction * size_of(p.dtype);
    check(cudaMemsetAsync(p.out, 0, bytes, stream), "zeroing an empty weight gradient");
    return;
  }
  require_aligned(p.dy, "dy");
  require_aligned(p.x, "x");
  require_aligned(p.out, "out");
  require(p.dy_stride % 8 == 0 && p.x_stride % 8 == 0, "the row strides of dy and x must be multiples of 8");
  p.dtype == DType::kBFloat16 ? gemm::grouped_weight_grad<cute::bfloat16_t>(p, stream)
                              : gemm::grouped_weight_grad<cute::half_t>(p, stream);
}

void launch_moe_weight_grad(const MoeWeightGradParams& p, cudaStream_t stream) {
  require_sizes(p.dy_columns, p.x_columns, p.dtype);
  if (p.experts == 0 || p.dy_columns == 0 || p.x_columns == 0) return;
  if (p.rows == 0) {
    if (p.add) return;
    const int64_t bytes = p.experts * p.dy_columns * p.x_columns * size_of(p.dtype);
    check(cudaMemsetAsync(p.out, 0, bytes, stream), "zeroing an empty weight gradient");
    return;
  }
  require_aligned(p.dy, "dy");
  require_aligned(p.x, "x");
  require_aligned(p.out, "out");
  require(p.dy_stride % 8 == 0 && p.x_stride % 8 == 0, "the row strides of dy and x must be multiples of 8");
  p.dtype == DType::kBFloat16 ? gemm::moe_weight_grad<cute::bfloat16_t>(p, stream)
                              : gemm::moe_weight_grad<cute::half_t>(p, stream);
}

void launch_moe_up(const MoeUpParams& p, cudaStream_t stream) {
  require_sizes(p.columns, p.contraction, p.dtype);
  require(p.contraction > 0 && p.experts > 0, "the up projection needs experts and a hidden size");
  if (p.rows == 0 || p.columns == 0) return;
  require_aligned(p.x, "x");
  require_aligned(p.weight, "the up projection");
  require(p.x_stride % 8 == 0, "the row stride of x must be a multiple of 8");
  p.dtype == DType::kBFloat16 ? gemm::moe_up<cute::bfloat16_t>(p, stream) : gemm::moe_up<cute::half_t>(p, stream);
}

void launch_moe_dact(const MoeDactParams& p, cudaStream_t stream) {
  require_sizes(p.columns, p.contraction, p.dtype);
  require(p.contraction > 0 && p.experts > 0, "the down projection needs experts and a hidden size");
  check(cudaMemsetAsync(p.grad_weights, 0, p.pairs * sizeof(float), stream), "zeroing the weights' gradient");
  if (p.rows == 0 || p.columns == 0) return;
  require_aligned(p.dout, "dout");
  require_aligned(p.weight, "the down projection");
  require_aligned(p.h, "h");
  require(p.dout_stride % 8 == 0, "the row stride of dout must be a multiple of 8");
  p.dtype == DType::kBFloat16 ? gemm::moe_dact<cute::bfloat16_t>(p, stream) : gemm::moe_dact<cute::half_t>(p, stream);
  gemm::sum_dact_partials(p, stream);
}

}  // namespace ling
