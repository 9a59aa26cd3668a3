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
#: Of these halves what FLOP per token and memory by dtype take, whichever half is left out.
EITHER_WAY = ("sequence_length", "micro_batch_size", "activation_checkpointing", "batch_size",
              "context")  # fmt: skip
#: Defaults live here and not in the parser: None then means that a flag was not stated.
PRESET, GPU = "ling-mini-2.0", "h100"
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
    add("preset", nargs="?",
        help="preset, a checkpoint's folder, or a JSON file: config.json or the fields of "
        f"LingConfig (default: {PRESET})")  # fmt: skip
    add("--model", nargs="+", default=[], metavar="NAME=VALUE",
        help="changed fields of LingConfig, such as num_layers=24")  # fmt: skip
    add("--article", action="store_true",
        help="the article's tables, from their own inputs; beside it --json alone")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    add("--layouts", action="store_true", help="also the memory of every layout of so many GPUs")
    add("--only", choices=("training", "serving"), help="default: both")
    _add_gpus(parser.add_argument_group("GPUs"))
    _add_settings(parser.add_argument_group("training"), TRAINING)
    _add_settings(parser.add_argument_group("serving"), SERVING)


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def stated(arguments: argparse.Namespace) -> list[str]:
    """The settings that the command line gives; every other is None, False or empty."""
    names = ("preset", "model", "layouts", "only", "gpu", "gpus",
             *FIGURES, *PRICES, *DEGREES, *TRAINING, *SERVING)  # fmt: skip
    values = {name: getattr(arguments, name) for name in names}
    return [name for name, v in values.items() if not (v is None or v is False or v == [])]


def with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the defaults of what was not stated."""
    defaults = {name: default for name, (default, _) in (TRAINING | SERVING).items()}
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return argparse.Namespace(
        **{**vars(arguments), "preset": PRESET, "gpu": GPU, **defaults, **given}
    )


def _add_gpus(group: argparse._ArgumentGroup) -> None:
    known = f"a100, h100, h100-measured, h200 or b200 (default: {GPU})"
    group.add_argument("--gpu", metavar="NAME", help=known)
    for name, what in FIGURES.items():
        group.add_argument(flag(name), type=float, metavar="X", help=f"{what}, of your own GPU")
    for name, what in PRICES.items():
        group.add_argument(flag(name), type=float, metavar="X", help=what)
    group.add_argument("--gpus", type=int, metavar="N",
                       help="GPUs of training, and of serving (default: the fewest)")  # fmt: skip
    for name, what in DEGREES.items():
        group.add_argument(flag(name), type=int, metavar="N", help=what)


def _add_settings(group: argparse._ArgumentGroup, settings: dict[str, tuple[Any, str]]) -> None:
    for name, (default, what) in settings.items():
        if default is False:
            group.add_argument(flag(name), action="store_true", help=what)
            continue
        kind = type(default)
        shown = f"{default:g}" if kind is float else default
        group.add_argument(
            flag(name), type=kind, help=f"{what} (default: {shown})",
            metavar={int: "N", float: "X", str: "NAME"}[kind],
        )  # fmt: skip
