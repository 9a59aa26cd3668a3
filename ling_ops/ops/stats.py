"""`routing_stats`: what a layer's routing looks like, without a sync."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import stats as reference
from ..reference.route import Routing
from . import _checks
from ._backend import use_kernel
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
    counts, pairs = routing.expert_counts, routing.token_row
    shape = tuple(pairs.shape)
    _checks.token_mask(token_mask, shape[0], "routing", pairs)
    if indices is not None:
        _checks.shape("indices", indices, shape, "[T, K]")
        _checks.dtype("indices", indices, _checks.IDS)
        _checks.same_device("indices", indices, "routing", pairs)
    if weights is not None:
        _checks.shape("weights", weights, shape, "[T, K]")
        _checks.same_device("weights", weights, "routing", pairs)
        weights = weights.float()
    tensors = counts, pairs, indices, weights, token_mask
    if use_kernel("routing_stats", pairs):
        dense = [None if t is None else t.contiguous() for t in tensors]
        values = torch.ops.ling_ops.routing_stats(*dense)
    else:
        values = reference.routing_stats(*tensors)
    experts = counts.shape[0]
    stats = {"utilization": values[:experts]}
    stats |= zip(reference.MEASURES, values[experts:].unbind(), strict=True)
    if weights is None:
        del stats["gate_mass_dropped"]
    return stats
