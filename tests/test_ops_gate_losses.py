"""The gate's losses from its own kernels: values against float64, gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import float_dtypes, make_logits, seeds
from tolerances import SCORE_ULPS, assert_bitwise, assert_within

from ling_ops.ops import gate_losses
from ling_ops.ops.gate_losses import LossCoefficients, topk_gate_with_losses

TOKENS, EXPERTS, CHOICES, LENGTH = 24, 10, 3, 8
COEFFICIENTS = [
    LossCoefficients(balance=0.7),
    LossCoefficients(sequence_balance=0.3),
    LossCoefficients(z_loss=0.05),
    LossCoefficients(0.2, 0.4, 0.1),
]


def gradient(logits, coefficients, folded, monkeypatch, **options):
    """(d objective / d logits, losses) by the kernel's path or by autograd of the reference."""
    monkeypatch.setattr(gate_losses, "use_kernel", lambda *unused: folded)
    leaf = logits.detach().clone().requires_grad_()
    weights, _, losses = topk_gate_with_losses(leaf, CHOICES, coefficients, **options)
    pull = torch.linspace(-1, 1, weights.numel(), dtype=weights.dtype, device=weights.device)
    (weights * pull.view_as(weights)).sum().backward()
    return leaf.grad, losses


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_folded_gradient_is_that_of_the_losses(
    device, monkeypatch, coefficients, score_function, masked
):
    torch.manual_seed(3)
    # the kernel computes in fp32; off the GPU the operator's reference runs in float64
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    logits = torch.randn(TOKENS, EXPERTS, device=device, dtype=dtype) * 2
    mask = (torch.arange(TOKENS, device=device) % 5 != 0) if masked else None
    options = {
        "score_function": score_function,
        "sequence_length": LENGTH,
        "token_mask": mask,
        "loss_scale": 1.5,
        "scale": 2.5,
    }
    want, want_losses = gradient(logits, coefficients, False, monkeypatch, **options)
    got, got_losses = gradient(logits, coefficients, True, monkeypatch, **options)
    # fp32: a few roundings of sums over E and T; float64: the same formulas
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert got_losses.keys() == want_losses.keys()
    for name, value in want_losses.items():
        torch.testing.assert_close(got_losses[name], value)
        assert not got_losses[name].requires_grad


def test_losses_change_the_gradient(device, monkeypatch):
    """The comparison above is not between two gradients without losses."""
    logits = torch.randn(TOKENS, EXPERTS, device=device)
    plain, _ = gradient(logits, LossCoefficients(), False, monkeypatch)
    for coefficients in COEFFICIENTS:
        with_loss, _ = gradient(logits, coefficients, True, monkeypatch, sequence_length=LENGTH)
        assert (with_loss - plain).abs().max() > 1e-5


def test_sequence_loss_needs_a_length_that_divides(device):
    logits = torch.randn(TOKENS, EXPERTS, device=device)
    coefficients = LossCoefficients(sequence_balance=0.1)
    with pytest.raises(ValueError, match="sequence_length must be the tokens per sequence"):
        topk_gate_with_losses(logits, CHOICES, coefficients)
    with pytest.raises(ValueError, match="must divide the number of tokens, got 7 for 24"):
        topk_gate_with_losses(logits, CHOICES, coefficients, sequence_length=7)


# --- values: one pass over the logits ------------------------------------------------------------
SUMS = torch.ops.ling_ops.gate_losses


def arguments(logits, seed, *, sequences, masked, sigmoid, z_loss=True):
    """Operator arguments with random slopes, [E] and [S,E]; masked tokens hold NaN."""
    gen = torch.Generator().manual_seed(seed)
    tokens, experts = logits.shape
    mask = None
    if masked:
        mask = (torch.rand(tokens, generator=gen) < 0.6).to(logits.device)
        logits = torch.where(mask.unsqueeze(1), logits, float("nan"))
    balance = torch.rand(experts, generator=gen).to(logits.device)
    by_sequence = torch.rand(sequences, experts, generator=gen).to(logits.device)
    return logits, balance, by_sequence, max(1, tokens // sequences), mask, sigmoid, z_loss


def exact_sums(arguments):
    """The sums in float64, and what their terms amount to before anything cancels."""
    logits, balance, by_sequence, length, mask, sigmoid, z_loss = arguments
    wide, balance, by_sequence = (t.cpu().double() for t in (logits, balance, by_sequence))
    mask = None if mask is None else mask.cpu()
    # on the CPU, where the operator is its own reference
    exact = SUMS(wide, balance, by_sequence, length, mask, sigmoid, z_loss)
    real = wide if mask is None else wide[mask]
    # logsumexp is a largest logit plus a logarithm, which may cancel
    parts = real.abs().amax(1) + (real - real.amax(1, keepdim=True)).logsumexp(1).abs()
    return exact, torch.stack([exact[0], exact[1], parts.square().sum()])


@given(
    seed=seeds,
    shape=st.sampled_from([(1, 8, 1), (3, 1, 3), (48, 37, 4), (65, 256, 5), (130, 384, 2)]),
    style=st.sampled_from(["normal", "grid", "constant"]),
    size=st.sampled_from([1.0, 8.0]),
    dtype=float_dtypes,
    masked=st.booleans(),
    sigmoid=st.booleans(),
)
def test_loss_sums_against_float64(device, seed, shape, style, size, dtype, masked, sigmoid):
    tokens, experts, sequences = shape
    logits = (make_logits(tokens, experts, style, seed) * size).to(dtype).to(device)
    case = arguments(logits, seed, sequences=sequences, masked=masked, sigmoid=sigmoid)
    exact, magnitude = exact_sums(case)
    if not sigmoid:
        spread = (logits.double().amax(1) - logits.double().amin(1)).max().item()
    else:
        spread = logits.double().abs().max().item()
    # every term is a score times a slope; a sum of E terms, then one over all tokens by parts
    length = SCORE_ULPS + int(2 * min(spread, 110.0)) + experts + 64
    sums = SUMS(*case).cpu()
    assert_within(sums, exact, magnitude=magnitude, length=length, name="sums")


@pytest.mark.parametrize("sigmoid", [False, True])
def test_loss_sums_that_are_not_asked_for_are_zero(device, sigmoid):
    logits = make_logits(40, 16, "normal", 1).to(device)
    _, balance, by_sequence, length, *_ = arguments(
        logits, 1, sequences=4, masked=False, sigmoid=sigmoid
    )
    whole = SUMS(logits, balance, by_sequence, length, None, sigmoid, True)
    for number, alone in enumerate(
        [
            (balance, None, length, None, sigmoid, False),
            (None, by_sequence, length, None, sigmoid, False),
            (None, None, length, None, sigmoid, True),
        ]
    ):
        got = SUMS(logits, *alone)
        assert_bitwise(got[number], whole[number])
        assert got.count_nonzero() == 1 and whole.count_nonzero() == 3


def test_loss_sums_show_a_nan(device):
    """Of a token that counts: it must not vanish in a maximum."""
    logits = make_logits(40, 16, "normal", 1).to(device)
    logits[7, 3] = float("nan")
    for sigmoid in (False, True):
        case = arguments(logits, 1, sequences=4, masked=False, sigmoid=sigmoid)
        assert SUMS(*case).isnan().all()
        mask = torch.arange(40, device=device) != 7
        assert SUMS(*case[:4], mask, sigmoid, True).isfinite().all()


def test_no_tokens_cost_nothing(device):
    logits = torch.empty(0, 8, device=device)
    assert (
        SUMS(logits, torch.ones(8, device=device), None, 1, None, False, True).tolist() == [0] * 3
    )
