// Which tile a product uses: a pure function of shapes, so that the first call costs what every call costs and a
// shape always takes the same path. No element's sum depends on the choice (see multiply in kernel.cuh).
#pragma once

#include <cstdint>

namespace ling::gemm {

enum class TileChoice {
  // 256 x 256 per pair of blocks: each block reads its own 128 rows and half of the weight tile, which the pair
  // shares by multicast. 32 KiB from L2 per 4.2 MFLOP, which the L2 can deliver at full tensor rate.
  kPair256,
  // 128 x 256 per block: half as much again from L2, but no block waits for another. Better where the contraction is
  // short and the epilogue weighs more than the loads (1.05 against 1.15 ms at 262144 x 2048 x 512, 256 experts; 2.56
  // against 2.62 ms at 262144 x 2048 x 1536, 128 experts).
  kSingle256,
  // 128 x 128 per block, six stages: more tiles where there are few, and less of a tile is idle where experts have
  // few rows or outputs have few columns.
  kSingle128,
};

// A pair of blocks computes in steps of 128 rows; below about that many rows per expert it would mostly idle.
constexpr int64_t kPairRows = 128;
constexpr int64_t kShortContraction = 1536;

// rows, columns and contraction as in GroupedGemmParams.
constexpr TileChoice choose_row_tile(int64_t rows, int64_t columns, int64_t contraction, int64_t experts) {
  if (rows < kPairRows * experts || columns <= 128) return TileChoice::kSingle128;
  return contraction <= kShortContraction ? TileChoice::kSingle256 : TileChoice::kPair256;
}

// Weight gradients [columns, contraction] per expert: the output decides; rows only set the length of the sums.
constexpr TileChoice choose_weight_grad_tile(int64_t columns, int64_t contraction) {
  return columns > 128 && contraction > 128 ? TileChoice::kPair256 : TileChoice::kSingle128;
}

// Columns of a tile of the activation's backward: as many as there are registers for, unless most would be idle.
constexpr int choose_dact_columns(int64_t columns) { return columns <= 128 ? 128 : 256; }

// Warps that copy gathered rows there; the rest of the four complete tiles. A long contraction copies more for each
// tile: two take 4.00 against 5.00 ms at a contraction of 4096, 1.66 against 1.39 ms at 2048.
constexpr int choose_dact_load_warps(int64_t contraction) { return contraction < 3072 ? 1 : 2; }

// Blocks that share weights where rows are gathered (the up projection, the activation's backward), 256 columns each. A
// pair's tile of 256 rows idles more at an expert's end: alone, blocks take 0.632 against 0.658 ms (up) and 0.485
// against 0.518 (backward) at 65536 rows of 256 experts, 363 against 392 us (up) at 4096 rows. With 1024 rows per
// expert they are 4 % faster by themselves, yet the whole step is 1 % slower (they read more, which takes power, is the
// guess).
constexpr int64_t kGatheredPairRows = 640;
constexpr int choose_gathered_cluster(int64_t rows, int64_t experts) {
  return rows < kGatheredPairRows * experts ? 1 : 2;
}

// Columns of one partial sum of a routing weight's gradient, whatever the tile.
constexpr int kDactSumColumns = 128;

}  // namespace ling::gemm
