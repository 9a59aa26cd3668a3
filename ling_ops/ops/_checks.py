"""Argument checks. Every message names the argument, what it got and what it needs."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int32, torch.int64)


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def shape(name: str, value: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """`expected` may hold None for a free size; `meaning` is the shape in words, e.g. '[T, E]'."""
    tensor(name, value)
    fits = value.dim() == len(expected) and all(
        want is None or got == want for got, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        needs = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape {meaning} = [{needs}], got {list(value.shape)}")


def dtype(name: str, value: Tensor, allowed: Iterable[torch.dtype]) -> None:
    allowed = tuple(allowed)
    if value.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(
            f"{name} must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}"
        )


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {value.device}"
        )


def integer(name: str, value: Any, low: int, high: int | None = None, why: str = "") -> None:
    is_int = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    if not is_int:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        top = "" if high is None else f" and at most {high}{why}"
        raise ValueError(f"{name} must be at least {low}{top}, got {value}")


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(name: str, value: Any) -> None:
    is_number = isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat))
    if not is_number or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def positive(name: str, value: float) -> None:
    number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}")


def finite(name: str, value: float) -> None:
    number(name, value)
    if not (value == value and abs(value) != float("inf")):
        raise ValueError(f"{name} must be finite, got {value}")


def ids(name: str, value: Tensor, num_tokens: int | None = None) -> None:
    shape(name, value, (num_tokens, None), "[T, K]")
    dtype(name, value, IDS)
    if value.shape[1] < 1:
        raise ValueError(f"{name} must hold at least one choice per token, got K = 0")


def token_mask(value: Tensor | None, num_tokens: int, other_name: str, other: Tensor) -> None:
    if value is None:
        return
    shape("token_mask", value, (num_tokens,), "[T]")
    dtype("token_mask", value, (torch.bool,))
    same_device("token_mask", value, other_name, other)
