// What is fixed at compile time about a kernel: tile, stages, layouts in shared memory, register shares.
#pragma once

#include <cute/tensor.hpp>

#include "tensor_map.h"

namespace ling::gemm {

constexpr int kWarpgroup = 128;
constexpr int kMathWarpgroups = 2;
constexpr int kThreads = kWarpgroup * (1 + kMathWarpgroups);
constexpr int kHalfRows = 64;                             // rows of one wgmma: what one math warpgroup owns
constexpr int kTileM = kHalfRows * kMathWarpgroups;       // rows of a block's tile
constexpr int kTileK = 64;                                // one swizzle row of the contraction
constexpr int kBoxBytes = kRaggedRows * kBoxColumns * 2;  // a 64 x 64 box in shared memory
constexpr int kStagingBoxes = 2;                          // output boxes that a math warpgroup fills in turns
constexpr int kTileSlots = 4;                             // tiles under way between the warps of a cluster

using cute::SM90::GMMA::Major;

// How rows reach shared memory.
enum class Rows { kContiguous, kGathered };

// Who completes a tile.
enum class Output {
  kInTurns,   // the math warpgroups, through two boxes each
  kDetached,  // other warps, under the next tile's products: the math warpgroups leave the tile in shared memory
};

// A tile (M, N, K) of 128 x kTileN_ x 64 per block. The kCluster_ blocks of a cluster are stacked along M and share
// their columns: each loads a part of them for all.
// With kParts 2, the columns of a tile are kTileN / 2 of the gate and the same ones of the up projection.
template <class Element_, int kTileN_, int kCluster_, Major kMajorA_, Major kMajorB_, Rows kRows_ = Rows::kContiguous,
          int kParts_ = 1, Output kOutput_ = Output::kInTurns, int kDetachedLoadWarps_ = 1>
struct Config {
  using Element = Element_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kCluster = kCluster_;
  static constexpr Major kMajorA = kMajorA_;
  static constexpr Major kMajorB = kMajorB_;
  static constexpr Rows kRows = kRows_;
  static constexpr int kParts = kParts_;
  static constexpr bool kDetached = kOutput_ == Output::kDetached;
  // Warps of the loading warpgroup: all copy gathered rows, or some do and the others complete the tiles.
  static constexpr int kLoadWarps = kRows != Rows::kGathered ? 1 : kDetached ? kDetachedLoadWarps_ : 4;
  static constexpr int kDetachedWarps = kDetached ? 4 - kLoadWarps : 0;
  static constexpr int kOutputBoxes = kDetached ? kTileN / kBoxColumns : kStagingBoxes;  // of a math warpgroup
  static constexpr int kStages = kTileN == 128 ? 6 : kDetached ? 3 : 4;
  // Gathered rows take longer to arrive than weights; where a tile is detached, there is room for one more stage of
  // them alone.
  static constexpr int kStagesA = kDetached && kTileN == 256 ? 4 : kStages;
  static constexpr int kSliceN = kTileN / kCluster;            // columns that one block loads for all
  static constexpr int kRowTile = kTileM * kCluster;           // rows of a cluster's tile
  static constexpr int kPartN = kTileN / kParts;               // columns of one part in a block's tile
  static constexpr int kBoxN = kSliceN < 128 ? kSliceN : 128;  // weight rows of one load, K-major

  static_assert(sizeof(Element) == 2, "operands are bf16 or fp16");
  static_assert(kTileN == 128 || kTileN == 256, "one wgmma spans the tile's columns");
  static_assert(kCluster == 1 || kCluster == 2, "two blocks share columns in halves");
  static_assert(kParts == 1 || (kParts == 2 && kTileN == 256), "a part is loaded in boxes of 128 rows");
  // Rows are the contraction where they run along K.
  static constexpr bool kContractsRows = kMajorA == Major::MN;

  // MN-major tiles are stacked along K inside a 64-wide box, as the copy engine lays them down.
  template <Major kMajor>
  using Order = std::conditional_t<kMajor == Major::MN, cute::Step<cute::_2, cute::_1, cute::_3>,
                                   cute::Step<cute::_1, cute::_2, cute::_3>>;
  template <Major kMajor>
  using Atom = cute::SM90::GMMA::Layout_SW128_Atom<Element, kMajor>;
  template <Major kMajor, int kExtent, int kDepth>
  using Layout = decltype(cute::tile_to_shape(
      Atom<kMajor>{}, cute::Shape<cute::Int<kExtent>, cute::Int<kTileK>, cute::Int<kDepth>>{}, Order<kMajor>{}));
  using LayoutA = Layout<kMajorA, kTileM, kStagesA>;  // (BLK_M,BLK_K,PIPE)
  using LayoutB = Layout<kMajorB, kTileN, kStages>;   // (BLK_N,BLK_K,PIPE)

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
    alignas(1024) uint8_t staging[kMathWarpgroups][kOutputBoxes][kBoxBytes];
    uint64_t full[kStagesA];
    uint64_t empty[kStagesA];
    uint64_t staged[kMathWarpgroups];
    uint64_t taken[kMathWarpgroups];
    uint64_t tile_full[kTileSlots];
    uint64_t tile_empty[kTileSlots];
    int tiles[kTileSlots][8];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "a block of sm_90 has 227 KiB");
};

}  // namespace ling::gemm
