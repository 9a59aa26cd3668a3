// The operator that makes heads ready for attention. Part of bindings.cpp, which alone includes it.
#pragma once

#include <optional>

#include "bindings_util.h"
#include "ling/heads.h"

namespace ling::binding {
namespace {

// Checks a norm's weight [D], of projected's dtype or fp32, and puts it on a boundary.
void check_head_weight(const char* label, std::optional<Tensor>& weight, const Tensor& projected) {
  if (!weight) return;
  weight = on_boundary(*weight);
  Arg("attention_heads_", label, *weight).with(projected).dtype({projected.scalar_type(), ScalarType::Float});
  Arg("attention_heads_", label, *weight).shape({projected.size(2)}).contiguous();
}

Tensor attention_heads_(Tensor projected, Tensor key_cache, Tensor value_cache, Tensor rows, Tensor cos, Tensor sin,
                        std::optional<Tensor> query_weight, std::optional<Tensor> key_weight, double eps) {
  const char* op = "attention_heads_";
  projected = on_boundary(projected);
  cos = on_boundary(cos);
  sin = on_boundary(sin);
  Arg(op, "projected", projected).cuda().dtype({ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  Arg(op, "projected", projected).shape({-1, -1, -1}).contiguous();
  const int64_t tokens = projected.size(0);
  const int64_t dim = projected.size(2);
  expect(dim % 8 == 0 && dim <= kMaxHeadDim, op, "projected must have a multiple of 8 elements per head, at most ",
         kMaxHeadDim, "; got ", Shape{projected});
  const auto dtype = projected.scalar_type();
  Arg(op, "key_cache", key_cache).with(projected).dtype({dtype}).shape({-1, -1, dim}).contiguous().aligned(16);
  const int64_t cache_rows = key_cache.size(0);
  const int64_t kv_heads = key_cache.size(1);
  Arg(op, "value_cache", value_cache).with(projected).dtype({dtype}).shape({cache_rows, kv_heads, dim});
  Arg(op, "value_cache", value_cache).contiguous().aligned(16);
  const int64_t query_heads = projected.size(1) - 2 * kv_heads;
  expect(query_heads >= 0, op, "projected must have at least ", 2 * kv_heads, " heads; got ", Shape{projected});
  Arg(op, "rows", rows).with(projected).dtype({ScalarType::Long}).shape({tokens}).contiguous();
  Arg(op, "cos", cos).with(projected).dtype({ScalarType::Float}).shape({-1, -1}).contiguous();
  const int64_t positions = cos.size(0);
  const int64_t half = cos.size(1);
  expect(positions >= 1 && 2 * half <= dim, op, "cos must have a position, and at most half of ", dim, " columns; got ",
         Shape{cos});
  Arg(op, "sin", sin).with(projected).dtype({ScalarType::Float}).shape({positions, half}).contiguous();
  check_head_weight("query_weight", query_weight, projected);
  check_head_weight("key_weight", key_weight, projected);
  const bool both = query_weight.has_value() == key_weight.has_value();
  expect(both && (!query_weight || query_weight->scalar_type() == key_weight->scalar_type()), op,
         "query_weight and key_weight must both be given, in one dtype, or neither");
  Tensor query = empty(projected, {tokens, query_heads, dim}, dtype);
  const Launch launch(projected);
  launch_heads({.projected = projected.data_ptr(),
                .query_weight = query_weight ? query_weight->data_ptr() : nullptr,
                .key_weight = key_weight ? key_weight->data_ptr() : nullptr,
                .cos = input<float>(cos),
                .sin = input<float>(sin),
                .rows = input<int64_t>(rows),
                .query = query.data_ptr(),
                .key_cache = key_cache.data_ptr(),
                .value_cache = value_cache.data_ptr(),
                .tokens = tokens,
                .cache_rows = cache_rows,
                .positions = positions,
                .query_heads = static_cast<int>(query_heads),
                .kv_heads = static_cast<int>(kv_heads),
                .head_dim = static_cast<int>(dim),
                .half = static_cast<int>(half),
                .eps = static_cast<float>(eps),
                .float_weights = query_weight && query_weight->scalar_type() == ScalarType::Float,
                .dtype = kernel_dtype(op, "projected", projected)},
               launch.stream());
  return query;
}

}  // namespace
}  // namespace ling::binding
