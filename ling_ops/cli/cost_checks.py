"""What `ling-ops cost` refuses before it computes anything, and in which half something failed."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from ling_ops.cli.cost_options import DEGREES, PRICES, flag, stated
from ling_ops.cost.gpu import (
    RATES,
    CostError,
    FitError,
    need,
    need_choice,
    need_integer,
    need_share,
)
from ling_ops.cost.layout import SHARDS
from ling_ops.cost.serving import WEIGHT_BYTES

_INTEGERS = ("sequence_length", "micro_batch_size", "micro_batches", "batch_size", "context")
_CHOICES = {"dtype": RATES, "shard": SHARDS, "serve_dtype": RATES, "kv_dtype": tuple(WEIGHT_BYTES)}


def check_article(arguments: argparse.Namespace) -> None:
    """CostError for all that `--article` would ignore."""
    given = [name if name == "preset" else flag(name) for name in stated(arguments)]
    if given:
        raise CostError(
            f"--article: got {', '.join(given)} beside it, need nothing but --json: "
            "its inputs are the article's own"
        )


def check_values(arguments: argparse.Namespace) -> None:
    """CostError for a value without sense, also where `--only` leaves its half out."""
    need("tokens", arguments.tokens)
    need_share("mfu", arguments.mfu)
    for name in _INTEGERS:
        need_integer(name, getattr(arguments, name))
    for name, choices in _CHOICES.items():
        need_choice(name, getattr(arguments, name), choices)
    for name in PRICES:
        if getattr(arguments, name) is not None:
            need(name, getattr(arguments, name), above=False)
    for name in (*DEGREES, "gpus"):
        if getattr(arguments, name) is not None:
            need_integer(name, getattr(arguments, name))


def degrees(arguments: argparse.Namespace) -> dict[str, int | None]:
    """The number of GPUs and the degrees that were asked for; None is searched."""
    gpus, tensor, data = arguments.gpus, arguments.tensor_parallel, arguments.data_parallel
    if data is not None:
        product = data * (tensor or 1)
        if gpus not in (None, product):
            raise CostError(f"gpus: got {gpus}, need data_parallel x tensor_parallel = {product}")
        gpus, tensor = product, tensor or 1
    return {"gpus": gpus, "tensor_parallel": tensor, "expert_parallel": arguments.expert_parallel}


@contextlib.contextmanager
def half(name: str, only: Any) -> Iterator[None]:
    """Names the half, training or serving, that does not fit, and how to leave it out."""
    other = {"training": "serving", "serving": "training"}[name]
    try:
        yield
    except FitError as error:
        hint = "" if only else f"; --only {other} leaves {name} out"
        raise FitError(f"{name}: {error}{hint}") from error
