"""The training loop: steps, validation, metrics, checkpoints, and stopping cleanly."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ling_ops.cli.checkpoint import Checkpoint, run_folder_of, save_checkpoint
from ling_ops.cli.data import BatchOrder, TextData, order0_entropy, validation_windows
from ling_ops.cli.errors import CommandError
from ling_ops.cli.metrics import MetricsWriter, layer_metrics
from ling_ops.cli.optimizer import Optimizer, learning_rate_at
from ling_ops.cli.options import RunOptions
from ling_ops.cli.progress import Eta
from ling_ops.cli.ranks import Ranks, seed_of
from ling_ops.nn import accumulate_expert_counts, set_router_loss_scale

NATS_PER_BIT = math.log(2)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


class Trainer:
    """One run: a model, its optimizer, its text, and the folder that it writes to."""

    command = "train"

    def __init__(
        self, model: Any, options: RunOptions, text: TextData, output: Path,
        device: torch.device, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.ranks = Ranks() if ranks is None else ranks
        self.model = model = self.ranks.spread(model)
        self.options, self.output, self.device = options, output, device
        self.text = text
        self.optimizer = Optimizer(model, weight_decay=options.weight_decay)
        self.order = BatchOrder(
            text.train, sequence_length=options.sequence_length, batch=options.batch_size,
            seed=options.seed,
        )  # fmt: skip
        self.held_out = validation_windows(
            text.validation, sequence_length=options.sequence_length,
            limit=options.validation_bytes,
        )  # fmt: skip
        #: a token's nats become bits of the bytes that it stands for
        self.nats_per_bit = NATS_PER_BIT * text.bytes_per_token
        self.baseline = order0_entropy(self.held_out) / text.bytes_per_token
        self.step = 0
        self.elapsed = 0.0
        self.saved_step: int | None = None
        self.stopped = False
        self.last_validation: dict[str, Any] | None = None
        self._last_loss = self._last_norm = torch.zeros(())
        set_router_loss_scale(model, 1.0 / options.accumulate)

    # -- state --

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose model tensors are already loaded."""
        tensors = checkpoint.tensors
        self.optimizer.load_state_tensors(
            *(self.ranks.shard(self.model, tensors[group]) for group in ("optimizer", "model"))
        )
        rng, of_rank = tensors["rng"], f".{self.ranks.rank}" if self.ranks.rank else ""
        try:
            if f"cpu{of_rank}" in rng:
                torch.set_rng_state(rng[f"cpu{of_rank}"])
            else:  # the checkpoint comes from fewer processes
                torch.manual_seed(seed_of(self.options, checkpoint.state["step"], self.ranks.rank))
            if self.device.type == "cuda" and f"cuda{of_rank}" in rng:
                torch.cuda.set_rng_state(rng[f"cuda{of_rank}"], self.device)
            if self.device.type == "cpu":
                torch.set_num_threads(int(checkpoint.state["threads"]))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CommandError(f"the checkpoint's random state does not fit: {error}") from error
        self.step = checkpoint.state["step"]
        if run_folder_of(checkpoint.folder) == self.output.resolve():
            self.saved_step = self.step
        self.elapsed = float(checkpoint.state.get("elapsed_s", 0.0))

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the model."""
        return self.model.state_dict()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors."""
        return {
            "command": self.command, "settings": vars(self.options),
            "model": self.model.config.to_dict(), "data": self.text.fingerprint,
            "elapsed_s": round(self.elapsed, 3), "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint of the present step (never of values that are not finite)."""
        self._check_finite()
        states = self.ranks.every(torch.get_rng_state())
        rng = _by_rank("cpu", states)
        if self.device.type == "cuda":
            rng |= _by_rank("cuda", self.ranks.every(torch.cuda.get_rng_state(self.device)))
        tensors = {
            "model": self.ranks.gather(self.model, self.model_tensors()),
            "optimizer": self.ranks.gather(self.model, self.optimizer.state_tensors()),
            "rng": rng,
        }
        self.saved_step = self.step
        folder, state = self.output / "checkpoints", self.state()
        self.ranks.main_saves(
            lambda: save_checkpoint(
                folder, step=self.step, state=state, tensors=tensors, keep=self.options.keep
            )
        )

    # -- the loop --

    def run(self, metrics: MetricsWriter, progress: Any, stop: StopRequest) -> None:
        """Train up to options.steps, or until a signal asks to stop; always ends saved."""
        options = self.options
        eta = Eta(self.step, options.steps)
        tokens_per_step = options.batch_size * options.sequence_length * options.accumulate
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        since, mark, first = 0, time.monotonic(), self.step + 1
        while self.step < options.steps and not self._stops(stop):
            rate = self._learning_rate()
            loss_sum += self._train_step(rate)
            since += 1
            if self.step == first:
                eta.restart(self.step)
            if self.step % options.log_every == 0 or self.step == options.steps:
                self._check_finite()
                mean, now = (loss_sum / since).item(), time.monotonic()
                event = {
                    "event": "train", "step": self.step, "loss": mean,
                    "bits_per_byte": mean / self.nats_per_bit, "learning_rate": rate,
                    "gradient_norm": float(self._last_norm),
                    "tokens_per_s": tokens_per_step * since / (now - mark),
                    "elapsed_s": self.elapsed + now - mark, "layers": layer_metrics(self.model),
                }  # fmt: skip
                self.elapsed += now - mark
                metrics.write(event)
                progress.train(event, eta.left(self.step))
                loss_sum.zero_()
                since, mark = 0, now
            if _is_due(self.step, options.validate_every) and self.step < options.steps:
                progress.validation(self._validate(metrics))
            if _is_due(self.step, options.checkpoint_every) and self.step < options.steps:
                self.save()
        if not self.stopped:
            progress.validation(self._validate(metrics))
        if self.saved_step != self.step:
            self.save()

    def _stops(self, stop: StopRequest) -> bool:
        """Whether a signal reached any process: all of them end after the same step."""
        self.stopped = stop.signal is not None
        if self.ranks.size > 1:
            self.stopped = bool(self.ranks.total(torch.tensor(float(self.stopped))))
        return self.stopped

    def update_expert_biases(self) -> None:
        """What follows each optimizer step."""
        self.model.update_expert_biases()

    def _learning_rate(self) -> float:
        options = self.options
        return learning_rate_at(
            self.step + 1, steps=options.steps, warmup=options.warmup,
            peak=options.peak_learning_rate, final=options.final_learning_rate,
        )  # fmt: skip

    def _train_step(self, rate: float) -> torch.Tensor:
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in range(self.options.accumulate):
            batch = self.order.batch_at(self.step * self.options.accumulate + part)
            loss = self._loss(self.ranks.part(batch))
            (loss / self.options.accumulate).backward()
            accumulate_expert_counts(self.model)
            total += loss.detach().double() / self.options.accumulate
        total = self.ranks.total(total) / self.ranks.size
        self.ranks.average_gradients(self.model)
        clipper = self.ranks.clipper(self.model)
        self._last_loss = total
        self._last_norm = self.optimizer.step(rate, self.options.clip, clipper)
        self.update_expert_biases()
        self.step += 1
        return total

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(self.device)
        logits = self.model(batch[:, :-1]).logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def _check_finite(self) -> None:
        loss, norm = float(self._last_loss), float(self._last_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise CommandError(
                f"the loss is no longer finite at step {self.step} (loss {loss}, gradient norm "
                f"{norm}): lower --learning-rate; the last checkpoint is kept"
            )

    @torch.no_grad()
    def _validate(self, metrics: MetricsWriter) -> dict[str, Any]:
        self.model.eval()
        losses = []
        for batch in self.held_out.split(self.options.batch_size):
            part = self.ranks.part(batch)
            # Every process takes part in every forward; what it has twice counts once.
            loss = self._loss(part if len(part) else batch[:1])
            losses.append(loss.double() * len(part))
        mean = float(self.ranks.total(torch.stack(losses).sum())) / self.held_out.shape[0]
        event = {
            "event": "validation", "step": self.step, "bits_per_byte": mean / self.nats_per_bit,
            "order0_bits_per_byte": self.baseline,
        }  # fmt: skip
        metrics.write(event)
        self.last_validation = event
        return event


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _by_rank(kind: str, states: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The main process's state under the kind's own name, the others' with their rank."""
    return {f"{kind}.{rank}" if rank else kind: state for rank, state in enumerate(states)}
