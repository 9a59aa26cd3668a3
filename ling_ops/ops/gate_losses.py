"""The gate with its balancing losses: on a GPU one kernel computes all of their gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import gate as reference
from ..reference.losses import demand
from . import _checks
from ._backend import use_kernel
from .gate import check_gate, gate_unsupported, topk_gate
from .losses import inject_loss, load_balancing_loss, router_z_loss, sequence_balancing_loss


class LossCoefficients(NamedTuple):
    """Factors of the router's losses; 0 switches one off."""

    balance: float = 0.0  #: `load_balancing_loss`
    sequence_balance: float = 0.0  #: `sequence_balancing_loss`
    z_loss: float = 0.0  #: `router_z_loss`


def probabilities(logits: Tensor, score_function: str) -> Tensor:
    """Scores that sum to 1 over the experts [T,E]: softmax, or sigmoid divided by its sum."""
    scores = reference.gate_scores(logits, score_function)
    if score_function == "softmax":
        return scores
    return scores / (scores.sum(-1, keepdim=True) + reference.RENORMALIZE_EPSILON)


def _sequence_loss(probs, indices, sequence_length, coefficient, token_mask) -> Tensor:
    """A sequence with padding counts by its real tokens, in both of the means it multiplies."""
    if token_mask is not None:
        real = token_mask.view(-1, sequence_length).sum(1, keepdim=True).clamp(min=1)
        factor = (sequence_length / real).square().expand(-1, sequence_length).reshape(-1, 1)
        probs = torch.where(token_mask.unsqueeze(-1), probs * factor.to(probs.dtype), 0.0)
        indices = torch.where(token_mask.unsqueeze(-1), indices, -1)
    return sequence_balancing_loss(
        probs, indices, sequence_length=sequence_length, coefficient=coefficient
    )


def _z_loss(logits, coefficient, token_mask) -> Tensor:
    if token_mask is None:
        return router_z_loss(logits, coefficient=coefficient)
    # logits of -log(E) have a logsumexp of 0: such a row adds neither loss nor gradient
    filled = torch.where(token_mask.unsqueeze(-1), logits, -math.log(logits.shape[1]))
    share = logits.shape[0] / token_mask.sum().clamp(min=1).to(filled.dtype)
    return router_z_loss(filled, coefficient=coefficient) * share


def router_losses(
    logits: Tensor,
    indices: Tensor,
    coefficients: LossCoefficients,
    *,
    score_function: str,
    sequence_length: int | None = None,
    token_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses whose coefficient is not 0, by name: 0-dim, differentiable in `logits` [T,E].

    Padding tokens (`token_mask` [T] False) count in none of them.
    """
    losses = {}
    if coefficients.balance or coefficients.sequence_balance:
        probs = probabilities(logits, score_function)
    if coefficients.balance:
        losses["balance"] = load_balancing_loss(
            probs, indices, coefficient=coefficients.balance, token_mask=token_mask
        )
    if coefficients.sequence_balance:
        _check_sequence_length(sequence_length, logits.shape[0])
        losses["sequence_balance"] = _sequence_loss(
            probs, indices, sequence_length, coefficients.sequence_balance, token_mask
        )
    if coefficients.z_loss:
        losses["z_loss"] = _z_loss(logits, coefficients.z_loss, token_mask)
    return losses


def _check_sequence_length(sequence_length: int | None, tokens: int) -> None:
    if sequence_length is None:
        raise ValueError(
            "sequence_length must be the tokens per sequence for the sequence-wise loss, got None"
        )
    _checks.integer("sequence_length", sequence_length, 1)
    if tokens % sequence_length:
        raise ValueError(
            f"sequence_length must divide the number of tokens, got {sequence_length} "
            f"for {tokens} tokens"
        )


def _balance_slope(indices, num_experts, coefficients, sequence_length, token_mask):
    """d loss / d p of the two balancing losses, [S,E] fp32, and the tokens that a row serves."""
    tokens, choices = indices.shape
    whole = None
    if coefficients.balance:
        real = tokens if token_mask is None else token_mask.sum().clamp(min=1)
        counts = demand(indices, num_experts, token_mask).float()
        whole = (counts * (coefficients.balance * num_experts / choices) / real / real)[None]
    if not coefficients.sequence_balance:
        return whole, tokens
    sequences = tokens // sequence_length
    ids = indices if token_mask is None else torch.where(token_mask.unsqueeze(-1), indices, -1)
    counts = demand(ids.view(sequences, sequence_length, choices), num_experts).float()
    real = sequence_length
    if token_mask is not None:
        real = token_mask.view(sequences, sequence_length).sum(1, keepdim=True).clamp(min=1)
    factor = coefficients.sequence_balance * num_experts / (choices * sequences)
    slope = counts * factor / real / real
    return slope if whole is None else slope + whole, sequence_length


class _GateWithLosses(torch.autograd.Function):
    """Weights of a gate; the backward adds the losses' gradients in the same kernel."""

    @staticmethod
    def forward(ctx, logits, weights, indices, balance, z_scale, token_mask, settings):
        ctx.save_for_backward(logits, weights, indices, balance, z_scale, token_mask)
        ctx.settings = settings
        return weights.view_as(weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_weights):
        logits, weights, indices, balance, z_scale, token_mask = ctx.saved_tensors
        sequence_length, sigmoid, renormalize, scale = ctx.settings
        grad = torch.ops.ling_ops.topk_gate_backward(
            grad_weights.contiguous(), logits, weights, indices, balance, sequence_length,
            z_scale, token_mask, sigmoid, renormalize, scale,
        )  # fmt: skip
        return grad, *[None] * 6


def topk_gate_with_losses(
    logits: Tensor,
    k: int,
    coefficients: LossCoefficients,
    *,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    sequence_length: int | None = None,
    token_mask: Tensor | None = None,
    loss_scale: float = 1.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`topk_gate`, with the gradients of the router's losses injected into its backward.

    Arguments as `topk_gate`; `coefficients` as `LossCoefficients`, `sequence_length` tokens per
    sequence, `token_mask` [T] bool (False for padding), `loss_scale` a factor of what is injected.

    Returns:
        weights [T,K], indices [T,K] int32, and the losses by name (0-dim, detached, unscaled).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    gate = {
        "score_function": score_function, "expert_bias": expert_bias, "num_groups": num_groups,
        "topk_groups": topk_groups, "renormalize": renormalize, "scale": scale,
    }  # fmt: skip
    check_gate(logits, k, **gate)
    measured = {
        "score_function": score_function,
        "sequence_length": sequence_length,
        "token_mask": token_mask,
    }
    if not use_kernel("topk_gate", logits, gate_unsupported(logits, k)):
        weights, indices = topk_gate(logits, k, **gate)
        losses = router_losses(logits, indices, coefficients, **measured)
        if losses:
            weights = inject_loss(weights, sum(losses.values()) * loss_scale)
        return weights, indices, {name: loss.detach() for name, loss in losses.items()}
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    with torch.no_grad():
        weights, indices = topk_gate(logits, k, **gate)
        losses = router_losses(logits, indices, coefficients, **measured)
        balance, length = _balance_slope(
            indices, logits.shape[1], coefficients, sequence_length, token_mask
        )
        balance = None if balance is None else (balance * loss_scale).contiguous()
        z_scale = _z_slope(logits, coefficients.z_loss * loss_scale, token_mask)
    settings = (length, score_function == "sigmoid", renormalize, float(scale))
    weights = _GateWithLosses.apply(
        logits, weights, indices, balance, z_scale, token_mask, settings
    )
    return weights, indices, losses


def _z_slope(logits: Tensor, coefficient: float, token_mask: Tensor | None) -> Tensor | None:
    """2 * coefficient / tokens, 0-dim fp32 on the device."""
    if not coefficient:
        return None
    if token_mask is None:
        value = 2 * coefficient / max(1, logits.shape[0])
        return torch.full((), value, dtype=torch.float32, device=logits.device)
    return 2 * coefficient / token_mask.sum().clamp(min=1).float()
