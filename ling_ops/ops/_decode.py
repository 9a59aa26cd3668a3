"""The experts for few tokens: two launches that stream the chosen experts' weights once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.activation import ACTIVATIONS
from ..reference.route import Routing
from ._backend import use_kernel

#: Limits of the kernels. Pairs are those of the routed experts; a shared expert's come on top.
MAX_TOKENS, MAX_PAIRS, MAX_EXPERTS = 64, 512, 4096
#: With shared experts more pairs, and fewer experts: the smallest GPUs' shared memory holds both.
MAX_PAIRS_WITH_SHARED, MAX_EXPERTS_WITH_SHARED = 640, 1900
#: Tokens that an expert has on average up to which these kernels are at least as fast as the
#: grouped products: at four by 3 % with 128 experts of Qwen3's size. (Eight tokens of one expert
#: share a reading of its weights.)
PAIRS_PER_EXPERT = 4


_blocks: list[None] = []  # one for each block of `batch_invariant` that is being run


@contextmanager
def batch_invariant() -> Iterator[None]:
    """One path for batches of all sizes in a block: `moe_mlp` without its kernels for few tokens.

    A token's result is then bitwise the same in every batch, with gradients or without; few tokens
    take longer. Generation keeps PyTorch's attention for all prompts. The choice holds for the
    whole process, not for one thread; a CUDA graph keeps that of its capture.
    """
    # Blocks of several threads need not end in the order in which they began.
    _blocks.append(None)
    try:
        yield
    finally:
        _blocks.pop()


def is_batch_invariant() -> bool:
    """Whether a block of `batch_invariant` is being run."""
    return bool(_blocks)


def decode_limit(k: int, num_experts: int) -> int:
    """The most tokens that `moe_decode` is chosen for: `PAIRS_PER_EXPERT` per expert, at most
    `MAX_TOKENS` and `MAX_PAIRS`. A function of the layer alone: a token's result is bitwise the
    same in every batch on the same side of it."""
    pairs = min(MAX_PAIRS, PAIRS_PER_EXPERT * num_experts)
    return min(MAX_TOKENS, pairs // max(1, k)) if num_experts <= MAX_EXPERTS else 0


def runs_decode(
    x: Tensor, indices: Tensor, down_proj: Tensor, differentiable: Iterable[Tensor | None]
) -> bool:
    """Whether `moe_decode` takes the call: few tokens, no gradient wanted, a kernel for x's GPU."""
    if is_batch_invariant():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        return False
    tokens, k = indices.shape  # one comparison, so that torch.compile guards on one bound
    return use_kernel("moe_decode", x) and tokens <= decode_limit(k, down_proj.shape[0])


class SharedExpert(NamedTuple):
    """An expert that every token takes with a weight of 1."""

    gate: Tensor | None  # [S,H], None for an activation without a gate
    up: Tensor  # [S,H]
    down: Tensor  # [H,S]


def takes_shared(shared: SharedExpert, indices: Tensor, down_proj: Tensor) -> bool:
    """Whether `moe_decode` can take `shared` along: as slices as wide as the routed experts.

    A function of the layer alone, as `decode_limit` is."""
    slices, rest = divmod(shared.up.shape[0], down_proj.shape[2])
    k, experts = indices.shape[1], down_proj.shape[0]
    pairs = decode_limit(k, experts) * (k + slices)
    fits = experts + slices <= MAX_EXPERTS_WITH_SHARED and pairs <= MAX_PAIRS_WITH_SHARED
    return rest == 0 and slices > 0 and fits


def moe_decode(
    x: Tensor,
    proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    indices: Tensor,
    routing: Routing | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    activation: str,
    swiglu_limit: float | None,
    shared: SharedExpert | None = None,
) -> Tensor:
    """`moe_mlp`, plus `shared` (no biases beside it), on bf16 or fp16 CUDA tensors whose H and I
    are multiples of 8."""
    more = (None, None, None) if shared is None else shared
    biases = (None if b is None else b.to(x.dtype).contiguous() for b in (up_bias, down_bias))
    return torch.ops.ling_ops.moe_decode(
        x.contiguous(),
        proj.contiguous(),
        down_proj.contiguous(),
        weights.float().contiguous(),
        indices.contiguous(),
        None if routing is None else routing.token_row,
        *biases,
        *(None if t is None else t.contiguous() for t in more),
        ACTIVATIONS.index(activation),
        math.inf if swiglu_limit is None else swiglu_limit,
    )
