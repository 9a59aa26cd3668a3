"""A training step of one layer, eager: router product, gate, route, experts, combine, gradients.

Gradients of x, the expert weights and the router weight; no shared expert, no losses.  Every
provider computes the router product as one bf16 product; floors leave the router out.

Two more kinds of rows.  ``skew_fwd_bwd``: the experts alone with ids given, their popularity
Zipf(1.0), beside uniform ids ("ling_ops uniform").  ``module_fwd_bwd``: ``nn.MoE`` with a shared
expert, balancing losses and ``stats()``, beside the same work from plain ops without losses and
statistics ("ling_ops bare").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import (
    BYTE_RATE,
    DEVICE,
    FLOP_RATE,
    Case,
    main,
    normal,
    uniform,
    uniform_ids,
    zipf_ids,
)
from peers import torch_experts, transformers_experts
from shapes import TRAINING, Layer, forward_floor, training_floor
from verdicts import training_summary

import ling_ops
from ling_ops.nn import MoE

Forward = Callable[[], torch.Tensor]


def softmax_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, indices = logits.float().softmax(-1).topk(k)
    return weights / weights.sum(-1, keepdim=True), indices


def forwards(
    layer: Layer, x: torch.Tensor, router: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> dict[str, Forward]:
    def ours() -> torch.Tensor:
        weights, indices = ling_ops.topk_gate(F.linear(x, router), layer.K)
        return ling_ops.moe_mlp(x, gate_up, down, weights, indices)

    def torchs() -> torch.Tensor:
        weights, indices = softmax_topk(F.linear(x, router), layer.K)
        return torch_experts(x, gate_up, down, weights, indices)

    found = {"ling_ops": ours, "torch": torchs}
    theirs = transformers_experts(gate_up, down)
    if theirs is not None:

        def transformers() -> torch.Tensor:
            weights, indices = softmax_topk(F.linear(x, router), layer.K)
            return theirs(x, weights.to(x.dtype), indices)

        found["transformers"] = transformers
    return found


def layer_cases(layer: Layer) -> Iterator[Case]:
    t, h, i, e, _ = layer
    tensors = [
        normal(t, h),
        normal(e, h, scale=h**-0.5),
        normal(e, 2 * i, h, scale=h**-0.5),
        normal(e, h, i, scale=i**-0.5),
    ]
    for tensor in tensors:
        tensor.requires_grad_()
    upstream = normal(t, h)

    def drop_gradients() -> None:
        for tensor in tensors:
            tensor.grad = None

    found = forwards(layer, *tensors)
    steps = {name: lambda _, f=f: f().backward(upstream) for name, f in found.items()}
    halves = {name: lambda _, f=f: f() for name, f in found.items()}
    for what, floor_ms, providers in (
        ("fwd_bwd", training_floor(layer), steps),
        ("fwd", forward_floor(layer, e, training=True), halves),
    ):
        yield Case(
            "moe_train", what, layer._asdict(), "bfloat16", floor_ms, providers,
            reset=drop_gradients,
        )  # fmt: skip


def skew_case(layer: Layer) -> Case:
    """The experts given weights and ids; as many rows whichever ids."""
    t, h, i, e, k = layer
    tensors = [
        normal(t, h),
        normal(e, 2 * i, h, scale=h**-0.5),
        normal(e, h, i, scale=i**-0.5),
        uniform(t, k),
    ]
    for tensor in tensors:
        tensor.requires_grad_()
    upstream = normal(t, h)
    ids = {"ling_ops": zipf_ids(t, k, e), "ling_ops uniform": uniform_ids(t, k, e)}

    def drop_gradients() -> None:
        for tensor in tensors:
            tensor.grad = None

    providers = {
        name: lambda _, ids=found: ling_ops.moe_mlp(*tensors, ids).backward(upstream)
        for name, found in ids.items()
    }
    return Case(
        "moe_train", "skew_fwd_bwd", layer._asdict(), "bfloat16", training_floor(layer), providers,
        reset=drop_gradients,
    )  # fmt: skip


def module_case(layer: Layer) -> Case:
    t, h, i, e, k = layer
    options = {"num_shared_experts": 1, "balance_coefficient": 1e-2, "z_loss_coefficient": 1e-3}
    moe = MoE(h, e, k, i, **options, device=DEVICE, dtype=torch.bfloat16).train()
    x, upstream = normal(t, h).requires_grad_(), normal(t, h)

    def full(_: int) -> None:
        moe(x).backward(upstream)
        moe.stats()

    def bare(_: int) -> None:
        weights, indices = ling_ops.topk_gate(F.linear(x, moe.gate.weight), k)
        experts = moe.experts
        out = ling_ops.moe_mlp(x, experts.gate_up_proj, experts.down_proj, weights, indices)
        (out + moe.shared_experts(x)).backward(upstream)

    def drop_gradients() -> None:
        x.grad = None
        moe.zero_grad(set_to_none=True)

    shared_ms = 1e3 * max(18 * t * h * i / FLOP_RATE, 24 * t * h / BYTE_RATE)
    floor_ms = training_floor(layer) + shared_ms
    return Case(
        "moe_train", "module_fwd_bwd", layer._asdict(), "bfloat16", floor_ms,
        {"ling_ops": full, "ling_ops bare": bare}, reset=drop_gradients,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for layer in TRAINING:
        yield from layer_cases(layer)
        torch.cuda.empty_cache()
        yield skew_case(layer)
        torch.cuda.empty_cache()
    yield module_case(TRAINING[0])


if __name__ == "__main__":
    main(__doc__, cases, 0.8, ("moe_train",), training_summary)
