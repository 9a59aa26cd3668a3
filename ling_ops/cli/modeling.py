"""From settings to a model on a device."""

from __future__ import annotations

import os
from typing import Any

import torch

from ling_ops.cli.errors import CommandError
from ling_ops.cli.options import TrainOptions, parse_capacity
from ling_ops.models import LingConfig, LingForCausalLM
from ling_ops.models.config import parse_layer_pattern

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Weights, gradients and the two moments of AdamW; bf16 weights have an fp32 master beside them.
TRAINING_BYTES = {torch.float32: 16, torch.bfloat16: 20}
BYTE_VALUES = 256


def pick_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N) means on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}", 2) from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}", code=2)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise CommandError(f"no device {name!r}: this machine has {found} CUDA devices", code=2)
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The parameter dtype that `name` (auto, fp32, bf16) means on `device`."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def new_config(options: TrainOptions) -> LingConfig:
    """The preset with the options' changes. CommandError if they make no valid model."""
    changes: dict[str, Any] = {
        "layer_pattern": options.pattern, "num_layers": options.layers,
        "score_function": options.gate, "num_experts": options.experts,
        "num_experts_per_token": options.experts_per_token,
        "reroute_rounds": options.reroute_rounds, "balance_coefficient": options.balance_loss,
        "sequence_balance_coefficient": options.sequence_loss,
        "z_loss_coefficient": options.z_loss, "bias_update_rate": options.bias_rate,
    }  # fmt: skip
    try:
        if options.pattern is not None:
            counts = parse_layer_pattern(options.pattern)
            changes["first_k_dense_replace"] = 0
            if options.layers is None:
                changes["num_layers"] = sum(counts)
        if options.bias_rate is not None:
            changes["use_expert_bias"] = options.bias_rate > 0
        if options.capacity is not None:
            changes.update(parse_capacity(options.capacity))
        changes = {key: value for key, value in changes.items() if value is not None}
        config = LingConfig.preset(options.preset, **{**changes, **options.model})
    except (TypeError, ValueError) as error:
        raise CommandError(f"no such model: {error}", code=2) from error
    if config.vocab_size < BYTE_VALUES:
        raise CommandError(f"vocab_size must be at least {BYTE_VALUES}: tokens are bytes", code=2)
    return config


def saved_config(state: dict[str, Any]) -> LingConfig:
    """The configuration in a checkpoint's state."""
    try:
        return LingConfig.from_dict(state["model"])
    except (TypeError, ValueError) as error:
        raise CommandError(f"the checkpoint's model is not valid: {error}") from error


def build_model(
    config: LingConfig, device: torch.device, dtype: torch.dtype,
    tensors: dict[str, torch.Tensor] | None = None,
) -> LingForCausalLM:  # fmt: skip
    """A new model, or the one whose state dict `tensors` is."""
    try:
        model = LingForCausalLM(config, device=device, dtype=dtype)
        if tensors is not None:
            model.load_state_dict(tensors)
    except (TypeError, ValueError) as error:
        raise CommandError(f"no such model: {error}", code=2) from error
    except RuntimeError as error:
        if tensors is None or "state_dict" not in str(error):
            raise
        raise CommandError("the checkpoint's tensors do not fit its model's settings") from error
    return model


def check_memory(config: LingConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise CommandError if weights and optimizer state alone exceed the device's memory."""
    count = LingForCausalLM(config, device="meta").count_parameters().total
    need = count * TRAINING_BYTES[dtype]
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if need > have:
        raise CommandError(
            f"training {count / 1e9:,.1f}B parameters takes at least {need / 2**30:,.0f} GiB; "
            f"{device} has {have / 2**30:,.0f} GiB"
        )
