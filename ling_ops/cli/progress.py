"""The live view of a run: a rich panel on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import Any


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def relative_load(utilization: list[float]) -> list[float]:
    """Each expert's utilisation over the fair share: 1.0 everywhere is perfect balance."""
    total = sum(utilization)
    return [u * len(utilization) / total if total else 0.0 for u in utilization]


class Eta:
    """Time left, from the mean pace of this process (its first step is left out as warm-up)."""

    def __init__(self, first_step: int, steps: int) -> None:
        self.first, self.steps = first_step, steps
        self.started = time.monotonic()

    def restart(self, step: int) -> None:
        """Measure the pace from this step on."""
        self.first, self.started = step, time.monotonic()

    def left(self, step: int) -> float:
        """Seconds until the last step; infinite before there is a pace."""
        done = step - self.first
        if done <= 0:
            return math.inf
        return (time.monotonic() - self.started) / done * (self.steps - step)


class PlainProgress:
    """One line per event, at most one training line in `every` seconds."""

    def __init__(self, steps: int, *, every: float = 5.0) -> None:
        self.steps, self.every, self._last = steps, every, -math.inf

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *unused: object) -> None:
        return None

    def say(self, text: str) -> None:
        """Print one line now."""
        print(text, flush=True)

    def train(self, event: dict[str, Any], eta: float) -> None:
        """Show a `train` event."""
        now = time.monotonic()
        if now - self._last < self.every and event["step"] < self.steps:
            return
        self._last = now
        self.say(f"step {event['step']}/{self.steps}  {_summary(event)}  eta {clock(eta)}")

    def validation(self, event: dict[str, Any]) -> None:
        """Show a `validation` event."""
        self.say(
            f"step {event['step']}/{self.steps}  validation {event['bits_per_byte']:.3f} bits/byte "
            f"(order-0 baseline {event['order0_bits_per_byte']:.3f})"
        )


def _summary(event: dict[str, Any]) -> str:
    text = (
        f"loss {event['loss']:.3f} ({event['bits_per_byte']:.3f} bits/byte)  "
        f"{event['tokens_per_s']:,.0f} tokens/s"
    )
    if layers := event["layers"]:
        loads = [load for layer in layers for load in relative_load(layer["utilization"])]
        worst = max(layer["max_vio"] for layer in layers)
        drops = sum(layer["drop_rate"] for layer in layers) / len(layers)
        text += f"  MaxVio {worst:.2f}  utilisation {min(loads):.2f}-{max(loads):.2f}"
        text += f"  dropped {drops:.1%}"
    return text


_BARS = " ▁▂▃▄▅▆▇█"


def load_bars(utilization: list[float]) -> str:
    """One block character per expert; half height is the fair share."""
    top = len(_BARS) - 1
    return "".join(_BARS[min(top, round(u * top / 2))] for u in relative_load(utilization))


class LiveProgress:
    """A panel that redraws in place: progress bar, loss, pace, and one row per MoE layer."""

    def __init__(self, steps: int, title: str = "ling-ops train") -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn

        self.steps, self.title = steps, title
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(None),
            TextColumn("{task.percentage:.0f}%  ETA {task.fields[eta]}"), expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, eta="-:--")
        self._event: dict[str, Any] | None = None
        self._validation: dict[str, Any] | None = None
        self._console = Console()
        self._live = Live(
            self._render(), console=self._console, refresh_per_second=4, transient=False
        )

    def __enter__(self) -> LiveProgress:
        self._live.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._live.__exit__(*reason)

    def say(self, text: str) -> None:
        """Print one line above the panel."""
        self._console.print(text, markup=False, highlight=False)

    def train(self, event: dict[str, Any], eta: float) -> None:
        """Show a `train` event."""
        self._event = event
        self._bar.update(self._task, completed=event["step"], eta=clock(eta))
        self._live.update(self._render())

    def validation(self, event: dict[str, Any]) -> None:
        """Show a `validation` event."""
        self._validation = event
        self._live.update(self._render())

    def _render(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        parts: list[Any] = [self._bar]
        if self._event:
            parts += [Text(self._headline()), self._layers()]
        return Panel(Group(*parts), title=self.title, border_style="cyan")

    def _headline(self) -> str:
        event = self._event
        text = (
            f"loss {event['loss']:.3f}   {event['bits_per_byte']:.3f} bits/byte   "
            f"{event['tokens_per_s']:,.0f} tokens/s   lr {event['learning_rate']:.1e}"
        )
        if seen := self._validation:
            text += (
                f"\nvalidation {seen['bits_per_byte']:.3f} bits/byte at step {seen['step']}"
                f"   order-0 baseline {seen['order0_bits_per_byte']:.3f}"
            )
        return text

    def _layers(self) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2))
        for title in ("MoE layer", "MaxVio", "utilisation", "dropped", "per expert"):
            table.add_column(title, justify="left" if "expert" in title else "right")
        for layer in self._event["layers"]:
            loads = relative_load(layer["utilization"])
            table.add_row(
                str(layer["layer"]), f"{layer['max_vio']:.2f}",
                f"{min(loads):.2f}-{max(loads):.2f}",
                f"{layer['drop_rate']:.1%}", load_bars(layer["utilization"]),
            )  # fmt: skip
        return table


def open_progress(steps: int, title: str = "ling-ops train") -> PlainProgress | LiveProgress:
    """The live panel when stdout is a terminal, plain lines otherwise."""
    with contextlib.suppress(AttributeError, ValueError):
        if sys.stdout.isatty():
            return LiveProgress(steps, title)
    return PlainProgress(steps)
