// The backward of down projection and activation: dout gathered while loading, h read and the activation recomputed
// in the epilogue.
#pragma once

#include "activation.cuh"
#include "launch.cuh"
#include "tile_shape.h"

namespace ling::gemm {

// A 32-bit word of two neighbouring elements, widened.
template <class Element>
__device__ inline float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<Element, cute::bfloat16_t>) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
}

// The tile of the backward: columns are those of a, whatever the number of parts in h.
template <class Element, int kParts_>
struct DactConfig : Config<Element, kDactTileN, 2, Major::K, Major::MN, Rows::kGathered> {
  static constexpr int kOutputParts = kParts_;
};

// With accumulators d = dout . down_proj: dh = w d activation'(h), wa = w a, and each row's part of <d, a>.
template <class Config, class Product>
struct DactTile {
  struct Params {
    CUtensorMap dh;  // coordinates (column, part, inner, outer)
    CUtensorMap wa;
    const void* h;            // [rows, parts * columns]
    const float* weights;     // [pairs]
    const int32_t* row_pair;  // [rows]
    float* partial;           // [n_tiles, rows]
    int pairs;
    int rows;
    Activation activation;
    float limit;
  };
  using Element = typename Config::Element;
  static constexpr int kWa = -1;  // destinations of a box that are not a part of dh
  static constexpr int kNone = -2;
  static constexpr int kWords = 16;  // pairs of columns that a thread has in a 64-column chunk

  // The routing weights of this thread's two rows are fetched before the products.
  __device__ DactTile(const Params& params, const Work& work, int half) : params_(params), work_(work), half_(half) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = first_row() + 8 * r;
      const int pair = row < work.row_end ? params.row_pair[row] : -1;
      weights_[r] = static_cast<unsigned>(pair) < static_cast<unsigned>(params.pairs) ? params.weights[pair] : 0.0f;
    }
  }

  template <class Accumulators>
  __device__ void run(Staging& staging, const Accumulators& accumulators) const {
    float sums[2] = {0.0f, 0.0f};
    with_activation<Config::kOutputParts == 2>(params_.activation, [&]<Activation kActivation>() {
      CUTE_UNROLL
      for (int chunk = 0; chunk < Config::kTileN / kBoxColumns; ++chunk) {
        if constexpr (is_gated(kActivation)) {
          gated_chunk<kActivation>(staging, chunk, accumulators, sums);
        } else {
          plain_chunk<kActivation>(staging, chunk, accumulators, sums);
        }
      }
    });
    store_sums(sums);
  }

 private:
  __device__ int first_row() const {
    return work_.row + half_ * kHalfRows + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  }

  // Word i of a chunk is at row 8 (i % 2), column 8 (i / 2) from this thread's first. Places outside the matrix read
  // the nearest inside: what they give is never stored.
  __device__ void load_words(uint32_t (&words)[kWords], int part, int chunk) const {
    const int stride = Config::kOutputParts * work_.columns;
    const auto* h = static_cast<const Element*>(params_.h) + part * work_.columns + 2 * (threadIdx.x % 4);
    const auto* upper = h + static_cast<int64_t>(min(first_row(), work_.row_end - 1)) * stride;
    const auto* lower = h + static_cast<int64_t>(min(first_row() + 8, work_.row_end - 1)) * stride;
    CUTE_UNROLL
    for (int i = 0; i < kWords; i += 2) {
      const int column = min(work_.column + chunk * kBoxColumns + 4 * i, work_.columns - 8);
      words[i] = ptx::load_word(upper + column);
      words[i + 1] = ptx::load_word(lower + column);
    }
  }

  template <Activation kActivation, class Accumulators>
  __device__ void gated_chunk(Staging& staging, int chunk, const Accumulators& accumulators, float (&sums)[2]) const {
    uint32_t gates[kWords], ups[kWords], values[kWords];
    staging.acquire();
    load_words(gates, 0, chunk);
    load_words(ups, 1, chunk);
    CUTE_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const float2 gate = unpack<Element>(gates[i]);
      const float2 up = unpack<Element>(ups[i]);
      const Gated x = activate_gated<kActivation>(gate.x, up.x, params_.limit);
      const Gated y = activate_gated<kActivation>(gate.y, up.y, params_.limit);
      const float d0 = accumulators(32 * chunk + 2 * i), d1 = accumulators(32 * chunk + 2 * i + 1);
      const float w = weights_[i % 2];
      sums[i % 2] += d0 * x.value + d1 * y.value;
      gates[i] = pack<Element>(w * d0 * x.gate_slope, w * d1 * y.gate_slope);
      ups[i] = pack<Element>(w * d0 * x.up_slope, w * d1 * y.up_slope);
      values[i] = pack<Element>(w * x.value, w * y.value);
      // Written as soon as it can be, so that registers are free again.
      if (i % 4 == 3) {
        fill_quarter(staging.box(0), i / 4, [&](int at) { return gates[at]; });
        fill_quarter(staging.box(1), i / 4, [&](int at) { return ups[at]; });
      }
    }
    commit(staging, chunk, 0, 1);
    staging.acquire();
    fill_box(staging.box(0), [&](int at) { return values[at]; });
    commit(staging, chunk, kWa, kNone);
  }

  template <Activation kActivation, class Accumulators>
  __device__ void plain_chunk(Staging& staging, int chunk, const Accumulators& accumulators, float (&sums)[2]) const {
    uint32_t slopes[kWords], values[kWords];
    staging.acquire();
    load_words(slopes, 0, chunk);
    CUTE_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const float2 h = unpack<Element>(slopes[i]);
      const Sloped x = activate<kActivation>(h.x);
      const Sloped y = activate<kActivation>(h.y);
      const float d0 = accumulators(32 * chunk + 2 * i), d1 = accumulators(32 * chunk + 2 * i + 1);
      const float w = weights_[i % 2];
      sums[i % 2] += d0 * x.value + d1 * y.value;
      slopes[i] = pack<Element>(w * d0 * x.slope, w * d1 * y.slope);
      values[i] = pack<Element>(w * x.value, w * y.value);
      if (i % 4 == 3) {
        fill_quarter(staging.box(0), i / 4, [&](int at) { return slopes[at]; });
        fill_quarter(staging.box(1), i / 4, [&](int at) { return values[at]; });
      }
    }
    commit(staging, chunk, 0, kWa);
  }

  // Stores the boxes of one position, each to a part of dh or to wa.
  __device__ void commit(Staging& staging, int chunk, int first, int second) const {
    staging.commit([&] {
      const OutputBox at = Product::output_box(work_, half_ * kHalfRows, chunk * kBoxColumns);
      store_box(staging.box(0), first, at);
      if (second != kNone) store_box(staging.box(1), second, at);
    });
  }

  __device__ void store_box(uint32_t box, int destination, const OutputBox& at) const {
    if (at.x >= work_.columns) return;
    if (destination == kWa) {
      ptx::store_3d(&params_.wa, box, at.x, at.y, at.z);
    } else {
      ptx::store_4d(&params_.dh, box, at.x, destination, at.y, at.z);
    }
  }

  // A row's sum over this tile's columns: the four threads that share the row, in a fixed order.
  __device__ void store_sums(float (&sums)[2]) const {
    float* out = params_.partial + static_cast<int64_t>(work_.column / Config::kTileN) * params_.rows;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      sums[r] += __shfl_xor_sync(~0u, sums[r], 1);
      sums[r] += __shfl_xor_sync(~0u, sums[r], 2);
      const int row = first_row() + 8 * r;
      if (threadIdx.x % 4 == 0 && row < work_.row_end) out[row] = sums[r];
    }
  }

  const Params& params_;
  const Work& work_;
  int half_;
  float weights_[2];
};

template <class Element, int kParts>
void run_dact(const MoeDactParams& p, cudaStream_t stream) {
  using Config = DactConfig<Element, kParts>;
  const int64_t n_tiles = ceil_div<int64_t>(p.columns, Config::kTileN);
  KernelParams<DactTile<Config, RowProduct<Config>>> params{};
  params.b = make_weight_map(p.dtype, p.weight, p.experts, p.contraction, p.columns, kTileK);
  params.gather = {p.dout, p.row_token, p.dout_stride, checked_int(p.tokens, "tokens")};
  auto& epilogue = params.epilogue;
  epilogue.dh = make_ragged_parts_map(p.dtype, p.dh, p.rows, kParts, p.columns);
  epilogue.wa = make_ragged_map(p.dtype, p.wa, p.rows, p.columns, p.columns);
  epilogue.h = p.h;
  epilogue.weights = p.weights;
  epilogue.row_pair = p.row_pair;
  epilogue.partial = p.partial;
  epilogue.pairs = checked_int(p.pairs, "pairs");
  epilogue.rows = checked_int(p.rows, "rows");
  epilogue.activation = p.activation;
  epilogue.limit = p.limit;
  params.schedule = row_schedule<Config>(p.offsets, p.counter, p.rows, p.experts, n_tiles);
  params.extents = {checked_int(p.columns, "columns"), checked_int(p.contraction, "contraction")};
  params.zeroed[0] = {p.dh, kParts * p.columns};
  params.zeroed[1] = {p.wa, p.columns};
  launch_kernel<Config, RowProduct, DactTile>(params, row_tiles<Config>(p.rows, p.experts, n_tiles), stream);
}

template <class Element>
void moe_dact(const MoeDactParams& p, cudaStream_t stream) {
  if (is_gated(p.activation)) return run_dact<Element, 2>(p, stream);
  run_dact<Element, 1>(p, stream);
}

extern template void moe_dact<cute::bfloat16_t>(const MoeDactParams&, cudaStream_t);
extern template void moe_dact<cute::half_t>(const MoeDactParams&, cudaStream_t);

}  // namespace ling::gemm
