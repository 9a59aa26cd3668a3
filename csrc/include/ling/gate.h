// Top-k gating: scores, expert selection, gate weights, demand of each expert; and its backward.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ling/common.h"

namespace ling {

constexpr int kMaxGateExperts = 1024;
constexpr int kMaxGateChoices = 32;
constexpr int64_t kMaxGateTokens = 2147483647;

struct GateParams {
  const void* logits;        // [T,E], inner stride 1
  DType dtype;               // of logits: fp32, bf16, fp16
  int64_t row_stride;        // of logits, in elements
  const float* expert_bias;  // [E], or null
  float* weights;            // [T,K]
  int32_t* indices;          // [T,K], best first
  int32_t* expert_counts;    // [E], overwritten
  int64_t tokens;            // T
  int experts;               // E <= kMaxGateExperts
  int choices;               // K <= kMaxGateChoices, K <= topk_groups * E / num_groups
  int num_groups;            // divides E
  int topk_groups;
  bool sigmoid;      // scores: sigmoid, else softmax
  bool renormalize;  // divide by the chosen scores' sum + 1e-20 where K > 1
  float scale;
};

// One kernel; another that zeroes expert_counts runs in front of it unless one block holds all tokens.
void launch_gate(const GateParams& params, cudaStream_t stream);

struct GateBackwardParams {
  const float* grad_weights;  // [T,K], any strides
  int64_t grad_token_stride;
  int64_t grad_choice_stride;
  const void* logits;       // [T,E], inner stride 1
  DType dtype;              // of logits and grad_logits
  int64_t row_stride;       // of logits, in elements
  const int32_t* indices;   // [T,K]; ids outside [0,E) are skipped
  const float* balance;     // [S,E] d loss / d p of each sequence, or null
  int64_t sequence_length;  // tokens a row of balance serves
  const float* z_scale;     // [], factor of logsumexp(z) * softmax(z), or null
  const bool* token_mask;   // [T], false: no loss terms for the token; or null
  void* grad_logits;        // [T,E] contiguous
  int64_t tokens;
  int experts;
  int choices;
  int64_t sequences;  // S
  bool sigmoid;
  bool renormalize;
  float scale;
};

void launch_gate_backward(const GateBackwardParams& params, cudaStream_t stream);

constexpr int kGateLosses = 3;
constexpr int kGateLossBlocks = 512;  // at most, on every device: they fix the order of the sums

struct GateLossesParams {
  const void* logits;             // [T,E], inner stride 1
  DType dtype;                    // of logits
  int64_t row_stride;             // of logits, in elements
  const float* balance;           // [E] slopes of all tokens, or null
  const float* sequence_balance;  // [S,E] slopes of each sequence, or null
  int64_t sequence_length;        // tokens a row of sequence_balance serves
  const bool* token_mask;         // [T], false: the token is left out; or null
  float* partial;                 // [kGateLossBlocks, 3] scratch
  float* sums;                    // [3]: <balance, p>, <sequence_balance, p>, logsumexp^2, each over all tokens
  int64_t tokens;
  int64_t sequences;  // S
  int experts;
  bool sigmoid;  // p: sigmoid scores over their sum, else softmax
  bool squares;  // false: leave the last sum 0
};

void launch_gate_losses(const GateLossesParams& params, cudaStream_t stream);

}  // namespace ling
