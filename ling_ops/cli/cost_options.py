"""The flags of `ling-ops cost`."""

from __future__ import annotations

import argparse
from typing import Any

FIGURES = {
    "bf16_tflops": "dense bf16 rate in TFLOP/s",
    "fp8_tflops": "dense fp8 rate in TFLOP/s",
    "memory_gb": "memory in 10^9 bytes",
    "memory_tb_per_s": "memory bandwidth in TB/s",
    "power_w": "power in watts at full load",
}
DEGREES = {
    "data_parallel": "replicas (default: GPUs / tensor parallel)",
    "tensor_parallel": "GPUs that share each product (default: searched, 1 to 8)",
    "expert_parallel": "replicas that share a layer's experts (default: searched)",
}
PRICES = {
    "usd_per_gpu_hour": "rent of one GPU; without it no money is computed",
    "usd_per_kwh": "price of electricity in training, where the rent leaves it out",
}
#: name: (default, help).
TRAINING: dict[str, tuple[Any, str]] = {
    "tokens": (1e12, "tokens to train on"),
    "mfu": (0.4, "model FLOP utilisation: share of the GPU's peak reached, at most 1"),
    "dtype": ("bf16", "bf16, fp16, or fp8 (products alone)"),
    "shard": ("full", "what replicas divide: none, optimizer (ZeRO-1) or full (FSDP2)"),
    "sequence_length": (4096, "tokens of a sequence"),
    "micro_batch_size": (1, "sequences in a forward of one data-parallel rank"),
    "micro_batches": (1, "forwards per optimizer step"),
    "activation_checkpointing": (False, "keep each layer's input alone, compute the layer again"),
}
SERVING: dict[str, tuple[Any, str]] = {
    "batch_size": (32, "sequences served together, on all GPUs"),
    "context": (4096, "tokens of a prompt, cached"),
    "serve_dtype": ("bf16", "of weights and products: bf16, fp16 or fp8"),
    "kv_dtype": ("bf16", "of the cache: fp32, bf16, fp16 or fp8"),
}
DESCRIPTION = (
    "Parameters, FLOP per token, memory by dtype and layout, the least number of GPUs, training "
    "time and money, and floors of serving, for a preset or a config. Arithmetic on stated "
    "assumptions: no communication, perfect balance. GB are 10^9 bytes. Formulas: docs/cost.md."
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `cost` to the command's subparsers."""
    parser = commands.add_parser(
        "cost", help="what training and serving a model takes", description=DESCRIPTION
    )
    add = parser.add_argument
    add("preset", nargs="?", default="ling-mini-2.0",
        help="preset, a checkpoint's folder, or a JSON file: config.json or the fields of "
        "LingConfig (default: %(default)s)")  # fmt: skip
    add("--model", nargs="+", default=[], metavar="NAME=VALUE",
        help="changed fields of LingConfig, such as num_layers=24")  # fmt: skip
    add("--article", action="store_true",
        help="the article's tables, computed from their own inputs, and nothing else")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    add("--layouts", action="store_true", help="also the memory of every layout of so many GPUs")
    add("--only", choices=("training", "serving"), help="default: both")
    _add_gpus(parser.add_argument_group("GPUs"))
    _add_settings(parser.add_argument_group("training"), TRAINING)
    _add_settings(parser.add_argument_group("serving"), SERVING)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_gpus(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gpu", default="h100", metavar="NAME",
                       help="a100, h100, h100-measured, h200 or b200 (default: h100)")  # fmt: skip
    for name, what in FIGURES.items():
        group.add_argument(_flag(name), type=float, metavar="X", help=f"{what}, of your own GPU")
    for name, what in PRICES.items():
        group.add_argument(_flag(name), type=float, metavar="X", help=what)
    group.add_argument("--gpus", type=int, metavar="N",
                       help="GPUs of training, and of serving (default: the fewest)")  # fmt: skip
    for name, what in DEGREES.items():
        group.add_argument(_flag(name), type=int, metavar="N", help=what)


def _add_settings(group: argparse._ArgumentGroup, settings: dict[str, tuple[Any, str]]) -> None:
    for name, (default, what) in settings.items():
        if default is False:
            group.add_argument(_flag(name), action="store_true", help=what)
            continue
        kind = type(default)
        shown = f"{default:g}" if kind is float else default
        group.add_argument(
            _flag(name), type=kind, default=default, help=f"{what} (default: {shown})",
            metavar={int: "N", float: "X", str: "NAME"}[kind],
        )  # fmt: skip
