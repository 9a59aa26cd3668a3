"""Gate: scores, selection and weights from logits, forward and backward, as graph replays."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, floor, has_kernel, main, normal, rotations_for

import ling_ops

TOKENS = (64, 512, 2048, 8192, 32768, 262144)
EXPERTS = (8, 32, 64, 128, 512, 1024)
K, GROUPS, TOPK_GROUPS = 8, 8, 4


def bytes_forward(tokens: int, experts: int) -> float:
    """Logits read; weights and ids written."""
    return tokens * (experts * 4 + K * 8)


def softmax_torch(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, indices = logits.softmax(-1).topk(K)
    return weights / weights.sum(-1, keepdim=True), indices


def sigmoid_torch(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid, bias, 4 of 8 groups by their two best, top-8: as a model file writes it."""
    scores = logits.sigmoid()
    grouped = (scores + bias).view(len(logits), GROUPS, -1)
    kept = grouped.topk(2).values.sum(-1).topk(TOPK_GROUPS).indices
    mask = torch.ones(grouped.shape[:2], dtype=torch.bool, device=logits.device)
    mask.scatter_(1, kept, False)
    keys = grouped.masked_fill(mask.unsqueeze(-1), float("-inf")).flatten(1)
    indices = keys.topk(K).indices
    weights = scores.gather(1, indices)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, indices


def forward_case(what: str, tokens: int, experts: int) -> Case:
    size = bytes_forward(tokens, experts)
    turns = rotations_for(tokens * experts * 4)
    logits = [normal(tokens, experts, dtype=torch.float32) for _ in range(turns)]
    bias = torch.linspace(-0.1, 0.1, experts, device=logits[0].device)
    options = {
        "score_function": "sigmoid",
        "expert_bias": bias,
        "num_groups": GROUPS,
        "topk_groups": TOPK_GROUPS,
        "scale": 2.5,
    }
    if what == "softmax_fwd":
        providers = {
            "ling_ops": lambda i: ling_ops.topk_gate(logits[i], K),
            "torch": lambda i: softmax_torch(logits[i]),
        }
    else:
        providers = {
            "ling_ops": lambda i: ling_ops.topk_gate(logits[i], K, **options),
            "torch": lambda i: sigmoid_torch(logits[i], bias),
        }
    shape = {"T": tokens, "E": experts, "K": K}
    return Case("gate", what, shape, "float32", floor((0, size)), providers, True, turns)


def backward_case(tokens: int, experts: int) -> Case:
    """Gradient of the weights, the balancing loss and the z-loss, in logits."""
    turns = rotations_for(tokens * experts * 8)
    logits = [normal(tokens, experts, dtype=torch.float32) for _ in range(turns)]
    weights, indices = ling_ops.topk_gate(logits[0], K)
    upstream = normal(tokens, K, dtype=torch.float32)
    counts = torch.bincount(indices.reshape(-1).long(), minlength=experts).float()
    balance = (0.01 * experts / tokens * counts / counts.sum()).view(1, -1)
    z_scale = torch.tensor(2e-3 / tokens, device=upstream.device)

    def fused(i: int) -> torch.Tensor:
        return torch.ops.ling_ops.topk_gate_backward(
            upstream, logits[i], weights, indices, balance, tokens, z_scale, None, False, True, 1.0
        )

    def by_hand(i: int) -> torch.Tensor:
        p = logits[i].softmax(-1)
        chosen = p.gather(1, ids)
        total = chosen.sum(-1, keepdim=True)
        slope = (upstream - (upstream * chosen).sum(-1, keepdim=True) / total) / total
        grad = balance.expand_as(p).scatter_add(1, ids, slope)
        grad = p * (grad - (grad * p).sum(-1, keepdim=True))
        return grad + z_scale * logits[i].logsumexp(-1, keepdim=True) * p

    ids = indices.long()
    size = tokens * (2 * experts * 4 + 3 * K * 4)
    providers = {"ling_ops": fused} if has_kernel("topk_gate_backward") else {}
    providers["torch"] = by_hand
    shape = {"T": tokens, "E": experts, "K": K}
    return Case("gate", "softmax_bwd", shape, "float32", floor((0, size)), providers, True, turns)


def cases() -> Iterator[Case]:
    for tokens in TOKENS:
        for what in ("softmax_fwd", "sigmoid_group_fwd"):
            yield forward_case(what, tokens, 256)
    for experts in EXPERTS:
        yield forward_case("softmax_fwd", 32768, experts)
    for tokens in (8192, 32768):
        yield backward_case(tokens, 256)


if __name__ == "__main__":
    main(__doc__, cases, 0.4, ("gate",))
