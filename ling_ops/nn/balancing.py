"""What happens once a step over all MoE layers of a model: loads, expert biases, losses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed, nn

from ling_ops import ops

from .moe import MoE


def moe_modules(model: nn.Module) -> list[MoE]:
    """All MoE layers of ``model`` in module order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


@torch.no_grad()
def accumulate_expert_counts(model: nn.Module) -> None:
    """Adds each layer's ``expert_counts`` to its ``expert_load``. Call once per micro-batch.

    Call it after the backward of the micro-batch, so that activation checkpointing recomputes
    with the capacity of its forward: policies with a running window advance here.
    """
    for layer in moe_modules(model):
        counts = layer.expert_counts
        if not layer.counts_pending:
            continue
        load = layer.expert_load
        layer.expert_load = counts.long() if load is None else load.to(counts.device) + counts
        layer.capacity.update(counts)
        layer.counts_pending = False


@torch.no_grad()
def update_expert_biases(
    model: nn.Module,
    *,
    rate: float = 1e-3,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Moves every expert bias by the load since the last call. Call once per optimizer step.

    Loads are demands before any drop, summed over the micro-batches of the step
    (``accumulate_expert_counts``, called here for the last one if it was not) and, when
    torch.distributed is initialised, over the ranks of ``group``. bias += rate · (sign(e) -
    mean(sign(e))), e = mean(load) - load. Layers without an expert bias only have their load
    cleared. Needs no host synchronisation.
    """
    accumulate_expert_counts(model)
    layers = moe_modules(model)
    # Layers without a load take part too: another rank's may have one.
    biased = [layer for layer in layers if layer.gate.expert_bias is not None]
    loads = _summed_over_ranks([_load(layer) for layer in biased], group)
    for layer, load in zip(biased, loads, strict=True):
        ops.update_expert_bias(layer.gate.expert_bias, load, rate=rate)
    for layer in layers:
        layer.expert_load = None


def _load(layer: MoE) -> torch.Tensor:
    if layer.expert_load is not None:
        return layer.expert_load
    return torch.zeros_like(layer.gate.expert_bias, dtype=torch.int64)


def _summed_over_ranks(
    loads: list[torch.Tensor], group: distributed.ProcessGroup | None
) -> Iterable[torch.Tensor]:
    if not loads or not (distributed.is_available() and distributed.is_initialized()):
        return loads
    flat = torch.cat(loads)
    distributed.all_reduce(flat, group=group)
    return flat.split([load.numel() for load in loads])


def router_losses(model: nn.Module) -> dict[str, torch.Tensor]:
    """The auxiliary losses of the last training forward, summed over layers: name → 0-dim."""
    total: dict[str, torch.Tensor] = {}
    for layer in moe_modules(model):
        for name, loss in layer.last_losses.items():
            total[name] = total[name] + loss if name in total else loss
    return total


def set_router_loss_scale(model: nn.Module, scale: float) -> None:
    """Sets ``Router.loss_scale`` everywhere: what the main loss is multiplied with.

    With gradient accumulation over n micro-batches whose losses are divided by n, that is 1/n.
    """
    for layer in moe_modules(model):
        layer.gate.loss_scale = float(scale)
