"""Mixture-of-Experts kernels for PyTorch, with a pure-PyTorch reference of every op."""

from __future__ import annotations

from ._version import __version__
from .ops import *  # noqa: F403
from .ops import __all__ as _ops

__all__ = ["__version__", *_ops]
