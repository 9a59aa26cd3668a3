"""`route` and `reroute`: which row every (token, choice) pair gets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import route as reference
from ..reference.route import Routing
from . import _checks, _library  # noqa: F401
from ._backend import use_kernel

PRIORITIES = ("position", "probability")
MAX_KERNEL_EXPERTS = 4096
MAX_KERNEL_REROUTE_CHOICES = 32


def capacity_tensor(capacity: int | Tensor, num_experts: int, device: torch.device) -> Tensor:
    """An int32 tensor [1] or [E] on `device`, without a sync."""
    if isinstance(capacity, Tensor):
        if tuple(capacity.shape) not in ((), (1,), (num_experts,)):
            raise ValueError(
                f"capacity must be an int or a tensor of shape [] or [E] = [{num_experts}], "
                f"got shape {list(capacity.shape)}"
            )
        _checks.dtype("capacity", capacity, _checks.IDS)
        if capacity.device != device:
            raise ValueError(f"capacity must be on {device}, got {capacity.device}")
        limit = torch.iinfo(torch.int32).max
        return capacity.reshape(-1).clamp(0, limit).to(torch.int32)
    _checks.integer("capacity", capacity, 0)
    return torch.full((1,), min(capacity, 2**31 - 1), dtype=torch.int32, device=device)


def _check(indices, num_experts, priority, weights, token_mask) -> None:
    _checks.ids("indices", indices)
    _checks.integer("num_experts", num_experts, 1)
    _checks.choice("priority", priority, PRIORITIES)
    if weights is not None:
        _checks.shape("weights", weights, tuple(indices.shape), "[T, K]")
        _checks.dtype("weights", weights, _checks.FLOATS)
        _checks.same_device("weights", weights, "indices", indices)
    elif priority == "probability":
        raise ValueError("weights must be given for priority='probability', got None")
    _checks.token_mask(token_mask, indices.shape[0], "indices", indices)


def _unsupported(indices: Tensor, num_experts: int, weights: Tensor | None) -> str | None:
    if num_experts > MAX_KERNEL_EXPERTS:
        return f"num_experts = {num_experts} is beyond the kernel's {MAX_KERNEL_EXPERTS}"
    if indices.numel() > 2**31 - 1:
        return "there are more than 2^31 - 1 pairs"
    if weights is not None and weights.dtype == torch.float64:
        return "weights are float64"
    return None


def route(
    indices: Tensor,
    num_experts: int,
    *,
    capacity: int | Tensor | None = None,
    priority: str = "position",
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Routing:
    """Sort (token, choice) pairs by expert, keeping at most `capacity` of each.

    Shapes are static and nothing is read back to the host. Rows of an expert are in ascending
    pair order (pair = token * K + choice). A pair whose id is outside [0, E), or whose token is
    masked, is skipped: it isn't counted and takes no room.

    Args:
        indices: [T, K] int32 or int64 expert ids, any strides.
        num_experts: E.
        capacity: rows an expert may have: None (dropless), an int >= 0, or an integer tensor of
            shape [] or [E] on the same device.
        priority: who stays when demand passes the capacity: "position", the first pairs in token
            order; "probability", the largest `weights`, ties to the lower token, NaN last.
        weights: [T, K] gate weights, needed for "probability".
        token_mask: [T] bool, False for padding tokens.

    Returns:
        `Routing` of int32 tensors: expert_counts [E] (demand before any drop), expert_offsets
        [E+1], row_token and row_pair [T*K] (-1 past the last offset), token_row [T, K] (-1 where
        dropped or skipped).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    _check(indices, num_experts, priority, weights, token_mask)
    limit = None if capacity is None else capacity_tensor(capacity, num_experts, indices.device)
    by_probability = limit is not None and priority == "probability"
    weights = weights.detach() if by_probability else None
    if not use_kernel("route", indices, _unsupported(indices, num_experts, weights)):
        return reference.route(
            indices,
            num_experts,
            capacity=limit,
            weights=weights,
            token_mask=token_mask,
            by_probability=by_probability,
        )
    if weights is not None:
        weights = weights.float().contiguous()
    mask = None if token_mask is None else token_mask.contiguous()
    fields = torch.ops.ling_ops.route(
        indices.contiguous(), num_experts, limit, weights, mask, by_probability
    )
    return Routing(*fields)


def _reroute_unsupported(scores: Tensor, weights: Tensor, indices: Tensor) -> str | None:
    if torch.float64 in (scores.dtype, weights.dtype):
        return "scores or weights are float64"
    if indices.shape[1] > MAX_KERNEL_REROUTE_CHOICES:
        return f"K = {indices.shape[1]} is beyond the kernel's {MAX_KERNEL_REROUTE_CHOICES}"
    return _unsupported(indices, scores.shape[1], None)


def reroute(
    scores: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    capacity: int | Tensor,
    rounds: int = 2,
) -> tuple[Tensor, Tensor]:
    """Send pairs that overflow a capacity to their token's next-best expert with room.

    In each round every overflowing pair asks for its token's best-scored expert that the token
    doesn't hold and that has a free slot (the token's second overflowing pair for its second-best,
    and so on); an expert takes askers in pair order while slots last. Pairs that fit by position
    never move. `route(..., capacity=capacity)` on the result then keeps exactly the pairs that
    fitted or found room. A moved pair's weight is its new expert's own score, times the factor
    sum(weights) / sum(scores) of its token (its renormalisation and scale).

    Args:
        scores: [T, E] unbiased scores, fp32 or another float dtype; differentiable.
        weights: [T, K] gate weights; differentiable.
        indices: [T, K] int32 or int64 expert ids; ids outside [0, E) stay as they are.
        capacity: int >= 0, or an integer tensor of shape [] or [E].
        rounds: rounds of asking, >= 0.

    Returns:
        New (weights [T, K], indices [T, K]) in the dtypes given.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    _checks.shape("scores", scores, (None, None), "[T, E]")
    _checks.dtype("scores", scores, _checks.FLOATS)
    _checks.ids("indices", indices, scores.shape[0])
    _checks.shape("weights", weights, tuple(indices.shape), "[T, K]")
    _checks.dtype("weights", weights, _checks.FLOATS)
    _checks.same_device("weights", weights, "scores", scores)
    _checks.same_device("indices", indices, "scores", scores)
    _checks.integer("rounds", rounds, 0)
    limit = capacity_tensor(capacity, scores.shape[1], scores.device)
    if not use_kernel("reroute", scores, _reroute_unsupported(scores, weights, indices)):
        return reference.reroute(scores, weights, indices, capacity=limit, rounds=rounds)
    new_weights, new_indices, moved = torch.ops.ling_ops.reroute(
        scores.detach().contiguous(),
        weights.detach().float().contiguous(),
        indices.contiguous(),
        limit,
        rounds,
    )
    if torch.is_grad_enabled() and (scores.requires_grad or weights.requires_grad):
        new_weights = reference.moved_weights(scores, weights, indices, new_indices, moved)
    return new_weights.to(weights.dtype), new_indices
