"""Top-k gating in plain PyTorch: the definition of `ling_ops.topk_gate`."""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to the sum of the chosen scores before renormalising (Ling, DeepSeek-V3).
RENORMALIZE_EPSILON = 1e-20


def upcast(x: Tensor) -> Tensor:
    """The dtype in which routing is computed: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def ordered_key(x: Tensor) -> Tensor:
    """Map floats to integers of the same order; NaN below -inf, -0.0 equal to +0.0.

    The least integer itself is never produced, so callers may use it for "not a candidate".
    """
    x = upcast(x.detach())
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(integer)
    bits = torch.where(x == 0, torch.zeros_like(x), x).view(integer)
    key = torch.where(bits < 0, bits ^ limits.max, bits)
    return torch.where(torch.isnan(x), limits.min + 1, key)


def stable_topk(key: Tensor, k: int) -> Tensor:
    """Indices of the k largest keys along the last axis, largest first, ties to the lower index."""
    return torch.sort(key, dim=-1, descending=True, stable=True).indices[..., :k]


def gate_scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores [T,E] of all experts in fp32 (float64 for float64): softmax over E, or sigmoid."""
    z = upcast(logits)
    return torch.softmax(z, dim=-1) if score_function == "softmax" else torch.sigmoid(z)


def probabilities(logits: Tensor, score_function: str) -> Tensor:
    """Scores that sum to 1 over the experts [T,E]: softmax, or sigmoid divided by its sum."""
    scores = gate_scores(logits, score_function)
    if score_function == "softmax":
        return scores
    return scores / (scores.sum(-1, keepdim=True) + RENORMALIZE_EPSILON)


def _mask_groups(biased: Tensor, key: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """Keep the best groups; a group's score is the sum of its two largest biased scores."""
    tokens, experts = biased.shape
    grouped = biased.detach().view(tokens, num_groups, experts // num_groups)
    best = stable_topk(key.view(grouped.shape), min(2, grouped.shape[-1]))
    group_key = ordered_key(grouped.gather(-1, best).sum(-1))
    kept = stable_topk(group_key, topk_groups)
    keep = torch.zeros_like(group_key, dtype=torch.bool).scatter_(-1, kept, True)
    keep = keep.unsqueeze(-1).expand(grouped.shape).reshape(tokens, experts)
    return torch.where(keep, key, torch.iinfo(key.dtype).min)


def select_experts(
    logits: Tensor,
    scores: Tensor,
    k: int,
    *,
    score_function: str,
    expert_bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
) -> Tensor:
    """Chosen expert ids [T,k] (int64), best first."""
    if score_function == "softmax" and expert_bias is None and num_groups == 1:
        return stable_topk(ordered_key(logits), k)  # monotone, and free of saturation
    biased = scores if expert_bias is None else scores + expert_bias
    key = ordered_key(biased)
    if topk_groups < num_groups:
        key = _mask_groups(biased, key, num_groups, topk_groups)
    return stable_topk(key, k)


def chosen_weights(scores: Tensor, indices: Tensor, renormalize: bool, scale: float) -> Tensor:
    """Gate weights [T,K] of given ids [T,K] from unbiased scores [T,E]."""
    weights = scores.gather(-1, indices.long())
    if renormalize and indices.shape[-1] > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + RENORMALIZE_EPSILON)
    return weights * scale


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
    """See `ling_ops.topk_gate`. Differentiable in `logits` by PyTorch's own autograd."""
    scores = gate_scores(logits, score_function)
    indices = select_experts(
        logits,
        scores,
        k,
        score_function=score_function,
        expert_bias=expert_bias,
        num_groups=num_groups,
        topk_groups=topk_groups,
    )
    return chosen_weights(scores, indices, renormalize, scale), indices.to(torch.int32)


def topk_gate_backward(
    grad_weights: Tensor,
    logits: Tensor,
    indices: Tensor,
    *,
    balance: Tensor | None = None,
    sequence_length: int = 0,
    z_scale: Tensor | None = None,
    token_mask: Tensor | None = None,
    score_function: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Gradient [T,E] of the gate with the balancing and z-losses folded in, in logits' dtype.

    `balance` [S,E] is d loss / d p for each sequence of `sequence_length` tokens, where p is the
    softmax, or the sigmoid scores normalised to sum 1; `z_scale` (0-dim) multiplies
    logsumexp(z) * softmax(z). Tokens with `token_mask` False get no loss terms.
    Formulas: derivative of `topk_gate`; balancing and z-loss as in `ling_ops.losses`.
    """
    z, sigmoid = upcast(logits.detach()), score_function == "sigmoid"
    scores, softmax = gate_scores(z, score_function), torch.softmax(z, dim=-1)
    slope = _score_slope(grad_weights, scores, indices, renormalize, scale)
    losses = torch.zeros_like(slope)
    if balance is not None:
        token_balance = balance.to(z.dtype).repeat_interleave(sequence_length, dim=0)[: len(z)]
        p = scores / (scores.sum(-1, keepdim=True) + RENORMALIZE_EPSILON) if sigmoid else softmax
        losses = token_balance - (token_balance * p).sum(-1, keepdim=True)
        losses = losses * (p * (1 - scores) if sigmoid else p)
    if z_scale is not None:
        losses = losses + z_scale * torch.logsumexp(z, dim=-1, keepdim=True) * softmax
    if token_mask is not None:
        losses = torch.where(token_mask.unsqueeze(-1), losses, 0.0)
    if sigmoid:
        gradient = slope * scores * (1 - scores)
    else:
        gradient = (slope - (slope * softmax).sum(-1, keepdim=True)) * softmax
    return (gradient + losses).to(logits.dtype)


def _score_slope(
    grad_weights: Tensor, scores: Tensor, indices: Tensor, renormalize: bool, scale: float
) -> Tensor:
    """d objective / d scores [T,E] through the chosen weights; zero for the other experts."""
    ids = indices.long()
    slope = grad_weights.to(scores.dtype) * scale
    if renormalize and indices.shape[-1] > 1:
        chosen = scores.gather(-1, ids)
        total = chosen.sum(-1, keepdim=True) + RENORMALIZE_EPSILON
        slope = (slope - (slope * chosen).sum(-1, keepdim=True) / total) / total
    return torch.zeros_like(scores).scatter_add(-1, ids, slope)


def gate_losses(
    logits: Tensor,
    *,
    balance: Tensor | None,
    sequence_balance: Tensor | None,
    sequence_length: int,
    token_mask: Tensor | None,
    score_function: str,
    z_loss: bool,
) -> Tensor:
    """Three sums over the tokens, [3]: <balance, p>, <sequence_balance, p> and logsumexp(z)^2.

    p are the token's `probabilities`; `balance` [E] and `sequence_balance` [S,E], a row for each
    `sequence_length` tokens, are d loss / d p. The balancing losses are linear in p (their counts
    are constants), so these products are their values. A sum that is not asked for is 0, and
    tokens with `token_mask` False add nothing.
    """
    z = upcast(logits.detach())
    p = probabilities(z, score_function)
    terms = z.new_zeros(3, len(z))
    if balance is not None:
        terms[0] = p @ balance.to(z.dtype)
    if sequence_balance is not None:
        rows = sequence_balance.to(z.dtype).repeat_interleave(sequence_length, dim=0)[: len(z)]
        terms[1] = (rows * p).sum(-1)
    if z_loss:
        terms[2] = torch.logsumexp(z, dim=-1).square()
    return (terms if token_mask is None else torch.where(token_mask, terms, 0.0)).sum(-1)
