"""The router's auxiliary losses, with padding tokens taken out of every one of them."""

from __future__ import annotations

import math

import torch

from ling_ops import ops


def sequence_loss(
    probs: torch.Tensor,
    indices: torch.Tensor,
    sequence_length: int,
    coefficient: float,
    token_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Sequence-wise balancing loss of probs ``[T,E]``, indices ``[T,K]``; a 0-dim tensor.

    The loss of a sequence has its token count squared in the denominator (demand and probability
    are both means), so a sequence with padding is scaled up by (length / real tokens)².
    """
    if token_mask is not None:
        real = token_mask.view(-1, sequence_length).sum(1, keepdim=True).clamp(min=1)
        factor = (sequence_length / real).square().expand(-1, sequence_length).reshape(-1, 1)
        keep = token_mask.unsqueeze(-1)
        probs = torch.where(keep, probs * factor.to(probs.dtype), 0.0)
        indices = torch.where(keep, indices, -1)
    return ops.sequence_balancing_loss(
        probs, indices, sequence_length=sequence_length, coefficient=coefficient
    )


def z_loss(
    logits: torch.Tensor, coefficient: float, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """Router z-loss of logits ``[T,E]``, averaged over the real tokens; a 0-dim tensor."""
    if token_mask is None:
        return ops.router_z_loss(logits, coefficient=coefficient)
    # logits of -log(E) have a logsumexp of 0: such a row adds neither loss nor gradient
    neutral = -math.log(logits.shape[1])
    filled = torch.where(token_mask.unsqueeze(-1), logits, neutral)
    share = logits.shape[0] / token_mask.sum().clamp(min=1).to(logits.dtype)
    return ops.router_z_loss(filled, coefficient=coefficient) * share
