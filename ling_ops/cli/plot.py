"""The picture of a run: loss curve on top, one heat map of expert load per MoE layer below."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from ling_ops.cli.checkpoint import write_atomically
from ling_ops.cli.progress import relative_load

COLUMNS = 4
INK, TRAIN, VALID, BASE = "#22272e", "#4c78a8", "#d1495b", "#8a8f98"


def draw_run(events: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw the events of a metrics file into the PNG `path` (replaced atomically)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [event for event in events if event["event"] == "train"]
    layers = [layer["layer"] for layer in train[0]["layers"]] if train else []
    columns = min(COLUMNS, max(1, len(layers)))
    rows = math.ceil(len(layers) / columns)
    style = {
        "font.size": 9, "axes.titlesize": 9, "axes.edgecolor": BASE, "text.color": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12.5, 4.2 + 2.4 * rows), layout="constrained")
        grid = figure.add_gridspec(1 + rows, columns, height_ratios=[2.0] + [1.0] * rows)
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        _draw_loss(figure.add_subplot(grid[0, :]), events)
        if layers:
            _draw_heat_maps(figure, grid, train, layers, columns)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130)
        plt.close(figure)
    write_atomically(path, image.getvalue())


def _draw_loss(axes: Any, events: list[dict[str, Any]]) -> None:
    train = [(e["step"], e["bits_per_byte"]) for e in events if e["event"] == "train"]
    valid = [e for e in events if e["event"] == "validation"]
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAIN, linewidth=1.2, label="training")
    if valid:
        points = [(e["step"], e["bits_per_byte"]) for e in valid]
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=VALID,
            markersize=4,
            label="held out",
            clip_on=False,
        )
        baseline = valid[-1]["order0_bits_per_byte"]
        axes.axhline(
            baseline, color=BASE, linestyle="--", linewidth=1,
            label=f"order-0 entropy, held out ({baseline:.2f})",
        )  # fmt: skip
        step, value = points[-1]
        axes.annotate(
            f"{value:.2f}", (step, value), xytext=(0, 8), textcoords="offset points",
            ha="right", color=VALID, fontweight="bold",
        )  # fmt: skip
    top = max([value for _, value in train[:1]] + [e["order0_bits_per_byte"] for e in valid] + [1])
    axes.set(
        xlabel="step",
        ylabel="bits per byte",
        xlim=(0, max((e["step"] for e in events), default=1)),
        ylim=(0, 1.05 * min(top, 12)),
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    if train or valid:
        axes.legend(frameon=False, loc="upper right")


def _draw_heat_maps(figure: Any, grid: Any, train: list, layers: list[int], columns: int) -> None:
    from matplotlib.colors import TwoSlopeNorm

    steps = [event["step"] for event in train]
    norm = TwoSlopeNorm(1.0, 0.0, 2.0)
    every, mesh = [], None
    for place, layer in enumerate(layers):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        loads = [relative_load(event["layers"][place]["utilization"]) for event in train]
        image = [list(column) for column in zip(*loads, strict=True)]  # [experts, time]
        extent = (0, steps[-1], len(image) - 0.5, -0.5)
        mesh = axes.imshow(
            image, aspect="auto", cmap="RdBu_r", norm=norm, extent=extent, interpolation="nearest"
        )
        drops = sum(event["layers"][place]["drop_rate"] for event in train) / len(train)
        axes.set_title(
            f"layer {layer}: MaxVio {train[-1]['layers'][place]['max_vio']:.2f}, "
            f"dropped {drops:.1%}",
            loc="left",
        )
        if place % columns == 0:
            axes.set_ylabel("expert")
        if place + columns >= len(layers):
            axes.set_xlabel("step")
        every.append(axes)
    bar = figure.colorbar(mesh, ax=every, aspect=18, extend="max", extendfrac=0.07, pad=0.01)
    bar.set_label("utilisation / fair share")
    bar.set_ticks([0, 0.5, 1, 1.5, 2])
