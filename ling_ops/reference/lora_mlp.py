"""Experts with low-rank additions in plain PyTorch: the definition of `ling_ops.ops.lora_mlp`."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATIONS, activate
from .gate import upcast
from .moe_mlp import REFERENCE_STEPS, Steps, _with_bias
from .route import Routing


class LowRank(NamedTuple):
    """W becomes W + scale B A, for every expert; the product B A itself is never made."""

    a: Tensor  # [E, r, Kd]
    b: Tensor  # [E, N, r]
    scale: float = 1.0
    dropout: float = 0.0  # of the rows that enter A, in training


def _product(rows, proj, bias, low_rank, offsets, steps: Steps) -> Tensor:
    out = _with_bias(steps.grouped_gemm(rows, proj, offsets), bias, offsets)
    if low_rank is None:
        return out
    rows = F.dropout(rows, low_rank.dropout) if low_rank.dropout else rows
    inner = low_rank.scale * steps.grouped_gemm(rows, low_rank.a, offsets)
    return out + steps.grouped_gemm(inner, low_rank.b, offsets)


def lora_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    routing: Routing,
    *,
    gate_up_lora: LowRank | None,
    down_lora: LowRank | None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    swiglu_limit: float | None = None,
    steps: Steps = REFERENCE_STEPS,
) -> Tensor:
    """See `ling_ops.ops.lora_mlp`; the routing is given here."""
    offsets = routing.expert_offsets
    rows = steps.permute(x, routing)
    h = _product(rows, gate_up_proj, gate_up_bias, gate_up_lora, offsets, steps)
    a = activate(h, activation, swiglu_limit)
    y = _product(a, down_proj, down_bias, down_lora, offsets, steps)
    return steps.unpermute(y, routing, weights)


def add_activate_(h: Tensor, delta: Tensor, activation: int, limit: float) -> Tensor:
    """h += delta in place; returns activation of the sum, [M,I], taken before it is rounded.

    `activation` indexes `ACTIVATIONS`; `limit` is infinite for none.
    """
    total = upcast(h) + upcast(delta)
    h.copy_(total)
    bound = None if limit == float("inf") else limit
    return activate(total, ACTIVATIONS[activation], bound).to(h.dtype)
