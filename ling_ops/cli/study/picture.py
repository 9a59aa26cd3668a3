"""A study's picture, drawn from its JSON."""

from __future__ import annotations

import io
import statistics
from typing import Any

from ling_ops.cli.study.report import COLUMNS

INK, GRID = "#22272e", "#e6e8eb"
COLORS = ("#4c78a8", "#d1495b", "#59a14f", "#b07aa1", "#e59f3c", "#6b6f76", "#76b7b2", "#9c755f")
_POINTS = {"bits_per_byte", "pruned", "recovered"}  # a bar from 0 would hide what differs
_STYLE = {
    "font.size": 9, "axes.titlesize": 9, "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def draw(values: dict[str, Any]) -> bytes:
    """PNG of a study: bars of its first table's measures, and curves where there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, bars, curves = values["tables"][0]["rows"], values["bars"], values["curves"]
    heights = [1.0 + 0.32 * len(rows), *([2.6] if curves else [])]
    with plt.rc_context(_STYLE):
        width = max(len(bars), len(curves))
        figure = plt.figure(
            figsize=(3.6 * width, max(2.8, sum(heights) + 0.4)), layout="constrained"
        )
        figure.suptitle(_title(values), x=0.01, ha="left", fontweight="bold")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for place, (axes, measure) in enumerate(zip(_row(parts[0], bars), bars, strict=True)):
            _bars(axes, rows, measure, labels=place == 0)
        if curves:
            for place, (axes, title) in enumerate(zip(_row(parts[1], curves), curves, strict=True)):
                _curves(axes, title, values, legend=place == 0)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=90)
        plt.close(figure)
    return image.getvalue()


def _row(part: Any, content: Any) -> Any:
    """One panel for each of `content`."""
    return part.subplots(1, len(content), squeeze=False)[0]


def _title(values: dict[str, Any]) -> str:
    """Study, verdict, and where from: what a picture must say that stands alone."""
    setup, held = values["setup"], values["verdict"]["held"]
    seeds = len(setup["seeds"])
    device = "CPU" if setup["device"] == "cpu" else setup["device"]
    return (
        f"{values['study']}: the claim {'held' if held else 'did not hold'} "
        f"({device}, {setup['steps']} steps; mean of {seeds} seed{'s' * (seeds > 1)}"
        f"{', lines: ± half their range' * (seeds > 1)})"
    )


def _bars(axes: Any, rows: dict[str, list[dict[str, float]]], measure: str, labels: bool) -> None:
    """Mean and half range over the seeds: bars from 0, or points where all values are alike."""
    names = list(rows)
    series = [[seed[measure] for seed in rows[name]] for name in names]
    means = [statistics.fmean(values) for values in series]
    spread = [(max(values) - min(values)) / 2 for values in series]
    ends = [mean + half for mean, half in zip(means, spread, strict=True)]
    starts = [mean - half for mean, half in zip(means, spread, strict=True)]
    colors = [COLORS[i % len(COLORS)] for i in range(len(names))]
    if measure in _POINTS:
        axes.errorbar(
            means, range(len(names)), xerr=spread, fmt="none", ecolor=INK, elinewidth=1, zorder=1
        )
        axes.scatter(means, range(len(names)), color=colors, zorder=2)
        room = max(ends) - min(starts) or 1.0
        axes.set_xlim(min(starts) - 0.1 * room, max(ends) + 0.45 * room)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
    else:
        axes.barh(range(len(names)), means, xerr=spread, color=colors, height=0.7)
        axes.set_xlim(0, 1.35 * max([*ends, 0.0]) or 1)
    axes.set_yticks(range(len(names)), names if labels else [""] * len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    title, form = COLUMNS[measure]
    axes.set_title(title, loc="left")
    axes.xaxis.set_major_formatter((lambda x, _: f"{x:.0%}") if "%" in form else _ticks)
    for place, (mean, end) in enumerate(zip(means, ends, strict=True)):
        axes.annotate(
            form.format(mean), (end, place), xytext=(5, 0), textcoords="offset points", va="center"
        )


def _curves(axes: Any, title: str, values: dict[str, Any], legend: bool) -> None:
    for place, (name, points) in enumerate(values["curves"][title].items()):
        color = COLORS[place % len(COLORS)]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label=name)
    axes.set_title(title, loc="left")
    axes.set_xlabel(values["curve_axis"])
    axes.yaxis.set_major_formatter(_ticks)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    if not title.startswith("bits/byte"):
        axes.set_ylim(bottom=0)
    if legend:  # beside the axes, where it hides no curve
        axes.figure.legend(loc="outside left center", fontsize=8, frameon=False)


def _ticks(value: float, _: int) -> str:
    """Millions and thousands by letters: matplotlib's own factor stands away from its axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"
