// Which tile comes next: every warp walks the tiles of all experts, in expert order, with offsets read on the device.
#pragma once

#include <cstdint>

#include "ling/common.h"

namespace ling::gemm {

struct Schedule {
  const int32_t* offsets;  // [experts + 1]
  int experts;
  int rows;                // M, the clamp of every offset
  int row_tile;            // rows of a cluster's tile; 0 where rows are the contraction
  int m_tiles;             // tiles of an expert along M where rows are the contraction
  int n_tiles;             // tiles of an expert along N
  int group;               // m-tiles that share the n-tiles of one sweep, so that a wave of tiles is about square
};

// A cluster's tile: tile (m, n) of an expert that owns rows row_begin .. row_end.
struct Tile {
  int expert;
  int row_begin;
  int row_end;
  int m;
  int n;
};

// Lane l of the warp holds expert `first_expert_ + l`, so that finding a tile costs a ballot, and moving on costs a
// scan over the next 32 experts. All lanes call every function together.
class Scheduler {
 public:
  __device__ Scheduler(const Schedule& schedule, int first, int step)
      : schedule_(schedule), lane_(threadIdx.x % 32), next_(first), step_(step) {
    row_end_ = clamp_row(schedule_.offsets[0]);
    first_row_ = row_end_;
    load_experts();
  }

  __device__ bool next(Tile& tile) {
    while (next_ >= first_tile_ + shfl(last_, 31)) {
      if (first_expert_ + 32 >= schedule_.experts) return false;
      first_tile_ += shfl(last_, 31);
      first_expert_ += 32;
      load_experts();
    }
    const int local = next_ - first_tile_;
    const int owner = __popc(__ballot_sync(~0u, last_ <= local));
    const int before = owner == 0 ? 0 : shfl(last_, owner - 1);
    tile.expert = first_expert_ + owner;
    tile.row_begin = shfl(begin_, owner);
    tile.row_end = shfl(end_, owner);
    place(tile, local - before);
    next_ += step_;
    return true;
  }

  // Rows that belong to no expert: [0, first_row) and [end_row, M). Valid once next() has returned false.
  __device__ int first_row() const { return first_row_; }
  __device__ int end_row() const { return row_end_; }

 private:
  __device__ static int shfl(int value, int lane) { return __shfl_sync(~0u, value, lane); }
  __device__ int clamp_row(int row) const { return min(max(row, 0), schedule_.rows); }

  __device__ int tiles_of(int rows) const {
    return (schedule_.row_tile == 0 ? schedule_.m_tiles : ceil_div(rows, schedule_.row_tile)) * schedule_.n_tiles;
  }

  // Scans 32 experts: the running maximum of their ends, and the running sum of their tiles.
  __device__ void load_experts() {
    const int expert = first_expert_ + lane_;
    const bool exists = expert < schedule_.experts;
    int end = max(exists ? clamp_row(schedule_.offsets[expert + 1]) : 0, row_end_);
    for (int distance = 1; distance < 32; distance *= 2) end = max(end, __shfl_up_sync(~0u, end, distance));
    const int left = __shfl_up_sync(~0u, end, 1);
    begin_ = lane_ == 0 ? row_end_ : left;
    end_ = end;
    last_ = exists ? tiles_of(end_ - begin_) : 0;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int sum = __shfl_up_sync(~0u, last_, distance);
      if (lane_ >= distance) last_ += sum;
    }
    row_end_ = shfl(end_, 31);
  }

  // Tiles run down a group of m-tiles before the next n-tile: neighbours share the weight tile.
  __device__ void place(Tile& tile, int index) const {
    const int m_tiles =
        schedule_.row_tile == 0 ? schedule_.m_tiles : ceil_div(tile.row_end - tile.row_begin, schedule_.row_tile);
    const int sweep = schedule_.group * schedule_.n_tiles;
    const int first_m = index / sweep * schedule_.group;
    const int height = min(schedule_.group, m_tiles - first_m);
    const int in_sweep = index % sweep;
    tile.m = first_m + in_sweep % height;
    tile.n = in_sweep / height;
  }

  const Schedule& schedule_;
  int lane_;
  int next_;
  int step_;
  int first_expert_ = 0;
  int first_tile_ = 0;
  int begin_ = 0;      // this lane's expert: its rows
  int end_ = 0;
  int last_ = 0;       // tiles of the lanes up to this one
  int row_end_ = 0;
  int first_row_ = 0;
};

}  // namespace ling::gemm
