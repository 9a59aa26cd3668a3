"""Every public function under torch.compile(fullgraph=True), forward and backward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from strategies import make_indices, make_mlp, make_offsets

import ling_ops as lo
from ling_ops.ops.lora_mlp import LowRank, lora_mlp

E, K = 8, 2


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def functions(device: torch.device) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name -> (function, inputs); floating inputs get a gradient."""
    tokens, dtype = 16, torch.bfloat16
    case = make_mlp(tokens, 16, 8, E, K, dtype=dtype).to(device)
    logits = torch.randn(tokens, E, device=device)
    ids = make_indices(tokens, K, E, "skewed", 0).int().to(device)
    weights = torch.rand(tokens, K, device=device)
    capacity = torch.tensor(3, dtype=torch.int32, device=device)
    mask = torch.arange(tokens, device=device) % 4 != 0
    offsets = make_offsets(E, tokens * K, "tail", 0).to(device)
    rows = torch.randn(tokens * K, 16, device=device).to(dtype)
    low = [
        torch.randn(E, *shape, device=device).to(dtype)
        for shape in ((4, 16), (16, 4), (4, 8), (16, 4))
    ]
    routing = lo.route(ids, E, capacity=3)
    bias = torch.zeros(E, device=device)
    dynamic = lo.CapacityPolicy.dynamic(0.02)
    running = lo.CapacityPolicy.dynamic(0.02, mode="running").to(device)
    sigmoid = {"score_function": "sigmoid", "expert_bias": bias, "num_groups": 4, "topk_groups": 2}
    return {
        "topk_gate": (lambda z: lo.topk_gate(z, K), (logits,)),
        "topk_gate sigmoid": (lambda z: lo.topk_gate(z, K, **sigmoid), (logits,)),
        "route": (lambda i: lo.route(i, E), (ids,)),
        "route capacity": (
            lambda i, w, c: lo.route(i, E, capacity=c, priority="probability", weights=w,
                                     token_mask=mask), (ids, weights, capacity)),
        "reroute": (lambda s, w: lo.reroute(s, w, ids, capacity=capacity), (logits, weights)),
        "permute": (lambda x: lo.permute(x, routing), (case.x,)),
        "unpermute": (lambda r, w: lo.unpermute(r, routing, w), (rows, weights)),
        "grouped_gemm": (lambda a, b: lo.grouped_gemm(a, b, offsets), (rows, case.gate_up)),
        "grouped_mm": (
            lambda a, b: lo.grouped_mm(a, b, offs=offsets[1:]),
            (rows, case.gate_up.transpose(1, 2))),
        "grouped_mm ragged k": (
            lambda a, b: lo.grouped_mm(a, b, offs=offsets[1:]), (rows.t(), rows)),
        "moe_mlp": (
            lambda x, u, d, w: lo.moe_mlp(x, u, d, w, case.indices), case.tensors[:4]),
        "moe_mlp routing": (
            lambda x, u, d, w: lo.moe_mlp(x, u, d, w, ids, routing=lo.route(ids, E, capacity=3)),
            case.tensors[:4]),
        "lora_mlp": (
            lambda x, u, d, w, *low: lora_mlp(
                x, u, d, w, case.indices, gate_up_lora=LowRank(*low[:2], 0.5),
                down_lora=LowRank(*low[2:], 0.5)),
            (*case.tensors[:4], *low)),
        "fused_experts": (
            lambda x, u, d, w: lo.fused_experts(x, u, d, w, case.indices), case.tensors[:4]),
        "load_balancing_loss": (
            lambda z: lo.load_balancing_loss(z.softmax(1), ids, token_mask=mask), (logits,)),
        "sequence_balancing_loss": (
            lambda z: lo.sequence_balancing_loss(z.softmax(1), ids, sequence_length=4), (logits,)),
        "router_z_loss": (lambda z: lo.router_z_loss(z), (logits,)),
        "inject_loss": (lambda z: lo.inject_loss(z, lo.router_z_loss(z)), (logits,)),
        "update_expert_bias": (
            lambda: lo.update_expert_bias(torch.zeros(E, device=device), routing.expert_counts),
            ()),
        "routing_stats": (
            lambda w: lo.routing_stats(lo.route(ids, E, capacity=2), indices=ids, weights=w),
            (weights,)),
        "capacity batch": (lambda c: dynamic.capacity(c, 32, E), (routing.expert_counts,)),
        "capacity running": (lambda c: running.capacity(c, 32, E), (routing.expert_counts,)),
    }  # fmt: skip


def leaves(args: tuple[Any, ...]) -> list[Any]:
    return [
        a.detach().clone().requires_grad_() if a.is_floating_point() else a.clone() for a in args
    ]


def flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, dict):
        return list(result.values())
    return list(result) if isinstance(result, tuple) else [result]


def value_and_gradients(function: Callable[..., Any], args: tuple[Any, ...]) -> list[torch.Tensor]:
    inputs = leaves(args)
    outputs = flat(function(*inputs))
    smooth = [o for o in outputs if o.requires_grad]
    if smooth:
        wanted = [i for i in inputs if i.is_floating_point()]
        ups = [
            torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype)
            for o in smooth
        ]
        outputs = outputs + list(torch.autograd.grad(smooth, wanted, ups, allow_unused=True))
    return outputs


@pytest.mark.parametrize("name", functions(torch.device("cpu")))
def test_fullgraph(device: torch.device, name: str) -> None:
    function, args = functions(device)[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        value_and_gradients(compiled, args), value_and_gradients(function, args), strict=True
    ):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected)


@pytest.mark.cuda
def test_a_training_step_through_inductor(device: torch.device) -> None:
    case = make_mlp(200, 32, 16, E, K, dtype=torch.bfloat16).to(device)
    logits = torch.randn(200, E, device=device)

    def layer(x, up, down, z):
        weights, indices = lo.topk_gate(z, K)
        weights = lo.inject_loss(weights, lo.load_balancing_loss(z.softmax(1), indices))
        routing = lo.route(indices, E, capacity=60)
        return lo.moe_mlp(x, up, down, weights, indices, routing=routing)

    args = (*case.tensors[:3], logits)
    compiled = torch.compile(layer, fullgraph=True)
    for got, expected in zip(
        value_and_gradients(compiled, args), value_and_gradients(layer, args), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_a_new_token_count_does_not_recompile(device: torch.device) -> None:
    """Dynamic shapes: no guard on T in any op of the layer (19 is no other size here)."""
    compilations = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    case = make_mlp(1, 16, 8, E, K, dtype=torch.bfloat16).to(device)

    def layer(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, indices = lo.topk_gate(logits, K)
        routing = lo.route(indices, E, capacity=5)
        return lo.moe_mlp(x, case.gate_up, case.down, weights, indices, routing=routing)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for sizes, most in (((19, 24, 17, 100), 1), ((7, 3, 5), 2)):  # few tokens: decode's kernels
        for tokens in sizes:
            x = torch.randn(tokens, 16, device=device).bfloat16()
            logits = torch.randn(tokens, E, device=device)
            torch.testing.assert_close(compiled(x, logits), layer(x, logits))
        assert compilations <= most


def test_use_backend_is_honoured_when_compiled(device: torch.device) -> None:
    logits = torch.randn(5, E, device=device)
    with lo.use_backend("reference"):
        compiled = torch.compile(lambda z: lo.topk_gate(z, K), fullgraph=True, backend="eager")
        for got, expected in zip(compiled(logits), lo.topk_gate(logits, K), strict=True):
            assert torch.equal(got, expected)


def test_export(device: torch.device) -> None:
    case = make_mlp(16, 16, 8, E, K, dtype=torch.bfloat16).to(device)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            weights, indices = lo.topk_gate(logits, K)
            return lo.moe_mlp(x, case.gate_up, case.down, weights, indices)

    logits = torch.randn(16, E, device=device)
    with torch.no_grad():
        program = torch.export.export(Layer(), (case.x, logits))
        got = program.module()(case.x, logits)
        torch.testing.assert_close(got, Layer()(case.x, logits))


@pytest.mark.parametrize("shift", [0, 1], ids=["on a boundary", "off it"])
def test_main_grads_of_the_fused_path(
    device: torch.device, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added to once per step wherever the buffers begin, as without the compiler."""
    if device.type == "cpu":  # the fused path on the operators' CPU implementations
        module = importlib.import_module("ling_ops.ops.moe_mlp")
        monkeypatch.setattr(module, "use_kernel", lambda op, *_: op == "moe_mlp")
        monkeypatch.setattr(module, "runs_decode", lambda *_: False)
    case = make_mlp(16, 16, 8, E, K, dtype=torch.bfloat16).to(device)
    ids = make_indices(16, K, E, "skewed", 0).int().to(device)
    weights = torch.rand(16, K, device=device)
    inputs = [t.detach().requires_grad_() for t in (case.x, case.gate_up, case.down)]

    def step(x, up, down, first, second):
        return lo.moe_mlp(x, up, down, weights, ids, main_grads=(first, second))

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        buffers = []
        for weight in inputs[1:]:
            flat = torch.ones(weight.numel() + shift, device=device)
            buffers.append(flat[shift:].view(weight.shape))
        function(*inputs, *buffers).float().sum().backward()
        found.append(buffers)
    for eager, compiled in zip(*found, strict=True):
        assert not torch.equal(eager, torch.ones_like(eager))
        assert torch.equal(eager, compiled)
    assert inputs[1].grad is None and inputs[2].grad is None
