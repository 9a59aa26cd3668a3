// Which layout of gate/row.cuh serves E experts and K choices: a pure function of the two.
#pragma once

#include "ling/gate.h"

namespace ling::gate {

// What experts are chosen by.
enum class Keys {
  kLogits,   // softmax without bias and groups: the logits themselves
  kSoftmax,  // probabilities (+ bias), possibly limited to groups
  kSigmoid,
};

inline Keys keys_of(const GateParams& p) {
  if (p.sigmoid) return Keys::kSigmoid;
  return p.expert_bias != nullptr || p.num_groups > 1 ? Keys::kSoftmax : Keys::kLogits;
}

// Zeroes expert_counts by a kernel that the next one may overlap with.
void zero_counts(const GateParams& p, cudaStream_t stream);

// The gate by one warp per token; false, and nothing launched, for shapes that it does not serve.
bool launch_few_tokens(const GateParams& p, cudaStream_t stream);

template <int L, int C>
struct Layout {
  static constexpr int kLanes = L;   // lanes per token, at least K
  static constexpr int kChunks = C;  // chunks of 4 L experts
};

// `most_chunks`: what a lane should hold at most, where 32 lanes allow it. Few chunks need few registers;
// many chunks spread a token's cross-lane steps over fewer instructions.
template <typename Launch>
void dispatch_layout(int experts, int choices, int most_chunks, Launch launch) {
  const auto fits = [&](int lanes) { return choices <= lanes && experts <= 4 * lanes * most_chunks; };
  const int lanes = fits(8) ? 8 : fits(16) ? 16 : 32;
  const int chunks = ceil_div(experts, 4 * lanes);
  if (lanes == 8) {
    if (chunks <= 1) return launch(Layout<8, 1>());
    if (chunks <= 2) return launch(Layout<8, 2>());
    if (chunks <= 4) return launch(Layout<8, 4>());
    return launch(Layout<8, 8>());
  }
  if (lanes == 16) {
    if (chunks <= 2) return launch(Layout<16, 2>());
    if (chunks <= 4) return launch(Layout<16, 4>());
    if (chunks <= 6) return launch(Layout<16, 6>());
    return launch(Layout<16, 8>());
  }
  if (chunks <= 2) return launch(Layout<32, 2>());
  if (chunks <= 4) return launch(Layout<32, 4>());
  return launch(Layout<32, 8>());
}

// Whether rows of E elements can be read four elements at a time.
inline bool rows_of_four(const void* base, DType dtype, int64_t row_stride, int experts) {
  return experts % 4 == 0 && row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(base) % (4 * size_of(dtype)) == 0;
}

}  // namespace ling::gate
