"""routing_stats: what is logged about a layer's routing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from strategies import RouteCase, route_cases

from ling_ops import route, routing_stats


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


def test_no_tokens(device: torch.device) -> None:
    indices = torch.empty(0, 2, dtype=torch.int32, device=device)
    stats = routing_stats(route(indices, 4), indices=indices)
    assert all(value.isfinite().all() for value in stats.values())
    assert stats["dead_experts"].item() == 4 and stats["drop_rate"].item() == 0
