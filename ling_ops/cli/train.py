"""`ling-ops train`: put a run together, run it, and say what came of it."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from ling_ops.cli import checkpoint as checkpoints
from ling_ops.cli.data import load_text
from ling_ops.cli.errors import require_extra
from ling_ops.cli.modeling import (
    build_model,
    check_memory,
    new_config,
    pick_device,
    pick_dtype,
    saved_config,
)
from ling_ops.cli.options import TrainOptions, given_settings, merge
from ling_ops.cli.ranks import Ranks, local_device, open_ranks, seed_of, world_size
from ling_ops.cli.runs import (
    check_steps,
    checkpoint_to_resume,
    draw,
    from_anywhere,
    introduce_resumed,
    introduce_text,
    output_folder,
    run_and_record,
    say_stopped,
)
from ling_ops.models import LingForCausalLM


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops train`; returns the exit status."""
    require_extra("train")
    from ling_ops.cli.trainer import StopRequest

    with StopRequest() as stop:
        return _run(arguments, stop)


def _run(arguments: argparse.Namespace, stop: Any) -> int:
    started = time.monotonic()
    given = given_settings(arguments)
    found = checkpoint_to_resume(arguments, "train")
    options = merge(found.state["settings"] if found else {}, given, resuming=found is not None)
    check_steps(options, found)
    if found and "expert_parallel" not in given and world_size() % (options.expert_parallel or 1):
        options.expert_parallel = 0  # of other processes: now all share the experts
    options.data = [from_anywhere(path) for path in options.data]
    device = pick_device(local_device(options.device))
    with open_ranks(options, device) as ranks:
        return _train(arguments, stop, options, found, device, ranks, started)


def _train(
    arguments: argparse.Namespace, stop: Any, options: TrainOptions,
    found: checkpoints.Checkpoint | None, device: torch.device, ranks: Ranks, started: float,
) -> int:  # fmt: skip
    from ling_ops.cli.trainer import Trainer

    dtype = pick_dtype(options.dtype, device)
    config = saved_config(found.state) if found else new_config(options)
    check_memory(config, device, dtype)
    text = load_text(options.data, sequence_length=options.sequence_length)
    output = ranks.of_main(lambda: output_folder(arguments, options.preset, found))
    torch.manual_seed(options.seed)
    model = build_model(config, device, dtype, found.tensors["model"] if found else None)
    trainer = Trainer(model, options, text, output, device, ranks)
    if ranks.size > 1:
        torch.manual_seed(seed_of(options, 0, ranks.rank))
    if found:
        trainer.restore(found)
    if not ranks.is_main:
        trainer.run(_Silent(), _Silent(), stop)
        return 0
    _introduce(trainer, dtype, found)
    run_and_record(trainer, stop)
    return _conclude(trainer, stop, time.monotonic() - started)


class _Silent:
    """Metrics and progress of a process that leaves both to the main one."""

    def write(self, event: dict[str, Any]) -> None: ...

    def train(self, event: dict[str, Any], seconds_left: float | None) -> None: ...

    def validation(self, event: dict[str, Any]) -> None: ...


def _introduce(trainer: Any, dtype: torch.dtype, found: checkpoints.Checkpoint | None) -> None:
    config, ranks = trainer.model.config, trainer.ranks
    count = LingForCausalLM(config, device="meta").count_parameters()
    print(
        f"model: {trainer.options.preset}, {count.total:,} parameters, {count.active:,} active per "
        f"byte; {config.num_layers} layers, MoE in {_ranges(trainer.model)}"
    )
    introduce_text(trainer.text, trainer.baseline)
    print(
        f"run: {trainer.options.steps} steps on {trainer.device} in "
        f"{str(dtype).removeprefix('torch.')}, into {trainer.output}",
        flush=True,
    )
    if ranks.size > 1:
        print(f"ranks: {ranks.describe()}", flush=True)
    if found:
        introduce_resumed(trainer, found)


def _ranges(model: Any) -> str:
    layers = [index for index, _ in model.moe_layers()]
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs) or "none"


def _conclude(trainer: Any, stop: Any, seconds: float) -> int:
    from ling_ops.cli.progress import clock

    draw(trainer, trainer.options.preset)
    if trainer.stopped:
        say_stopped(trainer, stop)
        return 0
    final = trainer.last_validation["bits_per_byte"]
    print(
        f"final validation: {final:.3f} bits/byte; baseline (order-0 entropy of the same bytes): "
        f"{trainer.baseline:.3f} bits/byte; wall time {clock(seconds)}"
    )
    return 0
