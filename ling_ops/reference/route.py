"""Routing in plain PyTorch: the definition of `ling_ops.route` and `ling_ops.reroute`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gate import RENORMALIZE_EPSILON, ordered_key, stable_topk, upcast


class Routing(NamedTuple):
    """Where every (token, choice) pair goes. All int32, on the device of the ids.

    T tokens, K choices, E experts; pair = token * K + choice; a row is one kept pair, in expert
    order, ascending pair id inside an expert; M = expert_offsets[E] rows exist.
    """

    expert_counts: Tensor  #: [E] demand of each expert, before any drop
    expert_offsets: Tensor  #: [E+1] first row of each expert; the last entry is M
    row_token: Tensor  #: [T*K] token of each row, -1 from row M on
    row_pair: Tensor  #: [T*K] pair of each row, -1 from row M on
    token_row: Tensor  #: [T,K] row of each pair, -1 where dropped or skipped


def valid_experts(
    indices: Tensor, num_experts: int, token_mask: Tensor | None, sentinel: int
) -> Tensor:
    """Expert of each pair as int64 [T*K]; `sentinel` for bad ids and masked tokens."""
    ids = indices.long()
    valid = (ids >= 0) & (ids < num_experts)
    if token_mask is not None:
        valid = valid & token_mask.unsqueeze(-1)
    return torch.where(valid, ids, sentinel).reshape(-1)


def _sorted_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, sorted expert, first position of each expert [E+1]) of a stable sort by expert."""
    ordered, order = torch.sort(experts, stable=True)
    boundaries = torch.arange(num_experts + 1, device=experts.device)
    return order, ordered, torch.searchsorted(ordered, boundaries)


def expert_rank(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(rank of each entry among those of its expert, in order; counts [E])."""
    order, ordered, first = _sorted_by_expert(experts, num_experts)
    position = torch.arange(experts.numel(), device=experts.device)
    rank = torch.empty_like(order).scatter_(0, order, position - first[ordered])
    return rank, first.diff()


def _keep(experts, num_experts, capacity, weights, by_probability) -> Tensor:
    """Which pairs fit under the capacity."""
    limit = capacity.to(torch.int64).expand(num_experts)
    limit = torch.cat([limit, limit.new_zeros(1)])[experts]
    if by_probability:
        best_first = stable_topk(ordered_key(weights.reshape(-1)), experts.numel())
        rank, _ = expert_rank(experts[best_first], num_experts)
        rank = torch.empty_like(rank).scatter_(0, best_first, rank)
    else:
        rank, _ = expert_rank(experts, num_experts)
    return rank < limit


def route(
    indices: Tensor,
    num_experts: int,
    *,
    capacity: Tensor | None = None,
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
    by_probability: bool = False,
) -> Routing:
    """See `ling_ops.route`; `capacity` is an integer tensor [1] or [E] here."""
    experts = valid_experts(indices, num_experts, token_mask, num_experts)
    kept = experts
    if capacity is not None:
        keep = _keep(experts, num_experts, capacity, weights, by_probability)
        kept = torch.where(keep, experts, num_experts)
    order, _, offsets = _sorted_by_expert(kept, num_experts)
    counts = offsets.diff()
    if capacity is not None:
        counts = expert_rank(experts, num_experts)[1]
    position = torch.arange(order.numel(), device=order.device)
    is_row = position < offsets[-1]
    row_pair = torch.where(is_row, order, -1)
    row_token = torch.where(is_row, order // max(1, indices.shape[1]), -1)
    token_row = torch.empty_like(order).scatter_(0, order, torch.where(is_row, position, -1))
    fields = (counts, offsets, row_token, row_pair, token_row.view(indices.shape))
    return Routing(*(field.to(torch.int32) for field in fields))


def _propose(key: Tensor, free: Tensor, indices: Tensor, overflow: Tensor) -> Tensor:
    """Next-best expert with room for each overflowing pair [T,K]; E where there is none."""
    num_experts = key.shape[1]
    held = torch.zeros(key.shape[0], num_experts + 1, dtype=torch.bool, device=key.device)
    held.scatter_(1, indices, True)
    open_to = ~held[:, :num_experts] & (free > 0)
    least = torch.iinfo(key.dtype).min
    best_first = stable_topk(torch.where(open_to, key, least), num_experts)
    nth = (overflow.cumsum(1) - 1).clamp(0, num_experts - 1)
    candidate = best_first.gather(1, nth)
    return torch.where(overflow & open_to.gather(1, candidate), candidate, num_experts)


def reroute_ids(
    scores: Tensor, indices: Tensor, *, capacity: Tensor, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """(new ids [T,K] in indices' dtype, which of them moved [T,K]) of `ling_ops.reroute`.

    `capacity` is an integer tensor [1] or [E] here.
    """
    num_experts = scores.shape[1]
    limit = capacity.to(torch.int64).clamp(min=0).expand(num_experts)
    ids = valid_experts(indices, num_experts, None, num_experts).view(indices.shape)
    rank, counts = expert_rank(ids.reshape(-1), num_experts)
    ceiling = torch.cat([limit, limit.new_full((1,), ids.numel())])
    overflow = (rank >= ceiling[ids.reshape(-1)]).view(ids.shape)
    free = (limit - counts).clamp(min=0)
    key = ordered_key(scores)
    moved = torch.zeros_like(overflow)
    for _ in range(rounds):
        proposal = _propose(key, free, ids, overflow)
        rank, _ = expert_rank(proposal.reshape(-1), num_experts)
        room = torch.cat([free, free.new_zeros(1)])[proposal]
        accepted = rank.view(ids.shape) < room
        ids = torch.where(accepted, proposal, ids)
        moved, overflow = moved | accepted, overflow & ~accepted
        taken = expert_rank(torch.where(accepted, ids, num_experts).reshape(-1), num_experts)[1]
        free = free - taken
    return torch.where(moved, ids.to(indices.dtype), indices), moved


def moved_weights(
    scores: Tensor, weights: Tensor, old_ids: Tensor, new_ids: Tensor, moved: Tensor
) -> Tensor:
    """A moved pair's weight is its new expert's score under its token's own normalisation.

    In fp32 (float64 for float64); sums are taken in the order of the choices.
    """
    num_experts = scores.shape[1]
    scores = upcast(scores)
    old = valid_experts(old_ids, num_experts, None, num_experts).view(old_ids.shape)
    valid = old < num_experts
    old_scores = torch.where(valid, scores.gather(1, old.clamp(max=num_experts - 1)), 0.0)
    total = _sum_in_order(torch.where(valid, upcast(weights), 0.0))
    old_total = _sum_in_order(old_scores) + RENORMALIZE_EPSILON
    # Where nothing moved the quotient is of no use, and its slope can pass fp32's range: 0 * inf.
    factor = total / torch.where(moved.any(1, keepdim=True), old_total, 1.0)
    new_scores = scores.gather(1, torch.where(moved, new_ids.long(), 0))
    return torch.where(moved, (new_scores * factor).to(weights.dtype), weights)


def _sum_in_order(values: Tensor) -> Tensor:
    """Sums [T,1] of values [T,K], from the first choice to the last."""
    first, *others = values.unbind(1)
    for value in others:
        first = first + value
    return first.unsqueeze(1)


def reroute(
    scores: Tensor, weights: Tensor, indices: Tensor, *, capacity: Tensor, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """See `ling_ops.reroute`; `capacity` is an integer tensor [1] or [E] here."""
    new_ids, moved = reroute_ids(scores, indices, capacity=capacity, rounds=rounds)
    return moved_weights(scores, weights, indices, new_ids, moved), new_ids
