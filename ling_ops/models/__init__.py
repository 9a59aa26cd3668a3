"""The Ling language model on ``ling_ops.nn``."""

from __future__ import annotations

from .cache import KVCache
from .config import LingConfig
from .ling import LingForCausalLM, LingOutput, ParameterCount, next_token_loss
from .presets import PRESETS
from .pruning import expert_importance, prune_experts
from .published import CheckpointError

__all__ = [
    "PRESETS",
    "CheckpointError",
    "KVCache",
    "LingConfig",
    "LingForCausalLM",
    "LingOutput",
    "ParameterCount",
    "expert_importance",
    "next_token_loss",
    "prune_experts",
]
