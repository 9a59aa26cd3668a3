"""Route, permute and combine: everything of the layer that is not a product, as graph replays."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, floor, has_kernel, main, normal, rotations_for, uniform, uniform_ids

import ling_ops

K = 8


# --- route ---------------------------------------------------------------------------------------
def route_torch(indices: torch.Tensor, experts: int) -> tuple[torch.Tensor, ...]:
    """Stable sort by expert, counts, offsets and the inverse map, without a sync."""
    ids = indices.reshape(-1)
    _, order = ids.sort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids.long(), torch.ones_like(order))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=ids.device)
    return counts, counts.cumsum(0), order // K, order, inverse


def route_case(what: str, tokens: int, experts: int) -> Case:
    turns = rotations_for(tokens * K * 16)
    ids = [uniform_ids(tokens, K, experts) for _ in range(turns)]
    weights = uniform(tokens, K)
    options: dict[str, object] = {}
    size = tokens * K * 4 * 4 + experts * 8  # ids read; three maps written
    if what != "fwd":
        limit = int(1.25 * tokens * K / experts)
        options["capacity"] = torch.full((1,), limit, dtype=torch.int32, device=weights.device)
    if what == "probability_fwd":
        options |= {"priority": "probability", "weights": weights}
        size += tokens * K * 4
    providers = {"ling_ops": lambda i: ling_ops.route(ids[i], experts, **options)}
    if what == "fwd":
        providers["torch"] = lambda i: route_torch(ids[i], experts)
    shape = {"T": tokens, "E": experts, "K": K}
    return Case("route", what, shape, "int32", floor((0, size)), providers, True, turns)


def gate_route_case(tokens: int, experts: int) -> Case:
    """The gate and the routing as the layer calls them."""
    turns = rotations_for(tokens * experts * 4)
    logits = [normal(tokens, experts, dtype=torch.float32) for _ in range(turns)]

    def ours(i: int) -> object:
        weights, indices = ling_ops.topk_gate(logits[i], K)
        return weights, ling_ops.route(indices, experts)

    def torchs(i: int) -> object:
        weights, indices = logits[i].softmax(-1).topk(K)
        return weights / weights.sum(-1, keepdim=True), route_torch(indices, experts)

    size = tokens * (experts * 4 + K * 8) + tokens * K * 16 + experts * 8
    shape = {"T": tokens, "E": experts, "K": K}
    return Case(
        "route", "gate_route_fwd", shape, "float32", floor((0, size)),
        {"ling_ops": ours, "torch": torchs}, True, turns,
    )  # fmt: skip


# --- permute and combine -------------------------------------------------------------------------
def move_cases(tokens: int, hidden: int, experts: int) -> Iterator[Case]:
    """bf16 rows [T*K,H]; floors count every row read once and written once."""
    pairs = tokens * K
    routing = ling_ops.route(uniform_ids(tokens, K, experts), experts)
    x, grad_out = normal(tokens, hidden), normal(tokens, hidden)
    rows = [normal(pairs, hidden) for _ in range(2)]
    weights = uniform(tokens, K)
    token, pair = routing.row_token.long(), routing.row_pair.long()
    row = routing.token_row.reshape(-1).long()
    shape = {"T": tokens, "H": hidden, "E": experts, "K": K}
    move = floor((0, 2 * pairs * hidden * 2))
    gather = floor((0, (pairs + tokens) * hidden * 2))
    ops = torch.ops.ling_ops

    def case(bench: str, what: str, floor_ms: float, kernel: str, ours, torchs) -> Case:
        providers = {"ling_ops": ours} if has_kernel(kernel) else {}
        providers["torch"] = torchs
        return Case(bench, what, shape, "bfloat16", floor_ms, providers, True, 2)

    def combine_torch(i: int) -> torch.Tensor:
        picked = rows[i][row].view(tokens, K, hidden)
        return torch.einsum("tkh,tk->th", picked, weights.bfloat16())

    def combine_backward_torch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        moved = grad_out[token]
        share = (moved.float() * rows[i].float()).sum(-1)
        return moved * weights.view(-1)[pair].bfloat16().unsqueeze(-1), share

    yield case(
        "permute", "fwd", move, "permute",
        lambda i: ling_ops.permute(x, routing), lambda i: x.index_select(0, token),
    )  # fmt: skip
    yield case(
        "permute", "bwd", gather, "combine",
        lambda i: ops.combine(rows[i], routing.token_row, None, None),
        lambda i: rows[i][row].view(tokens, K, hidden).sum(1),
    )  # fmt: skip
    yield case(
        "combine", "fwd", gather, "combine",
        lambda i: ling_ops.unpermute(rows[i], routing, weights), combine_torch,
    )  # fmt: skip
    yield case(
        "combine", "bwd", move, "combine_backward",
        lambda i: ops.combine_backward(
            grad_out, rows[i], routing.row_pair, weights, routing.expert_offsets,
            routing.token_row,
        ),
        combine_backward_torch,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for tokens in (64, 2048, 8192, 32768, 262144):
        yield route_case("fwd", tokens, 256)
    for experts in (8, 64, 1024):
        yield route_case("fwd", 32768, experts)
    for what in ("position_fwd", "probability_fwd"):
        yield route_case(what, 32768, 256)
    yield gate_route_case(8192, 256)
    for hidden in (2048, 4096):
        yield from move_cases(32768, hidden, 256)


if __name__ == "__main__":
    main(__doc__, cases, 0.4, ("route", "permute", "combine"))
