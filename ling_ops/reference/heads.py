"""Heads made ready for attention over a static cache, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .gate import upcast


def attention_heads_(
    projected: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """See `ling_ops.ops._heads.attention_heads_`. In fp32 (float64 for float64), rounded once."""
    cache_rows, kv_heads = key_cache.shape[:2]
    query, key, value = projected.split((projected.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    inside = (rows >= 0) & (rows < cache_rows)
    positions = torch.where(inside, rows, 0) % cos.shape[0]
    turn = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    query = _rotated(_normalised(query, query_weight, eps), *turn).to(key_cache.dtype)
    key = _rotated(_normalised(key, key_weight, eps), *turn)
    _store_(key_cache, rows, inside, key)
    _store_(value_cache, rows, inside, value)
    return query.contiguous()


def _normalised(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = upcast(heads)
    return wide if weight is None else F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``[N, ., D]`` of which the first elements turn, in the rotate-half layout."""
    half, cos, sin = cos.shape[-1], cos.to(heads.dtype), sin.to(heads.dtype)
    first, second = heads[..., :half], heads[..., half : 2 * half]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat([*turned, heads[..., 2 * half :]], dim=-1)


def _store_(cache: Tensor, rows: Tensor, inside: Tensor, heads: Tensor) -> None:
    """cache[rows] = heads, where the rows are inside; the device is not asked where that is."""
    if rows.numel() == 0 or cache.numel() == 0:
        return
    # a token outside stores what the first one inside stores, once more; without one, what is there
    source = torch.where(inside, torch.arange(len(rows), device=rows.device), inside.int().argmax())
    at = rows[source].clamp(0, cache.shape[0] - 1)
    new = torch.where(inside[source].view(-1, 1, 1), heads[source].to(cache.dtype), cache[at])
    cache.index_copy_(0, at, new)
