"""Activations of an expert, in plain PyTorch."""

from __future__ import annotations

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
