"""`ling-ops cost`: what a model takes, and what the article's figures come to."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from ling_ops.cli.errors import CommandError

FIGURES = ("bf16_tflops", "memory_gb", "memory_tb_per_s", "power_w")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `cost` to the command's subparsers."""
    parser = commands.add_parser("cost", help="what training and serving a model takes")
    parser.add_argument("preset", nargs="?", default="ling-mini-2.0", help="model preset")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=VALUE",
                        help="changed fields of LingConfig")  # fmt: skip
    parser.add_argument("--article", action="store_true", help="check the article's figures")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--gpu", default="h100", help="a100, h100, h100-measured, h200, b200")
    for figure in FIGURES:
        parser.add_argument("--" + figure.replace("_", "-"), type=float, help="of your own GPU")
    parser.add_argument("--gpus", type=int, help="default: the least that hold it")
    parser.add_argument("--tokens", type=float, default=1e12, help="tokens to train on")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak reached")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences decoded together")
    parser.add_argument("--context", type=int, default=4096, help="cached tokens per sequence")
    parser.add_argument("--usd-per-gpu-hour", type=float, default=0.0)
    parser.add_argument("--usd-per-kwh", type=float, default=0.0)


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops cost`; returns the exit status."""
    from ling_ops.cost import CostError

    try:
        facts = _article() if arguments.article else collect(arguments)
    except (CostError, TypeError, ValueError) as error:
        raise CommandError(str(error), code=2) from error
    if arguments.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
        return 0
    from ling_ops.cli.info import render

    print(render(_rounded(facts)))
    return 0


def _article() -> dict[str, Any]:
    from ling_ops.cost import article_claims

    return {
        "article": [
            {**dataclasses.asdict(claim), "follows": claim.follows} for claim in article_claims()
        ]
    }


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model under one set of assumptions."""
    from ling_ops import cost
    from ling_ops.cli.options import parse_model_fields
    from ling_ops.models import LingConfig

    config = LingConfig.preset(arguments.preset, **parse_model_fields(arguments.model))
    gpu = cost.get_gpu(arguments.gpu, **{name: getattr(arguments, name) for name in FIGURES})
    for name in ("batch_size", "context", "sequence_length"):
        if getattr(arguments, name) < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1", code=2)
    count = cost.parameters(config)
    cache = cost.kv_cache_bytes(config, arguments.batch_size * arguments.context)
    states, served = cost.training_state_bytes(config), cost.weight_bytes(config) + cache
    train_gpus = serve_gpus = arguments.gpus
    if arguments.gpus is None:
        train_gpus, serve_gpus = cost.least_gpus(states, gpu), cost.least_gpus(served, gpu)
    training = cost.training_cost(
        config, arguments.tokens, gpu, num_gpus=train_gpus, mfu=arguments.mfu,
        sequence_length=arguments.sequence_length, usd_per_gpu_hour=arguments.usd_per_gpu_hour,
        usd_per_kwh=arguments.usd_per_kwh,
    )  # fmt: skip
    decoding = cost.decoding_cost(
        config, gpu, num_gpus=serve_gpus, batch_size=arguments.batch_size,
        context=arguments.context, usd_per_gpu_hour=arguments.usd_per_gpu_hour,
    )  # fmt: skip
    flop = cost.flop_per_token(config, arguments.sequence_length, arguments.context)
    return {
        "parameters": {**dataclasses.asdict(count), "total": count.total, "active": count.active},
        "flop_per_token": dataclasses.asdict(flop),
        "memory_without_activations": {
            "weights_gb": cost.weight_bytes(config) / 1e9, "training_states_gb": states / 1e9,
            "kv_cache_gb": cache / 1e9,
        },
        "gpu": dataclasses.asdict(gpu),
        "training": {"gpus": train_gpus, **dataclasses.asdict(training)},
        "decoding_floor": {"gpus": serve_gpus, **dataclasses.asdict(decoding)},
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else value
