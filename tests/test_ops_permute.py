"""permute and unpermute: rows in expert order, weighted sums back, and their gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import RouteCase, float_dtypes, lay_out, layouts, make_weights, route_cases
from tolerances import assert_bitwise, assert_within, truth

from ling_ops import permute, route, unpermute

hidden_sizes = st.sampled_from([1, 3, 8, 64, 72, 100, 257])


def setup(
    case: RouteCase, hidden: int, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[torch.Tensor, ...]:
    case = case.to(device)
    tokens, k = case.indices.shape
    x = lay_out(torch.randn(tokens, hidden, device=device).to(dtype), layout)
    rows = torch.randn(tokens * k, hidden, device=device).to(dtype)
    weights = make_weights(tokens, k, "random", 7).to(device)
    return route(case.indices, case.num_experts, **case.options), x, rows, weights


@given(case=route_cases(), hidden=hidden_sizes, dtype=float_dtypes, layout=layouts)
def test_rows_are_copies_and_the_tail_is_zero(
    device: torch.device, case: RouteCase, hidden: int, dtype: torch.dtype, layout: str
) -> None:
    routing, x, _, _ = setup(case, hidden, dtype, layout, device)
    rows = permute(x, routing)
    used = int(routing.expert_offsets[-1])
    assert rows.shape == (routing.row_token.numel(), hidden) and rows.is_contiguous()
    assert_bitwise(rows[:used], x[routing.row_token[:used].long()])
    assert_bitwise(rows[used:], torch.zeros_like(rows[used:]))


@given(case=route_cases(), hidden=hidden_sizes, dtype=float_dtypes, weighted=st.booleans())
def test_unpermute_against_float64(
    device: torch.device, case: RouteCase, hidden: int, dtype: torch.dtype, weighted: bool
) -> None:
    routing, _, rows, weights = setup(case, hidden, dtype, "contiguous", device)
    weights = weights if weighted else None
    out = unpermute(rows, routing, weights)
    naive = truth(unpermute, rows, routing, weights)
    wide = None if weights is None else weights.double()
    exact = truth(unpermute, rows.double(), routing, wide)
    magnitude = truth(unpermute, rows.double().abs(), routing, wide)
    assert out.dtype == dtype and out.shape == (case.indices.shape[0], hidden)
    assert_within(out, exact, naive=naive, magnitude=magnitude, length=case.indices.shape[1] + 1)


@given(
    case=route_cases(capacity=False, styles=["uniform", "skewed"], masks=False), hidden=hidden_sizes
)
def test_unpermute_undoes_permute(device: torch.device, case: RouteCase, hidden: int) -> None:
    routing, x, _, _ = setup(case, hidden, torch.float32, "contiguous", device)
    k = case.indices.shape[1]
    shares = torch.full(case.indices.shape, 1 / k, device=device)
    torch.testing.assert_close(unpermute(permute(x, routing), routing, shares), x)


@pytest.mark.parametrize("weighted", [False, True])
def test_dropped_pairs_are_invisible(device: torch.device, weighted: bool) -> None:
    """Neither a NaN row past the end nor the NaN weight of a dropped pair is ever seen."""
    indices = torch.tensor([[0, 1], [0, -1], [0, 1]], device=device)
    routing = route(indices, 2, capacity=1)
    rows = torch.ones(6, 16, device=device)
    rows[2:] = float("nan")
    weights = torch.ones(3, 2, device=device)
    weights[routing.token_row < 0] = float("nan")
    rows.requires_grad_(), weights.requires_grad_()
    out = unpermute(rows, routing, weights if weighted else None)
    assert out.tolist() == [[2.0] * 16, [0.0] * 16, [0.0] * 16]
    out.sum().backward()
    assert rows.grad[:2].eq(1).all() and rows.grad[2:].eq(0).all()
    if weighted:
        assert weights.grad[0].eq(16).all() and weights.grad[1:].eq(0).all()


@given(case=route_cases(), hidden=st.sampled_from([8, 64, 1032]), dtype=float_dtypes)
def test_gradients_against_float64(
    device: torch.device, case: RouteCase, hidden: int, dtype: torch.dtype
) -> None:
    routing, x, rows, weights = setup(case, hidden, dtype, "contiguous", device)
    upstream_rows, upstream = torch.randn_like(rows), torch.randn_like(x)

    def gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, rows, weights, up_rows, up = tensors
        leaves = [t.detach().requires_grad_() for t in (x, rows, weights)]
        moved = permute(leaves[0], routing)
        back = unpermute(leaves[1], routing, leaves[2])
        return torch.autograd.grad((moved, back), leaves, (up_rows, up))

    tensors = (x, rows, weights, upstream_rows, upstream)
    actual = gradients(*tensors)
    naive = truth(gradients, *tensors)
    exact = truth(gradients, *(t.double() for t in tensors))
    sums = truth(gradients, *(t.double().abs() for t in tensors))
    lengths = (case.indices.shape[1], 1, hidden)
    for name, got, plain, want, size, length in zip(
        ("grad_x", "grad_rows", "grad_weights"), actual, naive, exact, sums, lengths, strict=True
    ):
        assert_within(got, want, naive=plain, magnitude=size, length=length + 1, name=name)


def test_gradcheck(device: torch.device) -> None:
    indices = torch.tensor([[0, 2], [1, -1], [2, 1], [2, 0]], device=device)
    routing = route(indices, 3, capacity=2)
    x = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(4, 2, dtype=torch.float64, device=device, requires_grad=True)

    def there_and_back(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return unpermute(permute(x, routing).square(), routing, w)

    assert truth(torch.autograd.gradcheck, there_and_back, (x, w))
