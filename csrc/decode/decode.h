// What the two decode kernels share on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ling/decode.h"
#include "ling/launch.h"

namespace ling::decode {

void launch_up(const MoeDecodeParams& p, cudaStream_t stream);
void launch_down(const MoeDecodeParams& p, cudaStream_t stream);

// Calls `body` with the element type.
template <class Body>
void dispatch(const MoeDecodeParams& p, Body&& body) {
  if (p.dtype == DType::kFloat16) return body.template operator()<__half>();
  require(p.dtype == DType::kBFloat16, "moe_decode needs bfloat16 or float16");
  body.template operator()<__nv_bfloat16>();
}

}  // namespace ling::decode
