"""Small helpers that several modules share."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh")
PLAIN_ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu2")


def is_gated(activation: str) -> bool:
    """Whether ``activation`` multiplies a gate branch with an up branch."""
    if activation in GATED_ACTIVATIONS:
        return True
    if activation in PLAIN_ACTIVATIONS:
        return False
    known = ", ".join(GATED_ACTIVATIONS + PLAIN_ACTIVATIONS)
    raise ValueError(f"activation: got {activation!r}, need one of {known}")


def check_activation(activation: str, swiglu_limit: float | None) -> bool:
    """Validates an activation with its clamp; returns whether it is gated."""
    gated = is_gated(activation)
    if swiglu_limit is not None:
        if activation != "swiglu":
            raise ValueError(f"swiglu_limit: needs activation='swiglu', got {activation!r}")
        if not swiglu_limit > 0:
            raise ValueError(f"swiglu_limit: got {swiglu_limit}, need a positive number or None")
    return gated


def check_positive(**values: int) -> None:
    """Raises a ValueError that names the first value which is not a positive int."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, need a positive int")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operations on ``device`` keep the dtypes that they are given."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@torch.no_grad()
def init_normal(weight: torch.Tensor, fan_in: int, std: float | None) -> None:
    """Fills ``weight`` from N(0, std²); ``std=None`` means 1/sqrt(fan_in)."""
    torch.nn.init.normal_(weight, std=fan_in**-0.5 if std is None else std)
