// The activation of experts whose pre-activation is a sum of two products.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ling/gemm.h"

namespace ling {

// h += delta in place, and a = activation(h) of the unrounded sum; for a gated activation the first half of h's
// columns is the gate. All pointers 16-byte aligned.
struct AddActivateParams {
  void* h;            // [rows, parts * columns] contiguous, parts = 2 if gated, else 1
  const void* delta;  // like h
  void* a;            // [rows, columns]
  int64_t rows;
  int64_t columns;  // I, a multiple of 8
  Activation activation;
  float limit;  // clamps the factors of a gated activation; infinity for none
  DType dtype;  // bfloat16 or float16, of h, delta and a
};
void launch_add_activate(const AddActivateParams& params, cudaStream_t stream);

}  // namespace ling
