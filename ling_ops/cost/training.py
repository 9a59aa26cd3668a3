"""Training: the least number of GPUs, time, energy and money."""

from __future__ import annotations

from dataclasses import dataclass

from ling_ops.models import LingConfig

from .gpu import GPU, CostError, need, need_integer, need_share
from .layout import Layout
from .memory import training_memory
from .model import flop_per_token, parameters
from .search import layout_of, least_layout

#: Bytes per parameter of `ling-ops train`: weight, gradient and two moments; 16-bit weights have
#: an fp32 master beside them, and an fp32 gradient while the optimizer steps.
STATE_BYTES = {"fp32": 16, "bf16": 20, "fp16": 20}


def training_state_bytes(config: LingConfig, dtype: str = "bf16") -> int:
    """Bytes of weights, gradients and optimizer on one copy; activations come on top."""
    if dtype not in STATE_BYTES:
        raise CostError(f"dtype: got {dtype!r}, need one of {', '.join(STATE_BYTES)}")
    return parameters(config).total * STATE_BYTES[dtype]


def training_layout(
    config: LingConfig,
    gpu: GPU,
    *,
    gpus: int | None = None,
    tensor_parallel: int | None = None,
    expert_parallel: int | None = None,
    shard: str = "full",
    **step,
) -> Layout:
    """The layout of the fewest GPUs (or of exactly `gpus`) that hold a training step.

    `step` are the arguments of `training_memory`: batch_size and sequence_length (1 and 4096 if not
    given), dtype, activation_checkpointing, micro_batches. Raises CostError where nothing fits.
    """
    step = {"batch_size": 1, "sequence_length": 4096, **step}

    def peak_bytes(layout: Layout) -> int:
        return training_memory(config, layout=layout, **step).peak_bytes

    degrees = {"tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel}
    if gpus is None:
        return least_layout(config, peak_bytes, gpu, shard=shard, **degrees)
    return layout_of(config, gpus, peak_bytes, gpu, shard=shard, **degrees)


@dataclass(frozen=True)
class Training:
    """What one run takes."""

    seconds: float
    gpu_hours: float
    energy_kwh: float
    gpu_usd: float
    energy_usd: float
    tokens_per_s: float


def training_cost(
    config: LingConfig,
    tokens: float,
    gpu: GPU,
    *,
    layout: Layout,
    mfu: float,
    batch_size: int = 1,
    sequence_length: int = 4096,
    dtype: str = "bf16",
    activation_checkpointing: bool = False,
    micro_batches: int = 1,
    usd_per_gpu_hour: float = 0.0,
    usd_per_kwh: float = 0.0,
) -> Training:
    """Time, energy and money of training on `tokens` at a model FLOP utilisation of `mfu`.

    The utilisation is of the GPU's peak in `dtype`: with "fp8" products run in fp8 beside bf16
    weights, gradients and fp32 states. What a checkpointed layer computes again is no model FLOP.
    Power is the GPUs' own, at full load. Raises CostError for input without sense, and where a
    step does not fit the GPUs.
    """
    need("tokens", tokens)
    need("usd_per_gpu_hour", usd_per_gpu_hour, above=False)
    need("usd_per_kwh", usd_per_kwh, above=False)
    need_share("mfu", mfu)
    need_integer("sequence_length", sequence_length)
    rate = gpu.rate_flop_per_s(dtype)
    memory = training_memory(
        config, batch_size, sequence_length, dtype="bf16" if dtype == "fp8" else dtype,
        activation_checkpointing=activation_checkpointing, micro_batches=micro_batches,
        layout=layout,
    )  # fmt: skip
    if memory.peak_bytes > gpu.memory_bytes:
        raise CostError(
            f"layout: got {layout.gpus} GPUs with {memory.peak_bytes / 1e9:,.1f} GB on each, need "
            f"at most the {gpu.memory_gb:g} GB of {gpu.name}"
        )
    flop = tokens * flop_per_token(config, sequence_length, sequence_length).train_flop
    seconds = flop / (layout.gpus * rate * mfu)
    hours = seconds * layout.gpus / 3600
    energy = hours * gpu.power_w / 1e3
    return Training(seconds, hours, energy, hours * usd_per_gpu_hour, energy * usd_per_kwh,
                    tokens / seconds)  # fmt: skip
