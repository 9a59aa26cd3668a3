// What a block does for a tile, and how the copy engine brings its operands, for the two kinds of product.
#pragma once

#include "config.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"

namespace ling::gemm {

// A block's share of a cluster's tile.
struct Work {
  int expert;
  int row;       // first row of the output tile (rows of the batch, or rows of a weight gradient)
  int row_end;   // end of the output's rows: of the expert, or of the weight gradient
  int halves;    // 64-row halves to compute, 0 .. 2
  int column;    // first column of the output tile
  int k_begin;   // start and end of the contraction
  int k_end;
  __device__ int k_blocks() const { return ceil_div(k_end - k_begin, kTileK); }
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

// Sizes that both kinds read.
struct Extents {
  int columns;      // N
  int contraction;  // Kd
};

// out[rows of e] = a[rows of e] . b[e]^T. The last 64-row halves of an expert are shared out over the cluster, so that
// a tail costs each block at most as many halves as it must.
template <class Config>
struct RowProduct {
  static constexpr int kClusterRows = Config::kCluster * kTileM;

  __device__ static Work work(const Tile& tile, const Extents& extents, int block) {
    Work work;
    const int first = tile.row_begin + tile.m * kClusterRows;
    const int total = min(ceil_div(tile.row_end - first, kHalfRows), Config::kCluster * kMathWarpgroups);
    const int share = ceil_div(total, Config::kCluster);
    work.expert = tile.expert;
    work.row = first + block * share * kHalfRows;
    work.row_end = tile.row_end;
    work.halves = min(share, total - block * share);
    work.column = tile.n * Config::kTileN;
    work.k_begin = 0;
    work.k_end = extents.contraction;
    return work;
  }

  __device__ static void load_a(const CUtensorMap* map, uint32_t barrier, uint32_t destination, const Work& work,
                                int k) {
    for (int half = 0; half < work.halves; ++half) {
      const RaggedRow rows = ragged_row(work.row + half * kHalfRows, work.row_end);
      ptx::load_3d(map, barrier, destination + half * kBoxBytes, k, rows.inner, rows.outer);
    }
  }

  // This block's slice of the weight tile, for every block of the cluster.
  __device__ static void load_b(const CUtensorMap* map, uint32_t barrier, uint32_t destination, const Work& work,
                                int k, int block) {
    const int slice = block * Config::kSliceN;
    if constexpr (Config::kMajorB == Major::K) {
      load_box<Config>(map, barrier, destination + slice * kTileK * 2, k, work.column + slice, work.expert);
    } else {
      CUTE_UNROLL
      for (int i = 0; i < Config::kSliceN; i += kBoxColumns) {
        load_box<Config>(map, barrier, destination + (slice + i) * kTileK * 2, work.column + slice + i, k,
                         work.expert);
      }
    }
  }

  template <class C>
  __device__ static void load_box(const CUtensorMap* map, uint32_t barrier, uint32_t destination, int x, int y,
                                  int z) {
    if constexpr (C::kCluster == 1) {
      ptx::load_3d(map, barrier, destination, x, y, z);
    } else {
      ptx::load_3d_multicast(map, barrier, destination, (1 << C::kCluster) - 1, x, y, z);
    }
  }

  // Where a 64 x 64 box of the output lies in the ragged map of the output.
  struct Box {
    int x, y, z;
  };
  __device__ static Box output_box(const Work& work, int row, int column) {
    const RaggedRow rows = ragged_row(work.row + row, work.row_end);
    return {work.column + column, rows.inner, rows.outer};
  }
};

// out[e] = a[rows of e]^T . b[rows of e]: rows are the contraction, and both operands are MN-major. Rows beyond the
// expert's last come as zeros in both, so that nothing of a neighbour, not even its NaN, enters the sum.
template <class Config>
struct RowContraction {
  static_assert(Config::kMajorA == Major::MN && Config::kMajorB == Major::MN);

  __device__ static Work work(const Tile& tile, const Extents& extents, int block) {
    Work work;
    work.expert = tile.expert;
    work.row = (tile.m * Config::kCluster + block) * kTileM;
    work.row_end = extents.columns;
    work.halves = min(max(ceil_div(extents.columns - work.row, kHalfRows), 0), kMathWarpgroups);
    work.column = tile.n * Config::kTileN;
    work.k_begin = tile.row_begin;
    work.k_end = tile.row_end;
    return work;
  }

  __device__ static void load_a(const CUtensorMap* map, uint32_t barrier, uint32_t destination, const Work& work,
                                int k) {
    const RaggedRow rows = ragged_row(k, work.k_end);
    for (int half = 0; half < work.halves; ++half) {
      ptx::load_3d(map, barrier, destination + half * kBoxBytes, work.row + half * kHalfRows, rows.inner, rows.outer);
    }
  }

  __device__ static void load_b(const CUtensorMap* map, uint32_t barrier, uint32_t destination, const Work& work,
                                int k, int block) {
    const RaggedRow rows = ragged_row(k, work.k_end);
    const int slice = block * Config::kSliceN;
    CUTE_UNROLL
    for (int i = 0; i < Config::kSliceN; i += kBoxColumns) {
      RowProduct<Config>::template load_box<Config>(map, barrier, destination + (slice + i) * kTileK * 2,
                                                    work.column + slice + i, rows.inner, rows.outer);
    }
  }

  using Box = typename RowProduct<Config>::Box;
  __device__ static Box output_box(const Work& work, int row, int column) {
    return {work.column + column, work.row + row, work.expert};
  }
};

}  // namespace ling::gemm
