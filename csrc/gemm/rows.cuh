// out[rows of e] = a[rows of e] . b[e]^T, for one element type.
#pragma once

#include "launch.cuh"
#include "ling/gemm.h"
#include "tile_shape.h"

namespace ling::gemm {

template <class Config>
void run_rows(const GroupedGemmParams& p, cudaStream_t stream) {
  const int64_t n_tiles = ceil_div<int64_t>(p.columns, Config::kPartN);
  KernelParams<StoreTile<Config, RowProduct<Config>>> params{};
  params.a = make_ragged_map(p.dtype, p.a, p.rows, p.contraction, p.a_stride);
  params.b = Config::kMajorB == Major::K
                 ? make_weight_parts_map(p.dtype, p.b, p.experts, 1, p.columns, p.contraction, Config::kBoxN)
                 : make_weight_map(p.dtype, p.b, p.experts, p.contraction, p.columns, kTileK);
  params.epilogue.out = make_ragged_map(p.dtype, p.out, p.rows, p.columns, p.columns);
  params.schedule = row_schedule<Config>(p.offsets, p.counter, p.rows, p.experts, n_tiles);
  params.extents = {checked_int(p.columns, "columns"), checked_int(p.contraction, "contraction")};
  params.zeroed[0] = {p.out, p.columns};
  params.weights_first = p.counter_is_zero;
  launch_kernel<Config, RowProduct, StoreTile>(params, row_tiles<Config>(p.rows, p.experts, n_tiles), stream,
                                               p.counter_is_zero);
}

template <class Element, Major kMajorB>
void choose_rows(const GroupedGemmParams& p, cudaStream_t stream) {
  switch (choose_row_tile(p.rows, p.columns, p.contraction, p.experts)) {
    case TileChoice::kPair256: return run_rows<Config<Element, 256, 2, Major::K, kMajorB>>(p, stream);
    case TileChoice::kSingle256: return run_rows<Config<Element, 256, 1, Major::K, kMajorB>>(p, stream);
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
