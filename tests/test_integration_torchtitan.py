"""torchtitan's grouped product: its signature, its semantics, and its own experts on ours."""

from __future__ import annotations

import pytest
import torch
from signatures import assert_takes
from tolerances import assert_within
from torch import nn
from torch.nn import functional as F

from ling_ops.integrations import torchtitan as shim

TITAN = "torchtitan.models.common.moe:GroupedExperts._grouped_mm"


def test_signature() -> None:
    assert_takes(shim._grouped_mm, "self, *, A, B_t, offs", TITAN, since="torchtitan 0.3")


def experts_forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """How torchtitan's experts use the product: in bf16, weights transposed in place."""
    offs = counts.cumsum(0, dtype=torch.int32)

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._grouped_mm(A=rows, B_t=weight.bfloat16().transpose(-2, -1), offs=offs)

    h = F.silu(product(x.bfloat16(), self.w1)) * product(x.bfloat16(), self.w3)
    return product(h, self.w2).type_as(x)


class Experts(nn.Module):
    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(experts, width, hidden) / 4) for _ in "13")
        self.w2 = nn.Parameter(torch.randn(experts, hidden, width) / 4)

    forward = experts_forward

    def _grouped_mm(self, *, A, B_t, offs):
        raise NotImplementedError


def loop(x, counts, w1, w2, w3):
    """Every expert's rows through its own feed-forward, in x's dtype; no rows past the last."""
    parts, at = [], 0
    for expert, count in enumerate(counts.tolist()):
        rows = x[at : at + count]
        h = F.silu(rows @ w1[expert].t()) * (rows @ w3[expert].t())
        parts.append(h @ w2[expert].t())
        at += count
    return torch.cat([*parts, x.new_zeros(x.shape[0] - at, x.shape[1])])


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 0], [9, 0, 0, 0], [2, 2, 2, 1]])
def test_experts_against_a_loop(device, counts) -> None:
    undo = shim.install(Experts)
    try:
        experts = Experts(4, 16, 24).to(device)
        counts = torch.tensor(counts, device=device)
        x = torch.randn(9, 16, device=device).bfloat16().float().requires_grad_()
        out = experts(x, counts)
        grad = torch.randn_like(out).bfloat16().float()
        leaves = [x, experts.w1, experts.w2, experts.w3]
        found = torch.autograd.grad(out, leaves, grad)
    finally:
        undo()
    rounded = [x, *(w.detach().bfloat16() for w in leaves[1:])]
    runs = []
    for dtype in (torch.float64, torch.bfloat16):
        copies = [t.detach().to(dtype).requires_grad_() for t in rounded]
        result = loop(copies[0], counts, *copies[1:])
        runs.append((result, *torch.autograd.grad(result, copies, grad.to(dtype))))
    for got, exact, naive in zip((out, *found), *runs, strict=True):
        assert_within(got.bfloat16(), exact, naive=naive, magnitude=4.0, length=24, roundings=4)
    empty = counts == 0
    assert not any(g[empty].any() for g in found[1:]), "gradients of experts without rows"


def test_a_class_of_its_own_method_comes_back() -> None:
    method = Experts._grouped_mm
    undo = shim.install(Experts)
    assert Experts._grouped_mm is not method
    undo()
    assert Experts._grouped_mm is method

    class Derived(Experts):
        pass

    shim.install(Derived)()
    assert "_grouped_mm" not in vars(Derived) and Derived._grouped_mm is method


def test_errors_name_the_argument(device) -> None:
    with pytest.raises(TypeError, match="classes must have a method _grouped_mm, got Linear"):
        shim.install(nn.Linear)
    other = type("Other", (nn.Module,), {"_grouped_mm": lambda self, *, A, weight_EOI, offs: A})
    with pytest.raises(TypeError, match=r"Other\._grouped_mm must take A, B_t and offs"):
        shim.install(other)
    a, b = torch.randn(4, 8, device=device), torch.randn(2, 8, 16, device=device)
    with pytest.raises(ValueError, match="offs must have dtype int32"):
        shim.grouped_mm(a, b, torch.tensor([2, 4], device=device))
    with pytest.raises(ValueError, match=r"offs must have one end per group"):
        shim.grouped_mm(a, b, torch.tensor([4], dtype=torch.int32, device=device))


def test_torchtitans_own_experts(device) -> None:
    """The installed GroupedExperts with our product, against its own on the same weights."""
    titan = pytest.importorskip(
        "torchtitan.models.common.moe", reason="needs torchtitan 0.3 and what it imports",
        exc_type=ImportError,
    )  # fmt: skip
    experts = titan.GroupedExperts.Config(dim=16, hidden_dim=24, num_experts=4).build().to(device)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(std=0.25)
    counts = torch.tensor([3, 0, 5, 1], device=device)
    x = torch.randn(9, 16, device=device).bfloat16().float()
    method = titan.GroupedExperts._grouped_mm
    undo = shim.install()
    try:
        out = experts(x, counts)
    finally:
        undo()
    assert titan.GroupedExperts._grouped_mm is method
    w1, w2, w3 = (w.detach() for w in (experts.w1_EFD, experts.w2_EDF, experts.w3_EFD))
    exact = loop(x.double(), counts, *(w.bfloat16().double() for w in (w1, w2, w3)))
    assert_within(out.bfloat16(), exact, magnitude=4.0, length=24, roundings=8)
