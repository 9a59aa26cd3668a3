"""A training step of one layer whose experts carry LoRA (rank 16) on frozen weights, eager.

Router product, gate, route, experts, combine; gradients of x and of the additions alone. ``peft``
is PEFT's own ``target_parameters`` on transformers' ``grouped_mm`` experts, where both are
installed. ``folded`` computes what it does, W + scale B A of all experts before every forward, in
one product each, on the same experts (torch's grouped products without transformers); ``folded on
ling_ops`` does so on ``ling_ops.moe_mlp``. ``frozen`` is the step without LoRA.
Floors are of the frozen step: they leave the router and the thin products out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from bench_moe_train import softmax_topk
from harness import Case, floor, main, normal
from peers import torch_experts, transformers_experts
from shapes import Layer, forward_floor

import ling_ops
from ling_ops.ops.lora_mlp import LowRank, lora_mlp

LAYERS = (Layer(32768, 2048, 512, 256, 8), Layer(8192, 2048, 512, 256, 8))
RANK, SCALE = 16, 2.0


def frozen_floor(layer: Layer) -> float:
    """Forward, dact, dx rows, combine."""
    t, h, i, e, k = layer
    m = t * k
    return forward_floor(layer, e, training=True) + floor(
        (2 * m * h * i, 2 * (t * h + e * h * i + 2 * m * i + 2 * m * i)),
        (4 * m * h * i, 2 * (2 * m * i + e * 2 * i * h + m * h)),
        (0, 2 * (m * h + t * h)),
    )


def folded(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """W + scale B A, as the experts get it from PEFT."""
    return torch.baddbmm(weight, b, a, alpha=SCALE)


def folded_experts() -> Callable:
    """The experts of a model that PEFT wraps: transformers', or torch's grouped products."""

    def run(x, gate_up, down, weights, indices):
        theirs = transformers_experts(gate_up, down)
        if theirs is None:
            return torch_experts(x, gate_up, down, weights, indices)
        return theirs(x, weights.to(x.dtype), indices)

    return run


class Experts(torch.nn.Module):
    """transformers' ``grouped_mm`` experts with their weights as parameters, for PEFT to wrap."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor):
        return transformers_experts(self.gate_up_proj, self.down_proj)(x, weights, indices)


def peft_experts(
    gate_up: torch.Tensor, down: torch.Tensor, low: list[torch.Tensor]
) -> torch.nn.Module | None:
    """PEFT's wrapper of such experts with the additions `low`; None without PEFT."""
    try:
        import peft
    except ImportError:
        return None
    if transformers_experts(gate_up, down) is None:
        return None
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_parameters=names)
    module = torch.nn.ModuleDict({"experts": Experts(gate_up, down)})
    wrapped = peft.get_peft_model(module, config, autocast_adapter_dtype=False)
    # The last parameter's wrapper is outermost.
    outer = wrapped.base_model.model["experts"]
    for wrapper, (a, b) in ((outer.base_layer, low[:2]), (outer, low[2:])):
        with torch.no_grad():
            wrapper.lora_A["default"].weight.copy_(a.flatten(0, 1))
            wrapper.lora_B["default"].weight.copy_(b.permute(1, 2, 0).flatten(1))
    return outer


def layer_case(layer: Layer) -> tuple[torch.Tensor, Case]:
    """x, whose gradient every provider computes, and the case."""
    t, h, i, e, k = layer
    x, router = normal(t, h).requires_grad_(), normal(e, h, scale=h**-0.5)
    gate_up, down = normal(e, 2 * i, h, scale=h**-0.5), normal(e, h, i, scale=i**-0.5)
    low = [
        normal(e, RANK, h, scale=h**-0.5), normal(e, 2 * i, RANK, scale=0.1),
        normal(e, RANK, i, scale=i**-0.5), normal(e, h, RANK, scale=0.1),
    ]  # fmt: skip
    for tensor in low:
        tensor.requires_grad_()
    first, second = LowRank(low[0], low[1], SCALE), LowRank(low[2], low[3], SCALE)
    upstream, theirs = normal(t, h), folded_experts()
    peft = peft_experts(gate_up, down, low)

    def gated() -> tuple[torch.Tensor, torch.Tensor]:
        return ling_ops.topk_gate(F.linear(x, router), k)

    def ours() -> torch.Tensor:
        return lora_mlp(x, gate_up, down, *gated(), gate_up_lora=first, down_lora=second)

    def folded_on_ours() -> torch.Tensor:
        weights = folded(gate_up, *low[:2]), folded(down, *low[2:])
        return ling_ops.moe_mlp(x, *weights, *gated())

    def folded_on_theirs() -> torch.Tensor:
        routed = softmax_topk(F.linear(x, router), k)
        return theirs(x, folded(gate_up, *low[:2]), folded(down, *low[2:]), *routed)

    def wrapped() -> torch.Tensor:
        weights, indices = softmax_topk(F.linear(x, router), k)
        return peft(x, weights.to(x.dtype), indices)

    def frozen() -> torch.Tensor:
        return ling_ops.moe_mlp(x, gate_up, down, *gated())

    found = {
        "ling_ops": ours, "folded": folded_on_theirs, "folded on ling_ops": folded_on_ours,
        "frozen": frozen, **({"peft": wrapped} if peft is not None else {}),
    }  # fmt: skip

    def step(run: Callable[[], torch.Tensor]) -> Callable[[int], None]:
        def call(_: int) -> None:
            run().backward(upstream)

        return call

    def drop_gradients() -> None:
        for tensor in (x, *low, *(peft.parameters() if peft is not None else ())):
            tensor.grad = None

    case = Case(
        "lora", "fwd_bwd", layer._asdict(), "bfloat16", frozen_floor(layer),
        {name: step(run) for name, run in found.items()}, reset=drop_gradients,
    )  # fmt: skip
    return x, case


def cases() -> Iterator[Case]:
    for layer in LAYERS:
        yield layer_case(layer)[1]
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(__doc__, cases, 1.5, ("lora",))
