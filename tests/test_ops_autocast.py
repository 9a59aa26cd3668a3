"""Autocast: products take its dtype as torch.nn.functional.linear does; routing stays fp32."""

from __future__ import annotations

import pytest
import torch
from strategies import make_indices, make_mlp
from tolerances import assert_bitwise

import ling_ops as lo


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_cast(device: torch.device, dtype: torch.dtype) -> None:
    case = make_mlp(40, 16, 8, 4, 2, dtype=torch.float32).to(device)
    low = [t.to(dtype) for t in case.tensors[:3]]
    rows = torch.randn(9, 16, device=device)
    offsets = torch.tensor([0, 3, 3, 7, 9], dtype=torch.int32, device=device)
    with torch.autocast(device.type, dtype):
        out = lo.moe_mlp(*case.tensors)
        product = lo.grouped_gemm(rows, case.gate_up, offsets)
        mm = lo.grouped_mm(rows, case.gate_up.transpose(1, 2), offs=offsets[1:])
    assert_bitwise(out, lo.moe_mlp(*low, case.weights, case.indices))
    assert_bitwise(product, lo.grouped_gemm(rows.to(dtype), low[1], offsets))
    assert_bitwise(mm, product)


def test_gradients_come_back_in_the_parameters_dtype(device: torch.device) -> None:
    case = make_mlp(40, 16, 8, 4, 2, dtype=torch.float32).to(device)
    leaves = [t.requires_grad_() for t in case.tensors[:4]]
    with torch.autocast(device.type, torch.bfloat16):
        out = lo.moe_mlp(*case.tensors)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(leaf.grad.dtype == leaf.dtype and leaf.grad.any() for leaf in leaves)


def test_routing_stays_in_fp32(device: torch.device) -> None:
    logits = torch.randn(20, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        weights, indices = lo.topk_gate(logits, 2)
        loss = lo.router_z_loss(logits)
        balance = lo.load_balancing_loss(logits.softmax(1), indices)
    assert weights.dtype == loss.dtype == balance.dtype == torch.float32
    assert_bitwise(weights, lo.topk_gate(logits, 2)[0])
    assert_bitwise(loss, lo.router_z_loss(logits))


def test_float64_is_left_alone(device: torch.device) -> None:
    case = make_mlp(10, 16, 8, 4, 2).to(device)
    with torch.autocast(device.type, torch.bfloat16), lo.use_backend("reference"):
        assert lo.moe_mlp(*case.tensors).dtype == torch.float64


def test_unpermute_under_autocast(device: torch.device) -> None:
    indices = make_indices(10, 2, 4, "uniform", 0).int().to(device)
    routing = lo.route(indices, 4)
    x = torch.randn(10, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        rows = lo.permute(x, routing)
        assert rows.dtype == torch.float32
        assert_bitwise(lo.unpermute(rows, routing), lo.unpermute(rows.clone(), routing))
