"""The article's first table, and the table of models by size."""

from __future__ import annotations

from ling_ops.models import LingConfig

from ..gpu import gpus
from ..model import parameters
from .claim import DAY_S, HOURS, Claim, of_table

#: $ per GPU hour of the MoE column: $400M for 40000 GPUs and 120 days.
USD_PER_GPU_HOUR = 400e6 / (40e3 * 120 * HOURS)


def _needed_percent(flop: float, number: float, days: float) -> float:
    return 100 * flop / (number * gpus()["h100"].flop_per_s * days * DAY_S)


def _training_columns() -> list[Claim]:
    c = of_table("key figures")
    price = f"at the MoE column's ${USD_PER_GPU_HOUR:.2f} per GPU hour"
    named = parameters(LingConfig.preset("ling-1t")).total / 1e12
    return [
        c("parameters, first column", (0.1, 1.0), 1.8, "T", "the column's head says 100B class"),
        c("parameters of Ling-1T", 10, 1.0, "T", f"its name (as published: {named:.4f}T)"),
        c("parameters active", 2, 0.125 * 10, "T", "12.5 % of 10T"),
        c("training, 1.8T", 60, 25e3 * 90 * HOURS * USD_PER_GPU_HOUR / 1e6, "M$",
          "25000 GPUs * 90 days " + price),
        c("training, dense 10T", (800, 1200), 80e3 * 180 * HOURS * USD_PER_GPU_HOUR / 1e6, "M$",
          "80000 GPUs * 180 days " + price),
        c("training, MoE 10T", (300, 500), 390.3, "M$", "the sum of its own breakdown"),
        c("training days, dense 10T", 180, 10 / 2 * 40 / 80 * 120, "days",
          "5 x the FLOP of the MoE (10T against 2T) on 2 x its GPUs"),
        c("training days, 1.8T", 90, None, "days"),
        c("training days, MoE 10T", 120, None, "days"),
    ]  # fmt: skip


def _serving_columns() -> list[Claim]:
    c = of_table("key figures")
    a100, h100 = gpus()["a100"].flop_per_s, gpus()["h100"]
    queries = "the table for 1e8 queries, of 1000 tokens (assumed)"
    # On the GPUs of the columns themselves: the table for 1e8 queries has others, but no latency.
    rate = "2 * active * 1000 tokens (assumed) at the full bf16 rate of the column's "
    in_fp8 = 1e3 * 4e15 / (4 * h100.rate_flop_per_s("fp8"))
    claims = [
        c("$ per million tokens, 1.8T", (3, 6), None, "$"),
        c("$ per million tokens, dense 10T", (45, 80), 456e3 / 1e11 * 1e6, "$", queries),
        c("$ per million tokens, MoE 10T", (8, 15), 108e3 / 1e11 * 1e6, "$", queries),
        c("trillions over 100B class, MoE", (3, 8), 11.5 / 4.5, "x", "middles: $11.5 / $4.5"),
        c("trillions over 100B class, dense", (3, 8), 62.5 / 4.5, "x", "middles: $62.5 / $4.5"),
        c("first token, 1.8T", (200, 400), None, "ms"),
        c("first token, dense 10T", (1200, 2000), 1e3 * 2e16 / (8 * a100), "ms",
          rate + "8 A100", floor=True),
        c("first token, MoE 10T", (350, 600), 1e3 * 4e15 / (4 * h100.flop_per_s), "ms",
          rate + f"4 H100 (fp8: {in_fp8:.0f} ms)", floor=True),
    ]  # fmt: skip
    for name, stated, size, hardware in (
        ("1.8T", 80, 1.8e12, "one A100"), ("dense 10T", 640, 10e12, "8 A100"),
        ("MoE 10T", 280, 10e12, "4 H100"),
    ):  # fmt: skip
        for kind, width in (("bf16", 2), ("8 bits", 1), ("4 bits", 0.5)):
            claims.append(c(f"memory of {name} parameters", stated, size * width / 1e9, "GB",
                            f"{kind}; {hardware}", at_most=True))  # fmt: skip
    claims.append(c("memory of 4 H100", 280, 4 * h100.memory_gb, "GB", "4 * 80 GB"))
    return claims


def _scores() -> list[Claim]:
    c = of_table("key figures")
    claims = []
    columns = ("1.8T", "dense 10T", "MoE 10T")
    mmlu, maths = (86.4, 92.5, 89.2), (72.3, 88.6, 84.1)
    for name, general, special in zip(columns, mmlu, maths, strict=True):
        claims += [
            c(f"MMLU, {name}", general, None, "points"),
            c(f"maths, {name}", special, None, "points"),
        ]
    for name, stated, score, training, serving in (
        ("dense 10T", 0.12, 92.5, 1000, 62.5), ("MoE 10T", 0.65, 89.2, 400, 11.5),
    ):  # fmt: skip
        for how, cost, base in (("training $", training, 60), ("$ per token", serving, 4.5)):
            claims.append(c(f"score per $, {name}", stated, score / cost / (86.4 / base), "x",
                            f"MMLU / {how}, middles, over 1.8T's", rounding=0.01))  # fmt: skip
    return claims


def _models() -> list[Claim]:
    c = of_table("models by size")
    tokens = 5e26 / (6 * 2e12)
    claims = [
        c(f"{name}: {what}", stated, None, unit)
        for name, size, flop, cost in (("GPT-3", 175, 3.14e23, 4.6), ("PaLM", 540, 2.5e24, 35),
                                       ("GPT-4.5", 3000, 8e25, 180))
        for what, stated, unit in (("parameters", size, "B"), ("training FLOP", flop, "FLOP"),
                                   ("training", cost, "M$"))
    ]  # fmt: skip
    return [
        *claims,
        c("GPT-4: parameters", 1.8, 1.8, "T", "the first table"),
        c("GPT-4: training FLOP", 2.1e25, None, "FLOP"),
        c("GPT-4: training", 63, 60, "M$", "the first table"),
        c("GPT-4: training FLOP, share of peak", 100, _needed_percent(2.1e25, 25e3, 90), "%",
          "2.1e25 FLOP on 25000 H100 in 90 days", at_most=True),
        c("Ling-1T: parameters", 10, 10, "T", "the first table"),
        c("Ling-1T: training FLOP", 5e26, None, "FLOP"),
        c("Ling-1T: training", 400, 390.3, "M$", "the sum of its breakdown", rounding=100),
        c("Ling-1T: training FLOP, share of peak", 100, _needed_percent(5e26, 40e3, 120), "%",
          "5e26 FLOP on 40000 H100 in 120 days, 989 TFLOP/s each", at_most=True),
        c("Ling-1T: training text", 10, tokens * 4 / 1e12, "TB",
          f"5e26 / (6 * 2T) = {tokens / 1e12:.1f}T tokens of 4 bytes (assumed), read once"),
        c("GPT-3: relative cost of inference", 1, None, "x", "the unit of this column"),
        c("PaLM: relative cost of inference", 3.1, 540 / 175, "x", "540B / 175B", rounding=0.1),
        c("GPT-4: relative cost of inference", 3.5, None, "x", "active parameters not given"),
        c("GPT-4.5: relative cost of inference", 4.8, None, "x", "active parameters not given"),
        c("Ling-1T: relative cost of inference", 5.2, 2000 / 175, "x", "2T active / 175B"),
        c("Ling-1T over GPT-4: cost of inference", 5.2 / 3.5, 11.5 / 4.5, "x",
          "5.2 / 3.5 against the first table's middles, $11.5 / $4.5"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    return [*_training_columns(), *_serving_columns(), *_scores(), *_models()]
