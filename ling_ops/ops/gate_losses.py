"""The gate with its balancing losses: on a GPU one kernel computes all of their values, and the
gate's backward kernel all of their gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.gate import probabilities
from ..reference.losses import demand
from . import _checks
from ._backend import use_kernel
from .gate import check_gate, gate_unsupported, kernel_bias, topk_gate
from .losses import inject_loss, load_balancing_loss, router_z_loss, sequence_balancing_loss


class LossCoefficients(NamedTuple):
    """Factors of the router's losses; 0 switches one off."""

    balance: float = 0.0  #: `load_balancing_loss`
    sequence_balance: float = 0.0  #: `sequence_balancing_loss`
    z_loss: float = 0.0  #: `router_z_loss`


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


def _balance_slope(counts, coefficient, choices, tokens, token_mask) -> Tensor:
    """d loss / d p of the balancing loss, [E]; `counts` [E] is the demand of real tokens."""
    real = max(1, tokens)
    if token_mask is not None:
        real = token_mask.sum().clamp(min=1).to(counts.dtype)
    return counts * (coefficient * len(counts) / choices / real / real)


def _sequence_slope(indices, num_experts, coefficient, length, token_mask, dtype) -> Tensor:
    """d loss / d p of the sequence-wise loss, [S,E]."""
    tokens, choices = indices.shape
    sequences = tokens // length
    ids, real = indices, length
    if token_mask is not None:
        ids = torch.where(token_mask.unsqueeze(-1), indices, -1)
        real = token_mask.view(sequences, length).sum(1, keepdim=True).clamp(min=1).to(dtype)
    counts = demand(ids.view(sequences, length, choices), num_experts).to(dtype)
    return counts * (coefficient * num_experts / (choices * max(1, sequences)) / real / real)


class _Slopes(NamedTuple):
    """d loss / d p of each balancing loss, None where its coefficient is 0, and 2 z / T."""

    balance: Tensor | None  # [E]
    sequence_balance: Tensor | None  # [S,E]
    z_loss: Tensor | None  # 0-dim: factor of logsumexp(z) * softmax(z)
    sequence_length: int  # tokens that a row of sequence_balance serves


def _summed(slopes: _Slopes, loss_scale: float) -> Tensor | None:
    """The slopes of both balancing losses in one, [S,E]."""
    known = [slope for slope in (slopes.balance, slopes.sequence_balance) if slope is not None]
    if not known:
        return None
    total = known[0] if len(known) == 1 else known[0] + known[1]
    total = total if loss_scale == 1.0 else total * loss_scale
    return total.view(-1, total.shape[-1])


def _slopes(logits, indices, counts, coefficients, sequence_length, token_mask) -> _Slopes:
    (tokens, experts), choices = logits.shape, indices.shape[1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    balance = sequence = z_loss = None
    if coefficients.balance:
        if token_mask is not None:
            counts = demand(indices, experts, token_mask)
        balance = _balance_slope(
            counts.to(dtype), coefficients.balance, choices, tokens, token_mask
        )
    if coefficients.sequence_balance:
        _check_sequence_length(sequence_length, tokens)
        sequence = _sequence_slope(
            indices, experts, coefficients.sequence_balance, sequence_length, token_mask, dtype
        )
    if coefficients.z_loss:
        z_loss = _z_slope(logits, coefficients.z_loss, token_mask, dtype)
    return _Slopes(balance, sequence, z_loss, tokens if sequence is None else sequence_length)


def _loss_values(logits, slopes: _Slopes, token_mask, sigmoid: bool) -> dict[str, Tensor]:
    """The losses by name, 0-dim: one pass over the logits."""
    sums = torch.ops.ling_ops.gate_losses(
        logits, slopes.balance, slopes.sequence_balance, slopes.sequence_length, token_mask,
        sigmoid, slopes.z_loss is not None,
    )  # fmt: skip
    values = {}
    if slopes.balance is not None:
        values["balance"] = sums[0]
    if slopes.sequence_balance is not None:
        values["sequence_balance"] = sums[1]
    if slopes.z_loss is not None:
        values["z_loss"] = sums[2] * slopes.z_loss / 2
    return values


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
    if not use_kernel("topk_gate", logits, gate_unsupported(logits, k)):
        weights, indices = topk_gate(logits, k, **gate)
        losses = router_losses(
            logits, indices, coefficients, score_function=score_function,
            sequence_length=sequence_length, token_mask=token_mask,
        )  # fmt: skip
        if losses:
            weights = inject_loss(weights, sum(losses.values()) * loss_scale)
        return weights, indices, {name: loss.detach() for name, loss in losses.items()}
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    mask = None if token_mask is None else token_mask.contiguous()
    sigmoid = score_function == "sigmoid"
    with torch.no_grad():
        weights, indices, counts = torch.ops.ling_ops.topk_gate(
            logits, kernel_bias(expert_bias), k, sigmoid, num_groups, topk_groups, renormalize,
            float(scale),
        )  # fmt: skip
        slopes = _slopes(logits, indices, counts, coefficients, sequence_length, mask)
        losses = _loss_values(logits, slopes, mask, sigmoid) if any(coefficients) else {}
        balance = _summed(slopes, loss_scale)
        z_scale = None if slopes.z_loss is None else slopes.z_loss * loss_scale
    settings = (slopes.sequence_length, sigmoid, renormalize, float(scale))
    weights = _GateWithLosses.apply(logits, weights, indices, balance, z_scale, mask, settings)
    return weights, indices, losses


def _z_slope(logits: Tensor, coefficient: float, token_mask: Tensor | None, dtype) -> Tensor:
    """2 * coefficient / tokens, 0-dim on the device."""
    if token_mask is None:
        value = 2 * coefficient / max(1, logits.shape[0])
        return torch.full((), value, dtype=dtype, device=logits.device)
    return 2 * coefficient / token_mask.sum().clamp(min=1).to(dtype)
