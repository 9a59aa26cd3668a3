"""The experts of a layer in plain PyTorch: the definition of `ling_ops.moe_mlp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import activate
from .gemm import grouped_gemm, row_experts
from .permute import combine, permute
from .route import Routing


class Steps(NamedTuple):
    """The ops that the layer is composed of: the reference's, or those that choose a kernel."""

    permute: Callable[[Tensor, Routing], Tensor]
    grouped_gemm: Callable[[Tensor, Tensor, Tensor], Tensor]
    unpermute: Callable[[Tensor, Routing, Tensor], Tensor]


REFERENCE_STEPS = Steps(
    lambda x, routing: permute(x, routing.row_token),
    grouped_gemm,
    lambda rows, routing, weights: combine(rows, routing.token_row, weights),
)


class _AddToMainGrad(torch.autograd.Function):
    """Hand a weight on; its gradient goes into an fp32 buffer instead of `.grad`."""

    @staticmethod
    def forward(ctx, weight: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.buffer.add_(grad)
        return None, None


def _with_bias(rows: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Add each row's expert's bias [E,N]; rows past the end may hold anything afterwards."""
    if bias is None:
        return rows
    return (rows + bias[row_experts(offsets, rows.shape[0])]).to(rows.dtype)


def moe_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    routing: Routing,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    swiglu_limit: float | None = None,
    main_grads: tuple[Tensor, Tensor] | None = None,
    steps: Steps = REFERENCE_STEPS,
) -> Tensor:
    """See `ling_ops.moe_mlp`; the routing is given here."""
    if main_grads is not None:
        gate_up_proj = _AddToMainGrad.apply(gate_up_proj, main_grads[0])
        down_proj = _AddToMainGrad.apply(down_proj, main_grads[1])
    offsets = routing.expert_offsets
    rows = steps.permute(x, routing)
    h = _with_bias(steps.grouped_gemm(rows, gate_up_proj, offsets), gate_up_bias, offsets)
    a = activate(h, activation, swiglu_limit)
    y = _with_bias(steps.grouped_gemm(a, down_proj, offsets), down_bias, offsets)
    return steps.unpermute(y, routing, weights)
