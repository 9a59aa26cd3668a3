"""A Ling model over packed tokens and a static cache: what generation runs.

Tokens of all sequences stand one behind the other, ``[N]``, without padding; every sequence reads
and extends its own part of the cache. A decode step is the case of one token per sequence: it
reads all lengths on the device, so that one CUDA graph serves every step.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ling_ops.nn import MoE
from ling_ops.nn.experts import Experts
from ling_ops.nn.mlp import add_linear_, add_mlp_, is_hooked
from ling_ops.ops._backend import use_kernel
from ling_ops.ops._heads import attention_heads_
from ling_ops.ops.gemm import tensor_core_unsupported

from ._attention_backend import flash_attention_4, runs_flash_attention_4
from .attention import Attention, rotary_table
from .cache import StaticCache

#: Tokens of one pass over a prompt: enough for full tiles of every expert, and a bound on memory.
CHUNK = 16384
_HALF = (torch.bfloat16, torch.float16)


class Span(NamedTuple):
    """Where the tokens of one pass belong."""

    rows: Tensor  # [N] int64, of the cache
    starts: Tensor  # [B + 1] int32: each sequence's first token
    longest: int  # a bound on the tokens of one sequence; 1 means exactly one of each
    keys: Tensor  # [B] int32: cached tokens of each sequence, those of this pass included
    sizes: list[tuple[int, int]] | None  # (tokens, keys) per sequence; None in a decode step


class PackedModel:
    """Runs ``model`` on packed tokens; ``cache`` holds the past.

    ``logits`` ``[B, V]`` are those of every sequence's last token so far.
    """

    def __init__(self, model, batch_size: int, max_length: int) -> None:
        weight = model.lm_head.weight
        self.model, self.config, self.device = model, model.config, weight.device
        self.cache = StaticCache(
            model.config, batch_size, max_length, device=weight.device, dtype=weight.dtype
        )
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        #: Sequences that still want tokens; the others take no room where capacity is limited.
        self.active = torch.ones(batch_size, dtype=torch.bool, device=self.device)
        self.logits: Tensor | None = None
        self._steps = torch.arange(batch_size + 1, dtype=torch.int32, device=self.device)
        self._longest = 0
        self._head_norm = model.head_norm()
        self._flash_runs = _flash_runs(weight, model.config.head_dim)
        self._graph: torch.cuda.CUDAGraph | None = None
        positions = torch.arange(max_length, device=self.device).unsqueeze(0)
        angles = rotary_table(positions, model.config.rotary_dim, model.config.rope_theta)
        half = model.config.rotary_dim // 2  # both halves of a row are the same
        self._cos, self._sin = (table[0, 0, :, :half].contiguous() for table in angles)

    # --- passes ----------------------------------------------------------------------------------
    def prefill(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Logits ``[B, V]`` behind prompts, packed as ``[N]``, of ``lengths`` (all positive)."""
        if max(lengths) > self.cache.max_length:
            raise ValueError(
                f"lengths: got {max(lengths)}, need at most max_length={self.cache.max_length}"
            )
        ends = list(itertools.accumulate(lengths))
        last = []
        for begin in range(0, ends[-1], CHUNK):
            end = min(begin + CHUNK, ends[-1])
            sizes = []
            for length, behind in zip(lengths, ends, strict=True):
                first = behind - length
                done = min(max(end - first, 0), length)
                sizes.append((done - min(max(begin - first, 0), length), done))
            hidden = self._pass(tokens[begin:end], self._span(sizes), None)
            finals = [behind - 1 - begin for behind in ends if begin < behind <= end]
            last.append(hidden[torch.tensor(finals, dtype=torch.int64, device=self.device)])
        self.cache.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self._longest = max(lengths)
        return self._logits(torch.cat(last))

    def step(self, tokens: Tensor, *, more: bool) -> Tensor:
        """Logits ``[B, V]`` behind one more token ``[B]`` of every sequence.

        ``more`` says that further steps are sure to come: a graph is worth its capture. The logits
        are overwritten by the next step. A ValueError says that the cache is full.
        """
        if self._longest == self.cache.max_length:
            raise ValueError(f"tokens: got one more, need at most {self._longest} per sequence")
        self.tokens.copy_(tokens)
        self._longest += 1
        if self._graph is not None:
            self._graph.replay()
            return self.logits
        self.logits = self._decode()  # also what a capture needs to have run once
        if more and self._can_capture():
            logits, self._graph = self.logits, torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile, such as a data loader's that pins memory
            with torch.cuda.graph(
                self._graph, stream=_capture_stream(self.device), capture_error_mode="thread_local"
            ):
                self.logits = self._decode()
            return logits
        return self.logits

    def rewind(self, length: int) -> None:
        """Back to the first ``length`` tokens of every sequence, none of which has fewer."""
        self.cache.lengths.fill_(length)
        self._longest = length

    def _decode(self) -> Tensor:
        cache = self.cache
        rows = cache.first_rows + cache.lengths
        cache.lengths.add_(1)
        span = Span(rows, self._steps, 1, cache.lengths, None)
        return self._logits(self._pass(self.tokens, span, self.active))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.head(self.model.model.norm(hidden), self._head_norm)

    def _span(self, sizes: list[tuple[int, int]]) -> Span:
        """The span of a part of the prompts, (tokens, keys) per sequence."""
        rows = [
            torch.arange(start + keys - new, start + keys)
            for start, (new, keys) in zip(
                range(0, self.cache.batch_size * self.cache.max_length, self.cache.max_length),
                sizes,
                strict=True,
            )
        ]
        starts = [0, *itertools.accumulate(new for new, _ in sizes)]
        keys = [keys for _, keys in sizes]
        integers = {"dtype": torch.int32, "device": self.device}
        return Span(
            torch.cat(rows).to(self.device),
            torch.tensor(starts, **integers),
            max(2, max(new for new, _ in sizes)),
            torch.tensor(keys, **integers),
            sizes,
        )

    def _can_capture(self) -> bool:
        """Whether a step is the same launches every time, and asks the device for nothing."""
        if not self._flash_runs:  # the other attention reads as many keys as the host has counted
            return False
        if is_hooked(*self.model.modules()):  # a hook would run once, in the capture
            return False
        weight = self.model.lm_head.weight
        for _, moe in self.model.moe_layers():
            if not _is_plain(moe):
                return False
            sizes = {"H": moe.experts.hidden_size, "I": moe.experts.intermediate_size}
            unsupported = tensor_core_unsupported(weight.dtype, **sizes)
            if not use_kernel("moe_mlp", weight, unsupported):
                return False
        return True

    # --- layers ----------------------------------------------------------------------------------
    def _pass(self, tokens: Tensor, span: Span, active: Tensor | None) -> Tensor:
        """Hidden states ``[N, H]`` before the last norm."""
        x = self.model.model.word_embeddings(tokens)
        for index, layer in enumerate(self.model.model.layers):
            attention, normed = layer.attention, layer.input_layernorm(x)
            query = self._heads(index, attention, normed, span.rows)
            add_linear_(x, attention.dense, self._attend(index, query, span).flatten(1))
            _add_layer_(x, layer.mlp, layer.post_attention_layernorm(x), active)
        return x

    def _heads(self, layer: int, attention: Attention, x: Tensor, rows: Tensor) -> Tensor:
        """Queries ``[N, heads, D]`` in the cache's dtype; the cache gains keys and values."""
        norms = {}
        if attention.query_layernorm is not None:
            norms = {
                "query_weight": attention.query_layernorm.weight,
                "key_weight": attention.key_layernorm.weight,
                "eps": attention.query_layernorm.eps,
            }
        projected = attention.query_key_value(x).unflatten(1, (-1, attention.head_dim))
        caches = self.cache.keys[layer], self.cache.values[layer]
        return attention_heads_(projected, *caches, rows, self._cos, self._sin, **norms)

    def _attend(self, layer: int, query: Tensor, span: Span) -> Tensor:
        """What the heads read, ``[N, heads, D]``."""
        if self._flash_runs:
            return self._flash(layer, query, span)
        attend = self._attend_step if span.sizes is None else self._attend_each
        return attend(layer, query, span)

    def _flash(self, layer: int, query: Tensor, span: Span) -> Tensor:
        """Attention that reads each sequence's length on the device, and no more keys than that."""
        cache = self.cache
        keys, values = cache.keys[layer], cache.values[layer]
        if span.sizes is not None and runs_flash_attention_4(
            query, keys.shape[1], cache.batch_size
        ):
            return flash_attention_4(query, keys, values, span.starts, cache.starts, span.keys)
        return torch.ops.aten._flash_attention_forward(
            query,
            keys,
            values,
            span.starts,
            cache.starts,
            span.longest,
            cache.max_length,
            0.0,
            span.longest > 1,  # causal, the last query at the last key
            False,
            seqused_k=span.keys,
        )[0]

    def _attend_step(self, layer: int, query: Tensor, span: Span) -> Tensor:
        key, value = self.cache.sequences(layer, self._longest)
        columns = torch.arange(self._longest, device=self.device)
        mask = (columns < span.keys.unsqueeze(1))[:, None, None]
        return _sdpa(query.unsqueeze(2), key, value, mask).squeeze(2)

    def _attend_each(self, layer: int, query: Tensor, span: Span) -> Tensor:
        keys, values = self.cache.sequences(layer, max(total for _, total in span.sizes))
        out, begin = [], 0
        for b, (new, total) in enumerate(span.sizes):
            if new == 0:
                continue
            q = query[begin : begin + new].transpose(0, 1).unsqueeze(0)
            columns = torch.arange(total, device=self.device)
            mask = None if new == total else columns <= columns[total - new :].unsqueeze(1)
            read = _sdpa(q, keys[b : b + 1, :, :total], values[b : b + 1, :, :total], mask)
            out.append(read[0].transpose(0, 1))
            begin += new
        return torch.cat(out)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device: torch's own belongs to the device that was current at its first use, and
    every stream keeps a workspace of cuBLAS."""
    return torch.cuda.Stream(device)


def _flash_runs(weight: Tensor, head_dim: int) -> bool:
    if not (weight.is_cuda and weight.dtype in _HALF and head_dim % 8 == 0 and head_dim <= 256):
        return False
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of ``[B, heads, S, D]``; without a mask causal."""
    gqa = key.shape[1] != query.shape[1]
    causal = mask is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=gqa
    )


def _is_plain(moe: MoE) -> bool:
    """Whether a token's result depends on that token alone, and on nothing a subclass adds."""
    plain = type(moe) is MoE and type(moe.experts) is Experts
    return plain and not is_hooked(moe) and moe.capacity.is_dropless


def _add_layer_(x: Tensor, mlp: nn.Module, normed: Tensor, active: Tensor | None) -> None:
    """x += mlp(normed), for a dense layer's or a whole MoE."""
    if not isinstance(mlp, MoE):
        add_mlp_(x, mlp, normed)
    elif not _is_plain(mlp):
        x.add_(mlp(normed, token_mask=active))
    else:
        routed = mlp.gate(normed)
        x.add_(mlp.all_experts(normed, routed.weights, routed.indices))
