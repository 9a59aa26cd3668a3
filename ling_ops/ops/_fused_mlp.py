"""The experts on tensor-core kernels: two autograd nodes, x -> h and h -> out.

Saved for the backward are x (an input), h, the gate weights and the routing; a, the rows of y and
every gathered copy are not. Two nodes, so that h can go as soon as its gradient is there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference.activation import ACTIVATIONS
from ..reference.route import Routing
from .route import MAX_KERNEL_EXPERTS, route

_OPS = torch.ops.ling_ops

#: Gathering while loading makes dW about a tenth slower; a copy in row order costs as much as that
#: at 2048 columns of the other operand. It is always the copy that takes memory, [M,H].
_GATHERED_COLUMNS = 2048


def _weight_grad(dy: Tensor, x: Tensor, routing, gather_x: bool, buffer: Tensor | None):
    """dW of one projection, or None once it is in the buffer; one of dy and x is in token order."""
    row_token, offsets = routing.row_token, routing.expert_offsets
    args = dy, x, row_token, offsets, gather_x
    if buffer is None:
        other = dy if gather_x else x
        if other.shape[1] <= _GATHERED_COLUMNS:
            return _OPS.moe_dw(*args)
        table = _OPS.permute(x if gather_x else dy, row_token, offsets, routing.token_row)
        dy, x = (dy, table) if gather_x else (table, x)
        return _OPS.grouped_gemm_dw(dy, x, offsets)
    _OPS.main_grad_add_(buffer, *args)
    return None


def _free_saved(ctx) -> None:
    """Lets saved tensors go before the node ends, unless the graph is kept for another pass.

    h is the largest of them, and dW_down with a copy in row order would be the step's peak.
    A compiled graph frees what it no longer needs by itself.
    """
    if not torch.compiler.is_compiling() and hasattr(ctx, "maybe_clear_saved_tensors"):
        ctx.maybe_clear_saved_tensors()


def _leave_undefined(ctx) -> None:
    """No zeros in place of the gradient that a never gets: they are as large as a.

    A compiled graph makes none, and its tracing does not know the call.
    """
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


class _Up(torch.autograd.Function):
    """h and a = act(h) of the rows; a carries no gradient of its own."""

    @staticmethod
    def forward(ctx, x, proj, routing, settings, buffer):
        h, a = _OPS.moe_up(x, proj, routing.row_token, routing.expert_offsets, *settings, True)
        ctx.save_for_backward(x, proj, *routing)
        ctx.buffer = buffer
        ctx.mark_non_differentiable(a)
        _leave_undefined(ctx)
        return h, a

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh, _da):
        x, proj, *fields = ctx.saved_tensors
        routing = Routing(*fields)
        grad_x = grad_proj = None
        if ctx.needs_input_grad[0]:
            rows = _OPS.grouped_gemm(dh, proj.transpose(1, 2), routing.expert_offsets)
            grad_x = _OPS.combine(rows, routing.token_row, None, None)
            del rows
        if ctx.needs_input_grad[1]:
            grad_proj = _weight_grad(dh, x, routing, True, ctx.buffer)
        return grad_x, grad_proj, None, None, None


class _Down(torch.autograd.Function):
    """out = combine(a @ down_proj^T, weights); the gradient reaches a through h."""

    @staticmethod
    def forward(ctx, h, a, down_proj, weights, routing, settings, buffer):
        rows = _OPS.grouped_gemm(a, down_proj, routing.expert_offsets)
        ctx.save_for_backward(h, down_proj, weights, *routing)
        ctx.settings, ctx.buffer = settings, buffer
        return _OPS.combine(rows, routing.token_row, weights, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        h, down_proj, weights, *fields = ctx.saved_tensors
        routing = Routing(*fields)
        grad_out = grad_out.contiguous()
        dh, wa, grad_weights = _OPS.moe_dact(
            grad_out, down_proj, h, weights, routing.row_token, routing.row_pair,
            routing.expert_offsets, *ctx.settings,
        )  # fmt: skip
        del h
        _free_saved(ctx)
        grad_down = None
        if ctx.needs_input_grad[2]:
            grad_down = _weight_grad(grad_out, wa, routing, False, ctx.buffer)
        return dh, None, grad_down, grad_weights, None, None, None


def fused_moe_mlp(
    x: Tensor,
    proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    indices: Tensor,
    routing: Routing | None,
    *,
    activation: str,
    swiglu_limit: float | None,
    main_grads: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`moe_mlp` without biases, on bf16 or fp16 CUDA tensors whose H and I are multiples of 8."""
    num_experts = down_proj.shape[0]
    settings = (ACTIVATIONS.index(activation), math.inf if swiglu_limit is None else swiglu_limit)
    x, proj, down_proj = x.contiguous(), proj.contiguous(), down_proj.contiguous()
    weights = weights.float().contiguous()
    trained = any(t.requires_grad for t in (x, proj, down_proj, weights))
    inference = not (torch.is_grad_enabled() and trained)
    if routing is None and not (inference and num_experts <= MAX_KERNEL_EXPERTS):
        routing = route(indices, num_experts)
    if inference:
        places = (None, None, None)
        if routing is not None:
            places = routing.row_token, routing.expert_offsets, routing.token_row
        return _OPS.moe_forward(
            x, proj, down_proj, weights, indices.contiguous(), *places, *settings
        )
    up_buffer, down_buffer = (None, None) if main_grads is None else main_grads
    h, a = _Up.apply(x, proj, routing, settings, up_buffer)
    return _Down.apply(h, a, down_proj, weights, routing, settings, down_buffer)
