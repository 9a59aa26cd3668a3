"""Generation where experts are spread over ranks: every rank takes part in every step of any."""

from __future__ import annotations

import torch
from torch import distributed


class Company:
    """The ranks that share a model's experts; without any, nothing is exchanged.

    A rank announces each of its steps, and once it has ended joins those of the others without a
    token, until no rank has one left.
    """

    def __init__(self, model) -> None:
        layers = [moe for _, moe in model.moe_layers()]
        # by name: what spreads experts is built on models
        groups = [moe.experts.group for moe in layers if hasattr(moe.experts, "group")]
        self.layers, self.group = layers, groups[0] if groups else None
        self.device = model.lm_head.weight.device

    def announce(self) -> None:
        """Before a step of this rank."""
        if self.group is not None:
            self._anyone(True)

    def join(self) -> None:
        """After this rank's last step."""
        while self.group is not None and self._anyone(False):
            for moe in self.layers:
                moe(moe.gate.weight.new_empty(0, moe.hidden_size))

    def _anyone(self, going: bool) -> bool:
        flag = torch.tensor(float(going), device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)
