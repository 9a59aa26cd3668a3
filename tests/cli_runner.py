"""Runs the `ling-ops` command for the tests, as a process or in this one, on a minute model."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from ling_ops.cli import main

# Everything that a resumed run must restore is switched on: router jitter (random numbers),
# expert bias, a capacity window, and more than one micro-batch.
MODEL = [
    "hidden_size=32", "num_heads=2", "num_kv_heads=1", "head_dim=16", "intermediate_size=48",
    "moe_intermediate_size=16", "router_jitter=0.1",
]  # fmt: skip
SETTINGS = [
    "--model", *MODEL, "--pattern", "1-1-1-1", "--experts", "4", "--experts-per-token", "2",
    "--gate", "sigmoid", "--bias-rate", "0.01", "--capacity", "dynamic:0.02:running",
    "--balance-loss", "0.01", "--sequence-loss", "0.001", "--z-loss", "0.0001",
    "--device", "cpu", "--batch-size", "2", "--accumulate", "2", "--sequence-length", "32",
    "--validation-bytes", "256",
]  # fmt: skip


def write_text(folder: Path, files: int = 24) -> Path:
    """A folder of small text files, some of which the hash holds out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [f"def name_{number}_{line}(x): return x + {line}\n" for line in range(40)]
        (folder / f"file_{number:02d}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def environment() -> dict[str, str]:
    """One thread, so that a test does not depend on what else the machine does."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ling_ops", *map(str, arguments)]


def train_arguments(text: Path, output: Path, *extra: object) -> list[object]:
    return ["train", *SETTINGS, "--data", text, "--output", output, *extra]


def run_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run `python -m ling_ops` to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), cwd=cwd,
        timeout=600, check=False,
    )  # fmt: skip


def run_here(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command in this process: as `run_command`, without the seconds of a start."""
    given, out, err = [str(item) for item in arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(given)
    return subprocess.CompletedProcess(given, code, out.getvalue(), err.getvalue())


def step_files(run: Path, step: int) -> dict[str, bytes]:
    """The tensor files of a checkpoint, by name."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
