"""Which implementation runs: the one rule, in one place.

CUDA tensor + compiled kernel for this arch, dtype and alignment -> kernel; otherwise the
reference, with one visible warning naming the reason if the tensor was on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .. import _extension

#: Ops with a kernel, and the build fact that lists the architectures it was compiled for.
KERNELS: dict[str, str] = {
    "topk_gate": "archs",
    "route": "archs",
    "reroute": "archs",
    "capacity": "archs",
    "routing_stats": "archs",
    "permute": "archs",
    "unpermute": "archs",
    "grouped_gemm": "gemm_archs",
    "grouped_mm": "gemm_archs",
    "moe_mlp": "gemm_archs",
    "moe_decode": "archs",
    "attention_heads": "archs",
}
_BACKENDS = ("auto", "reference")
_blocks: list[str] = []  # of `use_backend` that are being run, the latest last
_warned: set[tuple[str, str]] = set()


class FallbackWarning(UserWarning):
    """A GPU tensor took the PyTorch reference; the message names the reason."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force `"reference"` (PyTorch, the truth) or `"auto"` (kernels where they run) in a block.

    The choice holds for the whole process, not for one thread. Raises ValueError for other names.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}")
    # Blocks of several threads need not end in the order in which they began.
    _blocks.append(name)
    try:
        yield
    finally:
        del _blocks[len(_blocks) - 1 - _blocks[::-1].index(name)]  # the last one of this name


def chosen() -> str:
    """What the latest block of `use_backend` asks for."""
    return _blocks[-1] if _blocks else "auto"


@cache
def _missing(op: str, device_index: int) -> str | None:
    """Why `op` has no kernel on this GPU, or None if it has one."""
    extension = _extension.load()
    if extension.module is None:
        return extension.reason
    capability = torch.cuda.get_device_capability(device_index)
    return _extension.arch_reason(extension.facts[KERNELS[op]], capability) or None


def _fallback_reason(op: str, device_index: int, unsupported: str | None) -> str | None:
    """None if the kernel runs; otherwise the reason, warned of once. Runs at trace time."""
    reason = _missing(op, device_index) or unsupported
    if reason is not None and (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(
            f"ling_ops.{op} runs as PyTorch operations here: {reason}",
            FallbackWarning,
            stacklevel=4,
        )
    return reason


# What `torch.compiler.assume_constant_result` sets; the decorator itself imports all of the
# compiler, which takes longer than the rest of this package.
_fallback_reason._dynamo_marked_constant = True


def use_kernel(op: str, x: Tensor, unsupported: str | None = None) -> bool:
    """Whether `op` runs its kernel on `x`; `unsupported` is what the kernel can't do, if any."""
    if not x.is_cuda or chosen() == "reference":
        return False
    index = 0 if x.device.index is None else x.device.index
    return _fallback_reason(op, index, unsupported) is None


def _devices() -> list[dict[str, object]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "index": index,
            "name": torch.cuda.get_device_name(index),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]


def _op_state(op: str, devices: list[dict[str, object]]) -> dict[str, str]:
    if chosen() == "reference":
        return {"backend": "reference", "reason": "use_backend('reference') is in force"}
    reason = _extension.load().reason
    if not reason and not devices:
        reason = "PyTorch sees no CUDA device"
    if not reason:
        missing = [_missing(op, device["index"]) for device in devices]
        if None in missing:
            archs = _extension.load().facts[KERNELS[op]]
            return {"backend": "cuda", "reason": f"compiled for {archs}"}
        reason = missing[0]
    return {"backend": "reference", "reason": reason}


def backend_info() -> dict[str, object]:
    """What runs where and why.

    Returns a dict: `version`, `torch`, `cuda` (torch's CUDA version or None), `extension` (facts
    of the compiled binary, and why it is missing if it is), `devices` (CUDA devices: index, name,
    capability) and `ops`: for each op with a kernel, `backend` ("cuda" or "reference") and the
    `reason`. Asks the CUDA driver for its devices, so it may create a CUDA context.
    """
    from .. import __version__

    extension = _extension.load()
    devices = _devices()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "extension": {"loaded": extension.module is not None, "reason": extension.reason}
        | dict(extension.facts),
        "devices": devices,
        "ops": {op: _op_state(op, devices) for op in KERNELS},
    }
