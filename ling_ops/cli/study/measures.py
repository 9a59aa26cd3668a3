"""Numbers of a run, from its events: shares of demand, balance, drops, padding, time."""

from __future__ import annotations

import statistics
from typing import Any

from ling_ops.cli.study.trial import Trained

Layers = list[list[dict[str, Any]]]  # per event, per layer
_SKIPPED = 3  # first steps, which warm up


def settled(layers: Layers) -> Layers:
    """The last quarter of the events, at least one."""
    return layers[-max(1, len(layers) // 4) :]


def shares(layers: Layers) -> list[list[float]]:
    """Per layer, every expert's mean share of the demand over the events (they sum to 1)."""
    found = []
    for layer in range(len(layers[0])):
        per_event = []
        for event in layers:
            load = event[layer]["utilization"]
            total = sum(load)
            per_event.append([value / total if total else 0.0 for value in load])
        found.append([statistics.fmean(values) for values in zip(*per_event, strict=True)])
    return found


def extremes(layers: Layers) -> tuple[float, float]:
    """The lowest and the highest expert's share over the fair share 1/E, of all layers."""
    relative = [share * len(layer) for layer in shares(layers) for share in layer]
    return min(relative), max(relative)


def mean_of(layers: Layers, name: str) -> float:
    """Mean of a statistic over events and layers."""
    return statistics.fmean(float(layer[name]) for event in layers for layer in event)


def padding(layers: Layers) -> float:
    """Rows that stay empty over rows that are kept, where every expert has its capacity.

    C E / kept - 1; dropless layers have none.
    """
    found = []
    for event in layers:
        for layer in event:
            factor = layer["capacity"]
            kept = 1.0 - layer["drop_rate"]
            found.append(0.0 if factor is None or kept == 0 else max(0.0, factor / kept - 1))
    return statistics.fmean(found)


def step_ms(times: list[float]) -> float:
    """Median time of a step, without the first ones."""
    return statistics.median(times[_SKIPPED:] or times)


def of_run(trained: Trained) -> dict[str, float]:
    """What every study reports of a run."""
    count = trained.model.count_parameters()
    return {
        "bits_per_byte": trained.bits_per_byte, "step_ms": step_ms(trained.step_ms),
        "parameters": count.total, "active_parameters": count.active,
    }  # fmt: skip


def of_balance(trained: Trained) -> dict[str, float]:
    """How evenly the experts of the settled run are used."""
    layers = settled(trained.layers)
    low, high = extremes(layers)
    return {
        "low_share": low, "high_share": high, "max_vio": mean_of(layers, "max_vio"),
        "cv": mean_of(layers, "cv"), "entropy": mean_of(layers, "entropy"),
        "dead_experts": mean_of(layers, "dead_experts"),
    }  # fmt: skip
