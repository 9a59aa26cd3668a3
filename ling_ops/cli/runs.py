"""What training commands share: a run's folder, the checkpoint it goes on from, record and end."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ling_ops.cli import checkpoint as checkpoints
from ling_ops.cli.data import TextData
from ling_ops.cli.errors import CommandError, describe_os_error

GROUPS = ("model", "optimizer", "rng")


def checkpoint_to_resume(
    arguments: argparse.Namespace, command: str
) -> checkpoints.Checkpoint | None:
    """The checkpoint that --resume names, None without it."""
    if "resume" not in arguments:
        return None
    if not arguments.resume and "output" not in arguments:
        raise CommandError("--resume needs a checkpoint, or --output with one in it", code=2)
    folder = checkpoints.find_checkpoint(arguments.resume or arguments.output)
    found = checkpoints.load_checkpoint(folder, groups=GROUPS)
    wrote = command_of(found.state)
    if wrote != command:
        raise CommandError(f"{str(folder)!r} is of `ling-ops {wrote}`: resume it with that", code=2)
    return found


def is_published(folder: Path) -> bool:
    """Whether a folder is read as a checkpoint in the published format, not as one of a run."""
    trained = (folder / checkpoints.STATE).is_file() or checkpoints.has_checkpoint(folder)
    return (folder / "config.json").is_file() and not trained


def from_anywhere(path: str) -> str:
    """An existing path as it holds in every working folder; any other stays as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def command_of(state: dict[str, Any]) -> str:
    """The command that wrote a checkpoint."""
    return state.get("command", "train")


def check_steps(options: Any, found: checkpoints.Checkpoint | None) -> None:
    """Raise CommandError if the checkpoint is past the steps that are asked for."""
    if found and options.steps < found.state["step"]:
        raise CommandError(
            f"the checkpoint is at step {found.state['step']}, past steps ({options.steps})", code=2
        )


def output_folder(
    arguments: argparse.Namespace, name: str, found: checkpoints.Checkpoint | None
) -> Path:
    """--output, or else the folder of the run that goes on, or else a new one under runs/."""
    if "output" in arguments:
        output = Path(arguments.output)
        home = checkpoints.run_folder_of(found.folder) if found else None
        same = home is not None and home == output.resolve()
        if checkpoints.has_checkpoint(output) and not same:
            raise CommandError(
                f"{str(output)!r} already holds a run: add --resume to go on with it, or choose "
                "another --output"
            )
        if is_published(output):
            raise CommandError(
                f"{str(output)!r} holds a published checkpoint, which a run in it would hide: "
                "choose another --output"
            )
        return output
    if found:
        home = checkpoints.run_folder_of(found.folder)
        if home is None:
            raise CommandError("name a run folder with --output", code=2)
        return home
    for number in itertools.count(1):
        output = Path("runs", name if number == 1 else f"{name}-{number}")
        # Made here: another run that starts now must not find the same name free.
        with contextlib.suppress(FileExistsError):
            output.mkdir(parents=True)
            return output


def introduce_text(text: TextData, baseline: float) -> None:
    """Say what is read and what the best code without context needs for it."""
    unit = "bytes" if text.bytes_per_token == 1 else "tokens"
    print(
        f"text: {text.files} files of {text.description}, {text.train.numel():,} {unit} to train "
        f"on, {text.validation.numel():,} held out ({text.split})"
    )
    print(f"baseline: {baseline:.3f} bits/byte (order-0 entropy of the validation {unit})")


def introduce_resumed(trainer: Any, found: checkpoints.Checkpoint) -> None:
    """Say where the run goes on, and warn where it is not the same run."""
    print(f"resumed from {found.folder} at step {trainer.step}", flush=True)
    if found.state.get("data") != trainer.text.fingerprint:
        print(
            "ling-ops: warning: the data differ from the checkpoint's: this continues the "
            "model, not the same run",
            file=sys.stderr,
        )


def run_and_record(trainer: Any, stop: Any) -> None:
    """Run the trainer with its metrics file and the progress view."""
    from ling_ops.cli.metrics import MetricsWriter
    from ling_ops.cli.progress import open_progress

    output = trainer.output
    progress = open_progress(trainer.options.steps, f"ling-ops {trainer.command}")
    with writing(output), contextlib.ExitStack() as stack:
        output.mkdir(parents=True, exist_ok=True)
        metrics = MetricsWriter(output, after_step=trainer.step)
        stack.callback(metrics.close)
        stack.enter_context(progress)
        trainer.run(metrics, progress, stop)


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turns a refusal of the operating system into one line that names the folder."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise describe_os_error(error, f"writing to {str(output)!r}") from error


def draw(trainer: Any, name: str) -> None:
    """Draw the run's picture and say what lies in its folder."""
    from ling_ops.cli.metrics import read_metrics
    from ling_ops.cli.plot import draw_run

    picture = trainer.output / "training.png"
    reached = f"{name} after {trainer.step} steps"
    if trainer.last_validation is not None:
        reached += (
            f": {trainer.last_validation['bits_per_byte']:.2f} bits per byte of held-out text"
        )
    with writing(trainer.output):
        draw_run(read_metrics(trainer.output / "metrics.jsonl"), picture, title=reached)
    print(f"wrote {picture}, metrics.jsonl, tensorboard/ and checkpoints/ in {trainer.output}")


def say_stopped(trainer: Any, stop: Any) -> None:
    """Say what ended the run and how to go on."""
    by = stop.signal.name if stop.signal is not None else "another process"
    print(
        f"stopped by {by} after step {trainer.step}, which is saved; go on with "
        f"ling-ops {trainer.command} --resume --output {trainer.output}"
    )
