"""A training step of one layer, eager: router product, gate, route, experts, combine, gradients.

Gradients of x, the expert weights and the router weight; no shared expert, no losses.  Every
provider computes the router product as one bf16 product; floors leave the router out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import Case, main, normal
from peers import torch_experts, transformers_experts
from shapes import TRAINING, Layer, forward_floor, training_floor

import ling_ops

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


def cases() -> Iterator[Case]:
    for layer in TRAINING:
        yield from layer_cases(layer)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(__doc__, cases, 0.9, ("moe_train",))
