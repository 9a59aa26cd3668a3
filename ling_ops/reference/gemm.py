"""Grouped products, one torch.mm per expert: the definition of `ling_ops.grouped_gemm`.

The loop needs the offsets as Python integers, so each product is an operator of its own:
torch.compile sees one call with a known output shape, and its autograd formula is the pair
itself, which makes second derivatives work too.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def group_bounds(offsets: Tensor, length: int) -> list[tuple[int, int]]:
    """(first, end) of each group; offsets are clamped to [0, length] and made non-decreasing."""
    ends = offsets.detach().clamp(0, length).cummax(0).values.tolist()
    return list(pairwise(ends))


def loop_grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """[M,N]: rows of group e of a [M,Kd] times b[e]^T, b [E,N,Kd]; rows of no group are zero."""
    out = a.new_zeros(a.shape[0], b.shape[1])
    for expert, (first, end) in enumerate(group_bounds(offsets, a.shape[0])):
        if end > first:
            torch.mm(a[first:end], b[expert].t(), out=out[first:end])
    return out


def loop_grouped_gemm_dw(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """[E,N,Kd]: dy[rows of e]^T times x[rows of e], dy [M,N], x [M,Kd]; 0 for an empty group."""
    experts = offsets.shape[0] - 1
    out = x.new_zeros(experts, dy.shape[1], x.shape[1])
    for expert, (first, end) in enumerate(group_bounds(offsets, x.shape[0])):
        if end > first:
            torch.mm(dy[first:end].t(), x[first:end], out=out[expert])
    return out


grouped_gemm = torch.library.custom_op(
    "ling_ops_reference::grouped_gemm", loop_grouped_gemm, mutates_args=()
)
grouped_gemm_dw = torch.library.custom_op(
    "ling_ops_reference::grouped_gemm_dw", loop_grouped_gemm_dw, mutates_args=()
)


@grouped_gemm.register_fake
def _(a, b, offsets):
    return a.new_empty(a.shape[0], b.shape[1])


@grouped_gemm_dw.register_fake
def _(dy, x, offsets):
    return x.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gemm_backward(ctx, grad):
    a, b, offsets = ctx.saved_tensors
    grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_a = grouped_gemm(grad, b.transpose(1, 2), offsets)
    if ctx.needs_input_grad[1]:
        grad_b = grouped_gemm_dw(grad, a, offsets)
    return grad_a, grad_b, None


def _dw_backward(ctx, grad):
    dy, x, offsets = ctx.saved_tensors
    grad_dy = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_dy = grouped_gemm(x, grad, offsets)
    if ctx.needs_input_grad[1]:
        grad_x = grouped_gemm(dy, grad.transpose(1, 2), offsets)
    return grad_dy, grad_x, None


grouped_gemm.register_autograd(_gemm_backward, setup_context=_save)
grouped_gemm_dw.register_autograd(_dw_backward, setup_context=_save)


def row_experts(offsets: Tensor, num_rows: int) -> Tensor:
    """Expert of each row, int64 [num_rows]; E for rows past the end."""
    position = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), position, right=True)
