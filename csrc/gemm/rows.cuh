// out[rows of e] = a[rows of e] . b[e]^T, for one element type.
#pragma once

#include "launch.cuh"
#include "ling/gemm.h"
#include "tile_shape.h"

namespace ling::gemm {

template <class Config>
void run_rows(const GroupedGemmParams& p, cudaStream_t stream) {
  constexpr int kClusterRows = RowProduct<Config>::kClusterRows;
  const int64_t n_tiles = ceil_div<int64_t>(p.columns, Config::kTileN);
  KernelParams<StoreTile> params{};
  params.a = make_ragged_map(p.dtype, p.a, p.rows, p.contraction, p.a_stride);
  params.b = Config::kMajorB == Major::K
                 ? make_weight_map(p.dtype, p.b, p.experts, p.columns, p.contraction, Config::kSliceN)
                 : make_weight_map(p.dtype, p.b, p.experts, p.contraction, p.columns, kTileK);
  params.out = make_ragged_map(p.dtype, p.out, p.rows, p.columns, p.columns);
  params.schedule = {p.offsets, checked_int(p.experts, "experts"), checked_int(p.rows, "rows"), kClusterRows, 0,
                     checked_int(n_tiles, "columns"), kSweep};
  params.extents = {checked_int(p.columns, "columns"), checked_int(p.contraction, "contraction")};
  params.zeroed = p.out;
  params.output_columns = params.extents.columns;
  const int64_t m_tiles = p.rows / kClusterRows + std::min(p.experts, p.rows);
  checked_int(m_tiles * n_tiles, "the number of tiles");
  launch_kernel<Config, RowProduct, StoreTile>(params, m_tiles * n_tiles, stream);
}

template <class Element, Major kMajorB>
void choose_rows(const GroupedGemmParams& p, cudaStream_t stream) {
  switch (choose_row_tile(p.rows, p.columns, p.contraction, p.experts)) {
    case TileChoice::kPair256: return run_rows<Config<Element, 256, 2, Major::K, kMajorB>>(p, stream);
    case TileChoice::kSingle128: return run_rows<Config<Element, 128, 1, Major::K, kMajorB>>(p, stream);
  }
}

template <class Element>
void grouped_gemm(const GroupedGemmParams& p, cudaStream_t stream) {
  if (p.b_transposed) return choose_rows<Element, Major::MN>(p, stream);
  choose_rows<Element, Major::K>(p, stream);
}

extern template void grouped_gemm<cute::bfloat16_t>(const GroupedGemmParams&, cudaStream_t);
extern template void grouped_gemm<cute::half_t>(const GroupedGemmParams&, cudaStream_t);

}  // namespace ling::gemm
