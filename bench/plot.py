"""Draws bench/results/<gpu>.png from bench/results/<gpu>.json."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent / "results"
COLORS = {
    "ling_ops": "#c2410c",
    "torch": "#475569",
    "transformers": "#0e7490",
    "cublas": "#a3a3a3",
}
LAYERS = {
    (2048, 512, 256): "Ling-mini",
    (4096, 1024, 256): "Ling-flash",
    (2048, 768, 128): "Qwen3-30B",
    (4096, 14336, 8): "Mixtral",
}
Rows = list[dict[str, Any]]


def color(provider: str) -> str:
    return COLORS.get(provider, "#7c3aed")


def layer_name(row: dict[str, Any]) -> str:
    known = LAYERS.get((row["H"], row["I"], row["E"]))
    sizes = f"{row['H']}/{row['I']}/{row['E']}"
    return f"{known or sizes}\nT={row['T']}"


def pick(rows: Rows, bench: str, **wanted: Any) -> Rows:
    return [
        row
        for row in rows
        if row["bench"] == bench and all(row[key] == value for key, value in wanted.items())
    ]


def bars(axes: Axes, rows: Rows, height: Callable[[dict[str, Any]], float], label: str) -> None:
    """Groups of bars: one group per layer shape, one bar per provider."""
    if not rows:
        return
    names = list(dict.fromkeys(layer_name(row) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = 0.8 / max(1, len(providers))
    for index, provider in enumerate(providers):
        mine = {layer_name(r): r for r in rows if r["provider"] == provider}
        places = [i + (index - (len(providers) - 1) / 2) * width for i in range(len(names))]
        values = [height(mine[name]) if name in mine else 0.0 for name in names]
        drawn = axes.bar(places, values, width, color=color(provider), label=provider)
        texts = [f"{value:.3g}" if value else "" for value in values]
        axes.bar_label(drawn, texts, fontsize=6, padding=1)
    axes.set_xticks(range(len(names)), names, fontsize=6.5)
    axes.set_ylabel(label)
    axes.margins(y=0.12)


def curves(axes: Axes, rows: Rows, key: str, suffix: str = "", style: str = "-") -> None:
    """Microseconds over a size, one curve per provider and the floor, both axes logarithmic."""
    if not rows:
        return
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r[key])
        axes.plot(
            [r[key] for r in mine], [1e3 * r["ms"] for r in mine], style, marker="o", ms=3,
            color=color(provider), label=provider + suffix,
        )  # fmt: skip
    floors = sorted({(r[key], r["floor_ms"]) for r in rows})
    axes.plot(
        [x for x, _ in floors], [1e3 * y for _, y in floors], ":", color="black", lw=1,
        label=f"floor{suffix}",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel({"T": "tokens T", "E": "experts E"}[key])
    axes.set_ylabel("time, µs")


def training_panel(axes: Axes, rows: Rows) -> str:
    bars(axes, pick(rows, "moe_train", what="fwd_bwd"), lambda r: r["ms"] / r["floor_ms"],
         "time / floor (lower is better)")  # fmt: skip
    axes.axhline(1, color="black", ls=":", lw=1)
    return "Training step of the layer, forward + backward"


def product_panel(axes: Axes, rows: Rows) -> str:
    def rate(row: dict[str, Any]) -> float:
        return 4 * row["T"] * row["K"] * row["H"] * row["I"] / row["ms"] / 1e9

    bars(axes, pick(rows, "gemm", what="up_fwd"), rate, "TFLOP/s (higher is better)")
    return "Grouped product: the up projection"


def inference_panel(axes: Axes, rows: Rows) -> str:
    curves(axes, pick(rows, "moe_infer", H=2048, I=512, E=256), "T")
    return "Inference of a Ling-mini layer"


def gate_tokens_panel(axes: Axes, rows: Rows) -> str:
    curves(axes, pick(rows, "gate", what="softmax_fwd", E=256), "T", " softmax")
    curves(axes, pick(rows, "gate", what="sigmoid_group_fwd", E=256), "T", " sigmoid, groups", "--")
    return "Gate, E=256, top-8, fp32 logits"


def gate_experts_panel(axes: Axes, rows: Rows) -> str:
    curves(axes, pick(rows, "gate", what="softmax_fwd", T=32768), "E", " gate")
    curves(axes, pick(rows, "route", what="fwd", T=32768), "E", " route", "--")
    return "Gate and route, T=32768, K=8"


def route_panel(axes: Axes, rows: Rows) -> str:
    curves(axes, pick(rows, "route", what="fwd", E=256), "T")
    return "Route, E=256, K=8"


PANELS = (training_panel, product_panel, inference_panel, gate_tokens_panel, gate_experts_panel,
          route_panel)  # fmt: skip


def draw(record: dict[str, Any], target: Path) -> None:
    figure, grid = plt.subplots(2, 3, figsize=(19, 10), constrained_layout=True)
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        title = panel(axes, record["rows"])
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        if not axes.lines and not axes.patches:
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        else:
            axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=3 if axes.patches else 1)
    ceilings = record.get("ceilings", {})
    figure.suptitle(
        f"{record['device']}, torch {record['torch']}, CUDA {record['cuda']}, "
        f"{record['date'][:10]}; dense bf16 {ceilings.get('bf16_tflops', '?')} TFLOP/s, "
        f"copy {ceilings.get('copy_tb_s', '?')} TB/s; floors at an H100's 790 TFLOP/s and 3.0 TB/s",
        fontsize=12,
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", nargs="*", type=Path, help="records (default: all)")
    options = parser.parse_args()
    records = options.record or sorted(RESULTS.glob("*.json"))
    if not records:
        print(f"plot: no record in {RESULTS}", file=sys.stderr)
        return 1
    for path in records:
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
        print(path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
