// Grouped matrix products of the experts, for Hopper (sm_90a).
//
// Rows are in expert order; rows offsets[e] .. offsets[e+1] belong to expert e. Offsets are read on the device as
// their running maximum, clamped to [0, rows]: no value of theirs can cause an access out of range.
// bfloat16 and float16, fp32 accumulation. All pointers 16-byte aligned, all row strides multiples of 8 elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "ling/common.h"

namespace ling {

// out[r] = b[expert of r] . a[r]; rows that belong to no expert become zero.
struct GroupedGemmParams {
  const void* a;            // [rows, contraction], row stride a_stride
  const void* b;            // [experts, columns, contraction], or [experts, contraction, columns] if b_transposed
  const int32_t* offsets;   // [experts + 1]
  void* out;                // [rows, columns] contiguous
  int64_t rows;             // M
  int64_t columns;          // N, a multiple of 8
  int64_t contraction;      // Kd, a multiple of 8
  int64_t experts;          // E
  int64_t a_stride;         // elements
  bool b_transposed;
  DType dtype;              // of a, b and out
};
void launch_grouped_gemm(const GroupedGemmParams& params, cudaStream_t stream);

// out[e] = dy[rows of e]^T . x[rows of e]; exactly zero for an expert without rows.
struct GroupedWeightGradParams {
  const void* dy;           // [rows, columns], row stride dy_stride
  const void* x;            // [rows, contraction], row stride x_stride
  const int32_t* offsets;   // [experts + 1]
  void* out;                // [experts, columns, contraction] contiguous
  int64_t rows;             // M
  int64_t columns;          // N, a multiple of 8
  int64_t contraction;      // Kd, a multiple of 8
  int64_t experts;          // E
  int64_t dy_stride;        // elements
  int64_t x_stride;         // elements
  DType dtype;              // of dy, x and out
};
void launch_grouped_weight_grad(const GroupedWeightGradParams& params, cudaStream_t stream);

}  // namespace ling
