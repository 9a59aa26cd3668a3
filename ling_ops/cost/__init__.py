"""What a model takes: parameters, FLOPs, memory, time and money. Units are in the names."""

from __future__ import annotations

from .activations import Activations, activation_bytes
from .article import Claim, article_claims
from .gpu import GPU, CostError, FitError, get_gpu, gpus
from .layout import Layout
from .memory import TrainingMemory, training_memory
from .model import Parameters, TokenFlop, flop_per_token, moe_layer_train_ms, parameters
from .search import layouts_over
from .serving import (
    Load,
    Serving,
    ServingMemory,
    decoding_cost,
    kv_cache_bytes,
    prefill_cost,
    serving_layout,
    serving_memory,
    weight_bytes,
)
from .training import Training, training_cost, training_layout, training_state_bytes

__all__ = [
    "GPU",
    "Activations",
    "Claim",
    "CostError",
    "FitError",
    "Layout",
    "Load",
    "Parameters",
    "Serving",
    "ServingMemory",
    "TokenFlop",
    "Training",
    "TrainingMemory",
    "activation_bytes",
    "article_claims",
    "decoding_cost",
    "flop_per_token",
    "get_gpu",
    "gpus",
    "kv_cache_bytes",
    "layouts_over",
    "moe_layer_train_ms",
    "parameters",
    "prefill_cost",
    "serving_layout",
    "serving_memory",
    "training_cost",
    "training_layout",
    "training_memory",
    "training_state_bytes",
    "weight_bytes",
]
