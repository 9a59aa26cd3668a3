"""`topk_gate`: scores, expert selection and gate weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import gate as reference
from . import _checks, _library  # noqa: F401  (the operators are defined on import)
from ._backend import use_kernel

SCORE_FUNCTIONS = ("softmax", "sigmoid")
#: Limits of the CUDA kernel; beyond them the reference runs.
MAX_KERNEL_EXPERTS, MAX_KERNEL_CHOICES = 1024, 32


class _TopkGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, expert_bias, k, settings):
        sigmoid, num_groups, topk_groups, renormalize, scale = settings
        weights, indices, counts = torch.ops.ling_ops.topk_gate(
            logits, expert_bias, k, sigmoid, num_groups, topk_groups, renormalize, scale
        )
        ctx.save_for_backward(logits, weights, indices)
        ctx.settings = settings
        ctx.mark_non_differentiable(indices, counts)
        return weights, indices, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_weights, _indices, _counts):
        logits, weights, indices = ctx.saved_tensors
        sigmoid, _, _, renormalize, scale = ctx.settings
        grad = torch.ops.ling_ops.topk_gate_backward(
            grad_weights.contiguous(), logits, weights, indices, None, 0, None, None,
            sigmoid, renormalize, scale,
        )  # fmt: skip
        return grad, None, None, None


def check_gate(
    logits, k, *, score_function, expert_bias, num_groups, topk_groups, renormalize, scale
) -> None:
    """Raise for arguments of `topk_gate` that don't fit together."""
    _checks.shape("logits", logits, (None, None), "[T, E]")
    _checks.dtype("logits", logits, _checks.FLOATS)
    experts = logits.shape[1]
    _checks.integer("k", k, 1, experts, " (the number of experts)")
    _checks.choice("score_function", score_function, SCORE_FUNCTIONS)
    _checks.integer("num_groups", num_groups, 1)
    if experts % num_groups:
        raise ValueError(
            f"num_groups must divide the number of experts, got {num_groups} for {experts} experts"
        )
    _checks.integer("topk_groups", topk_groups, 1, num_groups, " (num_groups)")
    if k > topk_groups * (experts // num_groups):
        raise ValueError(
            f"k must be at most the {topk_groups * (experts // num_groups)} experts of "
            f"{topk_groups} kept groups, got {k}"
        )
    _checks.finite("scale", scale)
    if expert_bias is not None:
        _checks.shape("expert_bias", expert_bias, (experts,), "[E]")
        _checks.dtype("expert_bias", expert_bias, (torch.float32, torch.float64))
        _checks.same_device("expert_bias", expert_bias, "logits", logits)


def gate_unsupported(logits: Tensor, k: int) -> str | None:
    """What the kernel can't do about these arguments, if anything."""
    if logits.dtype == torch.float64:
        return "logits are float64"
    if logits.shape[1] > MAX_KERNEL_EXPERTS or k > MAX_KERNEL_CHOICES:
        return (
            f"E = {logits.shape[1]}, k = {k} are beyond the kernel's "
            f"E <= {MAX_KERNEL_EXPERTS}, k <= {MAX_KERNEL_CHOICES}"
        )
    return None


def kernel_bias(expert_bias: Tensor | None) -> Tensor | None:
    """The expert bias as the operator takes it: contiguous fp32."""
    return None if expert_bias is None else expert_bias.detach().float().contiguous()


def topk_gate(
    logits: Tensor,
    k: int,
    *,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose k experts for each token and weigh them.

    Scores are computed in fp32 (float64 for float64 logits): softmax over all experts, or
    sigmoid. The selection key is the logits themselves for softmax without bias and groups, and
    score + bias otherwise; equal keys go to the lower expert id, NaN is the lowest key. With
    groups, only experts of the `topk_groups` groups with the largest sum of their two best keys
    can be chosen (DeepSeek-V3, Ling 2.0). Weights are the unbiased scores of the chosen experts,
    divided by (their sum + 1e-20) if `renormalize` and k > 1, times `scale`.

    Args:
        logits: [T, E], fp32, bf16, fp16 or float64, any strides.
        k: experts per token, 1 <= k <= E (and no more than the kept groups hold).
        score_function: "softmax" or "sigmoid".
        expert_bias: [E] fp32, added to the scores for the selection only; gets no gradient.
        num_groups: contiguous groups of E / num_groups experts; must divide E.
        topk_groups: groups kept, 1 <= topk_groups <= num_groups.
        renormalize: divide by the sum of the chosen scores.
        scale: factor of all weights (`routed_scaling_factor`).

    Returns:
        weights [T, k], fp32 (float64 for float64 logits), differentiable in `logits`, and
        indices [T, k], int32, best expert first.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_gate(
        logits, k, score_function=score_function, expert_bias=expert_bias, num_groups=num_groups,
        topk_groups=topk_groups, renormalize=renormalize, scale=scale,
    )  # fmt: skip
    if not use_kernel("topk_gate", logits, gate_unsupported(logits, k)):
        return reference.topk_gate(
            logits, k, score_function=score_function, expert_bias=expert_bias,
            num_groups=num_groups, topk_groups=topk_groups, renormalize=renormalize, scale=scale,
        )  # fmt: skip
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    settings = (score_function == "sigmoid", num_groups, topk_groups, renormalize, float(scale))
    if torch.is_grad_enabled() and logits.requires_grad:
        return _TopkGate.apply(logits, kernel_bias(expert_bias), k, settings)[:2]
    return torch.ops.ling_ops.topk_gate(logits, kernel_bias(expert_bias), k, *settings)[:2]
