"""The Ling language model on ``ling_ops.nn``."""

from __future__ import annotations

from .cache import KVCache
from .config import LingConfig
from .ling import LingForCausalLM, LingOutput, ParameterCount, next_token_loss
from .presets import PRESETS

__all__ = [
    "PRESETS",
    "KVCache",
    "LingConfig",
    "LingForCausalLM",
    "LingOutput",
    "ParameterCount",
    "next_token_loss",
]
