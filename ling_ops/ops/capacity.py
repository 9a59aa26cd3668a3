"""`CapacityPolicy`: how many rows an expert may have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..reference.capacity import dynamic_capacity
from . import _checks

KINDS = ("dropless", "fixed", "dynamic")
MODES = ("batch", "running")


class CapacityPolicy(nn.Module):
    """A rule for the capacity C of every expert. Build one with `dropless`, `fixed`, `dynamic`.

    On one GPU dropless is also the fastest choice with grouped products; a capacity is worth
    having for static shapes, bounded memory, and stragglers across GPUs. The policy is a module
    because the "running" mode keeps its window in buffers, which go with the state dict.
    """

    def __init__(
        self,
        kind: str = "dropless",
        *,
        factor: float = 1.0,
        target_drop_rate: float = 0.02,
        mode: str = "batch",
        window: int = 64,
        quantile: float = 0.9,
        margin: float = 0.05,
        max_factor: float = 4.0,
    ) -> None:
        super().__init__()
        _checks.choice("kind", kind, KINDS)
        _checks.choice("mode", mode, MODES)
        _checks.positive("factor", factor)
        _checks.finite("factor", factor)
        _checks.integer("window", window, 1)
        for name, value in (("target_drop_rate", target_drop_rate), ("quantile", quantile)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if not margin >= 0:
            raise ValueError(f"margin must be at least 0, got {margin}")
        if not max_factor >= 1:
            raise ValueError(f"max_factor must be at least 1, got {max_factor}")
        self.kind, self.factor, self.mode = kind, factor, mode
        self.target_drop_rate, self.quantile = target_drop_rate, quantile
        self.margin, self.max_factor = margin, max_factor
        if kind == "dynamic" and mode == "running":
            self.register_buffer("window", torch.full((window,), math.nan))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def dropless(cls) -> CapacityPolicy:
        """Every pair is a row."""
        return cls("dropless")

    @classmethod
    def fixed(cls, factor: float) -> CapacityPolicy:
        """C = ceil(factor * T * K / E)."""
        return cls("fixed", factor=factor)

    @classmethod
    def dynamic(
        cls,
        target_drop_rate: float = 0.02,
        mode: str = "batch",
        *,
        window: int = 64,
        quantile: float = 0.9,
        margin: float = 0.05,
        max_factor: float = 4.0,
    ) -> CapacityPolicy:
        """The smallest C that drops at most `target_drop_rate` of the demand.

        mode "batch": C* of this batch's own demand. mode "running": from past steps only, so
        that buffers can be sized ahead: C = ceil(c * T*K/E), c = clip((1 + margin) *
        quantile(C* / mu over the last `window` steps), 1, max_factor), mu = T*K/E; `max_factor`
        before the first step.
        """
        return cls(
            "dynamic",
            target_drop_rate=target_drop_rate,
            mode=mode,
            window=window,
            quantile=quantile,
            margin=margin,
            max_factor=max_factor,
        )

    @property
    def is_dropless(self) -> bool:
        """Whether every pair is kept."""
        return self.kind == "dropless"

    def capacity(
        self, expert_counts: Tensor, num_pairs: int, num_experts: int
    ) -> int | Tensor | None:
        """C for a step: None (dropless), an int (fixed) or an int32 tensor [1] on the device.

        Args:
            expert_counts: integer demand before any drop: [E], or with expert parallelism
                [R*E], the loads that each of R ranks sends to each expert.
            num_pairs: T*K.
            num_experts: E.
        """
        _checks.integer("num_experts", num_experts, 1)
        mean = num_pairs / num_experts
        if self.kind == "dropless":
            return None
        if self.kind == "fixed":
            return math.ceil(self.factor * mean)
        if self.mode == "batch":
            star = dynamic_capacity(expert_counts, self.target_drop_rate)
            return star.to(torch.int32).reshape(1)
        return (self._running_factor() * mean).ceil().to(torch.int32).reshape(1)

    def _running_factor(self) -> Tensor:
        """c of the running mode, 0-dim float on the window's device."""
        ordered = self.window.float().sort().values  # what isn't filled yet is NaN, and last
        filled = self.steps.clamp(max=self.window.numel())
        at = (self.quantile * (filled - 1)).clamp(min=0).reshape(1)
        low, high = (ordered.gather(0, rank.long()) for rank in (at.floor(), at.ceil()))
        past = torch.lerp(low, high, at.float() - at.floor()).squeeze(0) * (1 + self.margin)
        past = torch.where(self.steps > 0, past, self.max_factor)
        return past.clamp(1.0, self.max_factor)

    @torch.no_grad()
    def update(self, expert_counts: Tensor) -> None:
        """Put a step's demand into the window (mode "running"; nothing otherwise).

        Call it once per optimizer step, so that recomputed forwards don't count twice.
        """
        if self.kind != "dynamic" or self.mode != "running":
            return
        mean = expert_counts.double().mean().clamp(min=1e-9)
        ratio = dynamic_capacity(expert_counts, self.target_drop_rate) / mean
        slot = (self.steps % self.window.numel()).reshape(1)
        self.window.index_copy_(0, slot, ratio.to(self.window.dtype).reshape(1))
        self.steps.add_(1)

    def extra_repr(self) -> str:
        if self.kind == "fixed":
            return f"fixed, factor={self.factor}"
        if self.kind == "dynamic":
            return f"dynamic, target_drop_rate={self.target_drop_rate}, mode={self.mode!r}"
        return "dropless"
