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

    rows, bars = values["tables"][0]["rows"], values["bars"]
    panels = len(bars) + bool(values["curves"])
    with plt.rc_context(_STYLE):
        height = 1.4 + 0.32 * len(rows)
        figure, axes = plt.subplots(
            1, panels, figsize=(3.6 * panels, max(2.8, height)), layout="constrained", squeeze=False
        )
        held = "held" if values["verdict"]["held"] else "did not hold"
        figure.suptitle(
            f"{values['study']}: the claim {held}", x=0.01, ha="left", fontweight="bold"
        )
        for place, measure in enumerate(bars):
            _bars(axes[0, place], rows, measure, labels=place == 0)
        if values["curves"]:
            _curves(axes[0, -1], values)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=90)
        plt.close(figure)
    return image.getvalue()


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
    for place, (mean, end) in enumerate(zip(means, ends, strict=True)):
        axes.annotate(
            form.format(mean), (end, place), xytext=(5, 0), textcoords="offset points", va="center"
        )


def _curves(axes: Any, values: dict[str, Any]) -> None:
    for place, (name, points) in enumerate(values["curves"].items()):
        color = COLORS[place % len(COLORS)]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label=name)
    axes.set_title(values["curve_title"], loc="left")
    axes.set_xlabel(values["curve_axis"])
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.legend(fontsize=7, edgecolor="none")
