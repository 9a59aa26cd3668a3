// What is fixed at compile time about a kernel: tile, stages, layouts in shared memory, register shares.
#pragma once

#include <cute/tensor.hpp>

#include "tensor_map.h"

namespace ling::gemm {

constexpr int kWarpgroup = 128;
constexpr int kMathWarpgroups = 2;
constexpr int kThreads = kWarpgroup * (1 + kMathWarpgroups);
constexpr int kHalfRows = 64;                            // rows of one wgmma: what one math warpgroup owns
constexpr int kTileM = kHalfRows * kMathWarpgroups;      // rows of a block's tile
constexpr int kTileK = 64;                               // one swizzle row of the contraction
constexpr int kBoxBytes = kRaggedRows * kBoxColumns * 2; // a 64 x 64 box in shared memory
constexpr int kStagingBoxes = 2;                         // output boxes that a math warpgroup owns

using cute::SM90::GMMA::Major;

// A tile (M, N, K) of 128 x kTileN_ x 64 per block; kCluster_ blocks stacked along M share the N operand.
template <class Element_, int kTileN_, int kCluster_, Major kMajorA_, Major kMajorB_>
struct Config {
  using Element = Element_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kCluster = kCluster_;
  static constexpr Major kMajorA = kMajorA_;
  static constexpr Major kMajorB = kMajorB_;
  static constexpr int kStages = kTileN == 256 ? 4 : 6;
  static constexpr int kSliceN = kTileN / kCluster;      // what one block loads for the whole cluster
  // Stages by which the second math warpgroup starts a tile behind the first, so that one multiplies while the other
  // is in its epilogue.
  static constexpr int kLead = 0;

  static_assert(sizeof(Element) == 2, "operands are bf16 or fp16");
  static_assert(kTileN == 128 || kTileN == 256, "one wgmma spans the tile's columns");
  static_assert(kCluster == 1 || kCluster == 2, "a cluster shares the N operand in halves");

  // MN-major tiles are stacked along K inside a 64-wide box, as the copy engine lays them down.
  template <Major kMajor>
  using Order = std::conditional_t<kMajor == Major::MN, cute::Step<cute::_2, cute::_1, cute::_3>,
                                   cute::Step<cute::_1, cute::_2, cute::_3>>;
  template <Major kMajor>
  using Atom = cute::SM90::GMMA::Layout_SW128_Atom<Element, kMajor>;
  template <Major kMajor, int kRows>
  using Layout = decltype(cute::tile_to_shape(
      Atom<kMajor>{}, cute::Shape<cute::Int<kRows>, cute::Int<kTileK>, cute::Int<kStages>>{}, Order<kMajor>{}));
  using LayoutA = Layout<kMajorA, kTileM>;  // (BLK_M,BLK_K,PIPE)
  using LayoutB = Layout<kMajorB, kTileN>;  // (BLK_N,BLK_K,PIPE)

  using Tile = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kTileK>>;
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::_64, cute::Int<kTileN>, cute::_64>,
                                       kMajorA, kMajorB>(),
      cute::Layout<cute::Shape<cute::Int<kMathWarpgroups>, cute::_1, cute::_1>>{}));

  static constexpr int kStageBytesA = kTileM * kTileK * 2;
  static constexpr int kStageBytesB = kTileN * kTileK * 2;

  struct Shared {
    alignas(1024) Element a[cute::cosize_v<LayoutA>];
    alignas(1024) Element b[cute::cosize_v<LayoutB>];
    alignas(1024) uint8_t staging[kMathWarpgroups][kStagingBoxes][kBoxBytes];
    uint64_t full[kStages];
    uint64_t empty[kStages];
    uint64_t lead;
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "a block of sm_90 has 227 KiB");
};

}  // namespace ling::gemm
