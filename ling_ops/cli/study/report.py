"""What a study says: a table of claim and measurement, a verdict, JSON, and a picture."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

import ling_ops
from ling_ops.cli.checkpoint import write_atomically
from ling_ops.cli.errors import describe_os_error
from ling_ops.cli.info import render
from ling_ops.cli.study.trial import Setup

#: measure -> (column, format)
COLUMNS = {
    "bits_per_byte": ("bits/byte", "{:.3f}"), "step_ms": ("ms/step", "{:.1f}"),
    "parameters": ("parameters", "{:,.0f}"), "active_parameters": ("active", "{:,.0f}"),
    "low_share": ("least used, x fair", "{:.2f}"), "high_share": ("most used, x fair", "{:.2f}"),
    "max_vio": ("MaxVio", "{:.2f}"), "cv": ("spread (cv)", "{:.2f}"),
    "entropy": ("entropy", "{:.3f}"), "dead_experts": ("dead", "{:.2f}"),
    "drop_rate": ("dropped", "{:.2%}"), "padding": ("padding", "{:.1%}"),
    "capacity": ("capacity, x fair", "{:.2f}"), "layer_ms": ("ms/layer", "{:.3f}"),
    "recovered": ("bits/byte after recovery", "{:.3f}"), "pruned": ("bits/byte pruned", "{:.3f}"),
}  # fmt: skip


@dataclass
class Verdict:
    """Whether a claim held, and the sentence that says under which conditions."""

    held: bool
    text: str


@dataclass
class Table:
    """Variants with the measures of each of their seeds."""

    title: str
    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def add(self, variant: str, measures: dict[str, float]) -> None:
        self.rows.setdefault(variant, []).append(measures)

    def mean(self, variant: str, measure: str) -> float:
        return statistics.fmean(row[measure] for row in self.rows[variant])

    def spread(self, variant: str, measure: str) -> float:
        """Half the range over the seeds."""
        values = [row[measure] for row in self.rows[variant]]
        return (max(values) - min(values)) / 2

    @property
    def measures(self) -> list[str]:
        return list(next(iter(self.rows.values()))[0])

    def words(self) -> list[dict[str, str]]:
        """One row of words per variant: mean ± spread."""
        lines = []
        for variant in self.rows:
            line = {"variant": variant}
            for measure in self.measures:
                title, form = COLUMNS[measure]
                line[title] = form.format(self.mean(variant, measure))
                if len(self.rows[variant]) > 1 and self.spread(variant, measure) > 0:
                    line[title] += f" ± {form.format(self.spread(variant, measure))}"
            lines.append(line)
        return lines


@dataclass
class Result:
    """A study's outcome. `bars` are the measures that the picture shows of the first table;
    `curves` are values over steps per variant, mean over seeds, of one quantity."""

    claim: str
    tables: list[Table]
    verdict: Verdict
    bars: tuple[str, ...]
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    curve_title: str = ""
    curve_axis: str = "step"


def to_json(result: Result, setup: Setup) -> dict[str, Any]:
    """The file's content: claim, setup, tables with every seed's measures, verdict, curves."""
    device = str(setup.device)
    if setup.device.type == "cuda":
        device = torch.cuda.get_device_name(setup.device)
    return {
        "study": setup.name, "claim": result.claim,
        "setup": {
            "command": f"ling-ops study {setup.name} --seeds {setup.seeds} --steps {setup.steps} "
            f"--device {setup.device.type}",
            "device": device, "threads": torch.get_num_threads(), "dtype": str(setup.dtype),
            "seeds": list(range(setup.seeds)), "steps": setup.steps, "model": setup.base,
            "batch_size": setup.batch_size, "sequence_length": setup.sequence_length,
            "learning_rate": setup.learning_rate, "text": setup.text.description,
            "text_sha256": setup.text.fingerprint, "ling_ops": ling_ops.__version__,
            "torch": torch.__version__, "python": platform.python_version(),
        },
        "tables": [{"title": t.title, "rows": t.rows} for t in result.tables],
        "verdict": {"held": result.verdict.held, "text": result.verdict.text},
        "bars": list(result.bars), "curves": result.curves, "curve_title": result.curve_title,
        "curve_axis": result.curve_axis,
    }  # fmt: skip


def conclude(result: Result, setup: Setup) -> None:
    """Print tables and verdict, and write JSON and picture."""
    print(f"\nclaim: {result.claim}\n")
    show({table.title: table.words() for table in result.tables})
    print(f"verdict: {'held' if result.verdict.held else 'did not hold'}. {result.verdict.text}")
    values = to_json(result, setup)
    try:
        setup.output.mkdir(parents=True, exist_ok=True)
        path = setup.output / f"{setup.name}.json"
        write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())
        from ling_ops.cli.study.picture import draw

        write_atomically(path.with_suffix(".png"), draw(values))
    except OSError as error:
        raise describe_os_error(error, f"writing to {str(setup.output)!r}") from error
    print(f"wrote {path} and {path.with_suffix('.png')}")


def show(tables: dict[str, list[dict[str, str]]]) -> None:
    """Tables on a terminal with rules, elsewhere as plain text."""
    if not sys.stdout.isatty():
        print(render(tables))
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for title, rows in tables.items():
        table = RichTable(title=title, title_justify="left")
        for number, column in enumerate(rows[0]):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
