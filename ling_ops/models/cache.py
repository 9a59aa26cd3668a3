"""The key-value caches: one grows by whole batches, in the other sequences grow each by itself."""

from __future__ import annotations

import torch

from .config import LingConfig


class KVCache:
    """Preallocated keys and values of every layer, ``[B, KV heads, max_length, head_dim]`` each.

    ``length`` tokens are filled. ``token_mask`` ``[B, max_length]`` bool says which of them are
    real; None while no padding has been seen.
    """

    def __init__(
        self,
        config: LingConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.max_length = max_length
        self.batch_size = batch_size
        self.length = 0
        self.token_mask: torch.Tensor | None = None
        self.keys = [
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def reset(self) -> None:
        """Empties the cache; the memory stays."""
        self.length = 0
        self.token_mask = None

    def reserve(self, batch_size: int, tokens: int, token_mask: torch.Tensor | None) -> None:
        """Checks that ``tokens`` more fit, and records their mask."""
        if batch_size != self.batch_size:
            raise ValueError(
                f"input_ids: got a batch of {batch_size}, need {self.batch_size} as in the cache"
            )
        end = self.length + tokens
        if end > self.max_length:
            raise ValueError(
                f"cache: got {self.length} + {tokens} tokens, need at most "
                f"max_length={self.max_length}"
            )
        if token_mask is not None and self.token_mask is None:
            self.token_mask = torch.ones(
                self.batch_size, self.max_length, dtype=torch.bool, device=token_mask.device
            )
        if token_mask is not None:
            self.token_mask[:, self.length : end] = token_mask

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes ``[B, KV heads, S, head_dim]`` behind the filled part; returns all up to it."""
        end = self.length + keys.shape[2]
        if self.keys[layer].device != keys.device:  # an engine runs this layer elsewhere
            for tensors in (self.keys, self.values):
                old = tensors[layer]
                tensors[layer] = (
                    torch.zeros_like(old, device=keys.device)
                    if old.is_meta
                    else old.to(keys.device)
                )
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        dtype = keys.dtype
        return self.keys[layer][:, :, :end].to(dtype), self.values[layer][:, :, :end].to(dtype)

    def advance(self, tokens: int) -> None:
        """Counts ``tokens`` as filled, once every layer has appended them."""
        self.length += tokens


class StaticCache:
    """Keys and values at fixed addresses, each sequence's own from its first row on.

    Per layer ``[B · max_length, KV heads, head_dim]``; sequence b has the rows from
    ``b · max_length`` on. ``lengths`` ``[B]`` int32 on the device says how many are filled, and
    ``first_rows`` ``[B]`` int64 where they begin; ``starts`` ``[B + 1]`` int32 are the same
    boundaries for attention.
    """

    def __init__(
        self,
        config: LingConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch_size * max_length, config.num_kv_heads, config.head_dim)
        self.batch_size, self.max_length = batch_size, max_length
        options = {"device": device, "dtype": dtype}
        # zeros: what lies behind a sequence is masked, but 0 times an old NaN would be one
        self.keys = [torch.zeros(shape, **options) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, **options) for _ in range(config.num_layers)]
        boundaries = torch.arange(batch_size + 1, device=device) * max_length
        self.starts, self.first_rows = boundaries.int(), boundaries[:-1]
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)

    def sequences(self, layer: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``longest`` keys and values of all, ``[B, KV heads, longest, head_dim]``."""
        both = (self.keys[layer], self.values[layer])
        shape = (self.batch_size, self.max_length)
        return tuple(t.unflatten(0, shape)[:, :longest].transpose(1, 2) for t in both)
