"""Balancing losses, the loss-free bias, and their injection into a model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import losses as reference
from . import _checks


def _check_probs(probs: Tensor, indices: Tensor) -> None:
    _checks.shape("probs", probs, (None, None), "[T, E]")
    _checks.dtype("probs", probs, _checks.FLOATS)
    _checks.ids("indices", indices, probs.shape[0])
    _checks.same_device("indices", indices, "probs", probs)


def load_balancing_loss(
    probs: Tensor, indices: Tensor, *, coefficient: float = 1.0, token_mask: Tensor | None = None
) -> Tensor:
    """coefficient * E * sum over i of f_i * P_i (Switch Transformer, generalised to top-k).

    f_i = n_i / (T*K) is the share of demand for expert i, taken before any drop and constant in
    the gradient; P_i is the mean over tokens of probs[t,i]. It is `coefficient` when balanced.

    Args:
        probs: [T, E] probabilities (softmax, or sigmoid scores normalised to sum 1).
        indices: [T, K] chosen expert ids; ids outside [0, E) are not counted.
        coefficient: factor of the loss.
        token_mask: [T] bool, False for padding, which then counts neither in f nor in P.

    Returns:
        A 0-dim fp32 tensor (float64 for float64 probs), differentiable in `probs`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
    """
    _check_probs(probs, indices)
    _checks.token_mask(token_mask, probs.shape[0], "probs", probs)
    return reference.load_balancing_loss(probs, indices, coefficient, token_mask)


def sequence_balancing_loss(
    probs: Tensor, indices: Tensor, *, sequence_length: int, coefficient: float = 1.0
) -> Tensor:
    """`load_balancing_loss` of each sequence by itself, averaged over sequences (DeepSeek-V3).

    Args:
        probs: [T, E] probabilities; tokens of a sequence are consecutive.
        indices: [T, K] chosen expert ids.
        sequence_length: tokens per sequence; must divide T.
        coefficient: factor of the loss.

    Returns:
        A 0-dim fp32 tensor (float64 for float64 probs), differentiable in `probs`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
    """
    _check_probs(probs, indices)
    _checks.integer("sequence_length", sequence_length, 1)
    if probs.shape[0] % sequence_length:
        raise ValueError(
            f"sequence_length must divide the number of tokens, got {sequence_length} "
            f"for {probs.shape[0]} tokens"
        )
    return reference.sequence_balancing_loss(probs, indices, sequence_length, coefficient)


def router_z_loss(logits: Tensor, *, coefficient: float = 1.0) -> Tensor:
    """coefficient * mean over tokens of logsumexp(logits[t])^2 (ST-MoE).

    Args:
        logits: [T, E] float.
        coefficient: factor of the loss.

    Returns:
        A 0-dim fp32 tensor (float64 for float64 logits), differentiable.

    Raises:
        ValueError, TypeError: an argument has a wrong shape or dtype.
    """
    _checks.shape("logits", logits, (None, None), "[T, E]")
    _checks.dtype("logits", logits, _checks.FLOATS)
    return reference.router_z_loss(logits, coefficient)


@torch.no_grad()
def update_expert_bias(bias: Tensor, expert_counts: Tensor, *, rate: float = 1e-3) -> Tensor:
    """One step of loss-free balancing, in place: bias += rate * (sign(e) - mean(sign(e))).

    e = mean(counts) - counts, on demand before any drop, summed over micro-batches and
    data-parallel ranks by the caller (DeepSeek-V3; the zero mean is Ling 2.0's).

    Args:
        bias: [E] fp32, changed in place.
        expert_counts: [E] integer or float demand.
        rate: step size.

    Returns:
        `bias`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
    """
    _checks.shape("bias", bias, (None,), "[E]")
    _checks.dtype("bias", bias, (torch.float32, torch.float64))
    _checks.shape("expert_counts", expert_counts, (bias.shape[0],), "[E]")
    _checks.same_device("expert_counts", expert_counts, "bias", bias)
    return bias.add_(reference.expert_bias_step(expert_counts, rate))


class _InjectLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def inject_loss(x: Tensor, loss: Tensor) -> Tensor:
    """`x` unchanged; its backward adds d loss, as if `loss` had been added to the objective.

    A model needs no plumbing for its balancing losses then. With a loss scaler, multiply `loss`
    by the scale.

    Args:
        x: any tensor on the path to the objective, e.g. gate weights [T, K].
        loss: 0-dim tensor.

    Returns:
        A view of x.

    Raises:
        ValueError, TypeError: `loss` is not a 0-dim tensor.
    """
    _checks.tensor("x", x)
    _checks.shape("loss", loss, (), "[]")
    return _InjectLoss.apply(x, loss)
