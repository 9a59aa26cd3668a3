"""Grouped-query attention with QK-norm and partial rotary embedding, on PyTorch's SDPA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ling_ops.nn import RMSNorm

from .cache import KVCache
from .config import LingConfig


class AttentionInputs(NamedTuple):
    """What all layers of one forward share."""

    cos: torch.Tensor  # [B or 1, 1, S, rotary_dim] fp32
    sin: torch.Tensor
    mask: torch.Tensor | None  # bool, broadcastable to [B, heads, S, keys]; True = may attend
    is_causal: bool  # the mask is the plain causal one and is left to SDPA


def attention_inputs(
    config: LingConfig,
    queries: int,
    past: int,
    token_mask: torch.Tensor | None,
    device: torch.device,
) -> AttentionInputs:
    """Rotary tables and mask of ``queries`` tokens behind ``past`` cached ones.

    ``token_mask`` ``[B, past + queries]`` bool: padding is not attended to and takes no position,
    so that a padded sequence has the positions of the same sequence alone.
    """
    if token_mask is None:
        positions = torch.arange(past, past + queries, device=device).unsqueeze(0)
    else:
        positions = (token_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    cos, sin = rotary_table(positions, config.rotary_dim, config.rope_theta)
    if token_mask is None and (past == 0 or queries == 1):
        # A branch, since a compiled graph of any length would have a symbol for the comparison.
        return AttentionInputs(cos, sin, None, is_causal=True if queries > 1 else False)  # noqa: SIM210
    columns = torch.arange(past + queries, device=device)
    rows = columns[past:].unsqueeze(1)
    mask = columns <= rows
    if token_mask is not None:
        # a padding query attends to itself: a row without any key would be NaN
        mask = (mask & token_mask[:, None, None, :]) | (columns == rows)
    return AttentionInputs(cos, sin, mask, is_causal=False)


def rotary_table(
    positions: torch.Tensor, rotary_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 ``[B, 1, S, rotary_dim]``, of positions ``[B, S]``.

    Angles position · theta^(-2i/rotary_dim), i = 0 … rotary_dim/2 - 1, twice side by side
    (Su et al. 2021, in the rotate-half layout).
    """
    steps = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.unsqueeze(-1).float() * theta ** (-steps / max(1, rotary_dim))
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first ``rotary_dim`` elements of every head of x ``[B, heads, S, head_dim]``."""
    rotary_dim = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)


class Attention(nn.Module):
    """Causal self-attention. x ``[B, S, H]`` → ``[B, S, H]``.

    ``query_key_value`` has the rows of all query heads, then all key heads, then all value heads.
    Order: projection, per-head RMSNorm of queries and keys, rotary embedding, attention.
    """

    def __init__(
        self,
        config: LingConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        width = config.num_heads * config.head_dim
        heads = config.num_heads + 2 * config.num_kv_heads
        self.query_key_value = nn.Linear(
            config.hidden_size, heads * config.head_dim, bias=False, **options
        )
        self.dense = nn.Linear(width, config.hidden_size, bias=False, **options)
        self.query_layernorm = self.key_layernorm = None
        if config.use_qk_norm:
            options["eps"] = config.rms_norm_eps
            self.query_layernorm = RMSNorm(config.head_dim, **options)
            self.key_layernorm = RMSNorm(config.head_dim, **options)

    def forward(
        self,
        x: torch.Tensor,
        shared: AttentionInputs,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> torch.Tensor:
        batch, length, _ = x.shape
        split = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        projected = self.query_key_value(x).view(batch, length, sum(split), self.head_dim)
        query, key, value = projected.transpose(1, 2).split(split, dim=1)
        if self.query_layernorm is not None:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        query = rotate(query, shared.cos, shared.sin)
        key = rotate(key, shared.cos, shared.sin)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=shared.mask,
            is_causal=shared.is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.dense(out.transpose(1, 2).flatten(2))
