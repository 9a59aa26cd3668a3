"""Activations of an expert, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .gate import upcast

#: Activations whose pre-activation holds gate and up halves, [.., 2I] -> [.., I].
GATED = ("swiglu", "geglu", "geglu_tanh")
#: Activations of one input, [.., I] -> [.., I].
PLAIN = ("gelu", "gelu_tanh", "silu", "relu2")
ACTIVATIONS = GATED + PLAIN


def _gated(gate: Tensor, up: Tensor, name: str, limit: float | None) -> Tensor:
    if name == "swiglu":
        activated = F.silu(gate)
    else:
        activated = F.gelu(gate, approximate="tanh" if name.endswith("tanh") else "none")
    if limit is None:
        return activated * up
    return activated.clamp(max=limit) * up.clamp(-limit, limit)


def activate(h: Tensor, name: str, limit: float | None = None) -> Tensor:
    """Apply an activation in fp32 (float64 for float64) and round to h's dtype.

    With a limit L (SwiGLU of Ling V3): silu(g).clamp(max=L) * u.clamp(-L, L).
    """
    wide = upcast(h)
    if name in GATED:
        gate, up = wide.chunk(2, dim=-1)
        return _gated(gate, up, name, limit).to(h.dtype)
    if name == "silu":
        return F.silu(wide).to(h.dtype)
    if name == "relu2":
        return F.relu(wide).square().to(h.dtype)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return F.gelu(wide, approximate=approximate).to(h.dtype)


def _slope(x: Tensor, name: str) -> Tensor:
    """Derivative of a one-input activation; "swiglu" and "geglu..." mean their gate's function."""
    if name in ("silu", "swiglu"):
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if name == "relu2":
        return 2 * F.relu(x)
    if name.endswith("tanh"):
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(scale * (x + cubic * x.pow(3)))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * cubic * x * x)
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def activation_backward(da: Tensor, h: Tensor, name: str, limit: float | None = None) -> Tensor:
    """d objective / d h for d objective / d activate(h), in fp32 (float64 for float64)."""
    wide, da = upcast(h), upcast(da)
    if name not in GATED:
        return da * _slope(wide, name)
    gate, up = wide.chunk(2, dim=-1)
    value = F.silu(gate)
    if name != "swiglu":
        value = F.gelu(gate, approximate="tanh" if name.endswith("tanh") else "none")
    gate_slope, up_slope = _slope(gate, name), torch.ones_like(up)
    if limit is not None:
        gate_slope = torch.where(value <= limit, gate_slope, 0.0)
        up_slope = torch.where(up.abs() <= limit, up_slope, 0.0)
        value, up = value.clamp(max=limit), up.clamp(-limit, limit)
    return torch.cat([da * up * gate_slope, da * value * up_slope], dim=-1)
