// The experts of a layer for few tokens: the weights of the chosen experts are streamed once, at memory speed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ling/common.h"
#include "ling/gemm.h"

namespace ling {

// out[t] = sum over k of weights[t,k] * (down_e act(proj_e x[t] + up_bias_e) + down_bias_e), e = indices[t,k], in fp32
// in order of k. A pair whose id lies outside [0, experts), or whose token_row is negative, contributes nothing.
// A token's result does not depend on the other tokens.
//
// With a shared expert of width shared * inner, shared_down act(shared_proj x[t]) is added. It counts as `shared`
// experts more, numbers experts ... experts + shared - 1, each a slice of its width, which every token takes with a
// weight of 1 after its own choices.
struct MoeDecodeParams {
  const void* x;             // [tokens, hidden] contiguous
  const void* proj;          // [experts, parts * inner, hidden], parts = 2 if gated, else 1
  const void* down_proj;     // [experts, hidden, inner]
  const float* weights;      // [tokens, choices]
  const void* indices;       // [tokens, choices] int32 or int64
  const int32_t* token_row;  // [tokens, choices], or null: nothing dropped
  const void* up_bias;       // [experts, parts * inner], or null
  const void* down_bias;     // [experts, hidden], or null
  const void* shared_gate;   // [shared * inner, hidden], or null without a gate or a shared expert
  const void* shared_up;     // [shared * inner, hidden], or null
  const void* shared_down;   // [hidden, shared * inner], or null
  void* a;                   // [pairs(), inner] workspace
  void* out;                 // [tokens, hidden]
  int64_t hidden;            // H, a multiple of 8
  int64_t inner;             // I, a multiple of 8
  int tokens;
  int choices;
  int experts;
  int shared;     // 0 for none; biases must then be null
  bool long_ids;  // indices are int64
  Activation activation;
  float limit;  // clamps the factors of a gated activation; infinity for none
  DType dtype;  // of x, projections, biases, a and out: bf16 or fp16

  LING_HOST_DEVICE int per_token() const { return choices + shared; }
  LING_HOST_DEVICE int pairs() const { return tokens * per_token(); }
};

// Limits of the kernels; beyond them launch_moe_decode throws.
constexpr int kDecodeMaxPairs = 640;
constexpr int kDecodeMaxExperts = 4096;

void launch_moe_decode(const MoeDecodeParams& params, cudaStream_t stream);

}  // namespace ling
