"""reroute: overflow finds room with the token's next-best experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import capacities, generator, seeds
from tolerances import truth

from ling_ops import reroute, route, topk_gate


@st.composite
def overflows(draw: st.DrawFn) -> tuple[torch.Tensor, int, object, int]:
    """(scores [T,E], K, capacity, rounds) with demand skewed towards a few experts."""
    tokens = draw(st.sampled_from([0, 1, 5, 40, 97]))
    experts = draw(st.sampled_from([1, 2, 4, 8, 33, 300]))
    k, seed = draw(st.integers(1, min(4, experts))), draw(seeds)
    skew = draw(st.sampled_from([0.0, 1.0, 3.0])) / torch.arange(1, experts + 1)
    logits = torch.randn(tokens, experts, generator=generator(seed)) + skew
    if draw(st.booleans()):
        logits = (2 * logits).round() / 2
    if draw(st.booleans()):
        masked = torch.rand(logits.shape, generator=generator(seed + 1)) < 0.1
        masked[:, 0] = False  # every row keeps a score
        logits[masked] = float("-inf")
    capacity = draw(capacities(tokens, experts, seed).filter(lambda c: c is not None))
    return logits.softmax(1), k, capacity, draw(st.integers(0, 3))


def moved(case: tuple, device: torch.device) -> tuple[torch.Tensor, ...]:
    scores, k, capacity, rounds = case
    scores = scores.to(device)
    capacity = capacity.to(device) if isinstance(capacity, torch.Tensor) else capacity
    weights, indices = truth(topk_gate, scores.log(), k)
    return (
        scores,
        weights,
        indices,
        *reroute(scores, weights, indices, capacity=capacity, rounds=rounds),
        capacity,
    )


@given(case=overflows())
def test_pairs_with_room_stay_and_moves_find_room(device: torch.device, case: tuple) -> None:
    scores, weights, indices, new_weights, new_indices, capacity = moved(case, device)
    experts = scores.shape[1]
    before = route(indices, experts, capacity=capacity)
    after = route(new_indices, experts, capacity=capacity)
    stays = before.token_row >= 0
    assert torch.equal(new_indices[stays], indices[stays])
    assert torch.equal(new_weights[stays], weights[stays])
    went = new_indices != indices
    assert (after.token_row[went] >= 0).all(), "a moved pair was dropped"
    assert (after.token_row[stays] >= 0).all(), "a moved pair pushed another one out"
    assert int(after.expert_offsets[-1]) == int(stays.sum()) + int(went.sum())
    ordered = new_indices.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "a token got an expert twice"
    assert new_indices.dtype == indices.dtype and new_weights.dtype == weights.dtype


@given(case=overflows())
def test_kernel_equals_the_reference(device: torch.device, case: tuple) -> None:
    *_, weights, indices, _ = moved(case, device)
    *_, expected_weights, expected_indices, _ = truth(moved, case, device)
    assert torch.equal(indices, expected_indices) and torch.equal(weights, expected_weights)


@given(case=overflows())
def test_more_rounds_never_drop_more(device: torch.device, case: tuple) -> None:
    scores, k, capacity, _ = case
    rows = []
    for rounds in range(4):
        *_, indices, limit = moved((scores, k, capacity, rounds), device)
        rows.append(int(route(indices, scores.shape[1], capacity=limit).expert_offsets[-1]))
    assert rows == sorted(rows)


def test_example(device: torch.device) -> None:
    """Both late tokens overflow expert 0; the first of them takes expert 1's only free slot."""
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.3, 0.2]], device=device)
    weights, indices = scores[:, :1].clone(), torch.zeros(3, 1, dtype=torch.int32, device=device)
    new_weights, new_indices = reroute(scores, weights, indices, capacity=1, rounds=1)
    assert new_indices.tolist() == [[0], [1], [0]]
    new_weights, new_indices = reroute(scores, weights, indices, capacity=1, rounds=2)
    assert new_indices.tolist() == [[0], [1], [2]]
    assert new_weights.reshape(-1).tolist() == pytest.approx([0.7, 0.3, 0.2])


def test_every_token_wants_the_same_experts(device: torch.device) -> None:
    """One round for each full expert spreads any skew over all experts, in token order."""
    tokens, experts = 40, 8
    scores = torch.arange(experts, 0, -1, device=device).float().expand(tokens, experts)
    indices = torch.zeros(tokens, 1, dtype=torch.int32, device=device)
    weights = scores[:, :1].contiguous()
    spread = reroute(scores, weights, indices, capacity=5, rounds=experts - 1)[1]
    assert spread.flatten().tolist() == [token // 5 for token in range(tokens)]


def test_renormalised_weights_keep_their_factor(device: torch.device) -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], device=device)
    weights, indices = topk_gate(scores.log(), 2, scale=2.0)  # 2 * [5/8, 3/8]
    capacity = torch.tensor([1, 2, 2], dtype=torch.int32, device=device)
    new_weights, new_indices = reroute(scores, weights, indices, capacity=capacity, rounds=1)
    assert new_indices.tolist() == [[0, 1], [2, 1]]
    assert new_weights[1].tolist() == pytest.approx([2 * 0.2 / 0.8, 2 * 0.3 / 0.8])


def test_tokens_that_keep_their_experts_hand_no_gradient_to_tiny_scores(device) -> None:
    scores = torch.full((4, 4), 1e-20, device=device, requires_grad=True)
    weights = torch.full((4, 2), 0.5, device=device, requires_grad=True)
    indices = torch.tensor([[0, 1]] * 4, dtype=torch.int32, device=device)
    new_weights, _ = reroute(scores, weights, indices, capacity=4)
    new_weights.sum().backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))
    assert torch.equal(weights.grad, torch.ones_like(weights))


def test_ids_out_of_range_stay(device: torch.device) -> None:
    scores = torch.rand(3, 4, device=device)
    indices = torch.tensor([[-1], [4], [0]], device=device)
    weights = torch.rand(3, 1, device=device)
    new_weights, new_indices = reroute(scores, weights, indices, capacity=0)
    assert torch.equal(new_indices, indices) and torch.equal(new_weights, weights)


def test_less_is_dropped_under_skew(device: torch.device) -> None:
    """Drop rate at capacity factor 1.25 falls by rerouting, at the same number of slots."""
    tokens, experts, k = 2048, 64, 6
    skew = 0.5 * torch.randn(experts, generator=generator(1))
    logits = (torch.randn(tokens, experts, generator=generator(2)) + skew).to(device)
    weights, indices = topk_gate(logits, k)
    capacity = -(-tokens * k * 5 // (experts * 4))

    def dropped(ids: torch.Tensor) -> float:
        rows = route(ids, experts, capacity=capacity).expert_offsets[-1]
        return 1 - int(rows) / ids.numel()

    rerouted = reroute(logits.softmax(1), weights, indices, capacity=capacity, rounds=2)[1]
    assert dropped(indices) > 0.04
    assert dropped(rerouted) < dropped(indices) / 4


def test_gradient_flows_through_moved_weights(device: torch.device) -> None:
    scores = torch.tensor([[0.7, 0.3], [0.6, 0.4]], dtype=torch.float64, device=device)
    indices = torch.zeros(2, 1, dtype=torch.int32, device=device)

    def weights(s: torch.Tensor) -> torch.Tensor:
        return reroute(s, s[:, :1], indices, capacity=1, rounds=1)[0]

    assert torch.autograd.gradcheck(weights, scores.requires_grad_())
