// Activations of the experts and their slopes, in fp32.
#pragma once

#include "ling/gemm.h"
#include "ptx.cuh"

namespace ling::gemm {

// A function's value and derivative at one point.
struct Sloped {
  float value;
  float slope;
};

__device__ inline float sigmoid(float x) {
  constexpr float log2_e = 1.4426950408889634f;
  return ptx::reciprocal_approx(1.0f + ptx::exp2_approx(-log2_e * x));
}

// x sigmoid(z(x)), the common form of SiLU (z = x) and of GELU's tanh approximation.
__device__ inline Sloped gated_by_sigmoid(float x, float z, float z_slope) {
  const float s = sigmoid(z);
  return {x * s, s + x * s * (1.0f - s) * z_slope};
}

template <Activation kActivation>
__device__ inline Sloped activate(float x) {
  if constexpr (kActivation == Activation::kSwiGlu || kActivation == Activation::kSilu) {
    return gated_by_sigmoid(x, x, 1.0f);
  } else if constexpr (kActivation == Activation::kGeGluTanh || kActivation == Activation::kGeluTanh) {
    // 0.5 (1 + tanh(t)) = sigmoid(2 t), with t = sqrt(2 / pi) (x + 0.044715 x^3).
    constexpr float scale = 1.5957691216057308f;
    const float square = x * x;
    return gated_by_sigmoid(x, scale * x * (1.0f + 0.044715f * square), scale * (1.0f + 0.134145f * square));
  } else if constexpr (kActivation == Activation::kGeGlu || kActivation == Activation::kGelu) {
    // The normal distribution's tail from Abramowitz and Stegun 7.1.26 (error below 1.5e-7), on the exponential that
    // the derivative needs anyway.
    constexpr float half_log2_e = 0.7213475204444817f;
    constexpr float density_scale = 0.3989422804014327f;
    const float gauss = ptx::exp2_approx(-half_log2_e * x * x);
    const float t = ptx::reciprocal_approx(1.0f + 0.2316418882663604f * fabsf(x));
    float tail = 0.5307027145f;
    tail = tail * t - 0.7265760135f;
    tail = tail * t + 0.7107068705f;
    tail = tail * t - 0.142248368f;
    tail = (tail * t + 0.127414796f) * t * gauss;
    const float cumulative = x < 0.0f ? tail : 1.0f - tail;
    return {x * cumulative, cumulative + x * density_scale * gauss};
  } else {
    static_assert(kActivation == Activation::kRelu2);
    const float positive = ptx::max_nan(x, 0.0f);
    return {positive * positive, 2.0f * positive};
  }
}

// A gated value with its two derivatives: f(gate) up, each factor clamped by the limit (infinity for none).
struct Gated {
  float value;
  float gate_slope;
  float up_slope;
};

template <Activation kActivation>
__device__ inline Gated activate_gated(float gate, float up, float limit) {
  const Sloped f = activate<kActivation>(gate);
  const float value = ptx::min_nan(f.value, limit);
  const float factor = ptx::max_nan(ptx::min_nan(up, limit), -limit);
  return {value * factor, f.value > limit ? 0.0f : f.slope * factor, fabsf(up) > limit ? 0.0f : value};
}

// Calls `body` with the activation as a compile-time constant; only those of one kind are instantiated.
template <bool kGated, class Body>
__device__ inline void with_activation(Activation activation, Body&& body) {
  if constexpr (kGated) {
    switch (activation) {
      case Activation::kGeGlu: return body.template operator()<Activation::kGeGlu>();
      case Activation::kGeGluTanh: return body.template operator()<Activation::kGeGluTanh>();
      default: return body.template operator()<Activation::kSwiGlu>();
    }
  } else {
    switch (activation) {
      case Activation::kGelu: return body.template operator()<Activation::kGelu>();
      case Activation::kGeluTanh: return body.template operator()<Activation::kGeluTanh>();
      case Activation::kRelu2: return body.template operator()<Activation::kRelu2>();
      default: return body.template operator()<Activation::kSilu>();
    }
  }
}

}  // namespace ling::gemm
