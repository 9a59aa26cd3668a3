"""The article's model: its sizes, its formula of cost, its three claims of engineering."""

from __future__ import annotations

from ling_ops.models import LingConfig

from ..model import parameters
from .claim import Claim, of_table


def claims() -> list[Claim]:
    c = of_table("architecture")
    mixed = parameters(LingConfig.preset("article-1t"))
    every = parameters(LingConfig.preset("article-1t", layer_pattern="0-1"))
    sizes = "120 layers, hidden 12288, 128 experts of 4x width, 16 active, "
    share = "K / E of all pairs, whatever the balance: 16 / 128"
    shorter = 1 - mixed.active / every.active
    return [
        c("total parameters", 10, every.total / 1e12, "T", sizes + "all MoE"),
        c("total parameters", 10, mixed.total / 1e12, "T", sizes + "2-4-2-4"),
        c("active parameters", 2, every.active / 1e12, "T", sizes + "all MoE"),
        c("active parameters", 2, mixed.active / 1e12, "T", sizes + "2-4-2-4"),
        c("hidden size", 12288, 96 * 128, "", "96 heads of 128 (assumed)"),
        c("experts active", 12.5, 100 * 16 / 128, "%", "16 of 128"),
        c("experts active, example layer", 12.5, 100 * 8 / 64, "%", "8 of 64"),
        c("parameters active", 12.5, 100 * 2 / 10, "%", "2T of 10T"),
        c("FLOP per parameter, forward and backward", 2, 6, "FLOP",
          "2 forward, 4 backward; 2 is a forward"),
        c("gain over dense", 4.7, 10 * 2 / (2 * 2 + 0.1), "x", "(10 * 2) / (2 * 2 + 0.1)",
          rounding=0.1),
        c("mean use of an expert, balanced", (12, 15), 12.5, "%", share),
        c("mean use of an expert, unbalanced", (30, 70), 12.5, "%", share),
        c("time saved by 2-4-2-4", 30, 100 * shorter, "%",
          "active parameters of both at its sizes", rounding=1),
        c("speed gained by 2-4-2-4", 30, 100 * shorter / (1 - shorter), "%",
          "the same, as a rate"),
        c("quality lost by 2-4-2-4", 1.2, None, "%", "measure it: ling-ops study hierarchy"),
        c("dropped tokens, fixed capacity", 8, None, "%", "measure it: ling-ops study capacity"),
        c("dropped tokens, dynamic capacity", 2, None, "%", "measure it: ling-ops study capacity"),
    ]  # fmt: skip
