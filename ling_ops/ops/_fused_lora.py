"""Experts with low-rank additions on tensor-core kernels: the nodes of `_fused_mlp`, each with one.

Beside what those nodes save there is one tensor [M, r] for each addition. Nothing of the size of
the weights is made; a frozen weight costs no product in the backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference.activation import ACTIVATIONS
from ..reference.lora_mlp import LowRank
from ..reference.route import Routing
from ._fused_mlp import _Down, _free_saved, _leave_undefined, _Up, _weight_grad

_OPS = torch.ops.ling_ops
_PLAIN = ACTIVATIONS.index("silu")


def _gathered_product(table: Tensor, proj: Tensor, routing: Routing) -> Tensor:
    """proj[e] [r, Kd] times the gathered rows of table [T, Kd]: [M, r]."""
    # the kernel that gathers while loading also writes an activation, here [M, r] and of no use
    args = table, proj, routing.row_token, routing.expert_offsets, _PLAIN, math.inf, True
    return _OPS.moe_up(*args)[0]


class _LoraUp(torch.autograd.Function):
    """h = x W^T + scale (x A^T) B^T of the rows, and act(h), which carries no gradient."""

    @staticmethod
    def forward(ctx, x, proj, a, b, scale, routing, settings):
        offsets = routing.expert_offsets
        h, _ = _OPS.moe_up(x, proj, routing.row_token, offsets, *settings, True)
        del _
        inner = _gathered_product(x, a, routing).mul_(scale)
        act = _OPS.add_activate_(h, _OPS.grouped_gemm(inner, b, offsets), *settings)
        ctx.save_for_backward(x, proj, a, b, inner, *routing)
        ctx.scale = scale
        ctx.mark_non_differentiable(act)
        _leave_undefined(ctx)
        return h, act

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh, _da):
        x, proj, a, b, inner, *fields = ctx.saved_tensors
        routing, offsets = Routing(*fields), fields[1]
        needs_x, needs_proj, needs_a, needs_b = ctx.needs_input_grad[:4]
        grad_x = grad_proj = grad_a = grad_b = None
        if needs_x or needs_a:
            d_inner = _OPS.grouped_gemm(dh, b.transpose(1, 2), offsets).mul_(ctx.scale)
        if needs_x:
            rows = _OPS.grouped_gemm(dh, proj.transpose(1, 2), offsets)
            grad_x = _OPS.combine(rows, routing.token_row, None, None)
            del rows
            rows = _OPS.grouped_gemm(d_inner, a.transpose(1, 2), offsets)
            grad_x = _OPS.combine(rows, routing.token_row, None, grad_x)
            del rows
        if needs_proj:
            grad_proj = _weight_grad(dh, x, routing, True, None)
        if needs_a:
            grad_a = _OPS.moe_dw(d_inner, x, routing.row_token, offsets, True)
        if needs_b:
            grad_b = _OPS.grouped_gemm_dw(dh, inner, offsets)
        return grad_x, grad_proj, grad_a, grad_b, None, None, None


class _LoraDown(torch.autograd.Function):
    """out = combine(y, weights), y = act W^T + scale (act A^T) B^T; act's gradient goes to h."""

    @staticmethod
    def forward(ctx, h, act, down_proj, a, b, weights, scale, routing, settings):
        offsets = routing.expert_offsets
        inner = _OPS.grouped_gemm(act, a, offsets).mul_(scale)
        rows = _OPS.grouped_gemm(act, down_proj, offsets)
        out = _OPS.combine(rows, routing.token_row, weights, None)
        del rows
        rows = _OPS.grouped_gemm(inner, b, offsets)
        ctx.save_for_backward(h, down_proj, a, b, inner, weights, *routing)
        ctx.scale, ctx.settings = scale, settings
        return _OPS.combine(rows, routing.token_row, weights, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        h, down_proj, a, b, inner, weights, *fields = ctx.saved_tensors
        routing, offsets = Routing(*fields), fields[1]
        grad_out = grad_out.contiguous()
        pairs = routing.row_pair, offsets, *ctx.settings
        d_inner = _gathered_product(grad_out, b.transpose(1, 2).contiguous(), routing)
        d_inner.mul_(ctx.scale)
        dh, wa, grad_weights = _OPS.moe_dact(
            grad_out, down_proj, h, weights, routing.row_token, *pairs
        )
        # dh is linear in what reaches act, and so are the gate weights' gradients
        own_row = torch.arange(h.shape[0], device=h.device, dtype=torch.int32)
        more, _, more_weights = _OPS.moe_dact(d_inner, a, h, weights, own_row, *pairs)
        dh.add_(more)
        grad_weights.add_(more_weights)
        del h, more, _
        _free_saved(ctx)
        grad_down = grad_a = grad_b = None
        if ctx.needs_input_grad[2]:
            grad_down = _weight_grad(grad_out, wa, routing, False, None)
        if ctx.needs_input_grad[3]:
            grad_a = _OPS.grouped_gemm_dw(d_inner, wa, offsets)
        if ctx.needs_input_grad[4]:
            pair = routing.row_pair.clamp(min=0).long()
            inner = inner * weights.reshape(-1)[pair].unsqueeze(-1).to(inner.dtype)
            grad_b = _OPS.moe_dw(grad_out, inner, routing.row_token, offsets, False)
        return dh, None, grad_down, grad_a, grad_b, grad_weights, None, None, None


def fused_lora_mlp(
    x: Tensor,
    proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    routing: Routing,
    *,
    gate_up_lora: LowRank | None,
    down_lora: LowRank | None,
    activation: str,
    swiglu_limit: float | None,
) -> Tensor:
    """`lora_mlp` without biases and dropout, as `fused_moe_mlp`; ranks are multiples of 8."""
    settings = (ACTIVATIONS.index(activation), math.inf if swiglu_limit is None else swiglu_limit)
    x, proj, down_proj = x.contiguous(), proj.contiguous(), down_proj.contiguous()
    weights = weights.float().contiguous()
    if gate_up_lora is None:
        h, act = _Up.apply(x, proj, routing, settings, None)
    else:
        low = gate_up_lora.a.contiguous(), gate_up_lora.b.contiguous(), gate_up_lora.scale
        h, act = _LoraUp.apply(x, proj, *low, routing, settings)
    if down_lora is None:
        return _Down.apply(h, act, down_proj, weights, routing, settings, None)
    low = down_lora.a.contiguous(), down_lora.b.contiguous()
    return _LoraDown.apply(h, act, down_proj, *low, weights, down_lora.scale, routing, settings)
