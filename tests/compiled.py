"""Whether this machine runs an operator as a kernel."""

from __future__ import annotations

import pytest

import ling_ops


def needs(op: str) -> None:
    """Skip the test where the binary has no kernel for this GPU."""
    state = ling_ops.backend_info()["ops"][op]
    if state["backend"] != "cuda":
        pytest.skip(f"{op} has no kernel here: {state['reason']}")
