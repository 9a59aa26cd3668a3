"""Generation by the model's own forward, where something watches or changes whole layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ling_ops.nn import RMSNorm
from ling_ops.nn.mlp import is_hooked

from .attention import Attention


class WholeModel:
    """What ``PackedModel`` does, by calling ``model``: sequences share one padded batch, and steps
    are never captured."""

    def __init__(self, model, batch_size: int, max_length: int) -> None:
        self.model, self.cache = model, model.new_cache(batch_size, max_length)

    def prefill(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Logits ``[B, V]`` behind prompts, packed as ``[N]``, of ``lengths`` (all positive)."""
        longest, device = max(lengths), tokens.device
        # Which sequences go on: where the tokens are, since an engine may keep weights elsewhere.
        self.active = torch.ones(len(lengths), dtype=torch.bool, device=device)
        padding = longest - torch.tensor(lengths, device=device).unsqueeze(1)
        mask = torch.arange(longest, device=device) >= padding
        return self._run(tokens.new_zeros(mask.shape).masked_scatter_(mask, tokens), mask)

    def step(self, tokens: Tensor, *, more: bool) -> Tensor:
        """Logits ``[B, V]`` behind one more token ``[B]`` of every sequence."""
        return self._run(tokens.unsqueeze(1), self.active.unsqueeze(1))

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        out = self.model(ids, cache=self.cache, token_mask=mask, last_logits_only=True)
        return out.logits[:, -1]


def runs_whole(model) -> bool:
    """Whether something watches or changes a module that ``PackedModel`` takes apart: a hook (FSDP
    has its own), a subclass, or a forward of its own, as accelerate and torch.compile give one."""
    from .ling import LingForCausalLM, LingLayer

    taken: dict[nn.Module, type[nn.Module]] = {model: LingForCausalLM}
    for layer in model.model.layers:
        attention = layer.attention
        taken |= {layer: LingLayer, attention: Attention}
        if attention.query_layernorm is not None:
            taken |= {attention.query_layernorm: RMSNorm, attention.key_layernorm: RMSNorm}
    if is_hooked(*taken) or any("forward" in vars(module) for module in model.modules()):
        return True
    return any(type(module).forward is not kind.forward for module, kind in taken.items())
