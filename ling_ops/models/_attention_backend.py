"""The kernel that reads the cache in a pass over prompts.

FlashAttention 4, of the extra ``attention``, where it runs and pays; elsewhere PyTorch's own. The
choice is a function of shapes, GPU and installation: nothing is timed, and no length is compiled
for, only each dtype, head size and number of queries per key.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from torch import Tensor

from ling_ops.ops._backend import FallbackWarning
from ling_ops.ops._decode import is_batch_invariant

#: Tokens of a pass from which on it is faster: below, the host's 0.16 ms per call outweigh it.
FEWEST_TOKENS = 4096
#: With more sequences the library launches, and compiles, kernels that order them.
MOST_SEQUENCES = 256
_HOPPER = (9, 0)
#: Sizes of a head, and queries per key, with which it is tested.
_HEAD_DIMS, _GROUPS = (64, 128), (1, 2, 4, 8, 16)
_VERSION = re.compile(r"4\.0(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+.*)?")


def runs_flash_attention_4(query: Tensor, kv_heads: int, sequences: int) -> bool:
    """Whether `flash_attention_4` takes a pass with ``query`` ``[N, heads, D]`` of ``sequences``.

    Never in `ling_ops.batch_invariant()`: other tokens would decide which kernel a token takes.
    """
    tokens, heads, head_dim = query.shape
    if not pays(tokens, sequences) or is_batch_invariant():
        return False
    if head_dim not in _HEAD_DIMS or heads / kv_heads not in _GROUPS:
        return False
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) != _HOPPER:
        return False
    return load() is not None


def pays(tokens: int, sequences: int) -> bool:
    """Whether a pass is of a size for which FlashAttention 4 is started."""
    return tokens >= FEWEST_TOKENS and sequences <= MOST_SEQUENCES


_compiled: set[tuple] = set()


@contextlib.contextmanager
def _without_remarks(dtype: torch.dtype, query: torch.Size, key: torch.Size) -> Iterator[None]:
    """Keeps back its compiler's remark on an argument of its own kernel, where it compiles one."""
    compiled_for = dtype, query[1] // key[1], query[2]
    if compiled_for in _compiled:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Argument aux_data ", category=UserWarning)
        yield
    _compiled.add(compiled_for)


def flash_attention_4(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, keys: Tensor
) -> Tensor:
    """Causal attention of packed queries ``[N, heads, D]``, each sequence's last at its last key.

    ``key`` and ``value`` are ``[rows, KV heads, D]``. ``starts`` and ``key_starts`` ``[B + 1]``
    int32 say where each sequence's queries and keys begin, ``keys`` ``[B]`` int32 how many keys
    count.
    """
    with torch.cuda.device(query.device), _without_remarks(query.dtype, query.shape, key.shape):
        # without bounds on lengths: they would only decide which kernel is compiled
        return load()(
            query,
            key,
            value,
            cu_seqlens_q=starts,
            cu_seqlens_k=key_starts,
            seqused_k=keys,
            causal=True,
        )[0]


@functools.cache
def load() -> Callable | None:
    """The library's function; None where no version that was tried is installed.

    One that is installed and does not load is warned of, once.
    """
    try:
        version = metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return None
    if not is_tried(version):
        return _none(f"flash-attn-4 {version} is not in the extra's range")
    try:
        function = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    except Exception as error:  # also a RuntimeError: a driver too old for its compiler
        return _none(f"flash-attn-4 {version} does not load: {error}")
    return function


def _none(reason: str) -> None:
    message = f"prompts take PyTorch's attention here: {reason}"
    warnings.warn(message, FallbackWarning, stacklevel=3)


def is_tried(version: str) -> bool:
    """Whether ``version`` of flash-attn-4 is in the range that pyproject.toml names."""
    if _VERSION.fullmatch(version) is None:
        return False
    first = re.fullmatch(
        r"4\.0(?:\.0)*(?:(a|b|rc)(\d+))?(?:\.post\d+)?(\.dev\d+)?(?:\+.*)?", version
    )
    if first is None:  # a release after the first
        return True
    stage, number, development = first[1], int(first[2] or 0), first[3]
    if stage is None:
        return development is None
    return stage == "rc" or (stage == "b" and (number > 36 or (number == 36 and not development)))
