// Which tile comes next. A counter in global memory hands tile numbers out in order; the first block of a cluster finds
// the tile from the expert offsets, which are read on the device, and passes it to all warps of the cluster.
//
// Clusters take tiles when they are ready for them, not by a fixed stride: neighbouring tiles, which share operands,
// then start at nearly the same time wherever they run, and find each other's operands in L2. (With a fixed stride the
// short tails of experts shift clusters against each other, and operands were read from memory four times.)
#pragma once

#include <cstdint>

#include "config.cuh"
#include "ptx.cuh"

namespace ling::gemm {

struct Schedule {
  const int32_t* offsets;  // [experts + 1]
  int32_t* counter;        // zero at launch
  int experts;
  int rows;                // M, the clamp of every offset
  int row_tile;            // rows of a cluster's tile; 0 where rows are the contraction
  int m_tiles;             // tiles of an expert along M where rows are the contraction
  int n_tiles;             // tiles of an expert along N
  int group;               // m-tiles that share the n-tiles of one sweep, so that a wave of tiles is about square
  int many_rows;           // experts with more rows go first, where rows are the contraction: long tiles start early
};

// A cluster's tile: tile (m, n) of an expert that owns rows row_begin .. row_end. After the last tile comes one whose
// expert is -1: its rows are those of all experts together.
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
  __device__ explicit Scheduler(const Schedule& schedule) : schedule_(schedule), lane_(threadIdx.x % 32) {
    first_row_ = clamp_row(schedule_.offsets[0]);
    row_end_ = first_row_;
    load_experts();
  }

  // Tile number `index` of all tiles. From call to call the index must not fall.
  __device__ Tile find(int index) {
    while (index >= first_tile_ + shfl(last_, 31)) {
      first_tile_ += shfl(last_, 31);
      first_expert_ += 32;
      if (first_expert_ >= schedule_.experts) {
        if (schedule_.row_tile != 0 || second_pass_) return {-1, first_row_, row_end_, 0, 0};
        second_pass_ = true;
        first_expert_ = 0;
        row_end_ = first_row_;
      }
      load_experts();
    }
    const int local = index - first_tile_;
    const int owner = __popc(__ballot_sync(~0u, last_ <= local));
    const int before = owner == 0 ? 0 : shfl(last_, owner - 1);
    Tile tile;
    tile.expert = first_expert_ + owner;
    tile.row_begin = shfl(begin_, owner);
    tile.row_end = shfl(end_, owner);
    place(tile, local - before);
    return tile;
  }

 private:
  __device__ static int shfl(int value, int lane) { return __shfl_sync(~0u, value, lane); }
  __device__ int clamp_row(int row) const { return min(max(row, 0), schedule_.rows); }

  // Where rows are the contraction, a pass takes either the experts with many rows or the others.
  __device__ int tiles_of(int rows) const {
    if (schedule_.row_tile != 0) return ceil_div(rows, schedule_.row_tile) * schedule_.n_tiles;
    return (rows > schedule_.many_rows) != second_pass_ ? schedule_.m_tiles * schedule_.n_tiles : 0;
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
  bool second_pass_ = false;
  int first_expert_ = 0;
  int first_tile_ = 0;
  int begin_ = 0;      // this lane's expert: its rows
  int end_ = 0;
  int last_ = 0;       // tiles of the lanes up to this one
  int row_end_ = 0;
  int first_row_ = 0;
};

// The tiles of one cluster: put in by its first block's first loading warp, read by all warps of all its blocks.
template <class Config>
class TileQueue {
  static constexpr int kSlotBytes = 32;
  static_assert(sizeof(Tile) <= kSlotBytes && Config::kCluster * kSlotBytes / 4 <= 32);

 public:
  __device__ explicit TileQueue(typename Config::Shared& shared)
      : tiles_(ptx::shared_address(shared.tiles)),
        full_(ptx::shared_address(shared.tile_full)),
        empty_(ptx::shared_address(shared.tile_empty)) {}

  __device__ static void initialise(typename Config::Shared& shared, int warps) {
    for (int i = 0; i < kTileSlots; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&shared.tile_full[i]), 1);
      ptx::mbarrier_init(ptx::shared_address(&shared.tile_empty[i]), Config::kCluster * warps);
    }
  }

  // By a whole warp of the first block: each lane writes one field of one block's copy.
  __device__ void publish(const Tile& tile) {
    const int slot = published_ % kTileSlots;
    while (!ptx::mbarrier_try_wait(empty_ + slot * 8, published_ / kTileSlots % 2 ^ 1)) {
    }
    const int lane = threadIdx.x % 32;
    const int field = lane % 8;
    const int value = field == 0   ? tile.expert
                      : field == 1 ? tile.row_begin
                      : field == 2 ? tile.row_end
                      : field == 3 ? tile.m
                                   : tile.n;
    if (lane / 8 < Config::kCluster) {
      ptx::store_cluster(ptx::map_to_block(tiles_ + slot * kSlotBytes + field * 4, lane / 8), value);
    }
    __syncwarp();
    if (lane < Config::kCluster) ptx::mbarrier_release_cluster(ptx::map_to_block(full_ + slot * 8, lane));
    ++published_;
  }

  // Returns when every warp of the cluster has answered for every tile.
  __device__ void drain() const {
    for (uint32_t i = published_; i < published_ + kTileSlots; ++i) {
      while (!ptx::mbarrier_try_wait(empty_ + i % kTileSlots * 8, i / kTileSlots % 2 ^ 1)) {
      }
    }
  }

  // By a whole warp of any block; every warp receives every tile.
  __device__ Tile receive() {
    const int slot = received_ % kTileSlots;
    while (!ptx::mbarrier_acquire_cluster(full_ + slot * 8, received_ / kTileSlots % 2)) {
    }
    // The shuffles make sure that the fields are in registers before the slot is given back.
    const int field = ptx::load_shared(tiles_ + slot * kSlotBytes + threadIdx.x % 8 * 4);
    const Tile tile{__shfl_sync(~0u, field, 0), __shfl_sync(~0u, field, 1), __shfl_sync(~0u, field, 2),
                    __shfl_sync(~0u, field, 3), __shfl_sync(~0u, field, 4)};
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_cluster(ptx::map_to_block(empty_ + slot * 8, 0));
    ++received_;
    return tile;
  }

 private:
  uint32_t tiles_;
  uint32_t full_;
  uint32_t empty_;
  uint32_t published_ = 0;
  uint32_t received_ = 0;
};

}  // namespace ling::gemm
