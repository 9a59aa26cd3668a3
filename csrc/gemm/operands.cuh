// What a block does for a tile, and how the copy engine brings its operands, for the two kinds of product.
#pragma once

#include "config.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"

namespace ling::gemm {

// Sizes that both kinds of product read.
struct Extents {
  int columns;      // N
  int contraction;  // Kd
};

// A block's share of a cluster's tile.
struct Work {
  int expert;
  int row;      // first row of the output tile (rows of the batch, or rows of a weight gradient)
  int row_end;  // end of the output's rows: of the expert, or of the weight gradient
  int halves;   // 64-row halves to load, 0 .. 2
  int column;   // first column of the output tile
  int columns;  // end of the output's columns
  int k_begin;  // start and end of the contraction
  int k_end;
  // Whether a math warpgroup has anything to compute.
  __device__ bool active(int half) const { return half < halves && column < columns; }
};

// Coordinates of up to 64 rows from `row` on in a ragged map (see make_ragged_map); rows from `end` on are outside.
struct RaggedRow {
  int inner;
  int outer;
};
__device__ inline RaggedRow ragged_row(int row, int end) {
  const int count = min(max(end - row, 0), kRaggedRows);
  return {kRaggedRows - count, row + count};
}

// Loads a box for all blocks of a cluster.
template <int kCluster>
__device__ inline void load_shared_box(const CUtensorMap* map, uint32_t barrier, uint32_t destination, int x, int y,
                                       int z) {
  if constexpr (kCluster == 1) {
    ptx::load_3d(map, barrier, destination, x, y, z);
  } else {
    ptx::load_3d_multicast(map, barrier, destination, (1 << kCluster) - 1, x, y, z);
  }
}

template <int kCluster>
__device__ inline void load_shared_box(const CUtensorMap* map, uint32_t barrier, uint32_t destination, int x, int y,
                                       int z, int w) {
  if constexpr (kCluster == 1) {
    ptx::load_4d(map, barrier, destination, x, y, z, w);
  } else {
    ptx::load_4d_multicast(map, barrier, destination, (1 << kCluster) - 1, x, y, z, w);
  }
}

// Coordinates of a 64 x 64 box of the output.
struct OutputBox {
  int x, y, z;
};

// out[rows of e] = a[rows of e] . b[e]^T. The last 64-row halves of an expert are shared out over the cluster, so that
// a tail costs each block as few halves as it can.
template <class Config>
struct RowProduct {
  __device__ static Work work(const Tile& tile, const Extents& extents, int block) {
    Work work;
    const int first = tile.row_begin + tile.m * Config::kRowTile;
    const int total = min(ceil_div(tile.row_end - first, kHalfRows), Config::kRowTile / kHalfRows);
    const int share = ceil_div(total, Config::kCluster);
    work.expert = tile.expert;
    work.row = first + block * share * kHalfRows;
    work.row_end = tile.row_end;
    work.halves = min(share, total - block * share);
    work.column = tile.n * Config::kPartN;
    work.columns = extents.columns;
    work.k_begin = 0;
    work.k_end = extents.contraction;
    return work;
  }

  __device__ static void load_a(const CUtensorMap* map, uint32_t barrier, uint32_t destination, const Work& work,
                                int k) {
    CUTE_NO_UNROLL
    for (int half = 0; half < work.halves; ++half) {
      const RaggedRow rows = ragged_row(work.row + half * kHalfRows, work.row_end);
      ptx::load_3d(map, barrier, destination + half * kBoxBytes, k, rows.inner, rows.outer);
    }
  }

  // This block's slice of the weight tile, for all blocks of the cluster.
  __device__ static void load_b(const CUtensorMap* map, uint32_t barrier, uint32_t destination, const Work& work, int k,
                                int block) {
    const int slice = block * Config::kSliceN;
    if constexpr (Config::kMajorB == Major::K) {
      CUTE_UNROLL
      for (int i = slice; i < slice + Config::kSliceN; i += Config::kBoxN) {
        load_shared_box<Config::kCluster>(map, barrier, destination + i * kTileK * 2, k,
                                          work.column + i % Config::kPartN, i / Config::kPartN, work.expert);
      }
    } else {
      CUTE_UNROLL
      for (int i = slice; i < slice + Config::kSliceN; i += kBoxColumns) {
        load_shared_box<Config::kCluster>(map, barrier, destination + i * kTileK * 2, work.column + i, k, work.expert);
      }
    }
  }

  // In a ragged map.
  __device__ static OutputBox output_box(const Work& work, int row, int column) {
    const RaggedRow rows = ragged_row(work.row + row, work.row_end);
    return {work.column + column, rows.inner, rows.outer};
  }
};

// out[e] = a[rows of e]^T . b[rows of e]: rows are the contraction, and both operands are MN-major. Rows beyond the
// expert's last come as zeros in both, so that nothing of a neighbour, not even its NaN, enters the sum.
template <class Config>
struct RowContraction {
  static_assert(Config::kMajorA == Major::MN && Config::kMajorB == Major::MN);
  static constexpr bool kTransposed = false;

  __device__ static Work work(const Tile& tile, const Extents& extents, int block) {
    Work work;
    work.expert = tile.expert;
    work.row = tile.m * Config::kRowTile + block * kTileM;
    work.row_end = extents.columns;
    work.halves = min(max(ceil_div(extents.columns - work.row, kHalfRows), 0), kMathWarpgroups);
    work.column = tile.n * Config::kPartN;
    work.columns = extents.contraction;
    work.k_begin = tile.row_begin;
    work.k_end = tile.row_end;
    return work;
  }

  __device__ static void load_a(const CUtensorMap* map, uint32_t barrier, uint32_t destination, const Work& work,
                                int k) {
    const RaggedRow rows = ragged_row(k, work.k_end);
    CUTE_NO_UNROLL
    for (int half = 0; half < work.halves; ++half) {
      ptx::load_3d(map, barrier, destination + half * kBoxBytes, work.row + half * kHalfRows, rows.inner, rows.outer);
    }
  }

  __device__ static void load_b(const CUtensorMap* map, uint32_t barrier, uint32_t destination, const Work& work, int k,
                                int block) {
    const RaggedRow rows = ragged_row(k, work.k_end);
    const int slice = block * Config::kSliceN;
    // Instead of a box wholly outside the map's columns the last one inside is loaded; what it gives is never stored.
    // (Small products faulted until this and a change in how tiles are announced went in together: whether a ragged
    // map, whose rows overlap, can stand such a box is not known.)
    const int last = (work.columns - 1) / kBoxColumns * kBoxColumns;
    CUTE_UNROLL
    for (int i = slice; i < slice + Config::kSliceN; i += kBoxColumns) {
      load_shared_box<Config::kCluster>(map, barrier, destination + i * kTileK * 2, min(work.column + i, last),
                                        rows.inner, rows.outer);
    }
  }

  __device__ static OutputBox output_box(const Work& work, int row, int column) {
    return {work.column + column, work.row + row, work.expert};
  }
};

// The same, but out[e] is stored as its transpose: for a gathered operand, which must be a, on the output's columns.
template <class Config>
struct TransposedRowContraction : RowContraction<Config> {
  static constexpr bool kTransposed = true;

  __device__ static OutputBox output_box(const Work& work, int row, int column) {
    return {work.row + row, work.column + column, work.expert};
  }
};

}  // namespace ling::gemm
