"""The smallest capacity for a target drop rate, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def dynamic_capacity(expert_counts: Tensor, target_drop_rate: float) -> Tensor:
    """Least C with sum over e of (n_e - C)+ <= floor(target * N), int64 0-dim, no sync.

    With n sorted descending and S_m its prefix sums, the pairs over C number
    max over m of (S_m - m C), so C = max over m of ceil((S_m - floor(target * N)) / m).
    """
    counts = expert_counts.to(torch.int64).sort(descending=True).values
    prefix = counts.cumsum(0)
    budget = (prefix[-1:].double() * target_drop_rate).floor().long()
    rank = torch.arange(1, counts.numel() + 1, device=counts.device)
    needed = -torch.div(budget - prefix, rank, rounding_mode="floor")
    return needed.max().clamp(min=0)
