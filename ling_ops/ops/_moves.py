"""Rows moved and added up by maps that need not come from `route`.

A map and its inverse: `row_token` [M], the token that a row is a copy of, and `token_rows` [T,K],
the rows of a token; -1 for none. Every row belongs to one token at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import permute as reference
from . import _library  # noqa: F401
from ._backend import use_kernel


def _combine(rows: Tensor, sources: Tensor, weights: Tensor | None) -> Tensor:
    """out[i] = Σ_k weights[i,k] · rows[sources[i,k]]; a source of -1 adds nothing."""
    if not rows.shape[0]:
        return rows.new_zeros(sources.shape[0], rows.shape[1])
    unsupported = "the rows are float64" if rows.dtype == torch.float64 else None
    if not use_kernel("unpermute", rows, unsupported):
        return reference.combine(rows, sources, weights)
    weights = None if weights is None else weights.float().contiguous()
    return torch.ops.ling_ops.combine(rows.contiguous(), sources.contiguous(), weights, None)


def inverse(sources: Tensor, num_rows: int) -> Tensor:
    """[num_rows] int64: the position in ``sources`` that reads each row, or -1."""
    found = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=sources.device)
    rows = torch.where(sources >= 0, sources, num_rows).flatten().long()
    positions = torch.arange(sources.numel(), device=sources.device)
    return found.scatter_(0, rows, positions)[:-1]


class _Gather(torch.autograd.Function):
    """Rows of x; the gradient of a row of x is the sum over its copies, in fp32."""

    @staticmethod
    def forward(ctx, x, row_token, token_rows):
        ctx.save_for_backward(token_rows)
        return _combine(x, row_token.unsqueeze(1), None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (token_rows,) = ctx.saved_tensors
        return _combine(grad, token_rows, None), None, None


class _Sum(torch.autograd.Function):
    """The weighted sum of each token's rows. Every row belongs to one token at most."""

    @staticmethod
    def forward(ctx, rows, token_rows, weights):
        ctx.save_for_backward(rows, token_rows, weights)
        return _combine(rows, token_rows, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, token_rows, weights = ctx.saved_tensors
        pair = inverse(token_rows, rows.shape[0])
        choices = max(1, token_rows.shape[1])
        row_token = torch.where(pair >= 0, pair // choices, -1).int().unsqueeze(1)
        factor = grad_rows = grad_weights = None
        if weights is not None:
            factor = weights.flatten()[pair.clamp(min=0)].unsqueeze(1) if pair.numel() else None
        if ctx.needs_input_grad[0]:
            grad_rows = _combine(grad, row_token, factor)
        if weights is not None and ctx.needs_input_grad[2]:
            wide = torch.promote_types(rows.dtype, torch.float32)
            products = (_combine(grad, row_token, None).to(wide) * rows.to(wide)).sum(1)
            # Rows of no token may hold anything: their sums go to a place that is cut off.
            flat = products.new_zeros(token_rows.numel() + 1)
            last = torch.where(pair >= 0, pair, token_rows.numel())
            flat = flat.scatter(0, last, products)[:-1]
            grad_weights = flat.view(weights.shape).to(weights.dtype)
        return grad_rows, None, grad_weights


def gather_rows(x: Tensor, row_token: Tensor, token_rows: Tensor) -> Tensor:
    """rows [M,H] of x [T,H]: rows[r] = x[row_token[r]], zero for -1. Maps are int32."""
    return _Gather.apply(x, row_token, token_rows)


def sum_rows(rows: Tensor, token_rows: Tensor, weights: Tensor | None) -> Tensor:
    """out [T,H] in rows' dtype: out[t] = sum over k of weights[t,k] * rows[token_rows[t,k]].

    The sum is taken in fp32. Rows that no token has may hold anything. `token_rows` is int32.
    """
    return _Sum.apply(rows, token_rows, weights)
