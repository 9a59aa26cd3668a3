// A 16-row strip of a weight matrix times up to 8 vectors, straight from memory to the tensor cores.
//
// A thread reads 8 consecutive elements of the contraction at once and hands them to two products as if they were the
// eight that m16n8k16 wants of it: weights and vectors are permuted alike, so the sum is the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ling/common.h"

namespace ling::decode {

constexpr int kStepLength = 32;  // of the contraction
constexpr int kBatch = 4;        // steps whose weights one thread asks for at once

__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }
template <typename Element>
__device__ inline Element from_float(float value) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// Weights pass by once: they shall not push the vectors out of the first-level cache. A row's next 256 bytes are wanted
// next, and memory gives them faster together (3.0 instead of 2.8 TB/s).
__device__ inline uint4 load_weight(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// Not the read-only path: a kernel that still ran when this one started may have written them.
__device__ inline uint4 load_vector(const void* address) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

// Brings a line of memory into L2.
__device__ inline void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

template <typename Element>
__device__ inline void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// The part of the contraction that a warp sums up, in elements; `begin` is a multiple of kStepLength.
struct Range {
  int begin;
  int end;
};

// A strip's rows as seen by one thread: row `lane / 4` of its upper half and of its lower half.
template <typename Element>
struct Strip {
  const Element* upper;
  const Element* lower;  // null: rows of zeros
  Range range;
};

// One thread's share of kBatch steps of a strip.
struct Weights {
  uint4 upper[kBatch];
  uint4 lower[kBatch];

  template <typename Element>
  __device__ void load(const Strip<Element>& strip, int batch) {
    const int first = strip.range.begin + batch * (kStepLength * kBatch) + threadIdx.x % 4 * 8;
#pragma unroll
    for (int step = 0; step < kBatch; ++step) {
      const int k = first + step * kStepLength;
      upper[step] = k < strip.range.end ? load_weight(strip.upper + k) : uint4{};
      lower[step] = k < strip.range.end && strip.lower != nullptr ? load_weight(strip.lower + k) : uint4{};
    }
  }
};

// Sums of a strip: value[0..1] are row lane / 4 and vectors 2 (lane % 4) + 0..1, value[2..3] the same of the lower
// half.
template <typename Element>
struct Sums {
  float value[4];
  float second[4];        // of every other product, added by `close`: a product waits for the one before in its sum
  const Element* vector;  // this thread's vector, number lane / 4, or null

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = second[i] = 0.0f;
  }

  __device__ void close() {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] += second[i];
  }

  __device__ void add(const Weights& weights, Range range, int batch) {
    const int first = range.begin + batch * (kStepLength * kBatch) + threadIdx.x % 4 * 8;
    uint4 v[kBatch];
#pragma unroll
    for (int step = 0; step < kBatch; ++step) {
      const int k = first + step * kStepLength;
      v[step] = vector != nullptr && k < range.end ? load_vector(vector + k) : uint4{};
    }
#pragma unroll
    for (int step = 0; step < kBatch; ++step) {
      const uint4 up = weights.upper[step];
      const uint4 low = weights.lower[step];
      multiply<Element>(value, up.x, low.x, up.y, low.y, v[step].x, v[step].y);
      multiply<Element>(second, up.z, low.z, up.w, low.w, v[step].z, v[step].w);
    }
  }
};

// Multiplies the units first, first + stride, ... below `end`, all of the same number of batches; two batches of
// weights are on their way, the first two before anything else is waited for. The task says where a unit's weights lie
// (`locate`) and which part of the contraction it is (`range_of`), readies its vectors (`start`) and keeps its sums
// (`finish`); `ready` runs once, after the first weights were asked for.
template <class Task, class SumsOfTask>
__device__ inline void stream(Task& task, SumsOfTask& sums, int first, int end, int stride, int batches) {
  auto strip = task.locate(min(first, max(end - 1, 0)));
  int asked_unit = first;
  int asked_batch = 0;
  const auto ask = [&](Weights& weights) {
    if (asked_unit >= end) return;
    weights.load(strip, asked_batch);
    if (++asked_batch < batches) return;
    asked_batch = 0;
    asked_unit += stride;
    if (asked_unit < end) strip = task.locate(asked_unit);
  };

  Weights current;
  Weights next;
  ask(current);
  ask(next);
  task.ready();
  for (int unit = first; unit < end; unit += stride) {
    const Range range = task.range_of(unit);
    task.start(unit);
    sums.clear();
    for (int batch = 0; batch < batches; ++batch) {
      sums.add(current, range, batch);
      current = next;
      ask(next);
    }
    sums.close();
    task.finish(unit);
  }
}

}  // namespace ling::decode
