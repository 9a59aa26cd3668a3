"""The kernel that reads the cache in a pass over prompts.

FlashAttention 4, of the extra ``attention``, where it runs and pays; elsewhere PyTorch's own. The
choice is a function of shapes, GPU and installation: nothing is timed, and no length is compiled
for, only each dtype, head size and number of queries per key.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Callable
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
_TESTED = re.compile(r"4\.0\.\d+(b(3[6-9]|[4-9]\d|\d{3,}))?")


def runs_flash_attention_4(query: Tensor, sequences: int) -> bool:
    """Whether `flash_attention_4` takes a pass with ``query`` ``[N, heads, D]`` of ``sequences``.

    Never in `ling_ops.batch_invariant()`: other tokens would decide which kernel a token takes.
    """
    if not pays(query.shape[0], sequences) or is_batch_invariant():
        return False
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) != _HOPPER:
        return False
    return load() is not None


def pays(tokens: int, sequences: int) -> bool:
    """Whether a pass is of a size for which FlashAttention 4 is started."""
    return tokens >= FEWEST_TOKENS and sequences <= MOST_SEQUENCES


def flash_attention_4(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, keys: Tensor
) -> Tensor:
    """Causal attention of packed queries ``[N, heads, D]``, each sequence's last at its last key.

    ``key`` and ``value`` are ``[rows, KV heads, D]``. ``starts`` and ``key_starts`` ``[B + 1]``
    int32 say where each sequence's queries and keys begin, ``keys`` ``[B]`` int32 how many keys
    count.
    """
    with torch.cuda.device(query.device):
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
        return None
    try:
        function = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    except Exception as error:  # also a RuntimeError: a driver too old for its compiler
        reason = f"flash-attn-4 {version} does not load: {error}"
        warnings.warn(
            f"prompts take PyTorch's attention here: {reason}", FallbackWarning, stacklevel=2
        )
        return None
    # its compiler's remark on an argument of its own kernel
    warnings.filterwarnings("ignore", message="Argument aux_data ", category=UserWarning)
    return function


def is_tried(version: str) -> bool:
    """Whether ``version`` of flash-attn-4 is in the range that pyproject.toml names."""
    return _TESTED.fullmatch(version) is not None
