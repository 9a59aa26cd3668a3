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
  const void* a;           // [rows, contraction], row stride a_stride
  const void* b;           // [experts, columns, contraction], or [experts, contraction, columns] if b_transposed
  const int32_t* offsets;  // [experts + 1]
  void* out;               // [rows, columns] contiguous
  int32_t* counter;        // [1] workspace of this call alone; contents do not matter
  int64_t rows;            // M
  int64_t columns;         // N, a multiple of 8
  int64_t contraction;     // Kd, a multiple of 8
  int64_t experts;         // E
  int64_t a_stride;        // elements
  bool b_transposed;
  DType dtype;  // of a, b and out
  // Then it is not zeroed here, so that nothing stands between this kernel and the one in front; that one must not
  // write b or offsets.
  bool counter_is_zero = false;
};
void launch_grouped_gemm(const GroupedGemmParams& params, cudaStream_t stream);

// out[e] = dy[rows of e]^T . x[rows of e]; exactly zero for an expert without rows.
struct GroupedWeightGradParams {
  const void* dy;          // [rows, columns], row stride dy_stride
  const void* x;           // [rows, contraction], row stride x_stride
  const int32_t* offsets;  // [experts + 1]
  void* out;               // [experts, columns, contraction] contiguous
  int32_t* counter;        // [1] workspace of this call alone; contents do not matter
  int64_t rows;            // M
  int64_t columns;         // N, a multiple of 8
  int64_t contraction;     // Kd, a multiple of 8
  int64_t experts;         // E
  int64_t dy_stride;       // elements
  int64_t x_stride;        // elements
  DType dtype;             // of dy, x and out
};
void launch_grouped_weight_grad(const GroupedWeightGradParams& params, cudaStream_t stream);

// The same with one operand in token order, read through row_token: dy [tokens, dy_columns] and x [rows, x_columns], or
// with gather_x dy [rows, dy_columns] and x [tokens, x_columns].
struct MoeWeightGradParams {
  const void* dy;            // row stride dy_stride
  const void* x;             // row stride x_stride
  const int32_t* row_token;  // [rows]; a token outside [0, tokens) reads as zeros
  const int32_t* offsets;    // [experts + 1]
  void* out;                 // [experts, dy_columns, x_columns] contiguous; fp32 if add
  int32_t* counter;          // [1] workspace of this call alone; contents do not matter
  int64_t rows;
  int64_t tokens;
  int64_t dy_columns;  // N, a multiple of 8
  int64_t x_columns;   // Kd, a multiple of 8
  int64_t experts;
  int64_t dy_stride;  // elements
  int64_t x_stride;   // elements
  bool gather_x;
  bool add;     // to what out holds, in fp32, instead of writing it in dtype
  DType dtype;  // of dy and x
};
void launch_moe_weight_grad(const MoeWeightGradParams& params, cudaStream_t stream);

// The codes that Python passes. The first three are gated: value = f(gate) * up.
enum class Activation : int { kSwiGlu, kGeGlu, kGeGluTanh, kGelu, kGeluTanh, kSilu, kRelu2 };
constexpr bool is_gated(Activation activation) { return activation <= Activation::kGeGluTanh; }

// h[r] = weight[expert of r] . x[row_token[r]] and a[r] = activation(h[r]); for a gated activation the first half of
// h's columns is the gate. Rows that belong to no expert become zero in h and a.
struct MoeUpParams {
  const void* x;             // [tokens, contraction], row stride x_stride
  const void* weight;        // [experts, parts * columns, contraction], parts = 2 if gated, else 1
  const int32_t* row_token;  // [rows]; a token outside [0, tokens) reads as zeros
  const int32_t* offsets;    // [experts + 1]
  void* h;                   // [rows, parts * columns], or null if not wanted
  void* a;                   // [rows, columns]
  int32_t* counter;          // [1] workspace of this call alone; contents do not matter
  int64_t rows;
  int64_t columns;      // I, a multiple of 8
  int64_t contraction;  // H, a multiple of 8
  int64_t experts;
  int64_t tokens;
  int64_t x_stride;  // elements
  Activation activation;
  float limit;                   // clamps the factors of a gated activation; infinity for none
  DType dtype;                   // of x, weight, h and a
  bool counter_is_zero = false;  // as above
};
void launch_moe_up(const MoeUpParams& params, cudaStream_t stream);

// The backward of a = activation(h), y = weight . a, out = sum of w y. With d[r] = dout[row_token[r]] . weight and
// w = weights[row_pair[r]]: dh = w d activation'(h), wa = w a, grad_weights[row_pair[r]] = <d, a>.
// Rows that belong to no expert become zero in dh and wa; pairs without a row get a zero gradient.
struct MoeDactParams {
  const void* dout;          // [tokens, contraction], row stride dout_stride
  const void* weight;        // [experts, contraction, columns]: down_proj
  const void* h;             // [rows, parts * columns] contiguous
  const float* weights;      // [pairs]
  const int32_t* row_token;  // [rows]
  const int32_t* row_pair;   // [rows]
  const int32_t* offsets;    // [experts + 1]
  void* dh;                  // [rows, parts * columns]
  void* wa;                  // [rows, columns]
  float* grad_weights;       // [pairs]
  float* partial;            // [dact_partials(columns), rows] workspace
  int32_t* counter;          // [1] workspace of this call alone; contents do not matter
  int64_t rows;
  int64_t columns;      // I, a multiple of 8
  int64_t contraction;  // H, a multiple of 8
  int64_t experts;
  int64_t tokens;
  int64_t pairs;
  int64_t dout_stride;  // elements
  Activation activation;
  float limit;
  DType dtype;  // of dout, weight, h, dh and wa
};
int64_t dact_partials(int64_t columns);
void launch_moe_dact(const MoeDactParams& params, cudaStream_t stream);

}  // namespace ling
