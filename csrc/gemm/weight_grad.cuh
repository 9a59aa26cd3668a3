// out[e] = dy[rows of e]^T . x[rows of e], for one element type; one of the two may be gathered.
#pragma once

#include "launch.cuh"
#include "ling/gemm.h"
#include "tile_shape.h"
#include "weight_grad_store.cuh"

namespace ling::gemm {

// What all weight gradients share: out[e] is [m, n], or [n, m] where the product is transposed.
template <class Config, template <class> class Product, template <class, class> class Epilogue>
void launch_weight_grad(KernelParams<Epilogue<Config, Product<Config>>>& params, const int32_t* offsets,
                        int32_t* counter, int64_t rows, int64_t experts, int64_t m, int64_t n, cudaStream_t stream) {
  const int64_t m_tiles = ceil_div<int64_t>(m, Config::kRowTile);
  const int64_t n_tiles = ceil_div<int64_t>(n, Config::kPartN);
  params.schedule = {offsets,
                     counter,
                     checked_int(experts, "experts"),
                     checked_int(rows, "rows"),
                     0,
                     checked_int(m_tiles, "columns"),
                     checked_int(n_tiles, "columns"),
                     kSweep,
                     checked_int(std::min(2 * rows / experts, rows), "rows")};
  params.extents = {checked_int(m, "columns"), checked_int(n, "columns")};
  checked_int(experts * m_tiles * n_tiles, "the number of tiles");
  launch_kernel<Config, Product, Epilogue>(params, experts * m_tiles * n_tiles, stream);
}

template <class Config>
void run_weight_grad(const GroupedWeightGradParams& p, cudaStream_t stream) {
  KernelParams<StoreWeightGrad<Config, RowContraction<Config>>> params{};
  params.a = make_ragged_map(p.dtype, p.dy, p.rows, p.columns, p.dy_stride);
  params.b = make_ragged_map(p.dtype, p.x, p.rows, p.contraction, p.x_stride);
  params.epilogue.out = make_weight_map(p.dtype, p.out, p.experts, p.columns, p.contraction, kHalfRows);
  params.zeroed[0] = {p.out, p.columns * p.contraction};
  launch_weight_grad<Config, RowContraction, StoreWeightGrad>(params, p.offsets, p.counter, p.rows, p.experts,
                                                              p.columns, p.contraction, stream);
}

template <class Element>
void grouped_weight_grad(const GroupedWeightGradParams& p, cudaStream_t stream) {
  if (choose_weight_grad_tile(p.columns, p.contraction) == TileChoice::kPair256) {
    return run_weight_grad<Config<Element, 256, 2, Major::MN, Major::MN>>(p, stream);
  }
  run_weight_grad<Config<Element, 128, 1, Major::MN, Major::MN>>(p, stream);
}

// The gathered operand is the kernel's a, whose rows each block loads for itself; the other one comes by multicast.
template <class Config, template <class> class Product, template <class, class> class Epilogue>
void run_gathered(const MoeWeightGradParams& p, cudaStream_t stream) {
  constexpr bool adds = std::is_same_v<Epilogue<Config, Product<Config>>, AddWeightGrad<Config, Product<Config>>>;
  const int64_t columns = p.gather_x ? p.dy_columns : p.x_columns;
  KernelParams<Epilogue<Config, Product<Config>>> params{};
  params.gather = {p.gather_x ? p.x : p.dy, p.row_token, p.gather_x ? p.x_stride : p.dy_stride,
                   checked_int(p.tokens, "tokens")};
  require(p.tokens * params.gather.stride / 8 < int64_t{1} << 32, "the gathered operand is larger than 64 GiB");
  params.b = p.gather_x ? make_ragged_map(p.dtype, p.dy, p.rows, columns, p.dy_stride)
                        : make_ragged_map(p.dtype, p.x, p.rows, columns, p.x_stride);
  params.epilogue.out =
      make_weight_map(adds ? DType::kFloat32 : p.dtype, p.out, p.experts, p.dy_columns, p.x_columns, kHalfRows);
  // What is added to keeps its value where there is nothing to add.
  if (!adds) params.zeroed[0] = {p.out, p.dy_columns * p.x_columns};
  launch_weight_grad<Config, Product, Epilogue>(params, p.offsets, p.counter, p.rows, p.experts,
                                                p.gather_x ? p.x_columns : p.dy_columns, columns, stream);
}

template <class Config, template <class, class> class Epilogue>
void choose_gathered(const MoeWeightGradParams& p, cudaStream_t stream) {
  if (p.gather_x) return run_gathered<Config, TransposedRowContraction, Epilogue>(p, stream);
  run_gathered<Config, RowContraction, Epilogue>(p, stream);
}

template <class Element>
void moe_weight_grad(const MoeWeightGradParams& p, cudaStream_t stream) {
  using Pair = Config<Element, 256, 2, Major::MN, Major::MN, Rows::kGathered>;
  using Single = Config<Element, 128, 1, Major::MN, Major::MN, Rows::kGathered>;
  if (choose_weight_grad_tile(p.dy_columns, p.x_columns) == TileChoice::kPair256) {
    return p.add ? choose_gathered<Pair, AddWeightGrad>(p, stream) : choose_gathered<Pair, StoreWeightGrad>(p, stream);
  }
  return p.add ? choose_gathered<Single, AddWeightGrad>(p, stream)
               : choose_gathered<Single, StoreWeightGrad>(p, stream);
}

extern template void grouped_weight_grad<cute::bfloat16_t>(const GroupedWeightGradParams&, cudaStream_t);
extern template void grouped_weight_grad<cute::half_t>(const GroupedWeightGradParams&, cudaStream_t);
extern template void moe_weight_grad<cute::bfloat16_t>(const MoeWeightGradParams&, cudaStream_t);
extern template void moe_weight_grad<cute::half_t>(const MoeWeightGradParams&, cudaStream_t);

}  // namespace ling::gemm
