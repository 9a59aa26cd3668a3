"""The article's tables of serving, of a company's own model, and of open source."""

from __future__ import annotations

from ..gpu import gpus
from .claim import DAY_S, HOURS, YEAR_DAYS, Claim, of_table

#: name, active and total parameters, FLOP per query, GPUs, then K$: electricity, hardware, total.
_MODELS = (
    ("dense 1T", 1e12, 1e12, 2e15, 8, "a100", 12, 45, 57),
    ("dense 10T", 10e12, 10e12, 2e16, 64, "a100", 96, 360, 456),
    ("MoE 10T", 2e12, 10e12, 4e15, 16, "h100", 18, 90, 108),
)


#: name, thousands of rows, days, then K$: GPUs, staff, total; gain and its unit.
_SCENARIOS = (
    ("customer service", 100, 3, 15, 30, 45, 8, "% accuracy"),
    ("law", 500, 7, 50, 80, 130, 18, "% accuracy"),
    ("code", 1000, 14, 120, 150, 270, 25, "% passed"),
    ("finance", 2000, 21, 220, 200, 420, 0.12, "AUC"),
)


def _inference() -> list[Claim]:
    c = of_table("inference of 1e8 queries")
    claims = []
    for name, active, total, flop, number, kind, power, hardware, cost in _MODELS:
        gpu = gpus()[kind]
        hours = 1e8 * flop / gpu.flop_per_s / 3600
        kwh = hours * gpu.power_w / 1e3
        claims += [
            c(f"{name}: FLOP per query", flop, 2 * active * 1000, "FLOP",
              "2 * active * 1000 tokens (assumed)"),
            *(c(f"{name}: memory of its GPUs", number * gpu.memory_gb, total * width / 1e9, "GB",
                f"{bits}; {number} {kind.upper()}", at_most=True)
              for bits, width in (("bf16", 2), ("4 bits", 0.5))),
            c(f"{name}: electricity", power, kwh * 0.08 / 1e3, "K$",
              "full rate, $0.08/kWh", floor=True),
            c(f"{name}: total", cost, power + hardware, "K$", "electricity + hardware"),
        ]  # fmt: skip
    seconds = 1e8 * 4e15 / gpus()["h100"].flop_per_s
    spent = seconds / DAY_S / YEAR_DAYS * 35e3 / 3 / 1e3
    return [
        *claims,
        c("MoE 10T: hardware", 90, spent, "K$", "full rate, $35K / 3 years each", floor=True),
        c("dense 1T: hardware", 45, None, "K$", "no price of an A100"),
        c("dense 10T: hardware", 360, None, "K$", "no price of an A100"),
        c("hardware, dense 10T over dense 1T", 360 / 45, 10, "x", "FLOP per query"),
        c("electricity, dense 10T over dense 1T", 96 / 12, 10, "x", "FLOP per query"),
        c("dense 10T over MoE", 4, 456 / 108, "x", "$456K / $108K", rounding=1),
        c("MoE over dense 1T", 1, 108 / 57, "x", "$108K / $57K; 'close to' the smaller class"),
    ]  # fmt: skip


def _company() -> list[Claim]:
    c = of_table("a company's own model")
    h100 = gpus()["h100"]
    staff = 6 * 0.5 * 180
    once = 500 + 800 + staff
    year = 4 * (35e3 / 3 + h100.power_w / 1e3 * HOURS * YEAR_DAYS * 0.08) / 1e3
    busy = 100 * 2e8 * 4e15 / (4 * h100.flop_per_s * YEAR_DAYS * DAY_S)
    return [
        c("API, a year", 400, 2e8 * 0.002 / 1e3, "K$", "2e8 * $0.002"),
        c("API, 3 years", 1200, 3 * 400, "K$", "3 * $400K"),
        c("data", 500, None, "K$"),
        c("GPUs", 800, None, "K$", f"is ${800e3 / (1000 * 14 * HOURS):.2f} per A100 hour"),
        c("staff", 540, staff, "K$", "6 people * 6 months * $180K a year"),
        c("one-time cost", 1500, once, "K$", "data 500 + GPUs 800 + staff 540"),
        c("serving, a year", 120, year, "K$", "4 * ($35K / 3 + 700 W at $0.08/kWh)"),
        c("serving: use of 4 H100", 100, busy, "%", "2e8 queries * 4e15 FLOP a year",
          at_most=True),
        c("serving: memory of 4 H100", 4 * h100.memory_gb, 5000, "GB", "10T in 4 bits",
          at_most=True),
        c("own model, 3 years", 1860, 1500 + 3 * 120, "K$", "1500 + 3 * 120, as stated"),
        c("own model, 3 years", 1860, once + 3 * 120, "K$", "the parts + 3 * 120"),
        c("hidden gains", 3900, 2000 + 3 * 300, "K$", "2000 + 3 * 300, no valuation"),
        c("net present value", 2040, 3900 - 1860, "K$", "as stated"),
        c("net present value", 2040, 2900 - once - 360, "K$", "gains - parts - 3 * 120"),
        c("NPV against API, summary", (2, 8), 2.04, "M$", "as stated above"),
        c("NPV against API, summary", (2, 8), (2900 - once - 360) / 1e3, "M$", "as computed"),
        c("long-term saving of own model, summary", 60, 100 * (1 - 1860 / 1200), "%",
          "$1.86M against $1.2M of API"),
    ]  # fmt: skip


def _scenarios() -> list[Claim]:
    c = of_table("fine-tuning scenarios")
    claims = []
    for name, rows, days, gpu, staff, total, gain, unit in _SCENARIOS:
        claims += [
            c(name, total, gpu + staff, "K$", f"GPUs {gpu} + staff {staff}"),
            c(f"{name}: data", rows, None, "K rows"),
            c(f"{name}: days", days, None, "days"),
            c(f"{name}: gain", gain, None, unit),
        ]
    return claims


def _open_source() -> list[Claim]:
    c = of_table("open source and investment")
    return [
        c("API, $ per million tokens", (1, 60), 4.5, "$", "the first table's middle, 1.8T"),
        c("margin of closed models", (70, 85), None, "%"),
        c("margin of open models", (30, 50), None, "%"),
        c("market of closed models", (50, 80), None, "B$"),
        c("market of open models", 500, None, "B$"),
        c("Llama: spent", 280, 200 + 50 + 30, "M$", "training + infrastructure + relations"),
        c("Llama: value", 32, 0.5 + 2 + 10 + 20, "B$", "0.5 + 2 + 10 + 20", rounding=1),
        c("Llama: return", 114, 32 / 0.28, "x", "$32B / $280M", rounding=1),
        c("Ling: share of sales, a year", 900, 0.03 * 30e3, "M$", "3 % of $30B"),
        c("Ling: sales in 3 years", 10, 30, "B$", "summary against section 2.1"),
        c("Ling: value in 3 years", (5, 8), 3 * (0.9 + 0.5), "B$",
          "3 * ($900M + $500M); ventures without a figure"),
        c("portfolio", 100, 30 + 40 + 20 + 10, "%", "30 + 40 + 20 + 10"),
        c("margin gained", 10, 15 - 5, "points", "AI cost from 15 % to 5 % of revenue"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    return [*_inference(), *_company(), *_scenarios(), *_open_source()]
