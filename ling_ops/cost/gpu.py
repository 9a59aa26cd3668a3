"""GPU figures: one data file, `gpus.json`, with a source for each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

#: Dtypes of products.
RATES = ("bf16", "fp16", "fp8")
#: What a number and a whole number may be: products and quotients of these stay finite.
SMALLEST, LARGEST, LARGEST_INTEGER = 1e-24, 1e24, 10**15
FIGURES = ("bf16_tflops", "fp8_tflops", "memory_gb", "memory_tb_per_s", "power_w")


class CostError(ValueError):
    """An input that makes no sense; the text names it, what it is and what it must be."""


class FitError(CostError):
    """A number of GPUs, or what is to run on them, that does not suit the other."""


def need(name: str, value: float, *, above: bool = True) -> float:
    """`value` if it is a positive number (or 0, unless `above`); CostError otherwise."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not (SMALLEST <= value <= LARGEST or (value == 0 and not above)):
        zero = "" if above else "0 or "
        raise CostError(
            f"{name}: got {short(value)}, need {zero}a positive number "
            f"({SMALLEST:g} to {LARGEST:g})"
        )
    return value


def short(value: object) -> str:
    """`value` as it was given, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def need_integer(name: str, value: int, least: int = 1) -> int:
    """`value` if it is an int of at least `least` and at most 10^15; CostError otherwise."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= LARGEST_INTEGER:
        raise CostError(
            f"{name}: got {short(value)}, need an int of at least {least} and at most 10^15"
        )
    return value


def need_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`; CostError otherwise."""
    if value not in choices:
        raise CostError(f"{name}: got {value!r}, need one of {', '.join(choices)}")
    return value


def need_share(name: str, value: float) -> float:
    """`value` if it lies in (0, 1]; CostError otherwise."""
    if need(name, value) > 1:
        raise CostError(f"{name}: got {value}, need a number above 0 and at most 1")
    return value


@dataclass(frozen=True)
class GPU:
    """Dense rates, memory (10^9 bytes), memory bandwidth and power of one GPU.

    `fp8_tflops` is None where the tensor cores have no fp8.
    """

    name: str
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gb: float
    memory_tb_per_s: float
    power_w: float
    source: str

    def __post_init__(self) -> None:
        for figure in FIGURES:
            value = getattr(self, figure)
            if figure != "fp8_tflops" or value is not None:
                need(figure, value)

    @property
    def flop_per_s(self) -> float:
        return self.bf16_tflops * 1e12

    def rate_flop_per_s(self, dtype: str) -> float:
        """Peak of products in "bf16", "fp16" or "fp8"; CostError where this GPU has none."""
        if need_choice("dtype", dtype, RATES) != "fp8":
            return self.flop_per_s
        if self.fp8_tflops is None:
            raise CostError(f"dtype: got 'fp8', need bf16: {self.name} has no fp8 products")
        return self.fp8_tflops * 1e12

    @property
    def bytes_per_s(self) -> float:
        return self.memory_tb_per_s * 1e12

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 1e9


def gpus() -> dict[str, GPU]:
    """All known GPUs by name."""
    text = (Path(__file__).parent / "gpus.json").read_text(encoding="utf-8")
    return {key: GPU(**values) for key, values in json.loads(text).items()}


def get_gpu(name: str, **figures: float | None) -> GPU:
    """A known GPU, with the figures that are not None in place of its own.

    Its name and its source then say so.
    """
    known = gpus()
    if name.lower() not in known:
        raise CostError(f"gpu: got {name!r}, need one of {', '.join(known)}")
    gpu = known[name.lower()]
    given = {key: value for key, value in figures.items() if value is not None}
    if not given:
        return gpu
    source = f"given: {', '.join(given)}; all else: {gpu.source}"
    return replace(gpu, **given, name=f"{gpu.name} (figures changed)", source=source)
