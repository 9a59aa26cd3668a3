"""Expert parallelism over torch.distributed: each rank holds E/R of every layer's experts."""

from __future__ import annotations

from .collectives import exchange
from .experts import ParallelExperts
from .gradients import average_gradients, clip_gradients
from .layout import (
    expert_mesh,
    expert_parameters,
    gather_tensors,
    is_expert_parallel,
    load_sharded_state_dict,
    parallelize,
    shard_tensors,
    sharded_state_dict,
)

__all__ = [
    "ParallelExperts",
    "average_gradients",
    "clip_gradients",
    "exchange",
    "expert_mesh",
    "expert_parameters",
    "gather_tensors",
    "is_expert_parallel",
    "load_sharded_state_dict",
    "parallelize",
    "shard_tensors",
    "sharded_state_dict",
]
