"""Balancing losses and the loss-free bias in plain PyTorch. Formulas: see `ling_ops.ops.losses`."""

from __future__ import annotations

import torch
from torch import Tensor

from .gate import upcast
from .route import valid_experts


def demand(indices: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """How many pairs ask for each expert, int64 [..., E] for indices [..., T, K]."""
    lead = indices.shape[:-2]
    experts = valid_experts(indices, num_experts, token_mask, num_experts)
    experts = experts.view(*lead, indices.shape[-2] * indices.shape[-1])
    counts = experts.new_zeros(*lead, num_experts + 1)
    return counts.scatter_add_(-1, experts, torch.ones_like(experts))[..., :num_experts]


def load_balancing_loss(
    probs: Tensor, indices: Tensor, coefficient: float, token_mask: Tensor | None
) -> Tensor:
    probs = upcast(probs)
    tokens, experts = probs.shape
    counts = demand(indices, experts, token_mask).to(probs.dtype)
    if token_mask is None:
        real = max(1, tokens)
    else:
        real = token_mask.sum().clamp(min=1).to(probs.dtype)
        probs = torch.where(token_mask.unsqueeze(-1), probs, 0.0)
    fraction = counts / (real * indices.shape[1])
    return coefficient * experts * (fraction * (probs.sum(0) / real)).sum()


def sequence_balancing_loss(
    probs: Tensor, indices: Tensor, sequence_length: int, coefficient: float
) -> Tensor:
    probs = upcast(probs)
    tokens, experts = probs.shape
    sequences = tokens // sequence_length
    per_sequence = indices.view(sequences, sequence_length, indices.shape[1])
    fraction = demand(per_sequence, experts).to(probs.dtype)
    fraction = fraction / (sequence_length * indices.shape[1])
    mean = probs.view(sequences, sequence_length, experts).mean(1)
    return coefficient * experts * (fraction * mean).sum() / max(1, sequences)


def router_z_loss(logits: Tensor, coefficient: float) -> Tensor:
    z = torch.logsumexp(upcast(logits), dim=-1)
    return coefficient * z.square().sum() / max(1, logits.shape[0])


def expert_bias_step(expert_counts: Tensor, rate: float) -> Tensor:
    """Change of the loss-free bias, fp32 [E]: rate * (sign(e) - mean(sign(e)))."""
    load = expert_counts.double()
    direction = torch.sign(load.mean() - load)
    return (rate * (direction - direction.mean())).float()
