"""`permute` and `unpermute`: tokens into expert order and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import permute as reference
from ..reference.route import Routing
from . import _checks, _library  # noqa: F401
from ._backend import use_kernel


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, row_token, expert_offsets, token_row):
        ctx.save_for_backward(token_row)
        return torch.ops.ling_ops.permute(x, row_token, expert_offsets, token_row)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (token_row,) = ctx.saved_tensors
        return torch.ops.ling_ops.combine(grad.contiguous(), token_row, None, None), *[None] * 3


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, token_row, row_pair, expert_offsets):
        ctx.save_for_backward(rows, weights, row_pair, expert_offsets, token_row)
        return torch.ops.ling_ops.combine(rows, token_row, weights, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weights, row_pair, expert_offsets, token_row = ctx.saved_tensors
        grad_rows, grad_weights = torch.ops.ling_ops.combine_backward(
            grad.contiguous(), rows, row_pair, weights, expert_offsets, token_row
        )
        return grad_rows, None if weights is None else grad_weights, None, None, None


def check_routing(routing: Routing, device: torch.device | None = None) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a ling_ops.Routing, got {type(routing).__name__}")
    if device is not None and routing.row_token.device != device:
        raise ValueError(f"routing must be on {device}, got {routing.row_token.device}")


def _unsupported(x: Tensor) -> str | None:
    return "the rows are float64" if x.dtype == torch.float64 else None


def permute(x: Tensor, routing: Routing) -> Tensor:
    """Gather tokens into expert order.

    Args:
        x: [T, H] float, differentiable.
        routing: from `ling_ops.route` for the same T tokens.

    Returns:
        rows [T*K, H] in x's dtype: rows[r] = x[routing.row_token[r]]; rows from
        routing.expert_offsets[E] on are zero.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
    """
    _checks.tensor("x", x)
    check_routing(routing, x.device)
    _checks.shape("x", x, (routing.token_row.shape[0], None), "[T, H]")
    _checks.dtype("x", x, _checks.FLOATS)
    if not use_kernel("permute", x, _unsupported(x)):
        return reference.permute(x, routing.row_token)
    x = x.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Permute.apply(x, routing.row_token, routing.expert_offsets, routing.token_row)
    return torch.ops.ling_ops.permute(
        x, routing.row_token, routing.expert_offsets, routing.token_row
    )


def unpermute(rows: Tensor, routing: Routing, weights: Tensor | None = None) -> Tensor:
    """Bring rows back to their tokens and add them up.

    out[t] = sum over k of weights[t,k] * rows[routing.token_row[t,k]], accumulated in fp32 in
    the order of k. A dropped pair adds exactly zero, also to the gradients.

    Args:
        rows: [T*K, H] float, differentiable.
        routing: from `ling_ops.route`.
        weights: [T, K] gate weights, differentiable, or None for a plain sum.

    Returns:
        out [T, H] in rows' dtype.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
    """
    _checks.tensor("rows", rows)
    check_routing(routing, rows.device)
    _checks.shape("rows", rows, (routing.token_row.numel(), None), "[T*K, H]")
    _checks.dtype("rows", rows, _checks.FLOATS)
    if weights is not None:
        _checks.shape("weights", weights, tuple(routing.token_row.shape), "[T, K]")
        _checks.dtype("weights", weights, _checks.FLOATS)
        _checks.same_device("weights", weights, "rows", rows)
    if not use_kernel("unpermute", rows, _unsupported(rows)):
        return reference.combine(rows, routing.token_row, weights)
    rows = rows.contiguous()
    weights = None if weights is None else weights.float().contiguous()
    needs_grad = rows.requires_grad or (weights is not None and weights.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        return _Unpermute.apply(
            rows, weights, routing.token_row, routing.row_pair, routing.expert_offsets
        )
    return torch.ops.ling_ops.combine(rows, routing.token_row, weights, None)
