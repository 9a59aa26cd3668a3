"""The gradients around the operators, on any machine.

On a GPU the public functions call ``torch.ops.ling_ops`` inside small autograd functions.  The
operators have CPU implementations, so the same path is taken here with CPU tensors by letting
the dispatch rule say yes; the properties are those of each op's own tests.
"""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import test_ops_compile
import test_ops_gate
import test_ops_gemm
import test_ops_moe_mlp
import test_ops_permute
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import GateCase, GemmCase, MlpCase, gate_cases, gemm_cases, mlp_cases, route_cases
from test_ops_compile import _fresh_compiler  # noqa: F401  (a fixture)
from tolerances import truth

from ling_ops import reroute
from ling_ops.ops import _backend

MODULES = ("gate", "route", "capacity", "permute", "gemm", "moe_mlp")


@pytest.fixture(autouse=True, scope="module")
def _operators_everywhere() -> None:
    def use_kernel(op: str, x: torch.Tensor, unsupported: str | None = None) -> bool:
        return unsupported is None and _backend.chosen() == "auto"

    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            module = importlib.import_module(f"ling_ops.ops.{name}")
            patch.setattr(module, "use_kernel", use_kernel)
        yield


@given(case=gate_cases(styles=["normal", "grid"]))
def test_gate(device: torch.device, case: GateCase) -> None:
    test_ops_gate.test_gradient_against_float64.hypothesis.inner_test(device, case)


@given(
    case=route_cases(styles=["uniform", "bad_ids"]),
    hidden=st.sampled_from([8, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_permute(device: torch.device, case, hidden: int, dtype: torch.dtype) -> None:
    inner = test_ops_permute.test_gradients_against_float64.hypothesis.inner_test
    inner(device, case, hidden, dtype)


def test_dropped_pairs(device: torch.device) -> None:
    for weighted in (False, True):
        test_ops_permute.test_dropped_pairs_are_invisible(device, weighted)
    for dtype in (torch.bfloat16, torch.float32):
        test_ops_moe_mlp.test_dropped_pairs_add_exactly_zero(device, dtype, True)


def test_reroute(device: torch.device) -> None:
    scores = torch.rand(40, 8, device=device).requires_grad_()
    indices = torch.zeros(40, 2, dtype=torch.int32, device=device)
    indices[:, 1] = 1
    weights = torch.rand(40, 2, device=device).requires_grad_()
    results = []
    for call in (reroute, partial(truth, reroute)):
        new_weights, _ = call(scores, weights, indices, capacity=7)
        gradients = torch.autograd.grad(new_weights.square().sum(), (scores, weights))
        with torch.no_grad():
            results.append((new_weights, *gradients, *call(scores, weights, indices, capacity=7)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@given(case=gemm_cases())
def test_grouped_gemm(device: torch.device, case: GemmCase) -> None:
    test_ops_gemm.test_gradients_against_float64.hypothesis.inner_test(device, case)


@pytest.mark.parametrize("layout", test_ops_gemm.LAYOUTS)
def test_grouped_mm(device: torch.device, layout: str) -> None:
    test_ops_gemm.test_grouped_mm_gradients(device, layout)


@given(case=mlp_cases())
def test_moe_mlp(device: torch.device, case: MlpCase) -> None:
    test_ops_moe_mlp.test_gradients_against_float64.hypothesis.inner_test(device, case)


def test_main_grads(device: torch.device) -> None:
    test_ops_moe_mlp.test_main_grads_accumulate(device, torch.bfloat16)


@pytest.mark.parametrize("needs", [(True, False, False, False), (False, True, False, False),
                                   (False, False, True, True)])  # fmt: skip
def test_subsets_of_requires_grad(device: torch.device, needs: tuple[bool, ...]) -> None:
    test_ops_moe_mlp.test_every_subset_of_requires_grad(device, needs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_tokens(device: torch.device, dtype: torch.dtype) -> None:
    test_ops_moe_mlp.test_zero_tokens(device, dtype)


def test_second_derivatives_are_refused_not_wrong(device: torch.device) -> None:
    """Where the operators can't differentiate twice, they say so."""
    a = torch.randn(4, 8, device=device).bfloat16().requires_grad_()
    b = torch.randn(2, 8, 8, device=device).bfloat16().requires_grad_()
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    out = test_ops_gemm.grouped_gemm(a, b, offsets).float().square().sum()
    (grad,) = torch.autograd.grad(out, a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().sum().backward()


@pytest.mark.parametrize(
    "name",
    ["topk_gate sigmoid", "route capacity", "reroute", "permute", "unpermute", "grouped_gemm",
     "grouped_mm ragged k", "moe_mlp routing"],
)  # fmt: skip
def test_fullgraph(device: torch.device, name: str) -> None:
    test_ops_compile.test_fullgraph(device, name)
