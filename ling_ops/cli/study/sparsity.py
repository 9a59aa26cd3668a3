"""Is a MoE model as good as a dense one of its size, at a fraction of the cost? Article: 4.7x."""

from __future__ import annotations

import statistics

import torch
from torch import nn

from ling_ops.cli.study.measures import of_run
from ling_ops.cli.study.report import Result, Table, Verdict, span
from ling_ops.cli.study.trial import Setup, Variant, each
from ling_ops.nn import MLP, MoE

CLAIM = "a MoE model costs about 4.7 times less than a dense one of as many parameters"
MOE, TOTAL, ACTIVE = "MoE", "dense, as many parameters", "dense, as many active parameters"
CLAIMED = 4.7
_TOKENS, _ROUNDS = 8192, 20


def variants(setup: Setup) -> list[Variant]:
    """MoE in all layers, and dense layers as wide as all of its experts or as those visited."""
    config = setup.config()
    experts = max(config.num_experts, 8 * config.num_experts_per_token)
    width, shared = config.moe_intermediate_size, config.num_shared_experts
    layers = config.num_layers
    dense = {"layer_pattern": f"{layers}-0"}
    visited = width * (config.num_experts_per_token + shared)
    return [
        Variant(MOE, {"layer_pattern": f"0-{layers}", "num_experts": experts}),
        Variant(TOTAL, {**dense, "intermediate_size": width * (experts + shared)}),
        Variant(ACTIVE, {**dense, "intermediate_size": visited}),
    ]


def run(setup: Setup) -> Result:
    """Train the three; on a GPU also time one layer of Ling-mini-2.0's size."""
    table = Table("sparsity")
    for variant, _, trained in each(setup, variants(setup)):
        table.add(variant.name, of_run(trained))
    tables = [table]
    if setup.device.type == "cuda":
        tables.append(layer_times(setup.device))
    bars = ("step_ms", "bits_per_byte", "parameters", "active_parameters")
    return Result(CLAIM, tables, judge(tables), bars)


def layer_times(device: torch.device) -> Table:
    """Forward and backward of one layer with Ling-mini-2.0's sizes in bf16, 8192 tokens."""
    hidden, width, experts, k = 2048, 512, 256, 8
    options = {"device": device, "dtype": torch.bfloat16}
    layers = {
        MOE: MoE(hidden, experts, k, width, num_shared_experts=1, **options),
        TOTAL: MLP(hidden, width * (experts + 1), **options),
        ACTIVE: MLP(hidden, width * (k + 1), **options),
    }
    table = Table("one layer of Ling-mini-2.0's size, 8192 tokens, forward and backward")
    x = torch.randn(_TOKENS, hidden, **options, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(_ROUNDS):
        for name, layer in layers.items():
            times[name].append(_step_ms(layer, x))
    for name, layer in layers.items():
        count = sum(p.numel() for p in layer.parameters())
        table.add(name, {"layer_ms": statistics.median(times[name][2:]), "parameters": count})
    return table


def _step_ms(layer: nn.Module, x: torch.Tensor) -> float:
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    layer(x).backward(x.detach())
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def judge(tables: list[Table]) -> Verdict:
    """Held where every seed's MoE model is that much faster than the dense one of as many
    parameters; one layer is told apart, since it leaves out attention and head."""
    table = tables[0]
    gain = [1 / ratio for ratio in table.ratios(MOE, TOTAL, "step_ms")]
    parts = [
        f"The MoE model's step is {span(gain, '{:.2f}')} times as fast as that of the dense model "
        f"of as many parameters (claim: {CLAIMED}), where total over active parameters is "
        f"{table.mean(MOE, 'parameters') / table.mean(MOE, 'active_parameters'):.1f}"
    ]
    loss = {name: table.ratios(MOE, name, "bits_per_byte") for name in (TOTAL, ACTIVE)}
    told = {name: span([ratio - 1 for ratio in ratios]) for name, ratios in loss.items()}
    parts.append(
        f"its bits/byte at equal steps: {told[TOTAL]} against that one, {told[ACTIVE]} against the "
        "dense model of as many active parameters"
    )
    if len(tables) > 1:
        parts.append(_layer_words(tables[1]))
    return Verdict(all(value >= CLAIMED for value in gain), "; ".join(parts) + ".")


def _layer_words(table: Table) -> str:
    """What one layer says of the claim, beside the ratio that it has."""
    gain = table.mean(TOTAL, "layer_ms") / table.mean(MOE, "layer_ms")
    paid = table.mean(MOE, "layer_ms") / table.mean(ACTIVE, "layer_ms")
    ratio = table.mean(MOE, "parameters") / table.mean(ACTIVE, "parameters")
    return (
        f"one layer of Ling-mini-2.0's size by itself {'reaches' if gain >= CLAIMED else 'misses'} "
        f"the figure: {gain:.1f} times as fast as the dense one of as many parameters, of "
        f"{ratio:.1f} that total over active would allow, and {paid:.2f} times the time of the "
        "dense one of as many active ones"
    )
