"""routing_stats: what is logged about a layer's routing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from strategies import RouteCase, route_cases
from tolerances import assert_bitwise

from ling_ops import route, routing_stats
from ling_ops.reference import stats as reference


def stats_of(case: RouteCase) -> dict[str, torch.Tensor]:
    routing = route(case.indices, case.num_experts, **case.options)
    return routing_stats(
        routing,
        indices=case.indices,
        weights=case.options.get("weights"),
        token_mask=case.options.get("token_mask"),
    )


def test_balanced(device: torch.device) -> None:
    indices = torch.arange(16, device=device).view(8, 2) % 4
    stats = routing_stats(route(indices, 4))
    assert stats["utilization"].tolist() == [0.5] * 4
    for name, value in {
        "max_vio": 0,
        "cv": 0,
        "entropy": 1,
        "dead_experts": 0,
        "drop_rate": 0,
        "tokens_dropped": 0,
    }.items():
        assert stats[name].item() == pytest.approx(value, abs=1e-6), name


def test_skewed_with_drops(device: torch.device) -> None:
    indices = torch.tensor([[0], [0], [0], [1]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.5], [0.2], [0.3], [1.0]], device=device)
    routing = route(indices, 3, capacity=1)
    stats = routing_stats(routing, indices=indices, weights=weights)
    mean = 4 / 3
    assert stats["utilization"].tolist() == pytest.approx([0.75, 0.25, 0.0])
    assert stats["max_vio"].item() == pytest.approx(3 / mean - 1)
    assert stats["cv"].item() == pytest.approx(math.sqrt(14 / 9) / mean)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(3)
    assert stats["entropy"].item() == pytest.approx(entropy)
    assert stats["dead_experts"].item() == 1
    assert stats["drop_rate"].item() == pytest.approx(0.5)
    assert stats["tokens_dropped"].item() == 2
    assert stats["gate_mass_dropped"].item() == pytest.approx(0.25)


def test_skipped_pairs_are_not_drops(device: torch.device) -> None:
    indices = torch.tensor([[0, -1], [1, 9], [-1, -1]], dtype=torch.int32, device=device)
    stats = routing_stats(route(indices, 2), indices=indices)
    assert stats["drop_rate"].item() == 0 and stats["tokens_dropped"].item() == 0
    assert stats["utilization"].tolist() == [0.5, 0.5]


def test_a_token_is_lost_only_with_all_its_pairs(device: torch.device) -> None:
    indices = torch.tensor([[0, 1], [0, 1], [0, 2]], dtype=torch.int32, device=device)
    stats = routing_stats(route(indices, 3, capacity=1), indices=indices)
    assert stats["tokens_dropped"].item() == 1
    assert stats["drop_rate"].item() == pytest.approx(3 / 6)


@given(case=route_cases(styles=["uniform", "one_expert", "skewed", "bad_ids", "empty_experts"]))
def test_ranges(device: torch.device, case: RouteCase) -> None:
    case = case.to(device)
    weights = case.options["weights"].nan_to_num(0.5)
    case.options["weights"] = weights
    stats = stats_of(case)
    assert all(value.device.type == device.type for value in stats.values())
    assert all(value.isfinite().all() for value in stats.values()), stats
    for name in ("entropy", "drop_rate", "gate_mass_dropped"):
        assert -1e-5 <= stats[name].item() <= 1 + 1e-5, name
    assert stats["utilization"].shape == (case.num_experts,)
    assert ((stats["utilization"] >= 0) & (stats["utilization"] <= 1)).all()
    assert stats["max_vio"].item() >= -1e-6 and stats["cv"].item() >= 0
    routing = route(case.indices, case.num_experts, **case.options)
    demand = int(routing.expert_counts.sum())
    if demand:
        lost = demand - int(routing.expert_offsets[-1])
        assert stats["drop_rate"].item() == pytest.approx(lost / demand, abs=1e-6)


def by_hand(case: RouteCase, routing) -> dict[str, float | list[float]]:
    """The measures from Python's numbers, pair by pair."""
    experts, rows = case.num_experts, routing.token_row.tolist()
    weights, mask = case.options.get("weights"), case.options.get("token_mask")
    counts, held, mass, lost = [0] * experts, [], 0.0, 0.0  # held: of a token's pairs with demand
    for token, ids in enumerate(case.indices.tolist()):
        if mask is not None and not mask[token]:
            continue
        kept = []
        for k, expert in enumerate(ids):
            if not 0 <= expert < experts:
                continue
            kept.append(rows[token][k] >= 0)
            counts[expert] += 1
            weight = float(weights[token, k]) if weights is not None else 0.0
            mass += weight
            lost += 0.0 if kept[-1] else weight
        held += [kept] if kept else []
    demand = sum(counts)
    mean, shares = demand / experts, [n / max(demand, 1) for n in counts]
    spread = math.sqrt(sum((n - mean) ** 2 for n in counts) / experts)
    found = {
        "utilization": [n / max(len(held), 1) for n in counts],
        "max_vio": max(counts) / mean - 1 if demand else 0.0,
        "cv": spread / mean if demand else 0.0,
        "entropy": -sum(s * math.log(s) for s in shares if s) / max(math.log(experts), 1e-12),
        "dead_experts": counts.count(0),
        "drop_rate": sum(kept.count(False) for kept in held) / max(demand, 1),
        "tokens_dropped": sum(not any(kept) for kept in held),
    }
    return found if weights is None else found | {"gate_mass_dropped": lost / mass if mass else 0.0}


@given(case=route_cases(styles=["uniform", "one_expert", "skewed", "bad_ids", "empty_experts"]))
def test_against_a_count_by_hand(device: torch.device, case: RouteCase) -> None:
    if "weights" in case.options:
        case.options["weights"] = case.options["weights"].nan_to_num(0.5).abs()
    on_device = case.to(device)
    routing = route(on_device.indices, case.num_experts, **on_device.options)
    found = stats_of(on_device)
    wanted = by_hand(case, routing)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name].cpu(), torch.tensor(value, dtype=torch.float32), rtol=1e-5, atol=2e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_more_tokens_than_a_grid_has_threads(device: torch.device, dtype: torch.dtype) -> None:
    """The kernel beside the reference, and the same bits every time."""
    tokens, k, experts = 150_001, 5, 300
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.randint(-9, experts + 9, (tokens, k), generator=generator, device=device)
    indices = indices.to(dtype)
    weights = torch.rand(tokens, k, generator=generator, device=device)
    mask = torch.rand(tokens, generator=generator, device=device) < 0.9
    capacity = torch.tensor([2000], device=device, dtype=torch.int32)
    routing = route(indices, experts, capacity=capacity, token_mask=mask)
    counts, rows = routing.expert_counts, routing.token_row
    for given_ids in (indices, None):
        for given_weights in (weights, None):
            for given_mask in (mask, None):
                arguments = (counts, rows, given_ids, given_weights, given_mask)
                first = torch.ops.ling_ops.routing_stats(*arguments)
                torch.testing.assert_close(
                    first, reference.routing_stats(*arguments), rtol=2e-5, atol=1e-6
                )
                for _ in range(20):
                    assert_bitwise(torch.ops.ling_ops.routing_stats(*arguments), first)


def test_no_tokens(device: torch.device) -> None:
    indices = torch.empty(0, 2, dtype=torch.int32, device=device)
    stats = routing_stats(route(indices, 4), indices=indices)
    assert all(value.isfinite().all() for value in stats.values())
    assert stats["dead_experts"].item() == 4 and stats["drop_rate"].item() == 0
