"""Do balancing terms even out the experts, and what do they cost? Article: 30-70 % -> 12-15 %."""

from __future__ import annotations

import statistics

from ling_ops.cli.study.measures import extremes, of_balance, of_run
from ling_ops.cli.study.report import Result, Table, Verdict
from ling_ops.cli.study.trial import Setup, Trained, Variant, each

CLAIM = (
    "expert utilisation goes from an uneven 30-70 % to a stable 12-15 % (read with the article's "
    "8 experts: the most used one takes at least 2.4 times the fair 12.5 % without balancing, and "
    "all take 0.96 to 1.2 times with it)"
)
NONE, BIAS = "none", "loss-free bias"
UNEVEN, EVEN = 30 / 12.5, (12 / 12.5, 15 / 12.5)


def variants(setup: Setup) -> list[Variant]:
    """The same tokens per step everywhere; "micro-batch" balances each quarter by itself."""
    none = setup.unbalanced
    quarter = {"batch_size": setup.batch_size // 4, "accumulate": 4}
    return [
        Variant(NONE, none),
        Variant("auxiliary, micro-batch", {**none, "balance_coefficient": 1e-2}, quarter),
        Variant("auxiliary, sequence", {**none, "sequence_balance_coefficient": 1e-2}),
        Variant("auxiliary, global batch", {**none, "balance_coefficient": 1e-2}),
        Variant(BIAS, {**none, "use_expert_bias": True, "bias_update_rate": 1e-2}),
    ]


def run(setup: Setup) -> Result:
    """Train all variants and compare the shares of the last quarter of the steps."""
    table, curves = Table("balance"), {}
    for variant, _, trained in each(setup, variants(setup)):
        table.add(variant.name, {**of_run(trained), **of_balance(trained)})
        curves.setdefault(variant.name, []).append(_most_used(trained))
    means = {
        name: [(s[0][0], statistics.fmean(v for _, v in s)) for s in zip(*runs, strict=True)]
        for name, runs in curves.items()
    }
    return Result(
        CLAIM, [table], judge(table), ("high_share", "low_share", "max_vio", "bits_per_byte"),
        means, "most used expert, x fair",
    )  # fmt: skip


def _most_used(trained: Trained) -> list[tuple[float, float]]:
    events = [event for event in trained.events if event["event"] == "train"]
    return [(event["step"], extremes([event["layers"]])[1]) for event in events]


def judge(table: Table) -> Verdict:
    """Both halves of the claim, for the best of the balanced variants."""
    most = table.mean(NONE, "high_share")
    balanced = [name for name in table.rows if name != NONE]
    best = min(balanced, key=lambda name: table.mean(name, "high_share"))
    low, high = table.mean(best, "low_share"), table.mean(best, "high_share")
    even = [
        name for name in balanced
        if table.mean(name, "low_share") >= EVEN[0] and table.mean(name, "high_share") <= EVEN[1]
    ]  # fmt: skip
    cost = table.mean(best, "bits_per_byte") - table.mean(NONE, "bits_per_byte")
    text = (
        f"Without balancing the most used expert takes {most:.2f} times its fair share (claim: at "
        f"least {UNEVEN:.1f}). Most even is {best!r}: {low:.2f} to {high:.2f} times (claim: "
        f"{EVEN[0]:.2f} to {EVEN[1]:.2f}), at {cost:+.3f} bits/byte. Within the claimed band: "
        f"{', '.join(even) or 'none'}."
    )
    return Verdict(most >= UNEVEN and bool(even), text)
