"""CapacityPolicy: dropless, fixed, and the smallest capacity for a target drop rate."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, seeds

from ling_ops import CapacityPolicy, route

targets = st.sampled_from([0.0, 0.01, 0.02, 0.25, 0.5, 1.0])


def demand(experts: int, seed: int, style: str) -> torch.Tensor:
    counts = torch.randint(0, 60, (experts,), generator=generator(seed))
    if style == "skewed":
        counts = (counts * 5.0 / torch.arange(1, experts + 1)).long()
    elif style == "one_expert":
        counts = torch.zeros_like(counts)
        counts[experts // 2] = 500
    elif style == "nothing":
        counts = torch.zeros_like(counts)
    return counts.int()


def drop_rate(counts: torch.Tensor, capacity: int) -> float:
    total = int(counts.sum())
    return int((counts - capacity).clamp(min=0).sum()) / total if total else 0.0


def test_dropless_has_no_capacity(device: torch.device) -> None:
    policy = CapacityPolicy.dropless()
    assert policy.capacity(torch.ones(4, dtype=torch.int32, device=device), 8, 4) is None


@pytest.mark.parametrize(
    "factor,pairs,experts,expected",
    [(1.25, 64, 8, 10), (1.0, 10, 4, 3), (1.5, 7, 2, 6), (1.0, 0, 4, 0), (1.1, 400, 8, 55)],
)
def test_fixed(
    device: torch.device, factor: float, pairs: int, experts: int, expected: int
) -> None:
    counts = torch.ones(experts, dtype=torch.int32, device=device)
    assert CapacityPolicy.fixed(factor).capacity(counts, pairs, experts) == expected
    assert expected == math.ceil(Fraction(str(factor)) * pairs / experts)


@given(
    experts=st.sampled_from([1, 2, 7, 64, 257]),
    seed=seeds,
    target=targets,
    style=st.sampled_from(["uniform", "skewed", "one_expert", "nothing"]),
)
def test_dynamic_is_the_smallest_capacity_for_the_target(
    device: torch.device, experts: int, seed: int, target: float, style: str
) -> None:
    counts = demand(experts, seed, style).to(device)
    capacity = CapacityPolicy.dynamic(target).capacity(counts, int(counts.sum()), experts)
    assert capacity.dtype == torch.int32 and capacity.device.type == device.type
    best = int(capacity)
    assert drop_rate(counts, best) <= target
    assert best == 0 or drop_rate(counts, best - 1) > target


def test_dynamic_feeds_route_without_leaving_the_device(device: torch.device) -> None:
    indices = torch.randint(0, 8, (400, 2), generator=generator(1)).square().remainder(8)
    indices = indices.int().to(device)
    counts = route(indices, 8).expert_counts
    capacity = CapacityPolicy.dynamic(0.05).capacity(counts, 800, 8)
    routing = route(indices, 8, capacity=capacity)
    assert torch.equal(counts, routing.expert_counts)
    assert 0.95 * 800 <= int(routing.expert_offsets[-1]) < 800


def test_dynamic_over_ranks_uses_the_list_of_loads(device: torch.device) -> None:
    """Two ranks with opposite skew: their sum looks balanced, each of them is not."""
    loads = torch.tensor([90, 10, 10, 90], dtype=torch.int32, device=device)
    policy = CapacityPolicy.dynamic(0.05)
    assert drop_rate(loads, int(policy.capacity(loads, 200, 2))) <= 0.05
    summed = loads.view(2, 2).sum(0)
    assert int(policy.capacity(summed, 200, 2)) > int(policy.capacity(loads, 200, 2))


def running(**options: object) -> CapacityPolicy:
    return CapacityPolicy.dynamic(0.0, mode="running", **options)


def test_running_uses_past_steps_only(device: torch.device) -> None:
    policy = running(window=4, quantile=1.0, margin=0.5, max_factor=4.0).to(device)
    calm = torch.full((4,), 10, dtype=torch.int32, device=device)
    wild = torch.tensor([25, 5, 5, 5], dtype=torch.int32, device=device)
    assert int(policy.capacity(wild, 40, 4)) == 40  # max_factor before the first step
    policy.update(calm)
    assert int(policy.capacity(wild, 40, 4)) == 15  # 1.5 x C*/mu = 1.5
    policy.update(wild)
    assert int(policy.capacity(calm, 40, 4)) == 38  # 1.5 x 2.5 = 3.75
    for _ in range(4):
        policy.update(calm)
    assert int(policy.capacity(wild, 40, 4)) == 15  # the wild step has left the window


def test_running_is_clipped(device: torch.device) -> None:
    policy = running(window=2, quantile=1.0, margin=0.0, max_factor=1.5).to(device)
    policy.update(torch.tensor([40, 0], dtype=torch.int32, device=device))
    assert int(policy.capacity(torch.zeros(2, device=device), 40, 2)) == 30
    calm = CapacityPolicy.dynamic(0.5, mode="running", window=2, quantile=1.0, margin=0.0)
    calm = calm.to(device)
    calm.update(torch.tensor([20, 20], dtype=torch.int32, device=device))
    assert int(calm.capacity(torch.zeros(2, device=device), 40, 2)) == 20  # never below mu


def test_running_window_is_in_the_state_dict(device: torch.device) -> None:
    policy = running(window=3).to(device)
    for step in range(5):
        policy.update(torch.tensor([10 + step, 10], dtype=torch.int32, device=device))
    other = running(window=3).to(device)
    other.load_state_dict(policy.state_dict())
    counts = torch.zeros(2, device=device)
    assert torch.equal(other.capacity(counts, 100, 2), policy.capacity(counts, 100, 2))


def test_the_window_keeps_its_precision_in_another_dtype(device: torch.device) -> None:
    counts = torch.tensor([1011, 1000, 990, 999], dtype=torch.int32, device=device)
    policy = CapacityPolicy.dynamic(0.0, mode="running", margin=0.0).to(device)
    policy.update(counts)
    wanted = int(policy.capacity(counts, 4000, 4))
    assert int(policy.bfloat16().capacity(counts, 4000, 4)) == wanted >= 1011


def test_stateless_policies_have_no_state() -> None:
    for policy in (CapacityPolicy.dropless(), CapacityPolicy.fixed(1.5), CapacityPolicy.dynamic()):
        assert not policy.state_dict()
        policy.update(torch.ones(4, dtype=torch.int32))
        assert not policy.state_dict()


@pytest.mark.parametrize("make", [CapacityPolicy.dynamic, running])
def test_zero_demand(device: torch.device, make: object) -> None:
    counts = torch.zeros(4, dtype=torch.int32, device=device)
    policy = make().to(device)
    policy.update(counts)
    assert int(policy.capacity(counts, 0, 4)) == 0
