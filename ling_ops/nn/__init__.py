"""Modules of a Mixture-of-Experts layer: router, experts, and the two joined."""

from __future__ import annotations

from ling_ops.ops import CapacityPolicy

from .balancing import (
    accumulate_expert_counts,
    moe_modules,
    router_losses,
    set_router_loss_scale,
    update_expert_biases,
)
from .experts import Experts
from .lora import add_lora, merge_lora, remove_lora, unmerge_lora
from .lora_files import load_lora, save_lora
from .mlp import MLP
from .moe import MoE
from .norm import RMSNorm
from .router import Router, RouterOutput

__all__ = [
    "MLP",
    "CapacityPolicy",
    "Experts",
    "MoE",
    "RMSNorm",
    "Router",
    "RouterOutput",
    "accumulate_expert_counts",
    "add_lora",
    "load_lora",
    "merge_lora",
    "moe_modules",
    "remove_lora",
    "router_losses",
    "save_lora",
    "set_router_loss_scale",
    "unmerge_lora",
    "update_expert_biases",
]
