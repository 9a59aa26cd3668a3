"""Balancing losses, z-loss, injection, loss-free bias: values, gradients, pre-drop demand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, make_indices, seeds

from ling_ops import (
    inject_loss,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
    topk_gate,
    update_expert_bias,
)

shapes = st.tuples(
    st.sampled_from([1, 2, 8, 60]), st.sampled_from([2, 4, 31, 64]), st.sampled_from([1, 2])
)


def draw(
    shape: tuple[int, int, int], seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, experts, k = shape
    logits = torch.randn(tokens, experts, generator=generator(seed), dtype=torch.float64)
    return logits.to(device), make_indices(tokens, k, experts, "skewed", seed).int().to(device)


def test_perfect_balance_costs_the_coefficient(device: torch.device) -> None:
    indices = torch.arange(8, device=device).view(4, 2) % 4
    probs = torch.full((4, 4), 0.25, device=device)
    assert load_balancing_loss(probs, indices, coefficient=0.3).item() == pytest.approx(0.3)


def test_collapse_costs_the_number_of_experts(device: torch.device) -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3, device=device)
    indices = torch.zeros(3, 1, dtype=torch.int32, device=device)
    assert load_balancing_loss(probs, indices).item() == pytest.approx(4.0)


@given(shape=shapes, seed=seeds)
def test_load_balancing_gradient(device: torch.device, shape: tuple, seed: int) -> None:
    """(alpha E / T) p_tj (f_j - sum_i f_i p_ti) for softmax."""
    logits, indices = draw(shape, seed, device)
    tokens, experts, k = shape
    logits.requires_grad_()
    p = logits.softmax(1)
    (grad,) = torch.autograd.grad(load_balancing_loss(p, indices, coefficient=0.7), logits)
    f = torch.bincount(indices.reshape(-1).long(), minlength=experts).double() / (tokens * k)
    expected = 0.7 * experts / tokens * p * (f - (p * f).sum(1, keepdim=True))
    torch.testing.assert_close(grad, expected)


def test_demand_counts_dropped_pairs_but_not_bad_ids_or_padding(device: torch.device) -> None:
    probs = torch.rand(3, 2, device=device, dtype=torch.float64)
    indices = torch.tensor([[0, 1], [0, 7], [1, 1]], device=device)
    mask = torch.tensor([True, True, False], device=device)
    value = load_balancing_loss(probs, indices, token_mask=mask)
    mean = probs[:2].mean(0)
    assert value.item() == pytest.approx((2 * (2 / 4 * mean[0] + 1 / 4 * mean[1])).item())


def test_padding_gets_no_gradient_even_if_it_is_nan(device: torch.device) -> None:
    probs = torch.rand(3, 2, device=device, dtype=torch.float64)
    probs[2] = float("nan")
    probs.requires_grad_()
    mask = torch.tensor([True, True, False], device=device)
    indices = torch.tensor([[0], [1], [1]], device=device)
    load_balancing_loss(probs, indices, token_mask=mask).backward()
    assert probs.grad[:2].isfinite().all() and (probs.grad[2] == 0).all()


@given(seed=seeds, sequences=st.integers(1, 5), length=st.sampled_from([1, 3, 8]))
def test_sequence_loss_is_the_mean_over_sequences(
    device: torch.device, seed: int, sequences: int, length: int
) -> None:
    logits, indices = draw((sequences * length, 8, 2), seed, device)
    probs = logits.softmax(1)
    value = sequence_balancing_loss(probs, indices, sequence_length=length, coefficient=0.5)
    each = [
        load_balancing_loss(p, i, coefficient=0.5)
        for p, i in zip(probs.split(length), indices.split(length), strict=True)
    ]
    torch.testing.assert_close(value, torch.stack(each).mean())


@given(shape=shapes, seed=seeds)
def test_z_loss(device: torch.device, shape: tuple, seed: int) -> None:
    logits, _ = draw(shape, seed, device)
    logits.requires_grad_()
    value = router_z_loss(logits, coefficient=1e-3)
    lse = logits.detach().logsumexp(1)
    torch.testing.assert_close(value.detach(), 1e-3 * lse.square().mean())
    (grad,) = torch.autograd.grad(value, logits)
    expected = 2e-3 / shape[0] * lse[:, None] * logits.detach().softmax(1)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_losses_are_computed_in_fp32(device: torch.device, dtype: torch.dtype) -> None:
    logits, indices = draw((60, 64, 2), 1, device)
    logits = logits.to(dtype)
    for value, exact in (
        (router_z_loss(logits), router_z_loss(logits.double())),
        (
            load_balancing_loss(logits.softmax(1), indices),
            load_balancing_loss(logits.softmax(1).double(), indices),
        ),
    ):
        assert value.dtype == torch.float32 and value.dim() == 0
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_zero_tokens_cost_nothing(device: torch.device) -> None:
    logits = torch.empty(0, 4, device=device, requires_grad=True)
    indices = torch.empty(0, 2, dtype=torch.int32, device=device)
    total = load_balancing_loss(logits.softmax(1), indices) + router_z_loss(logits)
    total = total + sequence_balancing_loss(logits.softmax(1), indices, sequence_length=4)
    total.backward()
    assert total.item() == 0 and logits.grad.shape == (0, 4)


def test_gradcheck(device: torch.device) -> None:
    logits, indices = draw((6, 4, 2), 2, device)

    def losses(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p = z.softmax(1)
        s = z.sigmoid()
        return (
            load_balancing_loss(p, indices),
            sequence_balancing_loss(s / s.sum(1, keepdim=True), indices, sequence_length=3),
            router_z_loss(z),
        )

    assert torch.autograd.gradcheck(losses, logits.requires_grad_())


# --- injection -----------------------------------------------------------------------------------
def test_injected_loss_reaches_its_own_inputs(device: torch.device) -> None:
    logits = torch.randn(5, 8, device=device, requires_grad=True)
    weights, indices = topk_gate(logits, 2)
    loss = load_balancing_loss(logits.softmax(1), indices, coefficient=0.1)
    carried = inject_loss(weights, loss)
    assert torch.equal(carried, weights)
    main = (carried * 3).sum()
    (injected,) = torch.autograd.grad(main, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((weights * 3).sum() + loss, logits)
    torch.testing.assert_close(injected, expected)


def test_injected_loss_is_not_scaled_by_the_upstream_gradient(device: torch.device) -> None:
    x = torch.ones(3, device=device, requires_grad=True)
    p = torch.ones((), device=device, requires_grad=True)
    inject_loss(x, p * 2).backward(torch.full((3,), 100.0, device=device))
    assert p.grad.item() == 2.0 and x.grad.tolist() == [100.0] * 3


# --- loss-free bias ------------------------------------------------------------------------------
def test_bias_update_example(device: torch.device) -> None:
    bias = torch.zeros(4, device=device)
    counts = torch.tensor([10, 2, 2, 2], dtype=torch.int32, device=device)
    returned = update_expert_bias(bias, counts, rate=0.1)
    # mean load 4: signs -1, 1, 1, 1 with mean 0.5
    assert returned is bias
    assert bias.tolist() == pytest.approx([-0.15, 0.05, 0.05, 0.05])


@given(seed=seeds, experts=st.sampled_from([1, 2, 7, 256]))
def test_bias_update_keeps_the_mean_and_moves_against_the_load(
    device: torch.device, seed: int, experts: int
) -> None:
    counts = torch.randint(0, 100, (experts,), generator=generator(seed)).to(device)
    bias = torch.zeros(experts, device=device)
    update_expert_bias(bias, counts, rate=1.0)
    assert abs(bias.double().mean().item()) < 1e-6
    if counts.max() > counts.min():
        assert bias[counts.argmax()] < bias[counts.argmin()]


def test_bias_balances_a_skewed_router(device: torch.device) -> None:
    skew = torch.linspace(0, 2, 16)
    logits = (torch.randn(512, 16, generator=generator(3)) + skew).to(device)
    bias = torch.zeros(16, device=device)

    def violation() -> tuple[float, torch.Tensor]:
        indices = topk_gate(logits, 2, score_function="sigmoid", expert_bias=bias)[1]
        counts = torch.bincount(indices.reshape(-1).long(), minlength=16)
        return (counts.max() / counts.float().mean()).item() - 1, counts

    before = violation()[0]
    for _ in range(150):
        update_expert_bias(bias, violation()[1], rate=5e-3)
    assert violation()[0] < before / 4
