"""Measures of balance and loss of one routing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: What `routing_stats` returns behind the utilization of each expert.
MEASURES = (
    "max_vio", "cv", "entropy", "dead_experts", "drop_rate", "tokens_dropped", "gate_mass_dropped"
)  # fmt: skip


def routing_stats(
    expert_counts: Tensor,
    token_row: Tensor,
    indices: Tensor | None,
    weights: Tensor | None,
    token_mask: Tensor | None,
) -> Tensor:
    """fp32 [E + 7]: each expert's utilization, then `MEASURES`; see `ling_ops.routing_stats`.

    Without `weights` the gate mass counts as 0.
    """
    wanted = _wanted(expert_counts.shape[0], token_row, indices, token_mask)
    dropped = wanted & (token_row < 0)
    tokens_dropped = (wanted.any(1) & ~(wanted & ~dropped).any(1)).sum()
    measures = [
        *_balance(expert_counts.float()),
        _ratio(dropped.sum(), wanted.sum()),
        tokens_dropped.float(),
        _mass_dropped(wanted, dropped, weights),
    ]
    utilization = _ratio(expert_counts.float(), wanted.any(1).sum())
    return torch.cat([utilization, torch.stack(measures)])


def _wanted(experts: int, token_row: Tensor, indices, token_mask) -> Tensor:
    """Which pairs [T,K] asked for an expert."""
    if indices is None:
        wanted = torch.ones_like(token_row, dtype=torch.bool)
    else:
        wanted = (indices >= 0) & (indices < experts)
    return wanted if token_mask is None else wanted & token_mask.unsqueeze(-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in fp32, whole being a count that is 0 only where part is: then 0."""
    return part.float() / whole.clamp(min=1).float()


def _balance(counts: Tensor) -> list[Tensor]:
    """`max_vio`, `cv`, `entropy` and `dead_experts` of the demand [E]."""
    experts, total = counts.numel(), counts.sum()
    share = _ratio(counts, total)
    surprise = -torch.special.xlogy(share, share).sum()
    return [
        torch.where(total > 0, _ratio(counts.amax() * experts, total) - 1, 0.0),
        _ratio(counts.std(correction=0) * experts, total),
        surprise / max(math.log(experts), 1e-12),
        (counts == 0).sum().float(),
    ]


def _mass_dropped(wanted: Tensor, dropped: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return wanted.new_zeros((), dtype=torch.float32)
    mass = torch.where(wanted, weights.float(), 0.0)
    lost, whole = torch.where(dropped, mass, 0.0).sum(), mass.sum()
    return torch.where(whole == 0, 0.0, lost / whole)
