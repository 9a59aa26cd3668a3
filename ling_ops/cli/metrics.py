"""What a run records: one JSON line per event, and the same numbers in TensorBoard.

Events of metrics.jsonl (field `event`): `train` (step, loss in nats per byte, bits_per_byte,
learning_rate, gradient_norm, tokens_per_s, elapsed_s, layers) and `validation` (step,
bits_per_byte, order0_bits_per_byte). Each of `layers` has layer, utilization (share of demand,
one number per expert), max_vio, cv, entropy, dead_experts, drop_rate, tokens_dropped and
gate_mass_dropped, all of the last micro-batch of the step.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ling_ops.cli.checkpoint import write_atomically
from ling_ops.cli.errors import CommandError

SCALARS = (
    "max_vio", "cv", "entropy", "dead_experts", "drop_rate", "tokens_dropped", "gate_mass_dropped",
)  # fmt: skip


class MetricsWriter:
    """Appends events to <folder>/metrics.jsonl and <folder>/tensorboard.

    `after_step`: events after that step are removed first (a resumed run writes them again).
    """

    def __init__(self, folder: Path, *, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [e for e in read_metrics(self.path) if e["step"] <= after_step]
        write_atomically(self.path, b"".join(_line(event) for event in kept))
        self._file = open(self.path, "ab")  # noqa: SIM115 - open for the whole run
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def write(self, event: dict[str, Any]) -> None:
        """Append one event; it is with the operating system when this returns."""
        self._file.write(_line(event))
        self._file.flush()
        step = event["step"]
        for name, value in event.items():
            if isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(f"{event['event']}/{name}", value, step)
        for layer in event.get("layers", ()):
            for name in SCALARS:
                self._board.add_scalar(f"layer_{layer['layer']:02d}/{name}", layer[name], step)

    def close(self) -> None:
        """Flush both outputs to the disk."""
        self._file.close()
        self._board.close()


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics file; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    events = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            event = json.loads(line)
            event["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise CommandError(f"{str(path)!r} line {number} is not a metrics event") from error
        events.append(event)
    return events


def layer_metrics(model: Any) -> list[dict[str, Any]]:
    """Routing statistics of each MoE layer's last forward, brought over in one copy."""
    numbers, rows = [], []
    for index, layer in model.moe_layers():
        stats = layer.stats()
        rows.append((index, stats["utilization"].numel()))
        numbers += [stats["utilization"].double().flatten()]
        numbers += [stats[name].double().reshape(1) for name in SCALARS]
    flat = torch.cat(numbers).tolist() if numbers else []
    result, at = [], 0
    for index, experts in rows:
        entry = {"layer": index, "utilization": flat[at : at + experts]}
        entry |= dict(zip(SCALARS, flat[at + experts :], strict=False))
        at += experts + len(SCALARS)
        result.append(entry)
    return result
