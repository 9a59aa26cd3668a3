"""The operators `torch.ops.ling_ops.*`: schemas, CPU implementations and shapes.

Defined here and not in the binary, so that they exist in every install: a graph exported on one
machine loads on another. `_C` adds the CUDA kernels to the same schemas. The operators are plain
(no autograd): the functions of `ling_ops.ops` check arguments, choose and differentiate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _extension
from ..reference import capacity, gate, gemm, heads, lora_mlp, moe_mlp, permute, stats
from ..reference.activation import ACTIVATIONS, GATED
from ..reference.losses import demand
from ..reference.route import moved_weights, reroute_ids
from ..reference.route import route as _route

_LIBRARY = torch.library.Library("ling_ops", "DEF")


def _define(schema: str, cpu: Callable, fake: Callable) -> None:
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"ling_ops::{name}", fake, lib=_LIBRARY)


def _score_name(sigmoid: bool) -> str:
    return "sigmoid" if sigmoid else "softmax"


def _gate(logits, expert_bias, k, sigmoid, num_groups, topk_groups, renormalize, scale):
    weights, indices = gate.topk_gate(
        logits,
        k,
        score_function=_score_name(sigmoid),
        expert_bias=expert_bias,
        num_groups=num_groups,
        topk_groups=topk_groups,
        renormalize=renormalize,
        scale=scale,
    )
    return weights, indices, demand(indices, logits.shape[1]).to(torch.int32)


def _gate_fake(logits, expert_bias, k, sigmoid, num_groups, topk_groups, renormalize, scale):
    tokens, experts = logits.shape
    score_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(tokens, k, dtype=score_dtype),
        logits.new_empty(tokens, k, dtype=torch.int32),
        logits.new_empty(experts, dtype=torch.int32),
    )


def _gate_backward(
    grad_weights, logits, weights, indices, balance, sequence_length, z_scale, token_mask,
    sigmoid, renormalize, scale,
):  # fmt: skip
    return gate.topk_gate_backward(
        grad_weights,
        logits,
        indices,
        balance=balance,
        sequence_length=sequence_length,
        z_scale=z_scale,
        token_mask=token_mask,
        score_function=_score_name(sigmoid),
        renormalize=renormalize,
        scale=scale,
    )


def _gate_backward_fake(grad_weights, logits, *unused):
    return logits.new_empty(logits.shape)


def _gate_losses(
    logits, balance, sequence_balance, sequence_length, token_mask, sigmoid, z_loss
):  # fmt: skip
    return gate.gate_losses(
        logits,
        balance=balance,
        sequence_balance=sequence_balance,
        sequence_length=sequence_length,
        token_mask=token_mask,
        score_function=_score_name(sigmoid),
        z_loss=z_loss,
    )


def _gate_losses_fake(logits, *unused):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(3, dtype=wide)


def _route_cpu(indices, num_experts, capacity, weights, token_mask, by_probability):
    return tuple(
        _route(
            indices,
            num_experts,
            capacity=capacity,
            weights=weights,
            token_mask=token_mask,
            by_probability=by_probability,
        )
    )


def _route_fake(indices, num_experts, capacity, weights, token_mask, by_probability):
    pairs = indices.shape[0] * indices.shape[1]
    sizes = ((num_experts,), (num_experts + 1,), (pairs,), (pairs,), tuple(indices.shape))
    return tuple(indices.new_empty(size, dtype=torch.int32) for size in sizes)


def _reroute_cpu(scores, weights, indices, capacity, rounds):
    new_ids, moved = reroute_ids(scores, indices, capacity=capacity, rounds=rounds)
    return moved_weights(scores, weights, indices, new_ids, moved), new_ids, moved


def _reroute_fake(scores, weights, indices, capacity, rounds):
    return (
        weights.new_empty(weights.shape),
        indices.new_empty(indices.shape),
        indices.new_empty(indices.shape, dtype=torch.bool),
    )


def _capacity_fake(counts_or_window, *unused):
    return counts_or_window.new_empty(1, dtype=torch.int32)


def _choices(grad_out, row_pair, weights, token_row):
    """K; without tokens only the weights or token_row can tell it."""
    for known in (weights, token_row):
        if known is not None:
            return known.shape[1]
    return row_pair.shape[0] // max(1, grad_out.shape[0])


def _combine_backward(grad_out, rows, row_pair, weights, expert_offsets, token_row=None):
    choices = _choices(grad_out, row_pair, weights, token_row)
    return permute.combine_backward(grad_out, rows, row_pair, weights, choices)


def _combine_backward_fake(grad_out, rows, row_pair, weights, expert_offsets, token_row=None):
    choices = _choices(grad_out, row_pair, weights, token_row)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.new_empty(rows.shape), rows.new_empty(grad_out.shape[0], choices, dtype=wide)


_define(
    "topk_gate(Tensor logits, Tensor? expert_bias, int k, bool sigmoid, int num_groups, "
    "int topk_groups, bool renormalize, float scale) "
    "-> (Tensor weights, Tensor indices, Tensor expert_counts)",
    _gate,
    _gate_fake,
)
_define(
    "topk_gate_backward(Tensor grad_weights, Tensor logits, Tensor weights, Tensor indices, "
    "Tensor? balance, int sequence_length, Tensor? z_scale, Tensor? token_mask, bool sigmoid, "
    "bool renormalize, float scale) -> Tensor",
    _gate_backward,
    _gate_backward_fake,
)
_define(
    "gate_losses(Tensor logits, Tensor? balance, Tensor? sequence_balance, int sequence_length, "
    "Tensor? token_mask, bool sigmoid, bool z_loss) -> Tensor",
    _gate_losses,
    _gate_losses_fake,
)
_define(
    "route(Tensor indices, int num_experts, Tensor? capacity, Tensor? weights, "
    "Tensor? token_mask, bool by_probability) -> (Tensor expert_counts, Tensor expert_offsets, "
    "Tensor row_token, Tensor row_pair, Tensor token_row)",
    _route_cpu,
    _route_fake,
)
_define(
    "reroute(Tensor scores, Tensor weights, Tensor indices, Tensor capacity, int rounds) "
    "-> (Tensor new_weights, Tensor new_indices, Tensor moved)",
    _reroute_cpu,
    _reroute_fake,
)
_define(
    "routing_stats(Tensor expert_counts, Tensor token_row, Tensor? indices, Tensor? weights, "
    "Tensor? token_mask) -> Tensor",
    stats.routing_stats,
    lambda expert_counts, *unused: expert_counts.new_empty(
        expert_counts.shape[0] + len(stats.MEASURES), dtype=torch.float32
    ),
)
_define(
    "dynamic_capacity(Tensor expert_counts, float target_drop_rate) -> Tensor",
    capacity.dynamic_capacity,
    _capacity_fake,
)
_define(
    "running_capacity(Tensor window, Tensor steps, float mean, float quantile, float margin, "
    "float max_factor) -> Tensor",
    capacity.running_capacity,
    _capacity_fake,
)
_define(
    "permute(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor? token_row=None) -> Tensor",
    lambda x, row_token, expert_offsets, token_row=None: permute.permute(x, row_token),
    lambda x, row_token, *unused: x.new_empty(row_token.shape[0], x.shape[1]),
)
_define(
    "combine(Tensor rows, Tensor token_row, Tensor? weights, Tensor? residual) -> Tensor",
    permute.combine,
    lambda rows, token_row, weights, residual: rows.new_empty(token_row.shape[0], rows.shape[1]),
)
_define(
    "combine_backward(Tensor grad_out, Tensor rows, Tensor row_pair, Tensor? weights, "
    "Tensor expert_offsets, Tensor? token_row=None) -> (Tensor grad_rows, Tensor grad_weights)",
    _combine_backward,
    _combine_backward_fake,
)
_define(
    "grouped_gemm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    gemm.loop_grouped_gemm,
    lambda a, b, offsets: a.new_empty(a.shape[0], b.shape[1]),
)
_define(
    "grouped_gemm_dw(Tensor dy, Tensor x, Tensor offsets) -> Tensor",
    gemm.loop_grouped_gemm_dw,
    lambda dy, x, offsets: x.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1]),
)


def _moe_up_fake(x, proj, row_token, offsets, activation, limit, write_h):
    rows, width = row_token.shape[0], proj.shape[1]
    inner = width // 2 if ACTIVATIONS[activation] in GATED else width
    return x.new_empty((rows, width) if write_h else (0,)), x.new_empty(rows, inner)


def _moe_dact_fake(grad_out, down_proj, h, weights, *unused):
    return (
        h.new_empty(h.shape),
        h.new_empty(h.shape[0], down_proj.shape[2]),
        weights.new_empty(weights.shape),
    )


_define(
    "moe_dw(Tensor dy, Tensor x, Tensor row_token, Tensor offsets, bool gather_x) -> Tensor",
    moe_mlp.moe_dw,
    lambda dy, x, row_token, offsets, gather_x: x.new_empty(
        offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    ),
)
_define(
    "moe_dw_add_(Tensor(a!) buffer, Tensor dy, Tensor x, Tensor row_token, Tensor offsets, "
    "bool gather_x) -> ()",
    moe_mlp.moe_dw_add_,
    lambda *unused: None,
)
_define(
    "moe_up(Tensor x, Tensor proj, Tensor row_token, Tensor offsets, int activation, "
    "float limit, bool write_h) -> (Tensor h, Tensor a)",
    moe_mlp.moe_up,
    _moe_up_fake,
)
_define(
    "moe_forward(Tensor x, Tensor proj, Tensor down_proj, Tensor weights, Tensor indices, "
    "Tensor? row_token, Tensor? offsets, Tensor? token_row, int activation, float limit) -> Tensor",
    moe_mlp.moe_forward,
    lambda x, *unused: x.new_empty(x.shape),
)
_define(
    "moe_dact(Tensor grad_out, Tensor down_proj, Tensor h, Tensor weights, Tensor row_token, "
    "Tensor row_pair, Tensor offsets, int activation, float limit) "
    "-> (Tensor dh, Tensor wa, Tensor grad_weights)",
    moe_mlp.moe_dact,
    _moe_dact_fake,
)
_define(
    "add_activate_(Tensor(a!) h, Tensor delta, int activation, float limit) -> Tensor",
    lora_mlp.add_activate_,
    lambda h, delta, activation, limit: h.new_empty(
        h.shape[0], h.shape[1] // (2 if ACTIVATIONS[activation] in GATED else 1)
    ),
)
_define(
    "moe_decode(Tensor x, Tensor proj, Tensor down_proj, Tensor weights, Tensor indices, "
    "Tensor? token_row, Tensor? up_bias, Tensor? down_bias, Tensor? shared_gate, "
    "Tensor? shared_up, Tensor? shared_down, int activation, float limit) -> Tensor",
    moe_mlp.moe_decode,
    lambda x, *unused: x.new_empty(x.shape),
)
_define(
    "attention_heads_(Tensor projected, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor rows, "
    "Tensor cos, Tensor sin, Tensor? query_weight, Tensor? key_weight, float eps) -> Tensor",
    heads.attention_heads_,
    lambda projected, key_cache, *unused: key_cache.new_empty(
        projected.shape[0], projected.shape[1] - 2 * key_cache.shape[1], projected.shape[2]
    ),
)


def _main_grad_add_(buffer, dy, x, row_token, offsets, gather_x):
    """`moe_dw_add_` into any buffer: it adds to contiguous fp32 on 16-byte boundaries only."""
    args = dy, x, row_token, offsets, gather_x
    on_boundary = buffer.is_contiguous() and buffer.data_ptr() % 16 == 0
    if buffer.dtype == torch.float32 and on_boundary:
        torch.ops.ling_ops.moe_dw_add_(buffer, *args)
    else:
        buffer.add_(torch.ops.ling_ops.moe_dw(*args))


# An operator of its own, since a traced graph can't ask where a buffer begins.
_define(
    "main_grad_add_(Tensor(a!) buffer, Tensor dy, Tensor x, Tensor row_token, Tensor offsets, "
    "bool gather_x) -> ()",
    _main_grad_add_,
    lambda *unused: None,
)
_LIBRARY.impl("main_grad_add_", _main_grad_add_, "CUDA")

_extension.load()  # registers the CUDA kernels, if there are any; touches no device
