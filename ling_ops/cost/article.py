"""The article's figures, computed again from its own inputs."""

from __future__ import annotations

from dataclasses import dataclass

from ling_ops.models import LingConfig

from .gpu import gpus
from .model import parameters

DAY_S, YEAR_DAYS, TOLERANCE = 86400, 365, 0.02


@dataclass(frozen=True)
class Claim:
    """One figure: as stated, as computed from the article's inputs, and whether they agree."""

    table: str
    figure: str
    stated: float
    computed: float
    unit: str
    how: str

    @property
    def follows(self) -> bool:
        """Whether the two agree to 2 %."""
        return abs(self.computed - self.stated) <= TOLERANCE * abs(self.stated)


def _model() -> list[Claim]:
    mixed = parameters(LingConfig.preset("article-1t"))
    every = parameters(LingConfig.preset("article-1t", layer_pattern="0-1"))
    table, how = "model", "120 layers, hidden 12288, 128 experts of 4x width, 16 active, "
    return [
        Claim(table, "total parameters", 10, every.total / 1e12, "T", how + "all MoE"),
        Claim(table, "total parameters", 10, mixed.total / 1e12, "T", how + "2-4-2-4"),
        Claim(table, "active parameters", 2, every.active / 1e12, "T", how + "all MoE"),
        Claim(table, "active parameters", 2, mixed.active / 1e12, "T", how + "2-4-2-4"),
        Claim(table, "experts active", 12.5, 100 * 16 / 128, "%", "16 of 128"),
        Claim(table, "parameters active", 12.5, 100 * 2 / 10, "%", "2T of 10T"),
        Claim(table, "gain over dense", 4.7, 10 * 2 / (2 * 2 + 0.1), "x", "(10*2)/(2*2+0.1)"),
    ]


def _training() -> list[Claim]:
    table, h100 = "training cost", gpus()["h100"]
    gpu = 40e3 * 35e3 / 3 * 120 / YEAR_DAYS / 1e6
    power = 40e3 * 0.7 * 24 * 120 * 0.08 / 1e6
    staff = 100 * 250e3 * 0.33 / 1e6
    peak = 40e3 * h100.flop_per_s * 120 * DAY_S
    fixed = 28 + 12 + 80 + 45
    return [
        Claim(table, "GPU depreciation", 153, gpu, "M$", "40000 * $35K / 3 years * 120 days"),
        Claim(table, "electricity", 64, power, "M$", "40000 * 700 W * 2880 h * $0.08/kWh"),
        Claim(table, "staff", 8.3, staff, "M$", "100 * $250K * 0.33 years"),
        Claim(table, "rerun reserve", 80, 0.2 * 400, "M$", "20 % of $400M"),
        Claim(table, "sum of the parts", 390, 153 + 64 + 8.3 + fixed, "M$", "parts as stated"),
        Claim(table, "sum of the parts", 390, gpu + power + staff + fixed, "M$",
              "parts as computed"),
        Claim(table, "training FLOP", 5e26, peak, "FLOP",
              "40000 H100 for 120 days at 100 % of 989 TFLOP/s is all there is"),
        Claim(table, "cost per parameter", 0.04, 400e6 / 10e3, "$ per B", "$400M / 10000B"),
        Claim(table, "cost per parameter, dense", 0.12, 1.2e9 / 10e3, "$ per B",
              "$1.2B / 10000B"),
        Claim(table, "time saved", 33, 100 * (1 - 120 / 180), "%", "120 against 180 days"),
        Claim(table, "GPUs saved", 50, 100 * (1 - 40 / 80), "%", "40000 against 80000"),
        Claim(table, "cost saved", 67, 100 * (1 - 400 / 1200), "%", "$400M against $1.2B"),
    ]  # fmt: skip


def _inference() -> list[Claim]:
    table = "inference of 1e8 queries"
    claims = [
        Claim(table, "memory of 10T parameters", 280, 10e12 * size / 1e9, "GB", f"10T in {name}")
        for name, size in (("bf16", 2), ("8 bits", 1), ("4 bits", 0.5))
    ]
    claims.append(Claim(table, "memory of 4 H100", 280, 4 * 80, "GB", "4 * 80 GB"))
    for name, active, flop, power, hardware, total in (
        ("dense 1T", 1, 2e15, 12, 45, 57), ("dense 10T", 10, 2e16, 96, 360, 456),
        ("MoE 10T", 2, 4e15, 18, 90, 108),
    ):  # fmt: skip
        claims += [
            Claim(table, f"{name}: FLOP per query", flop, 2 * active * 1e12 * 1000, "FLOP",
                  "2 * active parameters * 1000 tokens (the tokens are assumed)"),
            Claim(table, f"{name}: cost", total, power + hardware, "K$", "power + hardware"),
        ]  # fmt: skip
    how = "the table's $108K over 1e8 queries of 1000 tokens"
    claims.append(Claim(table, "MoE 10T: cost per million tokens", 8, 108e3 / 1e11 * 1e6, "$", how))
    claims.append(Claim(table, "MoE over dense 10T", 25, 100 * 108 / 456, "%", "$108K / $456K"))
    return claims


def _scaling() -> list[Claim]:
    table = "scaling law"
    rows = (("GPT-3 to GPT-4", 1.8, 1.8 / 0.175), ("GPT-4 to Ling-1T", 1.5, 10 / 1.8),
            ("Ling-1T to 100T", 1.8, 10.0))  # fmt: skip
    claims = [
        Claim(table, name, stated, ratio**0.076, "x", "(ratio of parameters)^0.076, of the loss")
        for name, stated, ratio in rows
    ]
    how = "1.8 / 90 per 1T, so ten times that per 10T"
    claims.append(Claim(table, "gain per 10T, 10T to 100T", 0.020, 1.8 / 90 * 10, "x", how))
    return claims


def _fine_tuning() -> list[Claim]:
    table, parts = "fine-tuning", 500 + 800 + 6 * 0.5 * 180
    claims = [
        Claim(table, "staff", 540, 6 * 0.5 * 180, "K$", "6 people * 6 months * $180K a year"),
        Claim(table, "one-time cost", 1500, parts, "K$", "data 500 + GPUs 800 + staff 540"),
        Claim(table, "3 years, own model", 1860, parts + 360, "K$", "the parts + 3 * 120"),
        Claim(table, "3 years of API", 1200, 3 * 2e8 * 0.002 / 1e3, "K$", "2e8 * $0.002 * 3"),
        Claim(table, "hidden gains", 3900, 2000 + 3 * 300, "K$", "2000 + 3 * 300, no valuation"),
    ]
    for name, gpu, staff, total in (
        ("customer service", 15, 30, 45), ("law", 50, 80, 130), ("code", 120, 150, 270),
        ("finance", 220, 200, 420),
    ):  # fmt: skip
        claims.append(Claim(table, name, total, gpu + staff, "K$", "GPUs + staff"))
    return claims


def article_claims() -> list[Claim]:
    """Every figure of the article's cost tables that its own inputs give."""
    return _model() + _training() + _inference() + _scaling() + _fine_tuning()
