"""The smallest capacity for a target drop rate, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def dynamic_capacity(expert_counts: Tensor, target_drop_rate: float) -> Tensor:
    """Least C with sum over e of (n_e - C)+ <= floor(target * N), int32 [1], no sync.

    With n sorted descending and S_m its prefix sums, the pairs over C number
    max over m of (S_m - m C), so C = max over m of ceil((S_m - floor(target * N)) / m).
    """
    counts = expert_counts.to(torch.int64).sort(descending=True).values
    prefix = counts.cumsum(0)
    budget = (prefix[-1:].double() * target_drop_rate).floor().long()
    rank = torch.arange(1, counts.numel() + 1, device=counts.device)
    needed = -torch.div(budget - prefix, rank, rounding_mode="floor")
    return _as_capacity(needed.max().clamp(min=0))


def _as_capacity(value: Tensor) -> Tensor:
    return value.clamp(max=torch.iinfo(torch.int32).max).to(torch.int32).reshape(1)


def running_capacity(
    window: Tensor, steps: Tensor, mean: float, quantile: float, margin: float, max_factor: float
) -> Tensor:
    """C = ceil(mean * clip((1 + margin) * quantile of `window`, 1, max_factor)), int32 [1].

    `window` [W] holds C* / mu of past steps, NaN where `steps` (0-dim) hasn't filled it yet;
    `max_factor` stands for the clipped term before the first step. The quantile interpolates
    linearly. In float64, one rounding an operation.
    """
    ordered = window.double().sort().values  # NaN last
    filled = steps.clamp(max=window.numel())
    at = (quantile * (filled.double() - 1)).clamp(min=0).reshape(1)
    low, high = (ordered.gather(0, rank.long()) for rank in (at.floor(), at.ceil()))
    rise = (high - low) * (at - at.floor())
    past = (low + rise).squeeze(0) * (1 + margin)
    past = torch.where(filled > 0, past, max_factor)
    return _as_capacity((past.clamp(1.0, max_factor) * mean).ceil())
