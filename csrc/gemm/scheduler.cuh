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
  int rows;       // M, the clamp of every offset
  int row_tile;   // rows of a cluster's tile; 0 where rows are the contraction
  int m_tiles;    // tiles of an expert along M where rows are the contraction
  int n_tiles;    // tiles of an expert along N
  int group;      // m-tiles that share the n-tiles of one sweep, so that a wave of tiles is about square
  int many_rows;  // experts with more rows go first, where rows are the contraction: long tiles start early
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

// The rows of 32 experts at a time, one expert a lane. Offsets count as their running maximum, clamped to [0, rows].
// All lanes call every function together.
class ExpertScan {
 public:
  __device__ explicit ExpertScan(const Schedule& schedule) : schedule_(schedule) { restart(); }

  __device__ void restart() { first_row_ = last_row_ = clamp_row(schedule_.offsets[0]); }

  // The experts from `first` on, which must follow those of the last call.
  __device__ void load(int first) {
    const int lane = threadIdx.x % 32;
    exists_ = first + lane < schedule_.experts;
    end_ = max(exists_ ? clamp_row(schedule_.offsets[first + lane + 1]) : 0, last_row_);
    for (int distance = 1; distance < 32; distance *= 2) end_ = max(end_, __shfl_up_sync(~0u, end_, distance));
    const int left = __shfl_up_sync(~0u, end_, 1);
    begin_ = lane == 0 ? last_row_ : left;
    last_row_ = __shfl_sync(~0u, end_, 31);
  }

  __device__ bool exists() const { return exists_; }
  __device__ int begin() const { return begin_; }
  __device__ int end() const { return end_; }
  __device__ int first_row() const { return first_row_; }
  __device__ int last_row() const { return last_row_; }

 private:
  __device__ int clamp_row(int row) const { return min(max(row, 0), schedule_.rows); }

  const Schedule& schedule_;
  bool exists_ = false;
  int begin_ = 0;
  int end_ = 0;
  int first_row_ = 0;
  int last_row_ = 0;
};

// Finding a tile costs a ballot over 32 experts, and moving on a scan over the next 32. An expert without rows has no
// tiles: every tile has something to multiply. All lanes of a warp call every function together.
class Scheduler {
 public:
  __device__ explicit Scheduler(const Schedule& schedule) : schedule_(schedule), experts_(schedule) { load_experts(); }

  // Tile number `index` of all tiles. From call to call the index must not fall.
  __device__ Tile find(int index) {
    while (index >= first_tile_ + shfl(last_, 31)) {
      first_tile_ += shfl(last_, 31);
      first_expert_ += 32;
      if (first_expert_ >= schedule_.experts) {
        if (schedule_.row_tile != 0 || second_pass_) return {-1, experts_.first_row(), experts_.last_row(), 0, 0};
        second_pass_ = true;
        first_expert_ = 0;
        experts_.restart();
      }
      load_experts();
    }
    const int local = index - first_tile_;
    const int owner = __popc(__ballot_sync(~0u, last_ <= local));
    const int before = owner == 0 ? 0 : shfl(last_, owner - 1);
    Tile tile;
    tile.expert = first_expert_ + owner;
    tile.row_begin = shfl(experts_.begin(), owner);
    tile.row_end = shfl(experts_.end(), owner);
    place(tile, local - before);
    return tile;
  }

 private:
  __device__ static int shfl(int value, int lane) { return __shfl_sync(~0u, value, lane); }

  // Where rows are the contraction, a pass takes either the experts with many rows or the others.
  __device__ int tiles_of(int rows) const {
    if (schedule_.row_tile != 0) return ceil_div(rows, schedule_.row_tile) * schedule_.n_tiles;
    return rows > 0 && (rows > schedule_.many_rows) != second_pass_ ? schedule_.m_tiles * schedule_.n_tiles : 0;
  }

  __device__ void load_experts() {
    experts_.load(first_expert_);
    last_ = experts_.exists() ? tiles_of(experts_.end() - experts_.begin()) : 0;
    const int lane = threadIdx.x % 32;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int sum = __shfl_up_sync(~0u, last_, distance);
      if (lane >= distance) last_ += sum;
    }
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
  ExpertScan experts_;
  bool second_pass_ = false;
  int first_expert_ = 0;
  int first_tile_ = 0;
  int last_ = 0;  // tiles of the lanes up to this one
};

// The tiles of one cluster: put in by its first block's first loading warp, read by all warps of all its blocks.
template <class Config>
class TileQueue {
  static constexpr int kSlotBytes = 32;
  static_assert(sizeof(Tile) <= kSlotBytes);

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

  // By a whole warp of the first block. One lane writes and announces a block's copy, so that the announcement
  // releases that lane's own writes.
  __device__ void publish(const Tile& tile) {
    const int slot = published_ % kTileSlots;
    while (!ptx::mbarrier_try_wait(empty_ + slot * 8, published_ / kTileSlots % 2 ^ 1)) {
    }
    const int block = threadIdx.x % 32;
    if (block < Config::kCluster) {
      const uint32_t copy = ptx::map_to_block(tiles_ + slot * kSlotBytes, block);
      ptx::store_cluster(copy, tile.expert);
      ptx::store_cluster(copy + 4, tile.row_begin);
      ptx::store_cluster(copy + 8, tile.row_end);
      ptx::store_cluster(copy + 12, tile.m);
      ptx::store_cluster(copy + 16, tile.n);
      announce(slot, block);
    }
    __syncwarp();
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
    while (!announced(slot, received_ / kTileSlots % 2)) {
    }
    const int field = ptx::load_shared(tiles_ + slot * kSlotBytes + threadIdx.x % 8 * 4);
    const Tile tile{__shfl_sync(~0u, field, 0), __shfl_sync(~0u, field, 1), __shfl_sync(~0u, field, 2),
                    __shfl_sync(~0u, field, 3), __shfl_sync(~0u, field, 4)};
    // The slot is given back once its fields are in registers: the shuffles have read them. Releasing what this warp
    // wrote besides would wait for its stores to global memory (1 to 4 % of a product's time).
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_cluster(ptx::map_to_block(empty_ + slot * 8, 0));
    ++received_;
    return tile;
  }

 private:
  // A block alone needs no order beyond its own threads: over the cluster, announcing is a fence over all memory, and
  // hearing of it empties the L1 cache.
  __device__ void announce(int slot, int block) const {
    if constexpr (Config::kCluster == 1) {
      ptx::mbarrier_arrive(full_ + slot * 8);
    } else {
      ptx::mbarrier_release_cluster(ptx::map_to_block(full_ + slot * 8, block));
    }
  }

  __device__ bool announced(int slot, uint32_t parity) const {
    if constexpr (Config::kCluster == 1) return ptx::mbarrier_try_wait(full_ + slot * 8, parity);
    return ptx::mbarrier_acquire_cluster(full_ + slot * 8, parity);
  }

  uint32_t tiles_;
  uint32_t full_;
  uint32_t empty_;
  uint32_t published_ = 0;
  uint32_t received_ = 0;
};

}  // namespace ling::gemm
