// Moving tokens into expert order and back. Rows and pairs are those of ling/route.h; M = expert_offsets[E].
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ling/common.h"

namespace ling {

struct PermuteParams {
  const void* x;             // [T,H]
  const int32_t* row_token;  // [T*K]
  const int32_t* token_row;  // [T,K], or null: then x is read once a row instead of once a token
  const int32_t* num_rows;   // [] M
  void* rows;                // [T*K,H]; zero from row M on
  DType dtype;               // of x and rows: fp32, bf16, fp16
  int64_t tokens;
  int64_t pairs;  // T*K
  int choices;
  int64_t hidden;
};

void launch_permute(const PermuteParams& params, cudaStream_t stream);

// out[t] = residual[t] + sum over k of weights[t,k] * rows[token_row[t,k]], in fp32, in order of k.
struct CombineParams {
  const void* rows;          // [M or more,H]
  const int32_t* token_row;  // [T,K]; outside [0,num_rows): contributes nothing
  const float* weights;      // [T,K], or null for ones
  const void* residual;      // [T,H], or null
  void* out;                 // [T,H]
  DType dtype;               // of rows, residual, out
  int64_t tokens;
  int64_t num_rows;  // of `rows`
  int choices;
  int64_t hidden;
};

void launch_combine(const CombineParams& params, cudaStream_t stream);

struct CombineBackwardParams {
  const void* grad_out;      // [T,H]
  const void* rows;          // [T*K,H]
  const int32_t* row_pair;   // [T*K]
  const int32_t* token_row;  // [T,K], or null: then grad_out is read once a row instead of once a token
  const float* weights;      // [T,K], or null for ones
  const int32_t* num_rows;   // [] M
  void* grad_rows;           // [T*K,H] weights * grad_out; zero from row M on
  float* grad_weights;       // [T,K] <grad_out, row>; 0 where dropped
  DType dtype;               // of grad_out, rows, grad_rows
  int64_t tokens;
  int64_t pairs;  // T*K
  int choices;
  int64_t hidden;
};

void launch_combine_backward(const CombineBackwardParams& params, cudaStream_t stream);

}  // namespace ling
