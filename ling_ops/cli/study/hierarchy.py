"""Every layer MoE, or dense and MoE by turns? Article: 30 % faster, 1.2 % worse."""

from __future__ import annotations

from ling_ops.cli.study.measures import of_run
from ling_ops.cli.study.report import Result, Table, Verdict, count_of, span
from ling_ops.cli.study.trial import Setup, Variant, each

CLAIM = "dense and MoE layers by turns (2-4-2-4) train 30 % faster than MoE everywhere, 1.2 % worse"
ALL, THIN, FAIR = "all MoE", "by turns, dense as one expert", "by turns, equal active parameters"
FASTER, WORSE = 0.30, 0.012


def variants(setup: Setup) -> list[Variant]:
    """Equal layers; the dense ones as wide as one expert, or as all that a token visits."""
    config = setup.config()
    width = config.moe_intermediate_size
    visited = width * (config.num_experts_per_token + config.num_shared_experts)
    return [
        Variant(ALL, {"layer_pattern": f"0-{config.num_layers}"}),
        Variant(THIN, {"intermediate_size": width}),
        Variant(FAIR, {"intermediate_size": visited}),
    ]


def run(setup: Setup) -> Result:
    """Train the three and compare time per step and held-out bits per byte."""
    table = Table("hierarchy")
    for variant, _, trained in each(setup, variants(setup)):
        table.add(variant.name, of_run(trained))
    bars = ("step_ms", "bits_per_byte", "active_parameters")
    return Result(CLAIM, [table], judge(table), bars)


def compared(table: Table, name: str) -> tuple[list[float], list[float]]:
    """Per seed (how much faster, how much worse) than MoE everywhere, as fractions."""
    faster = [1 / ratio - 1 for ratio in table.ratios(name, ALL, "step_ms")]
    worse = [ratio - 1 for ratio in table.ratios(name, ALL, "bits_per_byte")]
    return faster, worse


def judge(table: Table) -> Verdict:
    """The claim is one of speed at a small loss; it holds where every seed reaches both figures."""
    parts, held = [], False
    for name in (THIN, FAIR):
        faster, worse = compared(table, name)
        reached = [f >= FASTER and w <= WORSE for f, w in zip(faster, worse, strict=True)]
        held |= all(reached)
        parts.append(
            f"{name}: {span(faster, '{:+.0%}')} steps per second at {span(worse)} bits/byte, both "
            f"as claimed {count_of(reached)}"
        )
    return Verdict(held, f"{'; '.join(parts)}.")
