"""Expert pruning: how much each expert does on some text, and a model without the least of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ling_ops.nn import MoE
from ling_ops.nn.lora import adapters
from ling_ops.nn.router import RouterOutput

from .ling import LingForCausalLM

CRITERIA = ("usage", "gate-mass", "output-norm")
_EXPERT_BUFFERS = ("gate.weight", "gate.bias", "gate.expert_bias")


def _contribution(layer: MoE, x: Tensor, routed: RouterOutput, by: str) -> Tensor:
    """What each pair adds to its expert's score, [T, K] fp64."""
    if by == "usage":
        return torch.ones_like(routed.weights, dtype=torch.float64)
    if by == "gate-mass":
        return routed.weights.double()
    norms = [
        layer.experts(x, routed.weights[:, k : k + 1], routed.indices[:, k : k + 1])
        .double()
        .norm(dim=1)
        for k in range(routed.indices.shape[1])
    ]
    return torch.stack(norms, dim=1)


@contextlib.contextmanager
def _watching(
    model: LingForCausalLM, by: str, scores: dict[int, Tensor], real: list[Tensor | None]
) -> Iterator[None]:
    """Adds to ``scores`` what each forward of the model's routers sends to their experts, of the
    tokens where ``real[-1]`` [B, S] says so (None: all)."""

    def watch(index: int, layer: MoE):
        def add(router, inputs, routed: RouterOutput) -> None:
            added = _contribution(layer, inputs[0], routed, by)
            if real[-1] is not None:
                added = torch.where(real[-1].reshape(-1, 1), added, 0.0)
            scores[index].index_add_(0, routed.indices.flatten().long(), added.flatten())

        return layer.gate.register_forward_hook(add)

    handles = [watch(index, layer) for index, layer in model.moe_layers()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def expert_importance(
    model: LingForCausalLM,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    by: str = "usage",
) -> dict[int, Tensor]:
    """How much each expert does on the given text.

    Args:
        model: in eval mode, or it is put there meanwhile.
        batches: token ids [B, S] each, or pairs of them and a token_mask [B, S] bool that is False
            at padding, which then counts nowhere.
        by: "usage", the tokens that chose the expert; "gate-mass", the sum of its gate weights;
            "output-norm", the sum over tokens of the L2 norm of gate weight times its output.

    Returns:
        layer index -> [E] fp64 on the model's device, for each MoE layer.

    Raises:
        ValueError: `by` is none of these, the model has no MoE layer, or there are no batches.
    """
    if by not in CRITERIA:
        raise ValueError(f"by: got {by!r}, need one of {CRITERIA}")
    device = model.lm_head.weight.device
    modes = {module: module.training for module in model.modules()}
    scores = {
        index: torch.zeros(layer.num_experts, dtype=torch.float64, device=device)
        for index, layer in model.moe_layers()
    }
    if not scores:
        raise ValueError("model: got one without MoE layers, need at least one")
    real: list[Tensor | None] = [None]  # of each batch so far
    model.eval()
    try:
        with _watching(model, by, scores, real):
            for batch in batches:
                ids, mask = (batch, None) if isinstance(batch, Tensor) else batch
                real.append(None if mask is None else mask.to(device))
                model(ids.to(device), token_mask=real[-1], last_logits_only=True)
    finally:
        for module, training in modes.items():
            module.training = training
    if len(real) == 1:
        raise ValueError("batches: got none, need at least one")
    return scores


def kept_experts(scores: Tensor, keep: int, num_groups: int) -> Tensor:
    """Ids, ascending, of the ``keep`` best of ``scores [E]``: keep / num_groups of each group.

    Group-limited routing needs groups of one size, so each group keeps its own best. Equal scores
    keep the lower id.
    """
    groups = scores.view(num_groups, -1)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, : keep // num_groups]
    first = torch.arange(num_groups, device=scores.device)[:, None] * groups.shape[1]
    return (order + first).flatten().sort().values


def pruned_count(num_experts: int, num_groups: int, share: float) -> int:
    """How many experts ``share`` of them are: rounded to whole experts per group, at least one."""
    if not 0 < share <= 1:
        raise ValueError(f"keep: got {share!r}, need a share above 0 and at most 1")
    return max(1, round(share * num_experts / num_groups)) * num_groups


def _check_importance(model: LingForCausalLM, importance: dict[int, Tensor]) -> None:
    for index, layer in model.moe_layers():
        if index not in importance:
            raise ValueError(f"importance: got none of layer {index}, need that of each MoE layer")
        scores = importance[index]
        if scores.shape != (layer.num_experts,) or not bool(scores.isfinite().all()):
            raise ValueError(
                f"importance: layer {index} has {tuple(scores.shape)} scores, need "
                f"({layer.num_experts},), all finite"
            )


def prune_experts(
    model: LingForCausalLM, importance: dict[int, Tensor], *, keep: float
) -> LingForCausalLM:
    """A model with the most important experts of each layer.

    Router rows and selection biases go with their experts. Kept experts are copied, everything
    else is shared with `model`.

    Args:
        model: any model with MoE layers; left as it is.
        importance: layer index -> [E] finite, from ``expert_importance``, for each MoE layer.
        keep: share of the experts to keep, above 0 and at most 1; every layer keeps as many.

    Raises:
        ValueError: the share is outside (0, 1], or leaves fewer experts than a token takes; scores
            of a layer are missing, of another number, or not finite; the model has LoRA adapters.
    """
    config = model.config
    if adapters(model):
        raise ValueError("model: has LoRA adapters; merge_lora and remove_lora come first")
    _check_importance(model, importance)
    count = pruned_count(config.num_experts, config.num_groups, keep)
    try:
        smaller = dataclasses.replace(config, num_experts=count)
    except ValueError as error:
        raise ValueError(f"keep: {keep} leaves {count} experts per layer; {error}") from error
    state = dict(model.state_dict(keep_vars=True))
    for index, layer in model.moe_layers():
        kept = kept_experts(importance[index], count, config.num_groups)
        prefix = f"model.layers.{index}.mlp."
        experts = [f"experts.{name}" for name in layer.experts.state_dict()]
        for name in (*experts, *_EXPERT_BUFFERS):
            if prefix + name in state:
                state[prefix + name] = state[prefix + name].detach().index_select(0, kept)
    result = LingForCausalLM(smaller, device="meta", dtype=model.lm_head.weight.dtype)
    result.load_state_dict({name: t.detach() for name, t in state.items()}, assign=True)
    result.foreign_config = dict(model.foreign_config)
    return result.train(model.training)
