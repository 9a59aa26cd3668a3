// Operators of the portable kernels: gate, route, permute, combine. Part of bindings.cpp, which alone includes it.
#pragma once

#include <optional>
#include <tuple>

#include "bindings_util.h"
#include "ling/capacity.h"
#include "ling/gate.h"
#include "ling/permute.h"
#include "ling/route.h"
#include "ling/stats.h"

namespace ling::binding {
namespace {

constexpr std::initializer_list<ScalarType> kFloats = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

// ---- gate ----------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> topk_gate(Tensor logits, std::optional<Tensor> expert_bias, int64_t k, bool sigmoid,
                                             int64_t num_groups, int64_t topk_groups, bool renormalize, double scale) {
  const char* op = "topk_gate";
  Arg{op, "logits", logits}.cuda().dtype(kFloats).shape({-1, -1}).inner_contiguous();
  const int64_t tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  if (expert_bias) {
    Arg{op, "expert_bias", *expert_bias}.with(logits).dtype({ScalarType::Float}).shape({experts}).contiguous();
  }
  expect(experts >= 1 && experts <= kMaxGateExperts, op, "E must be in [1, ", kMaxGateExperts, "]; got ", experts);
  expect(num_groups >= 1 && experts % num_groups == 0, op, "num_groups must divide E = ", experts, "; got ",
         num_groups);
  expect(topk_groups >= 1 && topk_groups <= num_groups, op, "topk_groups must be in [1, ", num_groups, "]; got ",
         topk_groups);
  expect(k >= 1 && k <= kMaxGateChoices && k <= experts / num_groups * topk_groups, op, "k must be in [1, ",
         kMaxGateChoices, "] and at most the kept groups' experts; got ", k);

  const Tensor weights = empty(logits, {tokens, k}, ScalarType::Float);
  const Tensor indices = empty(logits, {tokens, k}, ScalarType::Int);
  const Tensor expert_counts = empty(logits, {experts}, ScalarType::Int);
  GateParams params = {};
  params.logits = logits.data_ptr();
  params.dtype = kernel_dtype(op, "logits", logits);
  params.row_stride = logits.stride(0);
  params.expert_bias = input<float>(expert_bias);
  params.weights = output<float>(weights);
  params.indices = output<int32_t>(indices);
  params.expert_counts = output<int32_t>(expert_counts);
  params.tokens = tokens;
  params.experts = static_cast<int>(experts);
  params.choices = static_cast<int>(k);
  params.num_groups = static_cast<int>(num_groups);
  params.topk_groups = static_cast<int>(topk_groups);
  params.sigmoid = sigmoid;
  params.renormalize = renormalize;
  params.scale = static_cast<float>(scale);
  launch_gate(params, Launch(logits).stream());
  return {weights, indices, expert_counts};
}

Tensor topk_gate_backward(Tensor grad_weights, Tensor logits, Tensor weights, Tensor indices,
                          std::optional<Tensor> balance, int64_t sequence_length, std::optional<Tensor> z_scale,
                          std::optional<Tensor> token_mask, bool sigmoid, bool renormalize, double scale) {
  const char* op = "topk_gate_backward";
  Arg{op, "logits", logits}.cuda().dtype(kFloats).shape({-1, -1}).inner_contiguous();
  const int64_t tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  Arg{op, "indices", indices}.with(logits).dtype({ScalarType::Int}).shape({tokens, -1}).contiguous();
  const int64_t k = indices.size(1);
  Arg{op, "grad_weights", grad_weights}.with(logits).dtype({ScalarType::Float}).shape({tokens, k});
  Arg{op, "weights", weights}.shape({tokens, k});
  expect(experts >= 1 && experts <= kMaxGateExperts, op, "E must be in [1, ", kMaxGateExperts, "]; got ", experts);
  expect(k >= 1 && k <= kMaxGateChoices, op, "k must be in [1, ", kMaxGateChoices, "]; got ", k);
  if (balance) {
    Arg{op, "balance", *balance}.with(logits).dtype({ScalarType::Float}).shape({-1, experts}).contiguous();
    expect(sequence_length >= 1 && (tokens == 0 || balance->size(0) >= (tokens - 1) / sequence_length + 1), op,
           "balance must have a row for each ", sequence_length, " of ", tokens, " tokens; got ", balance->size(0));
  }
  if (z_scale) {
    Arg{op, "z_scale", *z_scale}.with(logits).dtype({ScalarType::Float});
    expect(z_scale->numel() == 1, op, "z_scale must have one element; got shape ", Shape{*z_scale});
  }
  if (token_mask) {
    Arg{op, "token_mask", *token_mask}.with(logits).dtype({ScalarType::Bool}).shape({tokens}).contiguous();
  }

  const Tensor grad_logits = empty(logits, {tokens, experts}, logits.scalar_type());
  GateBackwardParams params = {};
  params.grad_weights = input<float>(grad_weights);
  params.grad_token_stride = grad_weights.stride(0);
  params.grad_choice_stride = grad_weights.stride(1);
  params.logits = logits.data_ptr();
  params.dtype = kernel_dtype(op, "logits", logits);
  params.row_stride = logits.stride(0);
  params.indices = input<int32_t>(indices);
  params.balance = input<float>(balance);
  params.sequence_length = sequence_length;
  params.z_scale = input<float>(z_scale);
  params.token_mask = input<bool>(token_mask);
  params.grad_logits = grad_logits.data_ptr();
  params.tokens = tokens;
  params.experts = static_cast<int>(experts);
  params.choices = static_cast<int>(k);
  params.sequences = balance ? balance->size(0) : 0;
  params.sigmoid = sigmoid;
  params.renormalize = renormalize;
  params.scale = static_cast<float>(scale);
  launch_gate_backward(params, Launch(logits).stream());
  return grad_logits;
}

Tensor gate_losses(Tensor logits, std::optional<Tensor> balance, std::optional<Tensor> sequence_balance,
                   int64_t sequence_length, std::optional<Tensor> token_mask, bool sigmoid, bool z_loss) {
  const char* op = "gate_losses";
  Arg{op, "logits", logits}.cuda().dtype(kFloats).shape({-1, -1}).inner_contiguous();
  const int64_t tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  expect(experts >= 1 && experts <= kMaxGateExperts, op, "E must be in [1, ", kMaxGateExperts, "]; got ", experts);
  if (balance) {
    Arg{op, "balance", *balance}.with(logits).dtype({ScalarType::Float}).shape({experts}).contiguous();
  }
  if (sequence_balance) {
    const Tensor& slopes = *sequence_balance;
    Arg{op, "sequence_balance", slopes}.with(logits).dtype({ScalarType::Float}).shape({-1, experts}).contiguous();
    expect(sequence_length >= 1 && slopes.size(0) * sequence_length >= tokens, op,
           "sequence_balance must have a row for each ", sequence_length, " of ", tokens, " tokens; got ",
           slopes.size(0));
  }
  if (token_mask) {
    Arg{op, "token_mask", *token_mask}.with(logits).dtype({ScalarType::Bool}).shape({tokens}).contiguous();
  }

  const Tensor partial = empty(logits, {kGateLossBlocks, kGateLosses}, ScalarType::Float);
  const Tensor sums = empty(logits, {kGateLosses}, ScalarType::Float);
  const Launch launch(logits);
  launch_gate_losses({.logits = logits.data_ptr(),
                      .dtype = kernel_dtype(op, "logits", logits),
                      .row_stride = logits.stride(0),
                      .balance = input<float>(balance),
                      .sequence_balance = input<float>(sequence_balance),
                      .sequence_length = sequence_length,
                      .token_mask = input<bool>(token_mask),
                      .partial = output<float>(partial),
                      .sums = output<float>(sums),
                      .tokens = tokens,
                      .sequences = sequence_balance ? sequence_balance->size(0) : 0,
                      .experts = static_cast<int>(experts),
                      .sigmoid = sigmoid,
                      .squares = z_loss},
                     launch.stream());
  return sums;
}

// ---- route ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(Tensor indices, int64_t num_experts,
                                                         std::optional<Tensor> capacity, std::optional<Tensor> weights,
                                                         std::optional<Tensor> token_mask, bool by_probability) {
  const char* op = "route";
  Arg{op, "indices", indices}.cuda().dtype({ScalarType::Int, ScalarType::Long}).shape({-1, -1}).contiguous();
  const int64_t tokens = indices.size(0);
  const int64_t k = indices.size(1);
  const int64_t pairs = tokens * k;
  expect(num_experts >= 1 && num_experts <= kMaxRouteExperts, op, "num_experts must be in [1, ", kMaxRouteExperts,
         "]; got ", num_experts);
  expect(k >= 1 && pairs <= kMaxRoutePairs, op, "indices must hold 1 or more choices and at most 2^31 - 1 pairs; got ",
         Shape{indices});
  if (capacity) {
    Arg{op, "capacity", *capacity}.with(indices).dtype({ScalarType::Int}).shape({-1}).contiguous();
    expect(capacity->size(0) == 1 || capacity->size(0) == num_experts, op, "capacity must have shape [1] or [",
           num_experts, "]; got ", Shape{*capacity});
  }
  // Without a capacity nothing is dropped, whatever the priority.
  by_probability = by_probability && capacity.has_value();
  if (by_probability) {
    expect(weights.has_value(), op, "weights are needed by probability");
    Arg{op, "weights", *weights}.with(indices).dtype({ScalarType::Float}).shape({tokens, k}).contiguous();
  }
  if (token_mask) {
    Arg{op, "token_mask", *token_mask}.with(indices).dtype({ScalarType::Bool}).shape({tokens}).contiguous();
  }

  const Tensor expert_counts = empty(indices, {num_experts}, ScalarType::Int);
  const Tensor expert_offsets = empty(indices, {num_experts + 1}, ScalarType::Int);
  const Tensor row_token = empty(indices, {pairs}, ScalarType::Int);
  const Tensor row_pair = empty(indices, {pairs}, ScalarType::Int);
  const Tensor token_row = empty(indices, {tokens, k}, ScalarType::Int);
  RouteParams params = {};
  params.indices = indices.data_ptr();
  params.index_dtype = kernel_dtype(op, "indices", indices);
  params.capacity = input<int32_t>(capacity);
  params.capacity_stride = capacity && capacity->size(0) > 1 ? 1 : 0;
  params.weights = input<float>(weights);
  params.token_mask = input<bool>(token_mask);
  params.expert_counts = output<int32_t>(expert_counts);
  params.expert_offsets = output<int32_t>(expert_offsets);
  params.row_token = output<int32_t>(row_token);
  params.row_pair = output<int32_t>(row_pair);
  params.token_row = output<int32_t>(token_row);
  params.tokens = tokens;
  params.choices = static_cast<int>(k);
  params.experts = static_cast<int>(num_experts);
  params.by_probability = by_probability;
  const Tensor workspace =
      empty(indices, {route_workspace(tokens, params.choices, params.experts, by_probability)}, ScalarType::Int);
  params.workspace = output<int32_t>(workspace);
  launch_route(params, Launch(indices).stream());
  return {expert_counts, expert_offsets, row_token, row_pair, token_row};
}

std::tuple<Tensor, Tensor, Tensor> reroute(Tensor scores, Tensor weights, Tensor indices, Tensor capacity,
                                           int64_t rounds) {
  const char* op = "reroute";
  Arg{op, "scores", scores}.cuda().dtype(kFloats).shape({-1, -1}).contiguous();
  const int64_t tokens = scores.size(0);
  const int64_t experts = scores.size(1);
  Arg{op, "indices", indices}.with(scores).dtype({ScalarType::Int, ScalarType::Long}).shape({tokens, -1}).contiguous();
  const int64_t k = indices.size(1);
  Arg{op, "weights", weights}.with(scores).dtype({ScalarType::Float}).shape({tokens, k}).contiguous();
  Arg{op, "capacity", capacity}.with(scores).dtype({ScalarType::Int}).shape({-1}).contiguous();
  expect(experts >= 1 && experts <= kMaxRouteExperts, op, "E must be in [1, ", kMaxRouteExperts, "]; got ", experts);
  expect(k >= 1 && k <= kMaxRerouteChoices && tokens * k <= kMaxRoutePairs, op, "indices must hold 1 to ",
         kMaxRerouteChoices, " choices and at most 2^31 - 1 pairs; got ", Shape{indices});
  expect(capacity.size(0) == 1 || capacity.size(0) == experts, op, "capacity must have shape [1] or [", experts,
         "]; got ", Shape{capacity});

  const Tensor new_weights = empty(scores, {tokens, k}, ScalarType::Float);
  const Tensor new_indices = empty(scores, {tokens, k}, indices.scalar_type());
  const Tensor moved = empty(scores, {tokens, k}, ScalarType::Bool);
  RerouteParams params = {};
  params.scores = scores.data_ptr();
  params.score_dtype = kernel_dtype(op, "scores", scores);
  params.weights = input<float>(weights);
  params.indices = indices.data_ptr();
  params.index_dtype = kernel_dtype(op, "indices", indices);
  params.capacity = input<int32_t>(capacity);
  params.capacity_stride = capacity.size(0) > 1 ? 1 : 0;
  params.new_weights = output<float>(new_weights);
  params.new_indices = new_indices.data_ptr();
  params.moved = output<bool>(moved);
  params.tokens = tokens;
  params.choices = static_cast<int>(k);
  params.experts = static_cast<int>(experts);
  params.rounds = static_cast<int>(rounds);
  const Tensor workspace = empty(scores, {reroute_workspace(tokens, params.choices, params.experts)}, ScalarType::Int);
  params.workspace = output<int32_t>(workspace);
  launch_reroute(params, Launch(scores).stream());
  return {new_weights, new_indices, moved};
}

Tensor routing_stats(Tensor expert_counts, Tensor token_row, std::optional<Tensor> indices,
                     std::optional<Tensor> weights, std::optional<Tensor> token_mask) {
  const char* op = "routing_stats";
  Arg{op, "expert_counts", expert_counts}.cuda().dtype({ScalarType::Int}).shape({-1}).contiguous();
  Arg{op, "token_row", token_row}.with(expert_counts).dtype({ScalarType::Int}).shape({-1, -1}).contiguous();
  const int64_t experts = expert_counts.size(0);
  const int64_t tokens = token_row.size(0);
  const int64_t k = token_row.size(1);
  expect(experts >= 1, op, "expert_counts must not be empty");
  if (indices) {
    Arg{op, "indices", *indices}.with(expert_counts).dtype({ScalarType::Int, ScalarType::Long});
    Arg{op, "indices", *indices}.shape({tokens, k}).contiguous();
  }
  if (weights) {
    Arg{op, "weights", *weights}.with(expert_counts).dtype({ScalarType::Float}).shape({tokens, k}).contiguous();
  }
  if (token_mask) {
    Arg{op, "token_mask", *token_mask}.with(expert_counts).dtype({ScalarType::Bool}).shape({tokens}).contiguous();
  }

  const Tensor partial = empty(expert_counts, {kRoutingStatsBlocks, kRoutingSums}, ScalarType::Double);
  const Tensor stats = empty(expert_counts, {experts + kRoutingMeasures}, ScalarType::Float);
  launch_routing_stats({.expert_counts = input<int32_t>(expert_counts),
                        .token_row = input<int32_t>(token_row),
                        .indices = indices ? indices->data_ptr() : nullptr,
                        .index_dtype = indices ? kernel_dtype(op, "indices", *indices) : DType::kInt32,
                        .weights = input<float>(weights),
                        .token_mask = input<bool>(token_mask),
                        .partial = output<double>(partial),
                        .stats = output<float>(stats),
                        .tokens = tokens,
                        .choices = static_cast<int>(k),
                        .experts = static_cast<int>(experts)},
                       Launch(expert_counts).stream());
  return stats;
}

// ---- capacity ------------------------------------------------------------------------------------

Tensor dynamic_capacity(Tensor expert_counts, double target_drop_rate) {
  const char* op = "dynamic_capacity";
  Arg{op, "expert_counts", expert_counts}.cuda().dtype({ScalarType::Int, ScalarType::Long}).shape({-1}).contiguous();
  const Tensor capacity = empty(expert_counts, {1}, ScalarType::Int);
  launch_dynamic_capacity({.expert_counts = expert_counts.data_ptr(),
                           .dtype = kernel_dtype(op, "expert_counts", expert_counts),
                           .counts = expert_counts.size(0),
                           .target_drop_rate = target_drop_rate,
                           .capacity = output<int32_t>(capacity)},
                          Launch(expert_counts).stream());
  return capacity;
}

Tensor running_capacity(Tensor window, Tensor steps, double mean, double quantile, double margin, double max_factor) {
  const char* op = "running_capacity";
  Arg{op, "window", window}.cuda().dtype({ScalarType::Float}).shape({-1}).contiguous();
  Arg{op, "steps", steps}.with(window).dtype({ScalarType::Long}).shape({});
  expect(window.size(0) >= 1 && window.size(0) <= kMaxCapacityWindow, op, "window must have 1 to ", kMaxCapacityWindow,
         " slots; got ", Shape{window});
  const Tensor capacity = empty(window, {1}, ScalarType::Int);
  launch_running_capacity({.window = input<float>(window),
                           .steps = input<int64_t>(steps),
                           .slots = static_cast<int>(window.size(0)),
                           .mean = mean,
                           .quantile = quantile,
                           .margin = margin,
                           .max_factor = max_factor,
                           .capacity = output<int32_t>(capacity)},
                          Launch(window).stream());
  return capacity;
}

// ---- permute, combine ----------------------------------------------------------------------------

// K of T * K pairs.
int64_t choices_of(const char* op, int64_t pairs, int64_t tokens, const std::optional<Tensor>& token_row) {
  const int64_t k = token_row ? token_row->size(1) : tokens > 0 ? pairs / tokens : 0;
  expect(k * tokens == pairs, op, pairs, " pairs are no multiple of ", tokens, " tokens");
  return k;
}

Tensor permute(Tensor x, Tensor row_token, Tensor expert_offsets, std::optional<Tensor> token_row) {
  const char* op = "permute";
  Arg{op, "x", x}.cuda().dtype(kFloats).shape({-1, -1}).contiguous();
  Arg{op, "row_token", row_token}.with(x).dtype({ScalarType::Int}).shape({-1}).contiguous();
  Arg{op, "expert_offsets", expert_offsets}.with(x).dtype({ScalarType::Int}).shape({-1}).contiguous();
  expect(expert_offsets.size(0) >= 1, op, "expert_offsets must not be empty");
  if (token_row) Arg{op, "token_row", *token_row}.with(x).dtype({ScalarType::Int}).shape({x.size(0), -1}).contiguous();

  const Tensor rows = empty(x, {row_token.size(0), x.size(1)}, x.scalar_type());
  PermuteParams params = {};
  params.x = x.data_ptr();
  params.row_token = input<int32_t>(row_token);
  params.token_row = input<int32_t>(token_row);
  params.num_rows = input<int32_t>(expert_offsets) + expert_offsets.size(0) - 1;
  params.rows = rows.data_ptr();
  params.dtype = kernel_dtype(op, "x", x);
  params.tokens = x.size(0);
  params.pairs = row_token.size(0);
  params.choices = static_cast<int>(choices_of(op, params.pairs, params.tokens, token_row));
  params.hidden = x.size(1);
  launch_permute(params, Launch(x).stream());
  return rows;
}

Tensor combine(Tensor rows, Tensor token_row, std::optional<Tensor> weights, std::optional<Tensor> residual) {
  const char* op = "combine";
  Arg{op, "rows", rows}.cuda().dtype(kFloats).shape({-1, -1}).contiguous();
  Arg{op, "token_row", token_row}.with(rows).dtype({ScalarType::Int}).shape({-1, -1}).contiguous();
  const int64_t tokens = token_row.size(0);
  const int64_t k = token_row.size(1);
  if (weights) Arg{op, "weights", *weights}.with(rows).dtype({ScalarType::Float}).shape({tokens, k}).contiguous();
  if (residual) {
    Arg{op, "residual", *residual}.with(rows).dtype({rows.scalar_type()}).shape({tokens, rows.size(1)}).contiguous();
  }

  const Tensor out = empty(rows, {tokens, rows.size(1)}, rows.scalar_type());
  CombineParams params = {};
  params.rows = rows.data_ptr();
  params.token_row = input<int32_t>(token_row);
  params.weights = input<float>(weights);
  params.residual = residual ? residual->data_ptr() : nullptr;
  params.out = out.data_ptr();
  params.dtype = kernel_dtype(op, "rows", rows);
  params.tokens = tokens;
  params.num_rows = rows.size(0);
  params.choices = static_cast<int>(k);
  params.hidden = rows.size(1);
  launch_combine(params, Launch(rows).stream());
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_out, Tensor rows, Tensor row_pair,
                                            std::optional<Tensor> weights, Tensor expert_offsets,
                                            std::optional<Tensor> token_row) {
  const char* op = "combine_backward";
  Arg{op, "rows", rows}.cuda().dtype(kFloats).shape({-1, -1}).contiguous();
  const int64_t pairs = rows.size(0);
  const int64_t hidden = rows.size(1);
  Arg{op, "grad_out", grad_out}.with(rows).dtype({rows.scalar_type()}).shape({-1, hidden}).contiguous();
  const int64_t tokens = grad_out.size(0);
  Arg{op, "row_pair", row_pair}.with(rows).dtype({ScalarType::Int}).shape({pairs}).contiguous();
  Arg{op, "expert_offsets", expert_offsets}.with(rows).dtype({ScalarType::Int}).shape({-1}).contiguous();
  expect(expert_offsets.size(0) >= 1, op, "expert_offsets must not be empty");
  if (token_row) Arg{op, "token_row", *token_row}.with(rows).dtype({ScalarType::Int}).shape({tokens, -1}).contiguous();
  const int64_t k = choices_of(op, pairs, tokens, token_row ? token_row : weights);
  if (weights) Arg{op, "weights", *weights}.with(rows).dtype({ScalarType::Float}).shape({tokens, k}).contiguous();

  const Tensor grad_rows = empty(rows, {pairs, hidden}, rows.scalar_type());
  const Tensor grad_weights = empty(rows, {tokens, k}, ScalarType::Float);
  CombineBackwardParams params = {};
  params.grad_out = grad_out.data_ptr();
  params.rows = rows.data_ptr();
  params.row_pair = input<int32_t>(row_pair);
  params.token_row = input<int32_t>(token_row);
  params.weights = input<float>(weights);
  params.num_rows = input<int32_t>(expert_offsets) + expert_offsets.size(0) - 1;
  params.grad_rows = grad_rows.data_ptr();
  params.grad_weights = output<float>(grad_weights);
  params.dtype = kernel_dtype(op, "rows", rows);
  params.tokens = tokens;
  params.pairs = pairs;
  params.choices = static_cast<int>(k);
  params.hidden = hidden;
  launch_combine_backward(params, Launch(rows).stream());
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace ling::binding
