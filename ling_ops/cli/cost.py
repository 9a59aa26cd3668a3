"""`ling-ops cost`: what a model takes, and what the article's figures come to."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from ling_ops.cli.errors import CommandError

FIGURES = ("bf16_tflops", "fp8_tflops", "memory_gb", "memory_tb_per_s", "power_w")
DEGREES = ("data_parallel", "tensor_parallel", "expert_parallel")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `cost` to the command's subparsers."""
    parser = commands.add_parser("cost", help="what training and serving a model takes")
    parser.add_argument("preset", nargs="?", default="ling-mini-2.0", help="model preset")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=VALUE",
                        help="changed fields of LingConfig")  # fmt: skip
    parser.add_argument("--article", action="store_true", help="check the article's figures")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--layouts", action="store_true",
                        help="memory of every layout of that many GPUs")  # fmt: skip
    parser.add_argument("--only", choices=("training", "serving"), help="default: both")
    _add_gpu(parser)
    _add_training(parser)
    _add_serving(parser)


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("GPUs")
    group.add_argument("--gpu", default="h100", help="a100, h100, h100-measured, h200, b200")
    for figure in FIGURES:
        group.add_argument("--" + figure.replace("_", "-"), type=float, help="of your own GPU")
    group.add_argument("--usd-per-gpu-hour", type=float, default=0.0)
    group.add_argument("--usd-per-kwh", type=float, default=0.0)
    group.add_argument("--gpus", type=int, help="default: the least that hold it")
    group.add_argument("--data-parallel", type=int, help="default: gpus / tensor parallel")
    group.add_argument("--tensor-parallel", type=int, help="default: searched")
    group.add_argument("--expert-parallel", type=int, help="default: searched")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--tokens", type=float, default=1e12, help="tokens to train on")
    group.add_argument("--mfu", type=float, default=0.4, help="share of the peak reached")
    group.add_argument("--dtype", default="bf16", help="bf16, fp16, or fp8 (products alone)")
    group.add_argument("--shard", default="full", help="none, optimizer (ZeRO-1) or full (FSDP2)")
    group.add_argument("--sequence-length", type=int, default=4096)
    group.add_argument("--micro-batch-size", type=int, default=1,
                       help="sequences in a forward of one data-parallel rank")  # fmt: skip
    group.add_argument("--micro-batches", type=int, default=1, help="forwards per step")
    group.add_argument("--activation-checkpointing", action="store_true")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("serving")
    group.add_argument("--batch-size", type=int, default=32, help="sequences served together")
    group.add_argument("--context", type=int, default=4096, help="tokens of a prompt, cached")
    group.add_argument("--serve-dtype", default="bf16", help="of weights: bf16, fp16 or fp8")
    group.add_argument("--kv-dtype", default="bf16", help="of the cache: bf16, fp16 or fp8")


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops cost`; returns the exit status."""
    from ling_ops.cli import cost_tables
    from ling_ops.cost import CostError

    try:
        facts = _article() if arguments.article else collect(arguments)
    except (CostError, TypeError, ValueError) as error:
        raise CommandError(str(error), code=2) from error
    if arguments.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
    else:
        cost_tables.show(facts)
    return 0


def _article() -> dict[str, Any]:
    from ling_ops.cost import article_claims

    return {
        "article": [
            {**dataclasses.asdict(claim), "verdict": claim.verdict} for claim in article_claims()
        ]
    }


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model under one set of assumptions."""
    from ling_ops import cost
    from ling_ops.cli.options import parse_model_fields
    from ling_ops.models import LingConfig

    config = LingConfig.preset(arguments.preset, **parse_model_fields(arguments.model))
    gpu = cost.get_gpu(arguments.gpu, **{name: getattr(arguments, name) for name in FIGURES})
    count = cost.parameters(config)
    flop = cost.flop_per_token(config, arguments.sequence_length, arguments.context)
    facts = {
        "parameters": {**dataclasses.asdict(count), "total": count.total, "active": count.active},
        "flop_per_token": dataclasses.asdict(flop),
        "memory_by_dtype": _by_dtype(arguments, config),
        "gpu": dataclasses.asdict(gpu),
    }
    if arguments.only != "serving":
        facts |= _training(arguments, config, gpu)
    if arguments.only != "training":
        facts |= _serving(arguments, config, gpu)
    return facts


def _by_dtype(arguments: argparse.Namespace, config: Any) -> list[dict[str, Any]]:
    """Whole weights, training states, activations of a forward, and KV cache, on no layout."""
    from ling_ops import cost

    rows = []
    cached = arguments.batch_size * arguments.context
    for dtype in ("fp32", "bf16", "fp8"):
        row = {"dtype": dtype, "weight_gb": cost.weight_bytes(config, dtype) / 1e9,
               "kv_cache_gb": cost.kv_cache_bytes(config, cached, dtype) / 1e9}  # fmt: skip
        if dtype != "fp8":
            kept = cost.activation_bytes(
                config, arguments.micro_batch_size, arguments.sequence_length, dtype=dtype,
                activation_checkpointing=arguments.activation_checkpointing,
            )  # fmt: skip
            row["training_states_gb"] = cost.training_state_bytes(config, dtype) / 1e9
            row["activation_gb"] = kept.total_bytes / 1e9
        rows.append(row)
    return rows


def _layout_rows(config: Any, chosen: Any, gpu: Any, memory: Any) -> list[dict[str, Any]]:
    """Every layout of as many GPUs, with `memory(layout)` on each GPU."""
    from ling_ops import cost

    rows = []
    for layout in cost.layouts_over(config, chosen.gpus, shard=chosen.shard):
        peak = memory(layout).peak_bytes
        rows.append({"data": layout.data, "tensor": layout.tensor, "expert": layout.expert,
                     "peak_gb": peak / 1e9, "fits": peak <= gpu.memory_bytes})  # fmt: skip
    return rows


def _degrees(arguments: argparse.Namespace) -> dict[str, int | None]:
    """The number of GPUs and the degrees that were asked for; None is searched."""
    from ling_ops.cost.gpu import CostError, need_integer

    for name in (*DEGREES, "gpus"):
        if getattr(arguments, name) is not None:
            need_integer(name, getattr(arguments, name))
    gpus, tensor, data = arguments.gpus, arguments.tensor_parallel, arguments.data_parallel
    if data is not None:
        product = data * (tensor or 1)
        if gpus not in (None, product):
            raise CostError(f"gpus: got {gpus}, need data_parallel x tensor_parallel = {product}")
        gpus, tensor = product, tensor or 1
    return {"gpus": gpus, "tensor_parallel": tensor, "expert_parallel": arguments.expert_parallel}


def _training(arguments: argparse.Namespace, config: Any, gpu: Any) -> dict[str, Any]:
    from ling_ops import cost

    step = {
        "batch_size": arguments.micro_batch_size, "sequence_length": arguments.sequence_length,
        "dtype": arguments.dtype, "micro_batches": arguments.micro_batches,
        "activation_checkpointing": arguments.activation_checkpointing,
    }  # fmt: skip
    held = {**step, "dtype": "bf16"} if arguments.dtype == "fp8" else step
    layout = cost.training_layout(config, gpu, shard=arguments.shard, **_degrees(arguments), **held)
    memory = cost.training_memory(config, layout=layout, **held)
    training = cost.training_cost(
        config, arguments.tokens, gpu, layout=layout, mfu=arguments.mfu, **step,
        usd_per_gpu_hour=arguments.usd_per_gpu_hour, usd_per_kwh=arguments.usd_per_kwh,
    )  # fmt: skip
    rows = {}
    if arguments.layouts:
        rows["training_layouts"] = _layout_rows(
            config, layout, gpu, lambda other: cost.training_memory(config, layout=other, **held)
        )
    return {
        **rows,
        "training_layout": {"gpus": layout.gpus, **dataclasses.asdict(layout)},
        "training_memory_per_gpu": _gigabytes(memory),
        "training": {**dataclasses.asdict(training), "days": training.seconds / 86400},
    }


def _serving(arguments: argparse.Namespace, config: Any, gpu: Any) -> dict[str, Any]:
    from ling_ops import cost

    load = cost.Load(
        arguments.batch_size, arguments.context, arguments.serve_dtype, arguments.kv_dtype
    )
    layout = cost.serving_layout(config, gpu, load, **_degrees(arguments))
    price = {"layout": layout, "usd_per_gpu_hour": arguments.usd_per_gpu_hour}
    prefill = cost.prefill_cost(config, gpu, load, **price)
    decoding = cost.decoding_cost(config, gpu, load, **price)
    degrees = {name: getattr(layout, name) for name in ("data", "tensor", "expert")}
    rows = {}
    if arguments.layouts:
        rows["serving_layouts"] = _layout_rows(
            config, layout, gpu, lambda other: cost.serving_memory(config, load, layout=other)
        )
    return {
        **rows,
        "serving_layout": {"gpus": layout.gpus, **degrees},
        "serving_memory_per_gpu": _gigabytes(cost.serving_memory(config, load, layout=layout)),
        "prefill_floor": dataclasses.asdict(prefill),
        "decoding_floor": dataclasses.asdict(decoding),
    }


def _gigabytes(memory: Any) -> dict[str, float]:
    """Fields of bytes, and the peak, in 10^9 bytes."""
    sizes = {**dataclasses.asdict(memory), "peak_bytes": memory.peak_bytes}
    return {name.removesuffix("_bytes") + "_gb": size / 1e9 for name, size in sizes.items()}
