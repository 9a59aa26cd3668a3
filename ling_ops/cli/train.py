"""`ling-ops train`: put a run together, run it, and say what came of it."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ling_ops.cli import checkpoint as checkpoints
from ling_ops.cli.data import TextData, load_text
from ling_ops.cli.errors import CommandError, describe_os_error, require_extra
from ling_ops.cli.modeling import (
    build_model,
    check_memory,
    new_config,
    pick_device,
    pick_dtype,
    saved_config,
)
from ling_ops.cli.options import TrainOptions, given_settings, merge
from ling_ops.cli.ranks import Ranks, local_device, open_ranks, seed_of
from ling_ops.models import LingForCausalLM

GROUPS = ("model", "optimizer", "rng")


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops train`; returns the exit status."""
    require_extra("train")
    from ling_ops.cli.trainer import StopRequest

    with StopRequest() as stop:
        return _run(arguments, stop)


def _run(arguments: argparse.Namespace, stop: Any) -> int:
    started = time.monotonic()
    given = given_settings(arguments)
    found = _checkpoint_to_resume(arguments)
    options = merge(found.state["settings"] if found else {}, given, resuming=found is not None)
    if found and options.steps < found.state["step"]:
        raise CommandError(
            f"the checkpoint is at step {found.state['step']}, past steps ({options.steps})", code=2
        )
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
    output = ranks.of_main(lambda: _output_folder(arguments, options, found))
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
    _introduce(trainer, text, dtype, found)
    _run_and_record(trainer, stop)
    return _conclude(trainer, stop, time.monotonic() - started)


class _Silent:
    """Metrics and progress of a process that leaves both to the main one."""

    def write(self, event: dict[str, Any]) -> None: ...

    def train(self, event: dict[str, Any], seconds_left: float | None) -> None: ...

    def validation(self, event: dict[str, Any]) -> None: ...


def _run_and_record(trainer: Any, stop: Any) -> None:
    from ling_ops.cli.metrics import MetricsWriter
    from ling_ops.cli.progress import open_progress

    output = trainer.output
    progress = open_progress(trainer.options.steps)
    with _writing(output), contextlib.ExitStack() as stack:
        output.mkdir(parents=True, exist_ok=True)
        metrics = MetricsWriter(output, after_step=trainer.step)
        stack.callback(metrics.close)
        stack.enter_context(progress)
        trainer.run(metrics, progress, stop)


@contextlib.contextmanager
def _writing(output: Path):
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise describe_os_error(error, f"writing to {str(output)!r}") from error


def _checkpoint_to_resume(arguments: argparse.Namespace) -> checkpoints.Checkpoint | None:
    if "resume" not in arguments:
        return None
    if not arguments.resume and "output" not in arguments:
        raise CommandError("--resume needs a checkpoint, or --output with one in it", code=2)
    folder = checkpoints.find_checkpoint(arguments.resume or arguments.output)
    return checkpoints.load_checkpoint(folder, groups=GROUPS)


def _output_folder(
    arguments: argparse.Namespace, options: TrainOptions, found: checkpoints.Checkpoint | None
) -> Path:
    if "output" in arguments:
        output = Path(arguments.output)
        home = checkpoints.run_folder_of(found.folder) if found else None
        same = home is not None and home == output.resolve()
        if checkpoints.has_checkpoint(output) and not same:
            raise CommandError(
                f"{str(output)!r} already holds a run: add --resume to go on with it, or choose "
                "another --output"
            )
        return output
    if found:
        home = checkpoints.run_folder_of(found.folder)
        if home is None:
            raise CommandError("name a run folder with --output", code=2)
        return home
    number, output = 1, Path("runs", options.preset)
    while output.exists():
        number += 1
        output = Path("runs", f"{options.preset}-{number}")
    return output


def _introduce(trainer: Any, text: TextData, dtype: torch.dtype, found: Any) -> None:
    config, ranks = trainer.model.config, trainer.ranks
    count = LingForCausalLM(config, device="meta").count_parameters()
    print(
        f"model: {trainer.options.preset}, {count.total:,} parameters, {count.active:,} active per "
        f"byte; {config.num_layers} layers, MoE in {_ranges(trainer.model)}"
    )
    print(
        f"text: {text.files} files of {text.description}, {text.train.numel():,} bytes to train "
        f"on, {text.validation.numel():,} held out ({text.split})"
    )
    print(f"baseline: {trainer.baseline:.3f} bits/byte (order-0 entropy of the validation bytes)")
    print(
        f"run: {trainer.options.steps} steps on {trainer.device} in "
        f"{str(dtype).removeprefix('torch.')}, into {trainer.output}",
        flush=True,
    )
    if ranks.size > 1:
        print(f"ranks: {ranks.describe()}", flush=True)
    if found:
        print(f"resumed from {found.folder} at step {trainer.step}", flush=True)
        if found.state.get("data") != text.fingerprint:
            print(
                "ling-ops: warning: the data differ from the checkpoint's: this continues the "
                "model, not the same run",
                file=sys.stderr,
            )


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
    from ling_ops.cli.metrics import read_metrics
    from ling_ops.cli.plot import draw_run
    from ling_ops.cli.progress import clock

    picture = trainer.output / "training.png"
    reached = f"{trainer.options.preset} after {trainer.step} steps"
    if trainer.last_validation is not None:
        reached += (
            f": {trainer.last_validation['bits_per_byte']:.2f} bits per byte of held-out text"
        )
    with _writing(trainer.output):
        draw_run(read_metrics(trainer.output / "metrics.jsonl"), picture, title=reached)
    print(f"wrote {picture}, metrics.jsonl, tensorboard/ and checkpoints/ in {trainer.output}")
    if trainer.stopped:
        by = stop.signal.name if stop.signal is not None else "another process"
        print(
            f"stopped by {by} after step {trainer.step}, which is saved; go on with "
            f"ling-ops train --resume --output {trainer.output}"
        )
        return 0
    final = trainer.last_validation["bits_per_byte"]
    print(
        f"final validation: {final:.3f} bits/byte; baseline (order-0 entropy of the same bytes): "
        f"{trainer.baseline:.3f} bits/byte; wall time {clock(seconds)}"
    )
    return 0
