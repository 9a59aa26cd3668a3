"""The losses folded into the gate's backward against the same losses added by autograd."""

from __future__ import annotations

import pytest
import torch

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
