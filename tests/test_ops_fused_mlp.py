"""The fused autograd nodes, here on the operators' CPU implementations."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

import ling_ops
from ling_ops.ops import _fused_mlp


class _Packed:
    """A saved tensor in a wrapper that can be watched."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("kept", [False, True])
def test_h_is_let_go_before_the_weight_gradient_unless_the_graph_is_kept(monkeypatch, kept):
    tokens, hidden, inner, experts, k = 12, 16, 24, 4, 2
    shapes = ((tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner))
    x, proj, down = (torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    weights, indices = ling_ops.topk_gate(torch.randn(tokens, experts), k)
    routing = ling_ops.route(indices, experts)
    saved = []

    def pack(tensor):
        packed = _Packed(tensor)
        if tensor.shape == (tokens * k, 2 * inner):
            saved.append(weakref.ref(packed))
        return packed

    alive = []
    weight_grad = _fused_mlp._weight_grad

    def watched(*args):
        alive.append(saved[0]() is not None)
        return weight_grad(*args)

    monkeypatch.setattr(_fused_mlp, "_weight_grad", watched)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        out = _fused_mlp.fused_moe_mlp(
            x, proj, down, weights, indices, routing,
            activation="swiglu", swiglu_limit=None, main_grads=None,
        )  # fmt: skip
    grads = torch.autograd.grad(out.float().sum(), (x, proj, down), retain_graph=kept)
    assert len(saved) == 1
    assert alive[0] is kept
    assert all(grad.abs().sum() > 0 for grad in grads)
    if kept:
        again = torch.autograd.grad(out.float().sum(), (x, proj, down))
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_a_s_missing_gradient_is_not_filled_with_zeros(monkeypatch):
    """It would be as large as a, and written in every backward."""
    tokens, hidden, inner, experts, k = 12, 16, 24, 4, 2
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    proj = torch.randn(experts, 2 * inner, hidden, dtype=torch.bfloat16, requires_grad=True)
    down = torch.randn(experts, hidden, inner, dtype=torch.bfloat16)
    weights, indices = ling_ops.topk_gate(torch.randn(tokens, experts), k)
    routing = ling_ops.route(indices, experts)
    got = []
    backward = _fused_mlp._Up.backward

    def watched(ctx, dh, da):
        got.append((dh, da))
        return backward(ctx, dh, da)

    monkeypatch.setattr(_fused_mlp._Up, "backward", staticmethod(watched))
    out = _fused_mlp.fused_moe_mlp(
        x, proj, down, weights, indices, routing,
        activation="swiglu", swiglu_limit=None, main_grads=None,
    )  # fmt: skip
    out.float().sum().backward()
    ((dh, da),) = got
    assert dh.shape == (tokens * k, 2 * inner) and da is None
    assert x.grad.abs().sum() > 0 and proj.grad.abs().sum() > 0


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_without_gradients_the_bits_are_the_same(
    device: torch.device, activation: str, routed: bool
) -> None:
    """One operator for the forward against its steps, with dropped pairs and an empty expert.

    Without a capacity it routes itself.
    """
    tokens, hidden, inner, experts, k = 300, 264, 72, 7, 3
    parts = 2 if activation == "swiglu" else 1
    x, proj, down = (
        torch.randn(*shape, device=device).bfloat16() / shape[-1] ** 0.5
        for shape in ((tokens, hidden), (experts, parts * inner, hidden), (experts, hidden, inner))
    )
    logits = torch.randn(tokens, experts, device=device)
    logits[:, 2] = -math.inf
    weights, indices = ling_ops.topk_gate(logits, k)
    indices[::5, 1] = -1
    capacity = torch.tensor([60], device=device).int() if routed else None
    routing = ling_ops.route(indices, experts, capacity=capacity)
    options = {"activation": activation, "swiglu_limit": None, "main_grads": None}
    proj.requires_grad_()
    kept = _fused_mlp.fused_moe_mlp(x, proj, down, weights, indices, routing, **options)
    with torch.no_grad():
        plain = _fused_mlp.fused_moe_mlp(
            x, proj, down, weights, indices, routing if routed else None, **options
        )
    assert kept.requires_grad and not plain.requires_grad
    assert torch.equal(plain, kept)
