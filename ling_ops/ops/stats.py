"""`routing_stats`: what a layer's routing looks like, without a sync."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference.route import Routing
from . import _checks
from .permute import check_routing


@torch.no_grad()
def routing_stats(
    routing: Routing,
    *,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Measures of balance and loss of one routing; all on the device, nothing is read back.

    Args:
        routing: from `ling_ops.route`.
        indices: [T, K] ids that were routed; tells skipped pairs from dropped ones. Without it
            every pair with no row counts as dropped.
        weights: [T, K] gate weights, for `gate_mass_dropped`.
        token_mask: [T] bool as given to `route`.

    Returns:
        0-dim fp32 tensors unless said otherwise, n_e being the demand of expert e before drops:
        `utilization` [E]: n_e / number of tokens with demand (K / E each when balanced);
        `max_vio`: max n_e / mean n_e - 1; `cv`: standard deviation / mean of n_e;
        `entropy`: of the demand shares over log E (1 when balanced); `dead_experts`: experts
        without demand; `drop_rate`: dropped pairs / demand; `tokens_dropped`: tokens with demand
        and no row at all; `gate_mass_dropped` (with `weights`): their share of the gate weights.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
    """
    check_routing(routing)
    shape = tuple(routing.token_row.shape)
    wanted = _wanted(routing, indices, token_mask)
    dropped = wanted & (routing.token_row < 0)
    stats = _balance(routing.expert_counts.float(), wanted)
    stats["drop_rate"] = _ratio(dropped.sum(), wanted.sum())
    stats["tokens_dropped"] = (wanted.any(1) & ~(wanted & ~dropped).any(1)).sum().float()
    if weights is not None:
        _checks.shape("weights", weights, shape, "[T, K]")
        mass = torch.where(wanted, weights.float(), 0.0)
        lost, whole = torch.where(dropped, mass, 0.0).sum(), mass.sum()
        stats["gate_mass_dropped"] = torch.where(whole == 0, 0.0, lost / whole)
    return stats


def _wanted(routing: Routing, indices: Tensor | None, token_mask: Tensor | None) -> Tensor:
    """Which pairs [T,K] asked for an expert."""
    num_experts = routing.expert_counts.shape[0]
    pairs = routing.token_row
    _checks.token_mask(token_mask, pairs.shape[0], "routing", pairs)
    if indices is None:
        wanted = torch.ones_like(pairs, dtype=torch.bool)
    else:
        _checks.shape("indices", indices, tuple(pairs.shape), "[T, K]")
        _checks.dtype("indices", indices, _checks.IDS)
        _checks.same_device("indices", indices, "routing", pairs)
        wanted = (indices >= 0) & (indices < num_experts)
    return wanted if token_mask is None else wanted & token_mask.unsqueeze(-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in fp32, whole being a count that is 0 only where part is: then 0."""
    return part.float() / whole.clamp(min=1).float()


def _balance(counts: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    experts, total = counts.numel(), counts.sum()
    share = _ratio(counts, total)
    surprise = -torch.special.xlogy(share, share).sum()
    return {
        "utilization": _ratio(counts, wanted.any(1).sum()),
        "max_vio": torch.where(total > 0, _ratio(counts.amax() * experts, total) - 1, 0.0),
        "cv": _ratio(counts.std(correction=0) * experts, total),
        "entropy": surprise / max(math.log(experts), 1e-12),
        "dead_experts": (counts == 0).sum().float(),
    }
