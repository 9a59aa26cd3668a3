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
    "moe_modules",
    "router_losses",
    "set_router_loss_scale",
    "update_expert_biases",
]
