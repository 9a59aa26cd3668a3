"""`ling-ops cost`: what a model takes, and what the article's figures come to."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ling_ops.cli.cost_options import (
    EITHER_WAY,
    FIGURES,
    PRICES,
    SERVING,
    TRAINING,
    add_parser,
    with_defaults,
)
from ling_ops.cli.errors import CommandError

__all__ = ["add_parser", "collect", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops cost`; returns the exit status."""
    from ling_ops.cli import cost_tables
    from ling_ops.cost import CostError

    try:
        facts = _article(arguments) if arguments.article else collect(arguments)
    except (CostError, TypeError, ValueError) as error:
        raise CommandError(str(error), code=2) from error
    if arguments.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
    else:
        cost_tables.show(facts)
    return 0


def _article(arguments: argparse.Namespace) -> dict[str, Any]:
    from ling_ops.cli.cost_checks import check_article
    from ling_ops.cost import article_claims

    check_article(arguments)
    return {
        "article": [
            {**dataclasses.asdict(claim), "verdict": claim.verdict} for claim in article_claims()
        ]
    }


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model under one set of assumptions."""
    from ling_ops import cost
    from ling_ops.cli.cost_checks import check_values, half

    arguments = with_defaults(arguments)
    check_values(arguments)
    config = _config(arguments.preset, arguments.model)
    gpu = cost.get_gpu(arguments.gpu, **{name: getattr(arguments, name) for name in FIGURES})
    count = cost.parameters(config)
    flop = cost.flop_per_token(config, arguments.sequence_length, arguments.context)
    facts = {
        "assumptions": _assumptions(arguments),
        "parameters": {**dataclasses.asdict(count), "total": count.total, "active": count.active},
        "flop_per_token": dataclasses.asdict(flop),
        "memory_by_dtype": _by_dtype(arguments, config),
        "gpu": dataclasses.asdict(gpu),
    }
    if arguments.only != "serving":
        with half("training", arguments.only):
            facts |= _training(arguments, config, gpu)
    if arguments.only != "training":
        with half("serving", arguments.only):
            facts |= _serving(arguments, config, gpu)
    return facts


def _assumptions(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that some figure of these halves takes."""
    halves = {"serving": (*TRAINING, "usd_per_kwh"), "training": SERVING}
    left_out = set(halves.get(arguments.only, ())).difference(EITHER_WAY)
    names = [name for name in (*TRAINING, *SERVING, *PRICES) if name not in left_out]
    return {"model": arguments.preset, **{name: getattr(arguments, name) for name in names}}


def _config(name: str, changes: list[str]) -> Any:
    """The configuration of a preset, of a checkpoint's folder or of a JSON file."""
    from ling_ops.cli.options import parse_model_fields
    from ling_ops.models import PRESETS, LingConfig
    from ling_ops.models.published import CONFIG, read_config, read_json

    fields, path = parse_model_fields(changes), Path(name)
    if name in PRESETS:
        return LingConfig.preset(name, **fields)
    if not path.exists():
        known = ", ".join(PRESETS)
        raise ValueError(
            f"preset: got {name!r}, need one of {known}, or a folder or file that exists"
        )
    values = read_json(path / CONFIG if path.is_dir() else path)
    own = {"num_layers", "num_experts"} <= set(values)
    try:
        config = LingConfig.from_dict(values) if own else read_config(values)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return LingConfig.from_dict({**config.to_dict(), **fields})


def _by_dtype(arguments: argparse.Namespace, config: Any) -> list[dict[str, Any]]:
    """Whole weights, training states, activations of a forward, and KV cache, on no layout."""
    from ling_ops import cost

    rows = []
    load = cost.Load(arguments.batch_size, arguments.context)
    cached = load.batch_size * load.context
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


def _training(arguments: argparse.Namespace, config: Any, gpu: Any) -> dict[str, Any]:
    from ling_ops import cost
    from ling_ops.cli.cost_checks import degrees

    step = {
        "batch_size": arguments.micro_batch_size, "sequence_length": arguments.sequence_length,
        "dtype": arguments.dtype, "micro_batches": arguments.micro_batches,
        "activation_checkpointing": arguments.activation_checkpointing,
    }  # fmt: skip
    gpu.rate_flop_per_s(arguments.dtype)  # before anything takes it for a dtype of memory
    held = {**step, "dtype": "bf16"} if arguments.dtype == "fp8" else step
    layout = cost.training_layout(config, gpu, shard=arguments.shard, **degrees(arguments), **held)
    memory = cost.training_memory(config, layout=layout, **held)
    training = cost.training_cost(
        config, arguments.tokens, gpu, layout=layout, mfu=arguments.mfu, **step,
        **_prices(arguments, tuple(PRICES)),
    )  # fmt: skip
    money = {"usd_per_gpu_hour": "gpu_usd", "usd_per_kwh": "energy_usd"}
    rows = {}
    if arguments.layouts:
        rows["training_layouts"] = _layout_rows(
            config, layout, gpu, lambda other: cost.training_memory(config, layout=other, **held)
        )
    return {
        **rows,
        "training_layout": {"gpus": layout.gpus, **dataclasses.asdict(layout)},
        "training_memory_per_gpu": _gigabytes(memory),
        "training": {
            **dataclasses.asdict(training),
            "days": training.seconds / 86400,
            **_without_price(arguments, money),
        },
    }


def _serving(arguments: argparse.Namespace, config: Any, gpu: Any) -> dict[str, Any]:
    from ling_ops import cost
    from ling_ops.cli.cost_checks import degrees

    load = cost.Load(
        arguments.batch_size, arguments.context, arguments.serve_dtype, arguments.kv_dtype
    )
    layout = cost.serving_layout(config, gpu, load, **degrees(arguments))
    price = {"layout": layout, **_prices(arguments, ("usd_per_gpu_hour",))}
    money = _without_price(arguments, {"usd_per_gpu_hour": "usd_per_million_tokens"})
    prefill = cost.prefill_cost(config, gpu, load, **price)
    decoding = cost.decoding_cost(config, gpu, load, **price)
    divided = {name: getattr(layout, name) for name in ("data", "tensor", "expert")}
    idle = max(0, layout.data - load.batch_size)
    rows = {}
    if arguments.layouts:
        rows["serving_layouts"] = _layout_rows(
            config, layout, gpu, lambda other: cost.serving_memory(config, load, layout=other)
        )
    return {
        **rows,
        "serving_layout": {"gpus": layout.gpus, **divided, "replicas_without_sequence": idle},
        "serving_memory_per_gpu": _gigabytes(cost.serving_memory(config, load, layout=layout)),
        "prefill_floor": {**dataclasses.asdict(prefill), **money},
        "decoding_floor": {**dataclasses.asdict(decoding), **money},
    }


def _prices(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, float]:
    """The prices that were stated."""
    stated = {name: getattr(arguments, name) for name in names}
    return {name: price for name, price in stated.items() if price is not None}


def _without_price(arguments: argparse.Namespace, money: dict[str, str]) -> dict[str, None]:
    """None for every sum of `money` (price -> sum) whose price was not stated."""
    return {total: None for price, total in money.items() if getattr(arguments, price) is None}


def _gigabytes(memory: Any) -> dict[str, float]:
    """Fields of bytes, and the peak, in 10^9 bytes."""
    sizes = {**dataclasses.asdict(memory), "peak_bytes": memory.peak_bytes}
    return {name.removesuffix("_bytes") + "_gb": size / 1e9 for name, size in sizes.items()}
