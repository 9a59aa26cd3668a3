"""The article's tables of what training costs."""

from __future__ import annotations

from .claim import HOURS, YEAR_DAYS, Claim, of_table


def _breakdown() -> list[Claim]:
    c = of_table("training cost")
    gpu = 40e3 * 35e3 / 3 * 120 / YEAR_DAYS / 1e6
    power = 40e3 * 0.7 * HOURS * 120 * 0.08 / 1e6
    staff = 100 * 250e3 * 0.33 / 1e6
    others = 153 + 64 + 28 + 8.3 + 12 + 45
    return [
        c("GPU depreciation", 153, gpu, "M$", "40000 * $35K / 3 years * 120 days"),
        c("electricity", 64, power, "M$", "40000 * 700 W * 2880 h * $0.08/kWh"),
        c("network and storage", 28, None, "M$"),
        c("staff", 8.3, staff, "M$", "100 * $250K * 0.33 years", rounding=0.1),
        c("staff years", 0.33, 120 / YEAR_DAYS, "years", "120 days", rounding=0.01),
        c("data", 12, None, "M$"),
        c("rerun reserve", 80, 0.2 * 400, "M$", "20 % of $400M"),
        c("rerun reserve", 80, 0.2 * others, "M$", "20 % of the other parts as stated"),
        c("operations", 45, None, "M$"),
        c("sum of the parts", 390, others + 80, "M$", "parts as stated"),
        c("sum of the parts", 390, others + 80 + gpu + power + staff - 153 - 64 - 8.3, "M$",
          "depreciation, electricity and staff as computed"),
        c("sum, rounded", 400, others + 80, "M$", "parts as stated", rounding=100),
    ]  # fmt: skip


def _against_fine_tuning() -> list[Claim]:
    c = of_table("from scratch against fine-tuning")
    return [
        c("from scratch", 400, 390.3, "M$", "the breakdown", rounding=100),
        c("fine-tuning", (1, 5), 0.045, "M$", "the scenarios' least"),
        c("fine-tuning", (1, 5), 0.42, "M$", "the scenarios' most"),
        c("fine-tuning", (1, 5), 1.84, "M$", "the company's parts"),
        c("fine-tuning days", (7, 21), 3, "days", "the scenarios' least"),
        c("fine-tuning days", (7, 21), 21, "days", "the scenarios' most"),
        c("fine-tuning days", (7, 21), 14, "days", "the company's"),
        c("saved by fine-tuning", 70, 100 * (1 - 5 / 400), "%", "$5M against $400M"),
        c("score from scratch", 95, None, "points"),
        c("score of fine-tuning", (90, 93), None, "points"),
    ]


def _dense_against_moe() -> list[Claim]:
    c = of_table("training, dense against MoE")
    return [
        c("$ per B parameters, dense", 0.12, 1.2e9 / 10e3, "$", "$1.2B / 10000B"),
        c("$ per B parameters, MoE", 0.04, 400e6 / 10e3, "$", "$400M / 10000B"),
        c("time saved", 33, 100 * (1 - 120 / 180), "%", "120 against 180 days", rounding=1),
        c("GPUs saved", 50, 100 * (1 - 40 / 80), "%", "40000 against 80000"),
        c("cost saved", 67, 100 * (1 - 400 / 1200), "%", "$400M against $1.2B", rounding=1),
        c("cost per parameter saved", 67, 100 * (1 - 0.04 / 0.12), "%", "as stated", rounding=1),
        c("GPU days, dense over MoE", 4.7, 80 * 180 / (40 * 120), "x",
          "80000 * 180 / (40000 * 120), against the gain over dense"),
        c("cost, dense", 1.2, 80 * 180 / (40 * 120) * 0.4, "B$", "3 x the MoE's GPU days"),
    ]  # fmt: skip


def _scaling() -> list[Claim]:
    c = of_table("scaling law")
    claims = []
    for name, growth, stated, ratio in (
        ("GPT-3 to GPT-4", 10, 1.8, 1.8 / 0.175), ("GPT-4 to Ling-1T", 5.6, 1.5, 10 / 1.8),
        ("Ling-1T to 100T", 10, 1.8, 10.0),
    ):  # fmt: skip
        claims += [
            c(
                f"{name}: parameters",
                growth,
                ratio,
                "x",
                "ratio",
                rounding=0.1 if growth < 10 else 1,
            ),
            c(f"{name}: gain", stated, ratio**0.076, "x", "ratio^0.076, of the loss", rounding=0.1),
        ]
    return [
        *claims,
        c("gain per T, 1T to 10T", 0.167, 1.5 / 9, "x", "1.5 / 9"),
        c("gain per T, 1T to 10T", 0.167, 1.5 / (10 - 1.8), "x", "1.5 is of 1.8T to 10T"),
        c("gain per 10T, 10T to 100T", 0.020, 1.8 / 90 * 10, "x",
          "1.8 / 90 is per 1T, so ten times that"),
        c("returns fall", 8.4, 0.167 / 0.020, "x", "0.167 / 0.020, as stated", rounding=0.1),
    ]  # fmt: skip


def claims() -> list[Claim]:
    return [*_breakdown(), *_against_fine_tuning(), *_dense_against_moe(), *_scaling()]
