// 16-byte vectors of elements (or single elements where rows are not aligned), and launch shapes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "ling/common.h"

namespace ling::combine {

constexpr int kMaxThreads = 256;

// N neighbours of type T as one memory access. Kept in 32-bit words: an array of 16-bit elements would
// take a register each.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  static constexpr int kWords = N == 1 ? 1 : sizeof(T) * N / 4;
  using Word = std::conditional_t<N == 1, T, uint32_t>;
  Word words[kWords];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T, int N>
__device__ void unpack(const Vector<T, N>& vector, float (&out)[N]) {
  if constexpr (N == 1) {
    out[0] = to_float(vector.words[0]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = __uint_as_float(vector.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      float2 two;
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        two = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(vector.words[i]));
      } else {
        two = __half22float2(reinterpret_cast<const __half2&>(vector.words[i]));
      }
      out[2 * i] = two.x;
      out[2 * i + 1] = two.y;
    }
  }
}

template <typename T, int N>
__device__ Vector<T, N> pack(const float (&in)[N]) {
  Vector<T, N> vector;
  if constexpr (N > 1 && sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        reinterpret_cast<__nv_bfloat162&>(vector.words[i]) = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
      } else {
        reinterpret_cast<__half2&>(vector.words[i]) = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
      }
    }
  } else if constexpr (N > 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) vector.words[i] = __float_as_uint(in[i]);
  } else {
    vector.words[0] = static_cast<T>(in[0]);
  }
  return vector;
}

template <typename T, int N>
__device__ Vector<T, N> zeros() {
  const float zero[N] = {};
  return pack<T, N>(zero);
}

template <typename T, int N>
__device__ const Vector<T, N>* row_of(const void* base, int64_t row, int64_t columns) {
  return static_cast<const Vector<T, N>*>(base) + row * columns;
}

template <typename T, int N>
__device__ Vector<T, N>* row_of(void* base, int64_t row, int64_t columns) {
  return static_cast<Vector<T, N>*>(base) + row * columns;
}

// For rows that are written once and together pass what the L2 cache holds.
template <typename T, int N>
__device__ void store_streaming(Vector<T, N>* to, const Vector<T, N>& value) {
  if constexpr (sizeof(Vector<T, N>) == 16) {
    __stcs(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(value));
  } else {
    *to = value;
  }
}

// Zeroes rows [begin, end) with all blocks of the grid. `begin` is an offset from the caller, which may be wrong.
template <typename T, int N>
__device__ void zero_rows(void* base, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t row = max(begin, int64_t{0}) + blockIdx.x; row < end; row += gridDim.x) {
    for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) row_of<T, N>(base, row, columns)[c] = zeros<T, N>();
  }
}

// Threads of a block that walks `columns` vectors of a row: whole warps, evenly loaded.
inline int threads_for(int64_t columns) {
  const int64_t rounds = ceil_div<int64_t>(columns, kMaxThreads);
  return static_cast<int>(round_up<int64_t>(ceil_div(columns, rounds), 32));
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, int N>
struct Type {
  using Element = T;
  static constexpr int kWidth = N;
};

// Calls `launch` with the element type and the access width that rows of `hidden` elements allow.
template <typename Launch>
void dispatch(DType dtype, int64_t hidden, bool all_aligned, const char* name, Launch launch) {
  const bool wide = all_aligned && hidden * size_of(dtype) % 16 == 0;
  switch (dtype) {
    case DType::kFloat32: return wide ? launch(Type<float, 4>()) : launch(Type<float, 1>());
    case DType::kBFloat16: return wide ? launch(Type<__nv_bfloat16, 8>()) : launch(Type<__nv_bfloat16, 1>());
    case DType::kFloat16: return wide ? launch(Type<__half, 8>()) : launch(Type<__half, 1>());
    default: require(false, name, ": dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace ling::combine
