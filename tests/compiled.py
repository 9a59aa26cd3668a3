"""Whether this machine runs an operator as a kernel."""

from __future__ import annotations

import pytest

import ling_ops

#: Reasons that are no fault: nothing was built for this machine, or the binary is switched off.
NO_FAULT = (
    "no compiled kernels:",
    "switched off by",
    "the kernels were compiled for",
    "PyTorch sees no CUDA device",
)


def needs(op: str) -> None:
    """Skip the test where no kernel was built for this GPU.

    Without a kernel for another reason it fails: a binary of another Python, or a backend that an
    earlier test has left chosen, would otherwise hide every test of the kernels.
    """
    state = ling_ops.backend_info()["ops"][op]
    if state["backend"] == "cuda":
        return
    reason = f"{op} has no kernel here: {state['reason']}"
    if not state["reason"].startswith(NO_FAULT):
        pytest.fail(reason)
    pytest.skip(reason)
