"""Memory of weights, states and KV cache; time and money of training; the floor of decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ling_ops.models import LingConfig

from .gpu import GPU, CostError, need
from .model import experts_read, flop_per_token, parameters

#: Bytes per parameter of `ling-ops train`: weight, gradient and two moments; bf16 has an fp32
#: master beside it, and an fp32 gradient while the optimizer steps.
STATE_BYTES = {"fp32": 16, "bf16": 20}
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}


def weight_bytes(config: LingConfig, dtype: str = "bf16") -> int:
    """Bytes of all weights."""
    return parameters(config).total * WEIGHT_BYTES[dtype]


def training_state_bytes(config: LingConfig, dtype: str = "bf16") -> int:
    """Bytes of weights, gradients and optimizer on one copy; activations come on top."""
    return parameters(config).total * STATE_BYTES[dtype]


def kv_cache_bytes(config: LingConfig, tokens: int, dtype: str = "bf16") -> int:
    """Bytes of keys and values of `tokens` cached tokens in all layers."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * tokens * WEIGHT_BYTES[dtype]


def least_gpus(size_bytes: float, gpu: GPU) -> int:
    """The fewest GPUs whose memory together holds so many bytes, evenly divided."""
    return max(1, math.ceil(size_bytes / gpu.memory_bytes))


@dataclass(frozen=True)
class Training:
    """What one run takes."""

    seconds: float
    gpu_hours: float
    energy_kwh: float
    gpu_usd: float
    energy_usd: float


def training_cost(
    config: LingConfig, tokens: float, gpu: GPU, *, num_gpus: int, mfu: float,
    sequence_length: int = 4096, usd_per_gpu_hour: float = 0.0, usd_per_kwh: float = 0.0,
) -> Training:  # fmt: skip
    """Time, energy and money of training on `tokens` at a model FLOP utilisation of `mfu`.

    Power is the GPUs' own, at full load. Raises CostError for input without sense, and where the
    states alone do not fit the GPUs.
    """
    need("tokens", tokens)
    need("gpus", num_gpus)
    need("sequence_length", sequence_length)
    need("usd_per_gpu_hour", usd_per_gpu_hour, above=False)
    need("usd_per_kwh", usd_per_kwh, above=False)
    if need("mfu", mfu) > 1:
        raise CostError(f"mfu: got {mfu}, need a number above 0 and at most 1")
    least = least_gpus(training_state_bytes(config), gpu)
    if num_gpus < least:
        raise CostError(
            f"gpus: got {num_gpus}, need at least {least}: weights, gradients and optimizer take "
            f"{training_state_bytes(config) / 1e9:,.0f} GB"
        )
    flop = tokens * flop_per_token(config, sequence_length, sequence_length).train_flop
    seconds = flop / (num_gpus * gpu.flop_per_s * mfu)
    hours = seconds * num_gpus / 3600
    energy = hours * gpu.power_w / 1e3
    return Training(seconds, hours, energy, hours * usd_per_gpu_hour, energy * usd_per_kwh)


@dataclass(frozen=True)
class Decoding:
    """The floor of one decoding step: no launch, no communication, perfect division."""

    step_ms: float
    tokens_per_s: float
    usd_per_million_tokens: float


def decoding_cost(
    config: LingConfig, gpu: GPU, *, num_gpus: int, batch_size: int, context: int,
    usd_per_gpu_hour: float = 0.0,
) -> Decoding:  # fmt: skip
    """Roofline of decoding in bf16: each step streams the weights that it visits and the cache.

    Experts visited: E (1 - (1 - K/E)^B) per layer, routing uniform. Raises CostError for input
    without sense, and where weights and cache do not fit the GPUs.
    """
    for name, value in (("gpus", num_gpus), ("batch_size", batch_size), ("context", context)):
        need(name, value)
    need("usd_per_gpu_hour", usd_per_gpu_hour, above=False)
    cache = kv_cache_bytes(config, batch_size * context)
    size = weight_bytes(config) + cache
    if num_gpus < (least := least_gpus(size, gpu)):
        raise CostError(
            f"gpus: got {num_gpus}, need at least {least}: weights and KV cache take "
            f"{size / 1e9:,.0f} GB"
        )
    count = parameters(config)
    experts = count.routed_experts * experts_read(config, batch_size) / config.num_experts
    streamed = 2 * (count.total - count.embedding - count.routed_experts + experts) + cache
    flop = batch_size * flop_per_token(config, context, context).decode_flop
    seconds = max(streamed / gpu.bytes_per_s, flop / gpu.flop_per_s) / num_gpus
    rate = batch_size / seconds
    return Decoding(1e3 * seconds, rate, num_gpus * usd_per_gpu_hour / 3600 / rate * 1e6)
