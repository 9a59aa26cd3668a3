"""AdamW over fp32 values of all parameters, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ling_ops.cli.errors import CommandError


def learning_rate_at(step: int, *, steps: int, warmup: int, peak: float, final: float) -> float:
    """Learning rate of optimizer step `step` (1-based): linear warm-up, then a cosine.

    final: the rate at the last step as a fraction of `peak`.
    """
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Optimizer:
    """AdamW whose state is a flat dict of tensors.

    A parameter that is not fp32 gets an fp32 master copy, which takes the updates; the parameter
    is its rounding. Matrices decay, vectors (norms, biases) and embeddings do not.
    """

    def __init__(self, model: nn.Module, *, weight_decay: float) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.parameters.items()
        }
        embeddings = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules() if isinstance(module, nn.Embedding)
            for name, _ in module.named_parameters(recurse=False)
        }  # fmt: skip
        decayed = [n for n, p in self.masters.items() if p.dim() >= 2 and n not in embeddings]
        plain = [n for n in self.masters if n not in set(decayed)]
        self.adam = torch.optim.AdamW(
            [
                {"params": [self.masters[n] for n in decayed], "weight_decay": weight_decay},
                {"params": [self.masters[n] for n in plain], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95), eps=1e-8, lr=0.0, fused=True,
        )  # fmt: skip

    def step(
        self,
        learning_rate: float,
        clip: float,
        clip_all: Callable[[dict[str, Tensor], float], Tensor] | None = None,
    ) -> Tensor:
        """Take one step from the parameters' gradients; returns their norm before clipping.

        clip_all: clips the given gradients by name together with those of other processes.
        """
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
        norm = (clip_all or self._clip)(
            {name: m.grad for name, m in self.masters.items() if m.grad is not None}, clip
        )
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
                self.masters[name].grad = parameter.grad = None
        return norm

    def _clip(self, grads: dict[str, Tensor], clip: float) -> Tensor:
        norm = nn.utils.get_total_norm(grads.values())
        if clip > 0:
            nn.utils.clip_grads_with_norm_(self.masters.values(), clip, norm)
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """All state by name: "<parameter>/exp_avg", "/exp_avg_sq", "/step", "/master"."""
        tensors = {}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{name}/{key}"] = value
            if master is not self.parameters[name]:
                tensors[f"{name}/master"] = master
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` gave; CommandError if it belongs to another model.

        weights: the checkpoint's parameters by name; they seed the master copies that it lacks
        (a run in fp32 that goes on in bf16).
        """
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(weights[name])
            for key, value in tensors.items():
                name, _, kind = key.rpartition("/")
                master = self.masters.get(name)
                if master is None or (kind != "step" and value.shape != master.shape):
                    raise CommandError(f"the checkpoint's optimizer state {key!r} does not fit")
                if kind == "master":
                    master.copy_(value)
                else:
                    self.adam.state[master][kind] = value.to(master.device, copy=True)
