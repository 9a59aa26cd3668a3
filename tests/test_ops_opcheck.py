"""torch.library.opcheck on every operator: schema, fakes, dynamic shapes, dispatch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from strategies import make_indices, make_offsets

import ling_ops

T, H, E, K, N = 12, 16, 8, 2, 32
OPS = torch.ops.ling_ops


def samples(device: torch.device) -> dict[str, list[tuple[Any, ...]]]:
    dtype = torch.bfloat16
    logits = torch.randn(T, E, device=device)
    bias = torch.zeros(E, device=device)
    indices = make_indices(T, K, E, "bad_ids", 0).to(device)
    weights = torch.rand(T, K, device=device)
    capacity = torch.full((1,), 2, dtype=torch.int32, device=device)
    mask = torch.arange(T, device=device) % 3 != 0
    routing = ling_ops.route(indices, E, capacity=capacity)
    ids = make_indices(T, K, E, "uniform", 1).int().to(device)
    x = torch.randn(T, H, device=device).to(dtype)
    rows = torch.randn(T * K, H, device=device).to(dtype)
    b = torch.randn(E, N, H, device=device).to(dtype)
    dy = torch.randn(T * K, N, device=device).to(dtype)
    offsets = make_offsets(E, T * K, "tail", 0).to(device)
    balance = torch.rand(3, E, device=device)
    z = torch.tensor(0.1, device=device)
    down = torch.randn(E, H, N // 2, device=device).to(dtype)
    down_plain = torch.randn(E, H, N, device=device).to(dtype)
    main_grad = torch.randn(E, N, H, device=device)
    kv_heads, head = 2, torch.rand(H, device=device)
    projected = torch.randn(T, 3 + 2 * kv_heads, H, device=device).to(dtype)
    caches = (torch.zeros(20, kv_heads, H, device=device, dtype=dtype) for _ in range(2))
    cached = (projected, *caches, torch.arange(T, device=device) * 2 - 1)
    angles = (torch.rand(10, 3, device=device), torch.rand(10, 3, device=device))
    places = (routing.row_token, routing.row_pair, routing.expert_offsets)
    return {
        "topk_gate": [
            (logits, None, K, False, 1, 1, True, 1.0),
            (logits.to(dtype), bias, K, True, 4, 2, True, 2.5),
        ],
        "topk_gate_backward": [
            (weights, logits, weights, ids, None, 0, None, None, False, True, 1.0),
            (weights, logits, weights, ids, balance, T // 3, z, mask, True, False, 2.5),
        ],
        "gate_losses": [
            (logits, balance[0].contiguous(), None, 0, None, False, True),
            (logits.to(dtype), balance[0].contiguous(), balance, T // 3, mask, True, False),
        ],
        "route": [
            (indices, E, None, None, None, False),
            (indices.int(), E, capacity, weights, mask, True),
            (indices.int(), E, capacity.expand(E).contiguous(), None, None, False),
        ],
        "reroute": [
            (logits.softmax(1), weights, indices, capacity, 2),
            (logits.to(dtype), weights, ids, capacity.expand(E).contiguous(), 1),
        ],
        "routing_stats": [
            (routing.expert_counts, routing.token_row, None, None, None),
            (routing.expert_counts, routing.token_row, indices, weights, mask),
            (routing.expert_counts, routing.token_row, indices.int(), None, mask),
        ],
        "dynamic_capacity": [(routing.expert_counts, 0.02), (routing.expert_counts.long(), 0.0)],
        "running_capacity": [
            (torch.rand(4, device=device), torch.tensor(3, device=device), 3.0, 0.9, 0.05, 4.0),
        ],
        "permute": [(x, routing.row_token, routing.expert_offsets)],
        "combine": [
            (rows, routing.token_row, None, None),
            (rows, routing.token_row, weights, x),
        ],
        "combine_backward": [
            (x, rows, routing.row_pair, None, routing.expert_offsets),
            (x, rows, routing.row_pair, weights, routing.expert_offsets),
        ],
        "grouped_gemm": [
            (rows, b, offsets),
            (rows, b.transpose(1, 2).contiguous().transpose(1, 2), offsets),
        ],
        "grouped_gemm_dw": [(dy, rows, offsets)],
        "moe_dw": [
            (dy, x, routing.row_token, routing.expert_offsets, True),
            (x, dy, routing.row_token, routing.expert_offsets, False),
        ],
        "moe_dw_add_": [
            (main_grad, dy, x, routing.row_token, routing.expert_offsets, True),
            (main_grad.mT.contiguous(), x, dy, routing.row_token, routing.expert_offsets, False),
        ],
        "main_grad_add_": [
            (main_grad, dy, x, routing.row_token, routing.expert_offsets, True),
            (main_grad.mT.contiguous(), x, dy, routing.row_token, routing.expert_offsets, False),
            (main_grad.double(), dy, x, routing.row_token, routing.expert_offsets, True),
        ],
        "moe_up": [
            (x, b, routing.row_token, routing.expert_offsets, 0, math.inf, True),
            (x, b, routing.row_token, routing.expert_offsets, 6, math.inf, False),
        ],
        "moe_forward": [
            (x, b, down, weights, indices, routing.row_token, routing.expert_offsets,
             routing.token_row, 0, 1.0),
            (x, b, down_plain, weights, indices, None, None, None, 3, math.inf),
        ],
        "moe_dact": [
            (x, down, dy, weights, *places, 0, 1.0),
            (x, down_plain, dy, weights, *places, 3, math.inf),
        ],
        "add_activate_": [
            (dy.clone(), dy, 0, 1.0),
            (dy.clone(), dy, 3, math.inf),
        ],
        "moe_decode": [
            (x, b, down, weights, ids, None, None, None, None, None, None, 0, 1.0),
            (x, b, down_plain, weights, indices, routing.token_row, b[..., 0].contiguous(),
             down_plain[..., 0].contiguous(), None, None, None, 6, math.inf),
            (x, b, down, weights, indices, None, None, None, b[0, : N // 2].contiguous(),
             b[1, : N // 2].contiguous(), down[0].contiguous(), 0, math.inf),
        ],
        "attention_heads_": [
            (*cached, *angles, None, None, 1e-6),
            (*cached, *angles, head.to(dtype), head.to(dtype), 1e-5),
            (*cached, *angles, head, head, 1e-5),
        ],
    }  # fmt: skip


def test_every_operator_is_covered() -> None:
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    defined = {name.removeprefix("ling_ops::") for name in names if name.startswith("ling_ops::")}
    assert defined == set(samples(torch.device("cpu")))


@pytest.mark.parametrize("name", samples(torch.device("cpu")))
def test_opcheck(device: torch.device, name: str) -> None:
    for args in samples(device)[name]:
        torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("name", samples(torch.device("cpu")))
def test_fake_and_real_agree_on_zero_tokens(device: torch.device, name: str) -> None:
    """Empty leading dimensions: the shapes still come out, on a kernel too."""
    for args in samples(device)[name]:
        empty = tuple(
            a[:0] if isinstance(a, torch.Tensor) and a.dim() and len(a) in (T, T * K) else a
            for a in args
        )
        if name in ("grouped_gemm", "grouped_gemm_dw"):
            empty = (*empty[:2], torch.zeros_like(args[2]))
        real = getattr(OPS, name)(*empty)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = (mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in empty)
            fake = getattr(OPS, name)(*fakes)
        if real is None:  # works in place
            assert fake is None
            continue
        real, fake = (r if isinstance(r, (tuple, list)) else (r,) for r in (real, fake))
        for got, promised in zip(real, fake, strict=True):
            assert got.shape == promised.shape and got.dtype == promised.dtype
