"""Draws moe_layer.png: six tokens through a layer of four experts, two experts per token.

The routing is computed by ``ling_ops``; only the places of the boxes are chosen here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

import ling_ops

T, E, K = 6, 4, 2
EXPERT_COLORS = ("#c2410c", "#0e7490", "#4d7c0f", "#6d28d9")
COLUMNS = {"tokens": 0.0, "pairs": 2.6, "rows": 6.2, "out": 9.6}


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.5) -> None:
    axes.add_patch(plt.Rectangle((x, y - 0.19), width, 0.38, facecolor=color, alpha=0.9))
    axes.text(x + width / 2, y, text, ha="center", va="center", color="white", fontsize=8)


def arrow(axes: Axes, x0: float, y0: float, x1: float, y1: float, color: str) -> None:
    axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "-", "color": color, "lw": 1.1})


def draw(path: Path, seed: int = 1) -> None:
    torch.manual_seed(seed)
    weights, indices = ling_ops.topk_gate(2 * torch.randn(T, E), K)
    routing = ling_ops.route(indices, E)
    figure, axes = plt.subplots(figsize=(10.5, 5.2), dpi=110)
    pair_y = [T - (p / K) - 0.25 for p in range(T * K)]
    row_y = [T - r * 0.44 - int(expert) * 0.2 for r, expert in enumerate(rows_expert(routing))]
    for token in range(T):
        y = T - token - 0.5
        box(axes, COLUMNS["tokens"], y, f"token {token}", "#475569")
        box(axes, COLUMNS["out"], y, f"output {token}", "#475569")
        for k in range(K):
            pair, expert = token * K + k, int(indices[token, k])
            row, color = int(routing.token_row[token, k]), EXPERT_COLORS[expert]
            label = f"expert {expert}, w {weights[token, k]:.2f}"
            box(axes, COLUMNS["pairs"], pair_y[pair], label, color, 2.0)
            box(axes, COLUMNS["rows"], row_y[row], f"row {row} (token {token})", color, 2.0)
            arrow(axes, 1.5, y, COLUMNS["pairs"], pair_y[pair], color)
            arrow(axes, COLUMNS["pairs"] + 2, pair_y[pair], COLUMNS["rows"], row_y[row], color)
            arrow(axes, COLUMNS["rows"] + 2, row_y[row], COLUMNS["out"], y, color)
    for x, title in (
        (0.75, "x [T, H]"), (2.05, "1. gate"), (5.4, "2. route"), (7.2, "3. expert GEMM"),
        (8.9, "4. combine"), (10.35, "out [T, H]"),
    ):  # fmt: skip
        axes.text(x, T + 0.35, title, ha="center", fontsize=9, weight="bold")
    axes.set_xlim(-0.2, 11.3)
    axes.set_ylim(-0.4, T + 0.8)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight")


def rows_expert(routing: ling_ops.Routing) -> list[int]:
    """The expert of each row."""
    return torch.repeat_interleave(torch.arange(E), routing.expert_offsets.diff()).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    draw(parser.parse_args().out)
