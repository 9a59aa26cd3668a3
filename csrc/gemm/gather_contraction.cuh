// Loading where rows are the contraction and one operand's rows are gathered: operand A, whose columns run along the
// tile's rows; operand B comes in row order by the copy engine.
#pragma once

#include "load.cuh"

namespace ling::gemm {

// Four warps. A step is 64 rows of kTileM columns, 256 bytes each: 16 threads copy a row, so that a warp copies two
// whole segments at once. Thread t has column unit t % 16 of rows t / 16, t / 16 + 8, ...: the swizzle of a row depends
// on row % 8, which is the same for all of them. A stage is full when B's bytes and every thread's copies have landed.
template <class Config, class Product, class Params>
class GatheredContractionLoader {
  static constexpr int kUnits = kTileM * 2 / 16;        // 16-byte units of a row
  static constexpr int kRowStep = kWarpgroup / kUnits;  // rows that all threads copy at once
  static constexpr int kRowsPerThread = kTileK / kRowStep;
  static constexpr int kAhead = 4;  // steps between a token's load and its use: what a load under way may take
  using Tokens = int[kAhead];
  static_assert(kUnits == 16 && kRowStep == 8, "lanes map to rows by halves of a warp");

 public:
  __device__ GatheredContractionLoader(const Params& params, typename Config::Shared& shared, const Ring<Config>& ring,
                                       int block)
      : params_(params),
        shared_(shared),
        ring_(ring),
        block_(block),
        row_units_(static_cast<uint32_t>(params.gather.stride / 8)) {}

  __device__ void run() {
    TileSource<Config> source(params_.schedule, shared_, block_);
    Tile tile = source.next();
    Work work = Product::work(tile, params_.extents, block_);
    Tokens tokens;
    find_first(work, tokens);
    while (tile.expert >= 0) {
      const int ask = max(work.k_begin, work.k_end - kAskAhead<Config> * kTileK);
      bool asked = false;
      Work next = work;
      Tokens next_tokens;
      start_tile(work);
      for (int k = work.k_begin; k < work.k_end; k += kAhead * kTileK) {
        if (!asked && k + (kAhead - 1) * kTileK >= ask) {
          tile = source.next();
          asked = true;
          next = Product::work(tile, params_.extents, block_);
          find_first(next, next_tokens);
        }
        CUTE_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          if (k + i * kTileK < work.k_end) load(work, k + i * kTileK, tokens[i]);
        }
      }
      work = next;
      CUTE_UNROLL
      for (int i = 0; i < kAhead; ++i) tokens[i] = next_tokens[i];
    }
    source.drain();
    if (threadIdx.x == 0) ring_.drain();
    __syncwarp();
  }

 private:
  // A warp's rows of a step, one a lane (and again): row 8 i + r of pass i, where r is 2 * warp or 2 * warp + 1.
  __device__ int find_token(const Work& work, int k) const {
    const int slot = threadIdx.x % (2 * kRowsPerThread);
    const int row = k + slot / 2 * kRowStep + threadIdx.x / 32 * 2 + slot % 2;
    return row < work.k_end ? params_.gather.index[row] : -1;
  }

  __device__ void find_first(const Work& work, Tokens& tokens) const {
    CUTE_UNROLL
    for (int i = 0; i < kAhead; ++i) tokens[i] = find_token(work, work.k_begin + i * kTileK);
  }

  // This thread's columns of a tile; columns beyond the table's become zeros.
  __device__ void start_tile(const Work& work) {
    const int column = work.row + threadIdx.x % kUnits * 8;
    inside_ = column < work.row_end;
    columns_ = static_cast<const char*>(params_.gather.table) + (inside_ ? int64_t{column} * 2 : 0);
  }

  // One step. What can be done before the stage is free is; `token` becomes that of kAhead steps later.
  __device__ void load(const Work& work, int k, int& token) {
    const bool exists = static_cast<unsigned>(token) < static_cast<unsigned>(params_.gather.table_rows);
    const uint32_t row_units = exists ? token * row_units_ : 0;
    token = find_token(work, k + kAhead * kTileK);
    const int unit = threadIdx.x % kUnits;
    const int row = threadIdx.x / kUnits;
    const uint32_t existing = __ballot_sync(~0u, exists);
    const uint32_t present = inside_ ? existing >> row % 2 : 0;
    uint32_t units[kRowsPerThread];
    CUTE_UNROLL
    for (int i = 0; i < kRowsPerThread; ++i) units[i] = __shfl_sync(~0u, row_units, 2 * i + row % 2);

    const uint32_t full = ring_.full_barrier();
    ring_.wait_empty();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_bytes(full, Config::kStageBytesB);
      Product::load_b(&params_.b, full, ptx::shared_address(shared_.b) + ring_.stage() * Config::kStageBytesB, work, k,
                      block_);
    }
    __syncwarp();
    const uint32_t destination = ptx::shared_address(shared_.a) + ring_.stage() * Config::kStageBytesA +
                                 unit / 8 * kBoxBytes + row * 128 + (unit % 8 ^ row) * 16;
    CUTE_UNROLL
    for (int i = 0; i < kRowsPerThread; ++i) {
      ptx::copy_16(destination + i * kRowStep * 128, columns_ + uint64_t{units[i]} * 16, present >> 2 * i & 1 ? 16 : 0);
    }
    ptx::mbarrier_arrive_copies(full);
    ring_.advance();
  }

  const Params& params_;
  typename Config::Shared& shared_;
  Ring<Config> ring_;
  int block_;
  uint32_t row_units_;  // 16-byte units from one row of the table to the next
  const char* columns_ = nullptr;
  bool inside_ = false;
};

}  // namespace ling::gemm
