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
    """Whether a claim held (in every seed), and the sentence that says under which conditions."""

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
        return statistics.fmean(self.values(variant, measure))

    def spread(self, variant: str, measure: str) -> float:
        """Half the range over the seeds."""
        values = self.values(variant, measure)
        return (max(values) - min(values)) / 2

    def values(self, variant: str, measure: str) -> list[float]:
        return [row[measure] for row in self.rows[variant]]

    def ratios(self, variant: str, base: str, measure: str) -> list[float]:
        """Per seed, over `base` from the same seed: both start alike and read the same text, so
        that most of what seeds bring about falls out."""
        pairs = zip(self.values(variant, measure), self.values(base, measure), strict=True)
        return [own / other for own, other in pairs]

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


def span(values: list[float], form: str = "{:+.1%}") -> str:
    """Mean, and from where to where the seeds go."""
    mean = form.format(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def count_of(reached: list[bool]) -> str:
    """In how many seeds."""
    return f"in {sum(reached)} of {len(reached)} seed{'s' * (len(reached) > 1)}"


@dataclass
class Result:
    """A study's outcome. `bars` are the measures that the picture shows of the first table;
    `curves` are, by their title, the variants' values over `curve_axis`, means over seeds."""

    claim: str
    tables: list[Table]
    verdict: Verdict
    bars: tuple[str, ...]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    curve_axis: str = "step"


def to_json(result: Result, setup: Setup) -> dict[str, Any]:
    """The file's content: claim, setup, tables with every seed's measures, verdict, curves."""
    device = str(setup.device)
    if setup.device.type == "cuda":
        device = torch.cuda.get_device_name(setup.device)
    return {
        "study": setup.name, "claim": result.claim,
        "setup": {
            "command": setup.command,
            "device": device, "threads": torch.get_num_threads(), "dtype": str(setup.dtype),
            "seeds": list(range(setup.seeds)), "steps": setup.steps, "model": setup.base,
            "layer_pattern": setup.config().layer_pattern,
            "batch_size": setup.batch_size, "sequence_length": setup.sequence_length,
            "learning_rate": setup.learning_rate, "text": setup.text.description,
            "text_sha256": setup.text.fingerprint, "ling_ops": ling_ops.__version__,
            "torch": torch.__version__, "python": platform.python_version(),
        },
        "tables": [{"title": t.title, "rows": t.rows} for t in result.tables],
        "verdict": {"held": result.verdict.held, "text": result.verdict.text},
        "bars": list(result.bars), "curves": result.curves, "curve_axis": result.curve_axis,
    }  # fmt: skip


def conclude(result: Result, setup: Setup) -> None:
    """Print tables and verdict, and write JSON and picture."""
    print(f"\nclaim: {result.claim}\n")
    show({table.title: table.words() for table in result.tables})
    if setup.seeds == 1:
        result.verdict.text += " One seed: what chance alone brings about is not known."
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
        for columns in fitting(rows, console.width):
            table = RichTable(title=title, title_justify="left")
            for number, column in enumerate(columns):
                justify = "right" if number else "left"
                table.add_column(column, justify=justify, no_wrap=bool(number))
            for row in rows:
                table.add_row(*(row[column] for column in columns))
            console.print(table)


def fitting(rows: list[dict[str, str]], width: int) -> list[list[str]]:
    """The columns in as many tables as it takes for none to be wider than `width`: a terminal
    would cut numbers off. Each has the first column, and one other at least."""
    first, *others = rows[0]
    wide = {c: 3 + max(len(c), *(len(row[c]) for row in rows)) for c in rows[0]}
    groups, room = [[first]], width - 1 - wide[first]
    for column in others:
        if len(groups[-1]) > 1 and wide[column] > room:
            groups.append([first])
            room = width - 1 - wide[first]
        groups[-1].append(column)
        room -= wide[column]
    return groups
