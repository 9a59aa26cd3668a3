"""One training run of a study: a variant of a small model, and what it left behind."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ling_ops.cli.data import TextData, load_text
from ling_ops.cli.errors import CommandError, describe_os_error
from ling_ops.cli.modeling import build_model, pick_device, pick_dtype
from ling_ops.cli.options import TrainOptions
from ling_ops.cli.trainer import StopRequest, Trainer
from ling_ops.models import LingConfig

# Small enough for two CPU cores: a run of 300 steps takes a quarter of a minute.
_CPU = {
    "preset": "tiny", "hidden_size": 64, "num_heads": 2, "num_kv_heads": 1,
    "moe_intermediate_size": 64, "intermediate_size": 192,
}  # fmt: skip
_GPU = {"preset": "small"}
STEPS = 300
_UNBALANCED = {
    "use_expert_bias": False, "balance_coefficient": 0.0, "sequence_balance_coefficient": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What all runs of a study share."""

    name: str
    seeds: int
    steps: int
    device: torch.device
    dtype: torch.dtype
    output: Path
    text: TextData
    base: dict[str, Any]  # the preset and what is changed in it
    batch_size: int
    sequence_length: int
    learning_rate: float
    command: str  # what was asked for, to be run again

    def config(self, **changes: Any) -> LingConfig:
        """The study's model with `changes`."""
        fields = {**self.base, **changes}
        return LingConfig.preset(fields.pop("preset"), **fields)

    @property
    def unbalanced(self) -> dict[str, Any]:
        """Changes that switch every balancing term off."""
        return dict(_UNBALANCED)


@dataclass
class Variant:
    """One way to train: changes of the model and of the run."""

    name: str
    model: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trained:
    """What a run left behind."""

    model: Any
    events: list[dict[str, Any]]  # as in metrics.jsonl, with "capacity" per layer
    step_ms: list[float]
    trainer: StudyTrainer

    @property
    def bits_per_byte(self) -> float:
        return next(e for e in reversed(self.events) if e["event"] == "validation")["bits_per_byte"]

    @property
    def layers(self) -> list[list[dict[str, Any]]]:
        """Per train event, the routing statistics of each MoE layer."""
        return [event["layers"] for event in self.events if event["event"] == "train"]


class StudyTrainer(Trainer):
    """A run that keeps its steps' times and writes nothing."""

    command = "study"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.step_ms: list[float] = []
        self.loads: list[torch.Tensor] = []

    def update_expert_biases(self) -> None:
        # The demand of all micro-batches of the step; afterwards it is cleared.
        self.loads = [layer.expert_load for _, layer in self.model.moe_layers()]
        super().update_expert_biases()

    def _train_step(self, rate: float) -> torch.Tensor:
        started = time.perf_counter()
        loss = super()._train_step(rate)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.step_ms.append(1e3 * (time.perf_counter() - started))
        return loss

    def save(self) -> None:
        self._check_finite()
        self.saved_step = self.step

    def bits_per_byte(self) -> float:
        """Held-out bits per byte now."""
        return self._validate(_Events())["bits_per_byte"]


class _Events:
    """Keeps events in memory; also the progress view, one line that a terminal overwrites."""

    def __init__(self, trainer: Any = None, label: str = "", steps: int = 0) -> None:
        self.trainer, self.list = trainer, []
        self.label, self.steps = label, steps

    def write(self, event: dict[str, Any]) -> None:
        if event["event"] == "train":
            layers = self.trainer.model.moe_layers()
            for (_, layer), load, entry in zip(
                layers, self.trainer.loads, event["layers"], strict=True
            ):
                entry |= {**balance_of(load), "capacity": _capacity(layer)}
        self.list.append(event)

    def train(self, event: dict[str, Any], seconds_left: float) -> None:
        left = f", {seconds_left:.0f} s left" if math.isfinite(seconds_left) else ""
        self._line(f"{self.label}: step {event['step']} of {self.steps}{left}")

    def validation(self, event: dict[str, Any]) -> None:
        self._line("")

    def _line(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def balance_of(load: torch.Tensor) -> dict[str, Any]:
    """What `routing_stats` says of balance, of a step's demand `[E]`: every variant's steps have as
    many tokens, its forwards may not. "utilization" is the share of the demand."""
    share = load.double() / load.sum().clamp(min=1)
    relative = share * load.numel()
    return {
        "utilization": share.tolist(),
        "max_vio": max(0.0, float(relative.amax()) - 1),
        "cv": float(relative.std(correction=0)),
        "entropy": float(-torch.special.xlogy(share, share).sum()) / math.log(load.numel()),
        "dead_experts": float((load == 0).sum()),
    }


def _capacity(layer: Any) -> float | None:
    """Rows per expert over the fair share that a layer's rule gives for its last demand."""
    demand = layer.expert_counts
    pairs = int(demand.sum())
    capacity = layer.capacity.capacity(demand, pairs, layer.num_experts)
    return None if capacity is None else float(capacity) * layer.num_experts / pairs


def make_setup(arguments: argparse.Namespace) -> Setup:
    """The setup that the command's arguments ask for. CommandError where they make no sense."""
    for bad, message in (
        (arguments.seeds < 1, f"--seeds must be at least 1, not {arguments.seeds}"),
        (
            arguments.steps is not None and arguments.steps < 4,
            f"--steps must be at least 4, not {arguments.steps}",
        ),
    ):
        if bad:
            raise CommandError(message, code=2)
    device = pick_device(arguments.device)
    on_gpu = device.type == "cuda"
    length = 512 if on_gpu else 128
    text = load_text(arguments.data, sequence_length=length)
    check_output(Path(arguments.output))
    return Setup(
        name=arguments.name, seeds=arguments.seeds,
        steps=arguments.steps or STEPS, device=device,
        dtype=pick_dtype(arguments.dtype, device), output=Path(arguments.output),
        text=text, base=_GPU if on_gpu else _CPU,
        batch_size=32 if on_gpu else 8, sequence_length=length,
        learning_rate=3e-3 if on_gpu else 6e-3, command=command_of(arguments),
    )  # fmt: skip


def check_output(folder: Path) -> None:
    """CommandError where `folder` cannot be made: asked before minutes of training."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise CommandError(f"--output {str(folder)!r}: {str(there)!r} is a file", code=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise describe_os_error(error, "making the folder") from error


def command_of(arguments: argparse.Namespace) -> str:
    """The command whose results are these, whatever its defaults will be."""
    words = ["ling-ops", "study", arguments.name, "--seeds", str(arguments.seeds)]
    words += ["--steps", str(arguments.steps or STEPS), "--device", arguments.device]
    words += ["--dtype", arguments.dtype] if arguments.dtype != "auto" else []
    return shlex.join([*words, *(["--data", *arguments.data] if arguments.data else [])])


def options_of(setup: Setup, variant: Variant, seed: int) -> TrainOptions:
    """The run's settings; validation reads as much in every variant."""
    values = {
        "steps": setup.steps, "batch_size": setup.batch_size, "seed": seed,
        "sequence_length": setup.sequence_length, "learning_rate": setup.learning_rate,
        "log_every": max(1, setup.steps // 40), "validate_every": 0, "checkpoint_every": 0,
        "validation_bytes": 64 * setup.sequence_length,
    }  # fmt: skip
    options = TrainOptions(**{**values, **variant.run})
    options.check()
    return options


def train(
    setup: Setup, variant: Variant, seed: int, *, model: Any = None, label: str = ""
) -> Trained:
    """Train `variant` from `seed`; `model` goes on with weights that are there already."""
    options = options_of(setup, variant, seed)
    torch.manual_seed(seed)
    if model is None:
        try:
            config = setup.config(**variant.model)
        except ValueError as error:
            raise CommandError(f"{variant.name}: {error}", code=2) from error
        model = build_model(config, setup.device, setup.dtype)
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        trainer = StudyTrainer(model, options, setup.text, Path(folder), setup.device)
        events = _Events(trainer, label or variant.name, options.steps)
        trainer.run(events, events, stop)
    if trainer.stopped:
        raise KeyboardInterrupt
    return Trained(model, events.list, trainer.step_ms, trainer)


def each(
    setup: Setup, variants: list[Variant], seeds: Iterable[int] | None = None
) -> Iterable[tuple[Variant, int, Trained]]:
    """Train every variant from every seed (default: the setup's), variants by turns, and say how
    each run ended."""
    for seed in range(setup.seeds) if seeds is None else seeds:
        for variant in variants:
            started = time.perf_counter()
            label = f"seed {seed + 1} of {setup.seeds}  {variant.name}"
            trained = train(setup, variant, seed, label=label)
            tell(label, trained, time.perf_counter() - started)
            yield variant, seed, trained


def tell(label: str, trained: Trained, seconds: float) -> None:
    """One line for a run that ended."""
    print(f"{label}: {trained.bits_per_byte:.3f} bits/byte in {seconds:.1f} s", flush=True)
