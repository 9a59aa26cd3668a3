// The backward of down projection and activation: dout gathered while loading, h read and the activation recomputed
// in a detached epilogue, whose traffic and arithmetic run under the next tile's products.
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
template <class Element, int kParts_, int kTileN, int kCluster, int kLoadWarps>
struct DactConfig
    : Config<Element, kTileN, kCluster, Major::K, Major::MN, Rows::kGathered, 1, Output::kDetached, kLoadWarps> {
  static constexpr int kOutputParts = kParts_;
};

// With d = dout . down_proj, rounded: dh = w d activation'(h), wa = w a, and each row's parts of <d, a>.
//
// The warps take blocks of 16 rows in turns, and walk over them in chunks of 64 columns. A thread has 8 columns of
// every 4th row; eight neighbouring threads share a row, 128 bytes of every matrix.
template <class Config, class Product>
class DactTile {
  using Element = typename Config::Element;
  static constexpr int kParts = Config::kOutputParts;
  static constexpr int kUnit = 8;     // elements of 16 bytes
  static constexpr int kRowStep = 4;  // rows of a warp's access
  static constexpr int kRows = 4;     // of a thread in a block
  static constexpr int kBlock = kRowStep * kRows;
  static constexpr int kBlocks = kHalfRows / kBlock;
  static constexpr int kChunks = Config::kTileN / kBoxColumns;
  static constexpr int kSumChunks = kDactSumColumns / kBoxColumns;
  static_assert(kChunks % kSumChunks == 0);

 public:
  struct Params {
    const void* h;            // [rows, parts * columns]
    void* dh;                 // [rows, parts * columns]
    void* wa;                 // [rows, columns]
    const float* weights;     // [pairs]
    const int32_t* row_pair;  // [rows]
    float* partial;           // [dact_partials(columns), rows]
    int pairs;
    int rows;
    Activation activation;
    float limit;
  };

  __device__ DactTile(const Params& params, int warp) : params_(params), turn_(warp) {}

  // Calls `body` with what is chosen once for all tiles, as a compile-time constant.
  template <class Body>
  __device__ static void specialise(const Params& params, Body&& body) {
    with_activation<kParts == 2>(params.activation, body);
  }

  template <Activation kActivation>
  __device__ void run(Handoff<Config>& handoff, const Work& work) {
    prefetch_weights(work);
    load_chunk(work, turn_, 0);
    for (int half = 0; half < work.halves; ++half) {
      handoff.await(half);
      for (; turn_ < (half + 1) * kBlocks; turn_ += Config::kDetachedWarps) {
        load_weights(work);
        CUTE_NO_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          complete_chunk<kActivation>(handoff.box(half, chunk), work, chunk);
          if ((chunk + 1) % kSumChunks == 0) store_sums(work, chunk);
        }
      }
      handoff.release(half);
    }
    turn_ -= work.halves * kBlocks;
  }

 private:
  // Brings the rows' weights near, long before the products are done: a lane for each of 32 rows.
  __device__ void prefetch_weights(const Work& work) const {
    for (int at = work.row + threadIdx.x % 32; at < min(work.row_end, work.row + kTileM); at += 32) {
      const int pair = params_.row_pair[at];
      if (static_cast<unsigned>(pair) < static_cast<unsigned>(params_.pairs)) ptx::prefetch(params_.weights + pair);
    }
  }

  __device__ static int row(const Work& work, int block, int i) {
    return work.row + block * kBlock + i * kRowStep + threadIdx.x % 32 / 8;
  }
  __device__ static int column(const Work& work, int chunk) {
    return work.column + chunk * kBoxColumns + threadIdx.x % 8 * kUnit;
  }
  __device__ static bool inside(const Work& work, int row, int column) {
    return row < work.row_end && column < work.columns;
  }

  // What a row takes part with in dh and wa, zero for a row without a pair.
  __device__ void load_weights(const Work& work) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int at = row(work, turn_, i);
      const int pair = at < work.row_end ? params_.row_pair[at] : -1;
      weights_[i] = static_cast<unsigned>(pair) < static_cast<unsigned>(params_.pairs) ? params_.weights[pair] : 0.0f;
      sums_[i] = 0.0f;
    }
  }

  // One row of h.
  __device__ void load_row(const Work& work, int block, int chunk, int i) {
    const int at = row(work, block, i), x = column(work, chunk);
    const bool valid = inside(work, at, x) && block < work.halves * kBlocks;
    const auto* h = static_cast<const Element*>(params_.h) + static_cast<int64_t>(at) * kParts * work.columns + x;
    CUTE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      h_[i][part] = valid ? ptx::load_streamed(h + part * work.columns) : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ void load_chunk(const Work& work, int block, int chunk) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) load_row(work, block, chunk, i);
  }

  // Each row's registers are loaded for the next chunk as soon as they have been read for this one.
  template <Activation kActivation>
  __device__ void complete_chunk(uint32_t box, const Work& work, int chunk) {
    const bool last = chunk == kChunks - 1;
    const int next_block = turn_ + (last ? Config::kDetachedWarps : 0), next_chunk = last ? 0 : chunk + 1;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      uint4 h[kParts];
      CUTE_UNROLL
      for (int part = 0; part < kParts; ++part) h[part] = h_[i][part];
      load_row(work, next_block, next_chunk, i);
      const int at = turn_ % kBlocks * kBlock + i * kRowStep + threadIdx.x % 32 / 8;
      const uint4 d = ptx::load_shared_unit(box + at * 128 + (threadIdx.x % 8 ^ at % 8) * 16);
      complete_row<kActivation>(work, chunk, i, d, h);
    }
  }

  template <Activation kActivation>
  __device__ void complete_row(const Work& work, int chunk, int i, const uint4& d, uint4 (&h)[kParts]) {
    const float w = weights_[i];
    uint4 wa;
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float2 pair = unpack<Element>((&d.x)[j]);
      uint32_t& gate = (&h[0].x)[j];
      if constexpr (kParts == 2) {
        uint32_t& up = (&h[1].x)[j];
        const float2 gates = unpack<Element>(gate), ups = unpack<Element>(up);
        const Gated x = activate_gated<kActivation>(gates.x, ups.x, params_.limit);
        const Gated y = activate_gated<kActivation>(gates.y, ups.y, params_.limit);
        sums_[i] += pair.x * x.value;
        sums_[i] += pair.y * y.value;
        gate = pack<Element>(w * pair.x * x.gate_slope, w * pair.y * y.gate_slope);
        up = pack<Element>(w * pair.x * x.up_slope, w * pair.y * y.up_slope);
        (&wa.x)[j] = pack<Element>(w * x.value, w * y.value);
      } else {
        const float2 values = unpack<Element>(gate);
        const Sloped x = activate<kActivation>(values.x);
        const Sloped y = activate<kActivation>(values.y);
        sums_[i] += pair.x * x.value;
        sums_[i] += pair.y * y.value;
        gate = pack<Element>(w * pair.x * x.slope, w * pair.y * y.slope);
        (&wa.x)[j] = pack<Element>(w * x.value, w * y.value);
      }
    }
    const int at = row(work, turn_, i), x = column(work, chunk);
    if (!inside(work, at, x)) return;
    const int64_t place = static_cast<int64_t>(at) * work.columns;
    CUTE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      auto* dh = static_cast<Element*>(params_.dh) + kParts * place + part * work.columns + x;
      *reinterpret_cast<uint4*>(dh) = h[part];
    }
    *reinterpret_cast<uint4*>(static_cast<Element*>(params_.wa) + place + x) = wa;
  }

  // A row's sums over kDactSumColumns columns that end with `chunk`: its eight threads, in a fixed order.
  __device__ void store_sums(const Work& work, int chunk) {
    const int part = (work.column + chunk * kBoxColumns) / kDactSumColumns;
    float* out = params_.partial + static_cast<int64_t>(part) * params_.rows;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float sum = sums_[i];
      CUTE_UNROLL
      for (int lane = 1; lane < 8; lane *= 2) sum += __shfl_xor_sync(~0u, sum, lane);
      const int at = row(work, turn_, i);
      if (threadIdx.x % 8 == 0 && inside(work, at, part * kDactSumColumns)) out[at] = sum;
      sums_[i] = 0.0f;
    }
  }

  const Params& params_;
  int turn_;  // the tile's next block of this warp
  float weights_[kRows];
  float sums_[kRows];
  uint4 h_[kRows][kParts];
};

template <class Element, int kParts, int kTileN, int kCluster, int kLoadWarps>
void run_dact(const MoeDactParams& p, cudaStream_t stream) {
  using Config = DactConfig<Element, kParts, kTileN, kCluster, kLoadWarps>;
  const int64_t n_tiles = ceil_div<int64_t>(p.columns, Config::kTileN);
  KernelParams<DactTile<Config, RowProduct<Config>>> params{};
  params.b = make_weight_map(p.dtype, p.weight, p.experts, p.contraction, p.columns, kTileK);
  params.gather = {p.dout, p.row_token, p.dout_stride, checked_int(p.tokens, "tokens")};
  auto& epilogue = params.epilogue;
  epilogue.h = p.h;
  epilogue.dh = p.dh;
  epilogue.wa = p.wa;
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

template <class Element, int kParts, int kCluster>
void choose_wide_dact(const MoeDactParams& p, cudaStream_t stream) {
  if (choose_dact_load_warps(p.contraction) == 1) return run_dact<Element, kParts, 256, kCluster, 1>(p, stream);
  run_dact<Element, kParts, 256, kCluster, 2>(p, stream);
}

template <class Element, int kParts>
void choose_dact(const MoeDactParams& p, cudaStream_t stream) {
  if (choose_dact_columns(p.columns) == 128) return run_dact<Element, kParts, 128, 2, 1>(p, stream);
  if (choose_gathered_cluster(p.rows, p.experts) == 1) return choose_wide_dact<Element, kParts, 1>(p, stream);
  choose_wide_dact<Element, kParts, 2>(p, stream);
}

template <class Element>
void moe_dact(const MoeDactParams& p, cudaStream_t stream) {
  if (is_gated(p.activation)) return choose_dact<Element, 2>(p, stream);
  choose_dact<Element, 1>(p, stream);
}

extern template void moe_dact<cute::bfloat16_t>(const MoeDactParams&, cudaStream_t);
extern template void moe_dact<cute::half_t>(const MoeDactParams&, cudaStream_t);

}  // namespace ling::gemm
