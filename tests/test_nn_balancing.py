"""Loads, expert biases and losses over a whole model; nothing is counted twice."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from ling_ops.nn import (
    MoE,
    accumulate_expert_counts,
    moe_modules,
    router_losses,
    set_router_loss_scale,
    update_expert_biases,
)

H, E, K = 8, 4, 2


class Stack(nn.Module):
    """Two MoE layers with residuals; ``recompute``: None, or checkpoint's ``use_reentrant``."""

    def __init__(self, device: torch.device, recompute: bool | None = None, **options) -> None:
        super().__init__()
        options = {"score_function": "sigmoid", "use_expert_bias": True, **options}
        make = lambda: MoE(H, E, K, 8, init_std=0.5, device=device, **options)  # noqa: E731
        self.layers = nn.ModuleList([make(), make()])
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.recompute is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.recompute)
        return x


def batch(device: torch.device, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(2, 10, H, generator=gen).to(device).requires_grad_()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_repeats_the_routing_and_counts_nothing_twice(reentrant, device):
    losses = {"balance_coefficient": 0.1, "z_loss_coefficient": 0.1, "jitter": 0.2}
    plain, recomputing = Stack(device, **losses), Stack(device, reentrant, **losses)
    recomputing.load_state_dict(plain.state_dict())
    grads = []
    for model in (plain, recomputing):
        torch.manual_seed(5)
        model(batch(device, 0)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        accumulate_expert_counts(model)
    tolerance = 0.0 if device.type == "cpu" else 1e-5  # scatter-adds of the fp32 path on a GPU
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(moe_modules(recomputing), moe_modules(plain), strict=True):
        assert torch.equal(mine.expert_load, theirs.expert_load)
        assert mine.expert_load.sum() == 20 * K


def test_loads_add_up_over_micro_batches(device):
    model = Stack(device)
    expected = [torch.zeros(E, dtype=torch.int64, device=device) for _ in model.layers]
    for seed in range(3):
        model(batch(device, seed)).sum().backward()
        accumulate_expert_counts(model)
        accumulate_expert_counts(model)  # the same micro-batch again: nothing new to count
        for total, layer in zip(expected, moe_modules(model), strict=True):
            total += layer.expert_counts
    model.eval()
    model(batch(device, 9))  # validation is no load
    for total, layer in zip(expected, moe_modules(model), strict=True):
        assert torch.equal(layer.expert_load, total)
    update_expert_biases(model, rate=0.01)
    for total, layer in zip(expected, moe_modules(model), strict=True):
        sign = torch.sign(total.float().mean() - total.float())
        torch.testing.assert_close(layer.gate.expert_bias, 0.01 * (sign - sign.mean()))
        assert layer.expert_load is None
    before = [layer.gate.expert_bias.clone() for layer in moe_modules(model)]
    update_expert_biases(model, rate=0.01)  # no step in between
    assert all(
        torch.equal(layer.gate.expert_bias, bias)
        for layer, bias in zip(moe_modules(model), before, strict=True)
    )


def test_bias_balances_the_load(device):
    layer = MoE(
        H, E, K, 8, init_std=0.3, device=device, score_function="sigmoid", use_expert_bias=True
    )
    x = torch.randn(512, H, device=device) + layer.gate.weight.detach()[0] * 3
    layer(x)
    first = layer.stats()["max_vio"]
    for _ in range(150):
        layer(x)
        update_expert_biases(layer, rate=5e-3)
    layer(x)
    assert layer.stats()["max_vio"] < 0.25 * first


def test_layers_without_a_bias_are_left_alone(device):
    model = Stack(device, use_expert_bias=False)
    model(batch(device, 0))
    update_expert_biases(model)
    assert all(layer.expert_load is None for layer in moe_modules(model))


def test_losses_are_summed_over_layers(device):
    model = Stack(device, balance_coefficient=0.1)
    model(batch(device, 0))
    first, second = (layer.last_losses["balance"] for layer in model.layers)
    assert torch.equal(router_losses(model)["balance"], first + second)
    set_router_loss_scale(model, 0.5)
    assert [layer.gate.loss_scale for layer in model.layers] == [0.5, 0.5]


def _rank(rank: int, store: str, results) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Stack(torch.device("cpu"))
    model(batch(torch.device("cpu"), rank))
    counts = [layer.expert_counts for layer in moe_modules(model)]
    update_expert_biases(model, rate=0.01)
    results[rank] = (counts, [layer.gate.expert_bias.clone() for layer in moe_modules(model)])
    if rank == 0:  # the other rank has nothing to compute in this step
        model(batch(torch.device("cpu"), 2))
    update_expert_biases(model, rate=0.01)
    results[f"idle {rank}"] = [layer.gate.expert_bias for layer in moe_modules(model)]
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")
def test_loads_are_summed_over_ranks(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "store"), results)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=2, join=True)
        (counts_0, bias_0), (counts_1, bias_1) = results[0], results[1]
        idle = results["idle 0"], results["idle 1"]
    for mine, theirs, first, second in zip(counts_0, counts_1, bias_0, bias_1, strict=True):
        total = (mine + theirs).float()
        sign = torch.sign(total.mean() - total)
        torch.testing.assert_close(first, 0.01 * (sign - sign.mean()))
        assert torch.equal(first, second)
    for before, first, second in zip(bias_0, *idle, strict=True):
        assert torch.equal(first, second) and not torch.equal(first, before)
