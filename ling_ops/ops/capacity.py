"""`CapacityPolicy`: how many rows an expert may have."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from ..reference import capacity as reference
from . import _checks, _library  # noqa: F401
from ._backend import use_kernel
from ._precise import PreciseBuffers

KINDS = ("dropless", "fixed", "dynamic")
MODES = ("batch", "running")
MAX_KERNEL_WINDOW = 1024


def _dynamic_capacity(expert_counts: Tensor, target_drop_rate: float) -> Tensor:
    """C* of the demand, an int32 tensor [1]."""
    _checks.shape("expert_counts", expert_counts, (None,), "[E] or [R*E]")
    unsupported = None
    if expert_counts.dtype not in _checks.IDS:
        unsupported = "the counts are neither int32 nor int64"
    if not use_kernel("capacity", expert_counts, unsupported):
        return reference.dynamic_capacity(expert_counts, target_drop_rate)
    counts = expert_counts.reshape(-1).contiguous()
    return torch.ops.ling_ops.dynamic_capacity(counts, target_drop_rate)


def _running_capacity(window: Tensor, steps: Tensor, *rule: float) -> Tensor:
    """C from past steps, an int32 tensor [1]; `rule`: mean, quantile, margin, max_factor."""
    unsupported = None
    if window.numel() > MAX_KERNEL_WINDOW:
        unsupported = f"the window is longer than the kernel's {MAX_KERNEL_WINDOW}"
    if not use_kernel("capacity", window, unsupported):
        return reference.running_capacity(window, steps, *rule)
    return torch.ops.ling_ops.running_capacity(window.float(), steps, *rule)


class CapacityPolicy(PreciseBuffers):
    """A rule for the capacity C of every expert. Build one with `dropless`, `fixed`, `dynamic`.

    On one GPU dropless is also the fastest choice with grouped products; a capacity is worth
    having for static shapes, bounded memory, and stragglers across GPUs. The policy is a module
    because the "running" mode keeps its window in buffers, which go with the state dict.
    """

    precise = ("window",)  # in bf16 a C from it could be a row too small

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
        # In integers: 1.1 * 50 is 55.000000000000007 in floats, whose ceiling is 56.
        self._ratio = Fraction(str(factor)).limit_denominator(10**6).as_integer_ratio()
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
        before the first step. (In the window mu is the step's mean demand: where tokens are
        masked, C is larger than it needs to be.)
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
            above, below = self._ratio
            return -(-above * num_pairs // (below * num_experts))
        if self.mode == "batch":
            return _dynamic_capacity(expert_counts, self.target_drop_rate)
        rule = (self.quantile, self.margin, self.max_factor)
        return _running_capacity(self.window, self.steps, mean, *rule)

    @torch.no_grad()
    def update(self, expert_counts: Tensor) -> None:
        """Put a step's demand into the window (mode "running"; nothing otherwise).

        Call it once per batch and after its backward, so that recomputed forwards don't count
        twice. `expert_counts` as in `capacity`.
        """
        if self.kind != "dynamic" or self.mode != "running":
            return
        mean = expert_counts.double().mean().clamp(min=1e-9)
        ratio = _dynamic_capacity(expert_counts, self.target_drop_rate) / mean
        slot = (self.steps % self.window.numel()).reshape(1)
        self.window.index_copy_(0, slot, ratio.to(self.window.dtype))
        self.steps.add_(1)

    def extra_repr(self) -> str:
        if self.kind == "fixed":
            return f"fixed, factor={self.factor}"
        if self.kind == "dynamic":
            return f"dynamic, target_drop_rate={self.target_drop_rate}, mode={self.mode!r}"
        return "dropless"
