// out[e] = dy[rows of e]^T . x[rows of e], for one element type.
#pragma once

#include "launch.cuh"
#include "ling/gemm.h"
#include "tile_shape.h"

namespace ling::gemm {

template <class Config>
void run_weight_grad(const GroupedWeightGradParams& p, cudaStream_t stream) {
  const int64_t m_tiles = ceil_div<int64_t>(p.columns, Config::kRowTile);
  const int64_t n_tiles = ceil_div<int64_t>(p.contraction, Config::kPartN);
  KernelParams<StoreTile<Config, RowContraction<Config>>> params{};
  params.a = make_ragged_map(p.dtype, p.dy, p.rows, p.columns, p.dy_stride);
  params.b = make_ragged_map(p.dtype, p.x, p.rows, p.contraction, p.x_stride);
  params.epilogue.out = make_weight_map(p.dtype, p.out, p.experts, p.columns, p.contraction, kHalfRows);
  params.schedule = {p.offsets,
                     p.counter,
                     checked_int(p.experts, "experts"),
                     checked_int(p.rows, "rows"),
                     0,
                     checked_int(m_tiles, "columns"),
                     checked_int(n_tiles, "contraction"),
                     kSweep,
                     checked_int(2 * p.rows / p.experts, "rows")};
  params.zeroed[0] = {p.out, p.columns * p.contraction};
  params.extents = {checked_int(p.columns, "columns"), checked_int(p.contraction, "contraction")};
  checked_int(p.experts * m_tiles * n_tiles, "the number of tiles");
  launch_kernel<Config, RowContraction, StoreTile>(params, p.experts * m_tiles * n_tiles, stream);
}

template <class Element>
void grouped_weight_grad(const GroupedWeightGradParams& p, cudaStream_t stream) {
  if (choose_weight_grad_tile(p.columns, p.contraction) == TileChoice::kPair256) {
    return run_weight_grad<Config<Element, 256, 2, Major::MN, Major::MN>>(p, stream);
  }
  run_weight_grad<Config<Element, 128, 1, Major::MN, Major::MN>>(p, stream);
}

extern template void grouped_weight_grad<cute::bfloat16_t>(const GroupedWeightGradParams&, cudaStream_t);
extern template void grouped_weight_grad<cute::half_t>(const GroupedWeightGradParams&, cudaStream_t);

}  // namespace ling::gemm
