"""CUDA graphs: captured once, replayed on other routings, and the same bits as eager calls."""

from __future__ import annotations

import pytest
import torch
from strategies import make_logits, make_mlp
from test_ops_cuda import INNER, E, H, K, Step, needs
from tolerances import assert_bitwise

import ling_ops as lo

pytestmark = pytest.mark.cuda

TOKENS, WIDTH = 300, 72
GROUPED = {"score_function": "sigmoid", "num_groups": 8, "topk_groups": 4}
# (seed, logits, capacity): the second sends every token to the same experts, the third drops all
ROUTINGS = [(1, "normal", 40), (2, "constant", 300), (3, "grid", 0), (4, "special", 1000)]


def capture(step: Step) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@pytest.mark.parametrize("training", [False, True])
def test_graph_replays_with_new_routing(device: torch.device, training: bool) -> None:
    """Gate, route with a device capacity, experts: captured once, replayed on other routings."""
    for op in ("topk_gate", "route", "moe_mlp"):
        needs(op)
    tokens = 256
    case = make_mlp(tokens, H, INNER, E, K, dtype=torch.bfloat16).to(device)
    x, up, down = (t.detach().clone().requires_grad_(training) for t in case.tensors[:3])
    logits = torch.zeros(tokens, E, device=device, requires_grad=training)
    capacity = torch.zeros((), dtype=torch.int32, device=device)
    upstream = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        weights, indices = lo.topk_gate(logits, K)
        routing = lo.route(indices, E, capacity=capacity)
        out = lo.moe_mlp(x, up, down, weights, indices, routing=routing)
        if not training:
            return out, indices
        return out.detach(), indices, *torch.autograd.grad(out, (x, up, down, logits), upstream)

    graph, outputs = capture(step)
    for seed, style, limit in (
        (1, "normal", 8),
        (2, "constant", 256),
        (3, "grid", 0),
        (4, "normal", 1000),
    ):
        with torch.no_grad():
            logits.copy_(make_logits(tokens, E, style, seed))
            x.copy_(torch.randn_like(x))
            capacity.fill_(limit)
        graph.replay()
        replayed = [t.clone() for t in outputs]
        for got, expected in zip(replayed, step(), strict=True):
            assert_bitwise(got, expected)


class Inputs:
    """Tensors at fixed addresses, which `renew` fills with another routing."""

    def __init__(self, device: torch.device) -> None:
        self.logits = torch.zeros(TOKENS, E, device=device)
        self.indices = torch.zeros(TOKENS, K, dtype=torch.int64, device=device)
        self.weights = torch.zeros(TOKENS, K, device=device)
        self.mask = torch.zeros(TOKENS, dtype=torch.bool, device=device)
        self.capacity = torch.zeros((), dtype=torch.int32, device=device)
        self.x = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16, device=device)
        self.rows = torch.zeros(TOKENS * K, WIDTH, dtype=torch.bfloat16, device=device)
        self.running = lo.CapacityPolicy.dynamic(0.02, mode="running").to(device)

    @torch.no_grad()
    def renew(self, seed: int, style: str, capacity: int) -> None:
        torch.manual_seed(seed)
        self.logits.copy_(make_logits(TOKENS, E, style, seed))
        weights, indices = lo.topk_gate(self.logits, K)
        self.weights.copy_(weights)
        bad = torch.rand(TOKENS, K, device=indices.device) < 0.05
        self.indices.copy_(torch.where(bad, E + 7, indices))
        self.mask.bernoulli_(0.8)
        self.capacity.fill_(capacity)
        self.x.normal_()
        self.rows.normal_()
        self.running.update(lo.route(self.indices, E).expert_counts)


def routing_steps(i: Inputs) -> dict[str, Step]:
    """Every routing op on `i`, with the gradients it has."""
    leaf = i.logits.requires_grad_()
    x, rows, weights = (t.requires_grad_() for t in (i.x, i.rows, i.weights))
    batch = lo.CapacityPolicy.dynamic(0.02)

    def route(**options: object) -> lo.Routing:
        return lo.route(i.indices, E, capacity=i.capacity, **options)

    def gate_backward() -> tuple[torch.Tensor, ...]:
        chosen, indices = lo.topk_gate(leaf, K, **GROUPED)
        loss = lo.load_balancing_loss(leaf.sigmoid(), indices) + lo.router_z_loss(leaf)
        return torch.autograd.grad(chosen.square().sum() + loss, leaf)

    def permute_backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(lo.permute(x, route()), x, rows.detach())

    def unpermute_backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(lo.unpermute(rows, route(), weights), (rows, weights), x)

    def rerouted() -> tuple[torch.Tensor, ...]:
        scores = leaf.sigmoid()
        new, ids = lo.reroute(scores, weights, i.indices, capacity=i.capacity, rounds=3)
        return new.detach(), ids, *torch.autograd.grad(new.sum(), (leaf, weights))

    def counts() -> torch.Tensor:
        return lo.route(i.indices, E).expert_counts

    def stats() -> tuple[torch.Tensor, ...]:
        return tuple(lo.routing_stats(route(), indices=i.indices, weights=weights).values())

    return {
        "topk_gate": lambda: lo.topk_gate(i.logits.detach(), K),
        "topk_gate grouped": lambda: lo.topk_gate(i.logits.detach(), K, **GROUPED),
        "topk_gate backward": gate_backward,
        "route": lambda: tuple(lo.route(i.indices, E, token_mask=i.mask)),
        "route capacity": lambda: tuple(route(token_mask=i.mask)),
        "route probability": lambda: tuple(route(priority="probability", weights=weights)),
        "reroute": rerouted,
        "capacity batch": lambda: (batch.capacity(counts(), TOKENS * K, E),),
        "capacity running": lambda: (i.running.capacity(counts(), TOKENS * K, E),),
        "permute": lambda: (lo.permute(x.detach(), route()),),
        "permute backward": permute_backward,
        "unpermute": lambda: (lo.unpermute(rows.detach(), route(), weights.detach()),),
        "unpermute backward": unpermute_backward,
        "routing_stats": stats,
    }


NAMES = list(routing_steps(Inputs(torch.device("cpu"))))


@pytest.mark.parametrize("name", NAMES)
def test_every_routing_op_replays_with_new_routing(device: torch.device, name: str) -> None:
    inputs = Inputs(device)
    inputs.renew(0, "normal", 40)
    step = routing_steps(inputs)[name]
    graph, outputs = capture(step)
    seen = []
    for routing in ROUTINGS:
        inputs.renew(*routing)
        for t in outputs:
            t.fill_(1)  # what an earlier replay left
        graph.replay()
        replayed = [t.clone() for t in outputs]
        for got, expected in zip(replayed, step(), strict=True):
            assert_bitwise(got, expected, name)
        seen.append(replayed)
    later = [t for outputs in seen[1:] for t in zip(outputs, seen[0], strict=True)]
    assert any(not torch.equal(a, b) for a, b in later), "the routings make no difference"


def test_stats_cost_no_sync(device: torch.device) -> None:
    inputs = Inputs(device)
    inputs.renew(*ROUTINGS[0])
    step = routing_steps(inputs)["routing_stats"]
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.is_cuda for value in stats)
