"""Autocast for the products: inputs are cast as torch.nn.functional.linear would cast them."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast(kind: str) -> bool:
    """Whether autocast is on for a kind of device; PyTorch can't be asked about "meta"."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype if autocast is on for their device; float64 stays."""
    kind = tensors[0].device.type
    if not is_autocast(kind):
        return tensors
    target = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(target) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
