"""Sizes past 2^31 elements. Sampled rows are compared: the truth would not fit beside them."""

from __future__ import annotations

import pytest
import torch
from test_ops_cuda import needs
from tolerances import truth

import ling_ops as lo

pytestmark = [pytest.mark.cuda, pytest.mark.xdist_group("large")]


def free_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.1f} are free")


def sample(rows: int, device: torch.device) -> torch.Tensor:
    """The first, the last and some random rows."""
    ends = torch.tensor([0, 1, rows - 2, rows - 1])
    return torch.cat([ends, torch.randint(rows, (60,))]).to(device)


def test_gate_past_2_31_elements(device: torch.device) -> None:
    free_memory(8)
    tokens, experts = 2**21 + 77, 1024
    logits = torch.empty(tokens, experts, dtype=torch.bfloat16, device=device).normal_()
    weights, indices = lo.topk_gate(logits, 8)
    rows = sample(tokens, device)
    expected_weights, expected = truth(lo.topk_gate, logits[rows], 8)
    assert torch.equal(indices[rows], expected)
    torch.testing.assert_close(weights[rows], expected_weights)


@pytest.mark.parametrize("tokens", [2**26 + 5, 2**28 - 1])
def test_route_of_very_many_pairs(device: torch.device, tokens: int) -> None:
    """The larger has 2^31 - 8 pairs.  Counting and the inverse map are checked in full."""
    needs("route")
    pairs, experts = tokens * 8, 64
    free_memory(pairs * 4 * 6 / 2**30)
    indices = torch.randint(experts, (tokens, 8), dtype=torch.int32, device=device)
    routing = lo.route(indices, experts)
    assert int(routing.expert_offsets[-1]) == pairs == int(routing.expert_counts.long().sum())
    rows = sample(pairs, device)
    pair = routing.row_pair[rows].long()
    assert torch.equal(routing.token_row.view(-1)[pair].long(), rows)
    expert = torch.searchsorted(routing.expert_offsets[1:].long(), rows, right=True)
    assert torch.equal(indices.view(-1)[pair].long(), expert)
    assert torch.equal(routing.row_token[rows].long(), pair // 8)
    for first in range(0, pairs - 1, 2**27):
        part = routing.row_pair[first : first + 2**27 + 1]
        falls = int((part[1:] < part[:-1]).sum())
        assert falls <= experts, "rows of an expert are not in pair order"


def test_permute_past_2_31_elements(device: torch.device) -> None:
    free_memory(12)
    tokens, k, hidden = 2**17 + 3, 8, 2056
    indices = torch.randint(64, (tokens, k), dtype=torch.int32, device=device)
    routing = lo.route(indices, 64)
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device).normal_()
    rows = lo.permute(x, routing)
    chosen = sample(tokens * k, device)
    assert torch.equal(rows[chosen], x[routing.row_token[chosen].long()])
    out = lo.unpermute(rows, routing)
    chosen = sample(tokens, device)
    torch.testing.assert_close(out[chosen], (x[chosen].float() * k).bfloat16())


def test_combine_backward_past_2_31_elements(device: torch.device) -> None:
    free_memory(16)
    tokens, k, hidden = 2**17 + 3, 8, 2056
    indices = torch.randint(64, (tokens, k), dtype=torch.int32, device=device)
    routing = lo.route(indices, 64, capacity=2**14)  # half of the experts drop some
    rows = torch.empty(tokens * k, hidden, dtype=torch.bfloat16, device=device).normal_()
    weights = torch.rand(tokens, k, device=device)
    upstream = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device).normal_()
    out = lo.unpermute(rows.requires_grad_(), routing, weights.requires_grad_())
    grad_rows, grad_weights = torch.autograd.grad(out, (rows, weights), upstream)
    chosen = sample(tokens, device)
    row = routing.token_row[chosen].long()
    present = (row >= 0).unsqueeze(-1)
    ups, row = upstream[chosen].float().unsqueeze(1), row.clamp(min=0)
    expected = (weights[chosen].unsqueeze(-1) * ups).bfloat16()
    assert torch.equal(torch.where(present, grad_rows[row], 0), torch.where(present, expected, 0))
    dots = torch.where(present, rows[row].double() * ups.double(), 0).sum(-1)
    torch.testing.assert_close(grad_weights[chosen].double(), dots, rtol=1e-5, atol=1e-3)
    kept = int(routing.expert_offsets[-1])
    assert kept < tokens * k and int(grad_rows[kept:].count_nonzero()) == 0


def test_reroute_past_2_31_elements(device: torch.device) -> None:
    """One expert without a slot, the others with room for all: tokens don't meet."""
    tokens, k, experts = 2**25 + 5, 4, 128
    free_memory(tokens * (experts * 2 + k * 40) / 2**30 + 1)
    scores = torch.empty(tokens, experts, dtype=torch.bfloat16, device=device).uniform_()
    indices = torch.randint(experts // k, (tokens, k), dtype=torch.int32, device=device)
    indices += torch.arange(k, dtype=torch.int32, device=device) * (experts // k)
    weights = torch.rand(tokens, k, device=device)
    capacity = torch.full((experts,), 2**31 - 1, dtype=torch.int32, device=device)
    capacity[3] = 0
    moved = lo.reroute(scores, weights, indices, capacity=capacity, rounds=1)
    chosen = sample(tokens, device)
    chosen = torch.cat([chosen, (indices[-1000:, 0] == 3).nonzero().flatten() + tokens - 1000])
    sampled = (scores[chosen], weights[chosen], indices[chosen])
    expected = truth(lo.reroute, *sampled, capacity=capacity, rounds=1)
    for got, right in zip(moved, expected, strict=True):
        assert torch.equal(got[chosen], right)
    assert int((moved[1] == 3).sum()) == 0


@pytest.mark.parametrize("rows,experts,n,kd", [(2**21 + 9, 4, 64, 1032), (4096, 257, 2056, 4096)])
def test_gemm_past_2_31_elements(
    device: torch.device, rows: int, experts: int, n: int, kd: int
) -> None:
    """Once in the rows, once in the weights."""
    free_memory(10)
    a = torch.empty(rows, kd, dtype=torch.bfloat16, device=device).normal_()
    b = torch.empty(experts, n, kd, dtype=torch.bfloat16, device=device).normal_()
    offsets = torch.linspace(0, rows, experts + 1).to(torch.int32).to(device)
    out = lo.grouped_gemm(a, b, offsets)
    chosen = sample(rows, device)
    group = torch.searchsorted(offsets[1:], chosen.int(), right=True)
    for row, expert in zip(chosen.tolist(), group.tolist(), strict=True):
        exact = b[expert].double() @ a[row].double()
        torch.testing.assert_close(out[row].double(), exact, rtol=8e-3, atol=0.3)
