// The up projection: rows gathered while loading, both halves of a gated activation in one tile, and the activation
// in the epilogue.
#pragma once

#include "activation.cuh"
#include "launch.cuh"
#include "tile_shape.h"

namespace ling::gemm {

// Writes h, rounded, and a = activation(h), from the unrounded h. A thread holds gate and up of the same element:
// the tile's columns are kPartN of the gate, then the same ones of the up projection.
template <class Config, class Product>
struct ActivateTile {
  struct Params {
    CUtensorMap h;  // coordinates (column, part, inner, outer)
    CUtensorMap a;
    Activation activation;
    float limit;
    bool write_h;
  };
  using Element = typename Config::Element;
  static constexpr int kChunks = Config::kPartN / kBoxColumns;  // 64-column chunks of one part
  static_assert(kChunks % kStagingBoxes == 0);

  __device__ ActivateTile(const Params& params, const Work& work, int half)
      : params_(params), work_(work), half_(half) {}

  template <class Accumulators>
  __device__ void run(Staging& staging, const Accumulators& accumulators) const {
    if (params_.write_h) {
      CUTE_UNROLL
      for (int chunk = 0; chunk < Config::kParts * kChunks; chunk += kStagingBoxes) {
        store(staging, chunk, [&](int at) { return rounded<Element>(accumulators, at); });
      }
    }
    with_activation<Config::kParts == 2>(params_.activation, [&]<Activation kActivation>() {
      CUTE_UNROLL
      for (int chunk = 0; chunk < kChunks; chunk += kStagingBoxes) {
        store_activated<kActivation>(staging, chunk, accumulators);
      }
    });
  }

 private:
  // Boxes of h: `pairs(c)` gives the pairs of 64-column chunk c of the tile.
  template <class Pairs>
  __device__ void store(Staging& staging, int chunk, Pairs&& pairs) const {
    staging.acquire();
    CUTE_UNROLL
    for (int i = 0; i < kStagingBoxes; ++i) fill_box(staging.box(i), pairs(chunk + i));
    staging.commit([&] {
      CUTE_UNROLL
      for (int i = 0; i < kStagingBoxes; ++i) {
        const int part = (chunk + i) / kChunks;
        const OutputBox at = Product::output_box(work_, half_ * kHalfRows, (chunk + i) % kChunks * kBoxColumns);
        if (at.x < work_.columns) ptx::store_4d(&params_.h, staging.box(i), at.x, part, at.y, at.z);
      }
    });
  }

  template <Activation kActivation, class Accumulators>
  __device__ void store_activated(Staging& staging, int chunk, const Accumulators& accumulators) const {
    const auto value = [&](int i) {
      if constexpr (Config::kParts == 2) {
        return activate_gated<kActivation>(accumulators(i), accumulators(i + Config::kPartN / 2), params_.limit).value;
      } else {
        return activate<kActivation>(accumulators(i)).value;
      }
    };
    staging.acquire();
    CUTE_UNROLL
    for (int i = 0; i < kStagingBoxes; ++i) {
      const int first = 32 * (chunk + i);
      fill_box(staging.box(i),
               [&](int pair) { return pack<Element>(value(first + 2 * pair), value(first + 2 * pair + 1)); });
    }
    staging.commit([&] {
      CUTE_UNROLL
      for (int i = 0; i < kStagingBoxes; ++i) {
        const OutputBox at = Product::output_box(work_, half_ * kHalfRows, (chunk + i) * kBoxColumns);
        if (at.x < work_.columns) ptx::store_3d(&params_.a, staging.box(i), at.x, at.y, at.z);
      }
    });
  }

  const Params& params_;
  const Work& work_;
  int half_;
};

template <class Element, int kParts, int kCluster>
void run_up(const MoeUpParams& p, cudaStream_t stream) {
  // Without a gate the epilogue transforms every accumulator, which leaves no registers for 256 columns.
  using Config = Config<Element, kParts == 2 ? 256 : 128, kCluster, Major::K, Major::K, Rows::kGathered, kParts>;
  const int64_t n_tiles = ceil_div<int64_t>(p.columns, Config::kPartN);
  KernelParams<ActivateTile<Config, RowProduct<Config>>> params{};
  params.b = make_weight_parts_map(p.dtype, p.weight, p.experts, kParts, p.columns, p.contraction, Config::kBoxN);
  params.gather = {p.x, p.row_token, p.x_stride, checked_int(p.tokens, "tokens")};
  if (p.h != nullptr) params.epilogue.h = make_ragged_parts_map(p.dtype, p.h, p.rows, kParts, p.columns);
  params.epilogue.a = make_ragged_map(p.dtype, p.a, p.rows, p.columns, p.columns);
  params.epilogue.activation = p.activation;
  params.epilogue.limit = p.limit;
  params.epilogue.write_h = p.h != nullptr;
  params.schedule = row_schedule<Config>(p.offsets, p.counter, p.rows, p.experts, n_tiles);
  params.extents = {checked_int(p.columns, "columns"), checked_int(p.contraction, "contraction")};
  params.zeroed[0] = {p.a, p.columns};
  params.zeroed[1] = {p.h, kParts * p.columns};
  launch_kernel<Config, RowProduct, ActivateTile>(params, row_tiles<Config>(p.rows, p.experts, n_tiles), stream,
                                                  p.counter_is_zero);
}

template <class Element, int kParts>
void choose_up(const MoeUpParams& p, cudaStream_t stream) {
  if (choose_gathered_cluster(p.rows, p.experts) == 1) return run_up<Element, kParts, 1>(p, stream);
  run_up<Element, kParts, 2>(p, stream);
}

template <class Element>
void moe_up(const MoeUpParams& p, cudaStream_t stream) {
  if (is_gated(p.activation)) return choose_up<Element, 2>(p, stream);
  choose_up<Element, 1>(p, stream);
}

extern template void moe_up<cute::bfloat16_t>(const MoeUpParams&, cudaStream_t);
extern template void moe_up<cute::half_t>(const MoeUpParams&, cudaStream_t);

}  // namespace ling::gemm
