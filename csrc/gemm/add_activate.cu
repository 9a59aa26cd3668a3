// h += delta and a = activation(h): bound by memory, so one pass over all three. A thread owns 16 bytes of a row of a.
#include "ling/add_activate.h"

#include <algorithm>

#include "../combine/vector.cuh"
#include "activation.cuh"

namespace ling {
namespace gemm {
namespace {

constexpr int kBlock = 256;
constexpr int kWidth = 8;
constexpr int kBlocksPerMultiprocessor = 8;

template <class Element>
using Units = combine::Vector<Element, kWidth>;

// The sum of a unit of h and of delta, which also goes back to h.
template <class Element>
__device__ void add_unit(Units<Element>& h, const Units<Element>& delta, float (&sum)[kWidth]) {
  float other[kWidth];
  combine::unpack(h, sum);
  combine::unpack(delta, other);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] += other[i];
  h = combine::pack<Element, kWidth>(sum);
}

template <Activation kActivation, class Element, bool kGated>
__device__ void add_activate(const AddActivateParams& p) {
  constexpr int parts = kGated ? 2 : 1;
  const int64_t units = p.columns / kWidth;
  const int64_t total = p.rows * units;
  auto* h = static_cast<Units<Element>*>(p.h);
  const auto* delta = static_cast<const Units<Element>*>(p.delta);
  auto* a = static_cast<Units<Element>*>(p.a);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < total; i += step) {
    const int64_t first = i / units * units * parts + i % units;
    float sum[parts][kWidth];
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      const int64_t at = first + part * units;
      add_unit<Element>(h[at], delta[at], sum[part]);
    }
    float value[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if constexpr (kGated) {
        value[j] = activate_gated<kActivation>(sum[0][j], sum[1][j], p.limit).value;
      } else {
        value[j] = activate<kActivation>(sum[0][j]).value;
      }
    }
    a[i] = combine::pack<Element, kWidth>(value);
  }
}

template <class Element, bool kGated>
__global__ void __launch_bounds__(kBlock) add_activate_kernel(const AddActivateParams p) {
  with_activation<kGated>(p.activation,
                          [&]<Activation kActivation>() { add_activate<kActivation, Element, kGated>(p); });
}

template <class Element>
void run(const AddActivateParams& p, cudaStream_t stream) {
  const int64_t needed = ceil_div<int64_t>(p.rows * (p.columns / kWidth), kBlock);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(needed, sm_count() * kBlocksPerMultiprocessor));
  if (is_gated(p.activation)) {
    add_activate_kernel<Element, true><<<blocks, kBlock, 0, stream>>>(p);
  } else {
    add_activate_kernel<Element, false><<<blocks, kBlock, 0, stream>>>(p);
  }
  check_launch("add_activate");
}

}  // namespace
}  // namespace gemm

void launch_add_activate(const AddActivateParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return;
  if (p.dtype == DType::kBFloat16) return gemm::run<__nv_bfloat16>(p, stream);
  gemm::run<__half>(p, stream);
}

}  // namespace ling
