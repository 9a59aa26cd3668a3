"""Do balancing terms even out the experts, and what do they cost? Article: 30-70 % -> 12-15 %."""

from __future__ import annotations

import statistics

from ling_ops.cli.study.measures import extremes, mean_of, of_balance, of_run
from ling_ops.cli.study.report import Result, Table, Verdict, count_of, span
from ling_ops.cli.study.trial import Setup, Trained, Variant, each

CLAIM = (
    "expert utilisation goes from an uneven 30-70 % to a stable 12-15 % (read against the fair "
    "12.5 %, 8 of 64 experts: the most used one takes at least 2.4 times its fair share without "
    "balancing, and all take 0.96 to 1.2 times theirs with it)"
)
NONE, BIAS = "none", "loss-free bias"
UNEVEN, EVEN = 30 / 12.5, (12 / 12.5, 15 / 12.5)
#: what is followed over training: title -> measure of an event's layers
FOLLOWED = {
    "most used expert, x fair": "", "MaxVio": "max_vio", "spread (cv)": "cv",
    "entropy over log E": "entropy", "dead experts per layer": "dead_experts",
}  # fmt: skip


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
    table, curves = Table("balance"), {title: {} for title in FOLLOWED}
    for variant, _, trained in each(setup, variants(setup)):
        table.add(variant.name, {**of_run(trained), **of_balance(trained)})
        for title, measure in FOLLOWED.items():
            curves[title].setdefault(variant.name, []).append(followed(trained, measure))
    means = {
        title: {name: mean_curve(runs) for name, runs in by_name.items()}
        for title, by_name in curves.items()
    }
    bars = ("high_share", "low_share", "max_vio", "bits_per_byte")
    return Result(CLAIM, [table], judge(table), bars, means)


def followed(trained: Trained, measure: str) -> list[tuple[float, float]]:
    """(step, mean of a statistic over layers); without a name, the most used expert's share."""
    events = [event for event in trained.events if event["event"] == "train"]
    return [
        (e["step"], mean_of([e["layers"]], measure) if measure else extremes([e["layers"]])[1])
        for e in events
    ]


def mean_curve(runs: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean over seeds of curves with the same steps."""
    return [(s[0][0], statistics.fmean(v for _, v in s)) for s in zip(*runs, strict=True)]


def judge(table: Table) -> Verdict:
    """Both halves of the claim, for the best of the balanced variants."""
    most = table.values(NONE, "high_share")
    uneven = [value >= UNEVEN for value in most]
    balanced = [name for name in table.rows if name != NONE]
    best = min(balanced, key=lambda name: _deviation(table, name))
    even = [name for name in balanced if all(in_band(table, name))]
    cost = [ratio - 1 for ratio in table.ratios(best, NONE, "bits_per_byte")]
    text = (
        f"Without balancing the most used expert takes {span(most, '{:.2f}')} times its fair share "
        f"(claim: at least {UNEVEN:.1f}; {count_of(uneven)}). Most even is {best!r}: "
        f"{table.mean(best, 'low_share'):.2f} to {table.mean(best, 'high_share'):.2f} times "
        f"(claim: {EVEN[0]:.2f} to {EVEN[1]:.2f}; {count_of(in_band(table, best))}), "
        f"at {span(cost)} bits/byte. Within the claimed band in every seed: "
        f"{', '.join(even) or 'none'}."
    )
    return Verdict(all(uneven) and bool(even), text)


def in_band(table: Table, name: str) -> list[bool]:
    """Per seed, whether all experts lie where the article has them."""
    pairs = zip(table.values(name, "low_share"), table.values(name, "high_share"), strict=True)
    return [low >= EVEN[0] and high <= EVEN[1] for low, high in pairs]


def _deviation(table: Table, name: str) -> float:
    """How far the least and the most used expert are from the fair share."""
    return max(1 - table.mean(name, "low_share"), table.mean(name, "high_share") - 1)
