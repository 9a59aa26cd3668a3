"""route: demand, offsets, rows in expert order, the inverse map, and who stays under a capacity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import RouteCase, make_indices, make_weights, route_cases
from tolerances import truth

from ling_ops import Routing, route


def run(case: RouteCase) -> Routing:
    return route(case.indices, case.num_experts, **case.options)


def pair_experts(case: RouteCase) -> torch.Tensor:
    """Expert of every pair [T*K], E for pairs that must be skipped."""
    ids = case.indices.long()
    real = (ids >= 0) & (ids < case.num_experts)
    mask = case.options.get("token_mask")
    if mask is not None:
        real &= mask.unsqueeze(1)
    return torch.where(real, ids, case.num_experts).reshape(-1)


def limits(case: RouteCase, counts: torch.Tensor) -> torch.Tensor:
    capacity = case.options.get("capacity")
    if capacity is None:
        return counts.clone()
    return torch.minimum(counts, torch.as_tensor(capacity, device=counts.device).long())


@given(case=route_cases())
def test_conservation(device: torch.device, case: RouteCase) -> None:
    """Every real pair is counted, and is a row exactly if its expert had room."""
    case = case.to(device)
    routing = run(case)
    pairs = case.indices.numel()
    experts = pair_experts(case)
    counts = torch.bincount(experts, minlength=case.num_experts + 1)[: case.num_experts]
    assert all(field.dtype == torch.int32 for field in routing)
    assert all(field.device == case.indices.device for field in routing)
    assert torch.equal(routing.expert_counts.long(), counts)
    assert routing.expert_offsets[0] == 0
    assert torch.equal(routing.expert_offsets.diff().long(), limits(case, counts))
    assert routing.row_token.shape == routing.row_pair.shape == (pairs,)
    assert routing.token_row.shape == case.indices.shape

    rows = int(routing.expert_offsets[-1])
    assert (routing.row_pair[rows:] == -1).all() and (routing.row_token[rows:] == -1).all()
    kept = routing.row_pair[:rows].long()
    sizes = routing.expert_offsets.diff().long()
    row_expert = torch.arange(case.num_experts, device=device).repeat_interleave(sizes)
    assert torch.equal(experts[kept], row_expert), "a row lies in another expert's segment"
    assert torch.equal(routing.row_token[:rows].long(), kept // case.indices.shape[1])
    same = row_expert[1:] == row_expert[:-1]
    assert (kept[1:] > kept[:-1])[same].all(), "rows of an expert are not in pair order"


@given(case=route_cases())
def test_inverse_map(device: torch.device, case: RouteCase) -> None:
    case = case.to(device)
    routing = run(case)
    rows = int(routing.expert_offsets[-1])
    flat = routing.token_row.reshape(-1)
    assert int((flat >= 0).sum()) == rows and (flat >= -1).all()
    position = torch.arange(rows, dtype=torch.int32, device=device)
    assert torch.equal(flat[routing.row_pair[:rows].long()], position)


@given(case=route_cases())
def test_the_right_pairs_are_dropped(device: torch.device, case: RouteCase) -> None:
    """Position: no kept pair comes after a dropped one.  Probability: none weighs less."""
    case = case.to(device)
    routing = run(case)
    experts = pair_experts(case)
    kept = routing.token_row.reshape(-1) >= 0
    assert not kept[experts == case.num_experts].any()
    order = torch.arange(len(experts), device=device)
    if case.options["capacity"] is not None and case.options["priority"] == "probability":
        weights = case.options["weights"].double().reshape(-1)
        key = torch.where(weights.isnan(), float("-inf"), weights)
        best_first = key.sort(descending=True, stable=True).indices
        order = torch.empty_like(order).scatter_(0, best_first, order)
    for expert in experts.unique().tolist():
        mine = experts == expert
        if expert < case.num_experts and kept[mine].any() and not kept[mine].all():
            assert order[mine & kept].max() < order[mine & ~kept].min()


@given(case=route_cases())
def test_kernel_equals_the_reference(device: torch.device, case: RouteCase) -> None:
    case = case.to(device)
    for actual, expected in zip(run(case), truth(run, case), strict=True):
        assert torch.equal(actual, expected)


@given(case=route_cases(capacity=False))
def test_a_capacity_that_nobody_reaches_changes_nothing(
    device: torch.device, case: RouteCase
) -> None:
    case = case.to(device)
    free = run(case)
    roomy = route(case.indices, case.num_experts, capacity=case.indices.numel(), **case.options)
    for actual, expected in zip(roomy, free, strict=True):
        assert torch.equal(actual, expected)


@given(case=route_cases(capacity=False))
def test_capacity_zero_drops_all_and_keeps_the_demand(
    device: torch.device, case: RouteCase
) -> None:
    case = case.to(device)
    routing = route(case.indices, case.num_experts, capacity=0, **case.options)
    assert torch.equal(routing.expert_counts, run(case).expert_counts)
    assert not routing.expert_offsets.any()
    assert (routing.token_row == -1).all() and (routing.row_pair == -1).all()


# --- worked examples -----------------------------------------------------------------------------
def ids(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def test_example(device: torch.device) -> None:
    routing = route(ids([[2, 0], [2, 1], [0, 2]], device), 4)
    assert routing.expert_counts.tolist() == [2, 1, 3, 0]
    assert routing.expert_offsets.tolist() == [0, 2, 3, 6, 6]
    assert routing.row_pair.tolist() == [1, 4, 3, 0, 2, 5]
    assert routing.row_token.tolist() == [0, 2, 1, 0, 1, 2]
    assert routing.token_row.tolist() == [[3, 0], [4, 2], [1, 5]]


def test_position_keeps_the_first_come(device: torch.device) -> None:
    routing = route(ids([[0], [1], [0], [0]], device), 2, capacity=2)
    assert routing.expert_counts.tolist() == [3, 1]
    assert routing.row_pair.tolist() == [0, 2, 1, -1]
    assert routing.token_row.tolist() == [[0], [2], [1], [-1]]


def test_probability_keeps_the_largest_and_breaks_ties_by_token(device: torch.device) -> None:
    weights = torch.tensor([[0.5], [float("nan")], [0.9], [0.5]], device=device)
    routing = route(ids([[0]] * 4, device), 1, capacity=2, priority="probability", weights=weights)
    assert routing.row_pair.tolist() == [0, 2, -1, -1]
    three = route(ids([[0]] * 4, device), 1, capacity=3, priority="probability", weights=weights)
    assert three.row_pair.tolist() == [0, 2, 3, -1]


def test_padding_tokens_take_no_room(device: torch.device) -> None:
    mask = torch.tensor([False, True, False, True], device=device)
    routing = route(ids([[0]] * 4, device), 2, capacity=1, token_mask=mask)
    assert routing.expert_counts.tolist() == [2, 0]
    assert routing.row_token.tolist() == [1, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bad_ids_are_skipped(device: torch.device, dtype: torch.dtype) -> None:
    bad = [-1, 3, torch.iinfo(dtype).max, torch.iinfo(dtype).min]
    indices = torch.tensor([[0, id_] for id_ in bad], dtype=dtype, device=device)
    routing = route(indices, 3)
    assert routing.expert_counts.tolist() == [4, 0, 0]
    assert routing.token_row.tolist() == [[row, -1] for row in range(4)]


def test_int64_ids_are_not_truncated(device: torch.device) -> None:
    indices = torch.tensor([[2**32], [2**32 + 1], [1]], device=device)
    assert route(indices, 2).expert_counts.tolist() == [0, 1]


def test_negative_capacity_tensor_means_zero(device: torch.device) -> None:
    capacity = torch.tensor([-3, 1], dtype=torch.int32, device=device)
    routing = route(ids([[0], [1], [1]], device), 2, capacity=capacity)
    assert routing.expert_offsets.tolist() == [0, 0, 1]


@pytest.mark.parametrize("experts", [1, 256, 511, 1024, 1025, 2048, 4096])
def test_many_experts(device: torch.device, experts: int) -> None:
    case = RouteCase(
        make_indices(257, min(8, experts), experts, "skewed", 3).int(),
        experts,
        {
            "capacity": 2,
            "priority": "probability",
            "weights": make_weights(257, min(8, experts), "ties", 4),
        },
    ).to(device)
    for actual, expected in zip(run(case), truth(run, case), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("tokens", [1, 255, 4097, 70_000])
@pytest.mark.parametrize("style", ["uniform", "one_expert"])
def test_many_tokens(device: torch.device, tokens: int, style: str) -> None:
    case = RouteCase(make_indices(tokens, 4, 32, style, 5).int(), 32, {"capacity": tokens // 9})
    case = case.to(device)
    for actual, expected in zip(run(case), truth(run, case), strict=True):
        assert torch.equal(actual, expected)
    test_inverse_map.hypothesis.inner_test(device, case)
    test_conservation.hypothesis.inner_test(device, case)


def test_position_ignores_the_weights(device: torch.device) -> None:
    indices = ids([[0], [0]], device)
    weights = torch.tensor([[0.1], [0.9]], device=device)
    assert route(indices, 1, capacity=1, weights=weights).row_pair.tolist() == [0, -1]
