// Epilogue of a weight gradient: stored in 16 bits, or added to an fp32 buffer, each also transposed.
#pragma once

#include "epilogue.cuh"

namespace ling::gemm {

// The same as fill_box, transposed: rows of the box are columns of the fragment.
template <class Pair>
__device__ void fill_box_transposed(uint32_t box, Pair&& pair) {
  const int lane = threadIdx.x % 32;
  const int unit = threadIdx.x % kWarpgroup / 32 * 2 + lane / 8 % 2;
  const uint32_t address = box + (lane / 16 * 8 + lane % 8) * 128 + (unit ^ lane % 8) * 16;
  CUTE_UNROLL
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int first = 4 * quarter;
    ptx::store_matrix_transposed(address + quarter * 16 * 128, pair(first), pair(first + 1), pair(first + 2),
                                 pair(first + 3));
  }
}

// Writes 64 columns of a warpgroup's fp32 fragment from accumulator `first` on into two boxes of 64 x 32.
template <class Accumulators>
__device__ void fill_wide(uint32_t left, uint32_t right, const Accumulators& accumulators, int first) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  CUTE_UNROLL
  for (int j = 0; j < 8; ++j) {
    const int unit = (j % 4 * 2 + lane % 4 / 2) ^ row % 8;
    const uint32_t address = (j < 4 ? left : right) + row * 128 + unit * 16 + lane % 2 * 8;
    ptx::store_shared(address, accumulators(first + 4 * j), accumulators(first + 4 * j + 1));
    ptx::store_shared(address + 8 * 128, accumulators(first + 4 * j + 2), accumulators(first + 4 * j + 3));
  }
}

// The same transposed: boxes of 64 columns of the fragment by 32 of its rows.
template <class Accumulators>
__device__ void fill_wide_transposed(uint32_t left, uint32_t right, const Accumulators& accumulators, int first) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x % kWarpgroup / 32;
  const uint32_t box = warp < 2 ? left : right;
  CUTE_UNROLL
  for (int i = 0; i < 32; ++i) {
    const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int column = warp % 2 * 16 + lane / 4 + i / 2 % 2 * 8;
    const uint32_t address = box + row * 128 + (column / 4 ^ row % 8) * 16 + column % 4 * 4;
    ptx::store_shared(address, accumulators(first + i));
  }
}

template <class Config, class Product, bool kAdd>
struct WeightGradTile {
  struct Params {
    CUtensorMap out;
  };
  using Element = typename Config::Element;
  static constexpr int kChunks = Config::kTileN / kBoxColumns;            // 64-column chunks of the tile
  static constexpr int kSetChunks = kAdd ? 1 : kStagingBoxes;             // chunks that fill a set of boxes
  static constexpr int kBoxWidth = kAdd ? kBoxColumns / 2 : kBoxColumns;  // elements in 128 bytes

  __device__ WeightGradTile(const Params& params, const Work& work, int half)
      : params_(params), work_(work), half_(half) {}

  template <class Accumulators>
  __device__ void run(Staging& staging, const Accumulators& accumulators) const {
    CUTE_UNROLL
    for (int chunk = 0; chunk < kChunks; chunk += kSetChunks) {
      staging.acquire();
      if constexpr (kAdd) {
        if constexpr (Product::kTransposed) {
          fill_wide_transposed(staging.box(0), staging.box(1), accumulators, 32 * chunk);
        } else {
          fill_wide(staging.box(0), staging.box(1), accumulators, 32 * chunk);
        }
      } else {
        CUTE_UNROLL
        for (int i = 0; i < kSetChunks; ++i) {
          if constexpr (Product::kTransposed) {
            fill_box_transposed(staging.box(i), rounded<Element>(accumulators, chunk + i));
          } else {
            fill_box(staging.box(i), rounded<Element>(accumulators, chunk + i));
          }
        }
      }
      staging.commit([&] { store(staging, chunk); });
    }
  }

 private:
  // The boxes of a set: neighbours along the tile's columns, or, of a transposed fp32 tile, along its rows.
  __device__ void store(const Staging& staging, int chunk) const {
    CUTE_UNROLL
    for (int i = 0; i < kStagingBoxes; ++i) {
      const int row = half_ * kHalfRows + (kAdd && Product::kTransposed ? i * kBoxWidth : 0);
      const int column = chunk * kBoxColumns + (kAdd && Product::kTransposed ? 0 : i * kBoxWidth);
      if (work_.row + row >= work_.row_end || work_.column + column >= work_.columns) continue;
      const OutputBox at = Product::output_box(work_, row, column);
      if constexpr (kAdd) {
        ptx::add_3d(&params_.out, staging.box(i), at.x, at.y, at.z);
      } else {
        ptx::store_3d(&params_.out, staging.box(i), at.x, at.y, at.z);
      }
    }
  }

  const Params& params_;
  const Work& work_;
  int half_;
};

template <class Config, class Product>
using StoreWeightGrad = WeightGradTile<Config, Product, false>;
template <class Config, class Product>
using AddWeightGrad = WeightGradTile<Config, Product, true>;

}  // namespace ling::gemm
