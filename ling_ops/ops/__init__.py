"""The public functions: argument checks, choice of kernel or reference, gradients."""

from __future__ import annotations

from ._backend import FallbackWarning, backend_info, use_backend
from ._decode import batch_invariant
from .capacity import CapacityPolicy
from .gate import topk_gate
from .gemm import grouped_gemm, grouped_mm
from .losses import (
    inject_loss,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
    update_expert_bias,
)
from .moe_mlp import fused_experts, moe_mlp
from .permute import permute, unpermute
from .route import Routing, reroute, route
from .stats import routing_stats

__all__ = [
    "CapacityPolicy",
    "FallbackWarning",
    "Routing",
    "backend_info",
    "batch_invariant",
    "fused_experts",
    "grouped_gemm",
    "grouped_mm",
    "inject_loss",
    "load_balancing_loss",
    "moe_mlp",
    "permute",
    "reroute",
    "route",
    "router_z_loss",
    "routing_stats",
    "sequence_balancing_loss",
    "topk_gate",
    "unpermute",
    "update_expert_bias",
    "use_backend",
]
