"""What a model takes: parameters, FLOPs, memory, time and money. Units are in the names."""

from __future__ import annotations

from .article import Claim, article_claims
from .gpu import GPU, CostError, get_gpu, gpus
from .model import Parameters, TokenFlop, flop_per_token, moe_layer_train_ms, parameters
from .plan import (
    Decoding,
    Training,
    decoding_cost,
    kv_cache_bytes,
    least_gpus,
    training_cost,
    training_state_bytes,
    weight_bytes,
)

__all__ = [
    "GPU",
    "Claim",
    "CostError",
    "Decoding",
    "Parameters",
    "TokenFlop",
    "Training",
    "article_claims",
    "decoding_cost",
    "flop_per_token",
    "get_gpu",
    "gpus",
    "kv_cache_bytes",
    "least_gpus",
    "moe_layer_train_ms",
    "parameters",
    "training_cost",
    "training_state_bytes",
    "weight_bytes",
]
