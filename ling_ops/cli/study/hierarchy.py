"""Every layer MoE, or dense and MoE by turns? Article: 30 % faster, 1.2 % worse."""

from __future__ import annotations

from ling_ops.cli.study.measures import of_run
from ling_ops.cli.study.report import Result, Table, Verdict
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


def compared(table: Table, name: str) -> tuple[float, float]:
    """(how much faster, how much worse) than MoE everywhere, as fractions."""
    faster = table.mean(ALL, "step_ms") / table.mean(name, "step_ms") - 1
    worse = table.mean(name, "bits_per_byte") / table.mean(ALL, "bits_per_byte") - 1
    return faster, worse


def judge(table: Table) -> Verdict:
    """The claim is one of speed at a small loss; it holds where both figures are reached."""
    parts, held = [], False
    for name in (THIN, FAIR):
        faster, worse = compared(table, name)
        held |= faster >= FASTER and worse <= WORSE
        parts.append(f"{name}: {faster:+.0%} steps per second, {worse:+.1%} bits/byte")
    noise = table.spread(ALL, "bits_per_byte") / table.mean(ALL, "bits_per_byte")
    return Verdict(held, f"{'; '.join(parts)}. Seeds alone differ by ±{noise:.1%}.")
