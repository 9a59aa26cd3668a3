"""How many experts does a trained model need? The article names pruning, and no figure."""

from __future__ import annotations

import statistics
import time
from typing import Any

from ling_ops.cli.data import validation_windows
from ling_ops.cli.study.measures import step_ms
from ling_ops.cli.study.report import COLUMNS, Result, Table, Verdict, count_of, span
from ling_ops.cli.study.trial import Setup, Trained, Variant, each, tell, train
from ling_ops.models.pruning import CRITERIA, expert_importance, prune_experts

CLAIM = (
    "experts can be pruned by what they do (the article gives no figure; taken as: half of them "
    "can go for at most 2 % more bits/byte after a short recovery)"
)
WHOLE, HALF, ALLOWED = "all experts", 0.5, 0.02
SHARES = (0.75, HALF, 0.25)
RECOVERY = 5  # a fifth of the steps


def run(setup: Setup) -> Result:
    """Train once per seed, prune by each criterion to each share, and recover."""
    table = Table("pruning; recovery of a fifth of the steps")
    for _, seed, trained in each(setup, [Variant(WHOLE, {})]):
        windows = validation_windows(
            setup.text.train, sequence_length=setup.sequence_length,
            limit=64 * setup.sequence_length,
        )  # fmt: skip
        batches = list(windows[:, :-1].split(setup.batch_size))
        table.add(WHOLE, measured(setup, trained, trained.model, seed, WHOLE))
        for by in CRITERIA:
            importance = expert_importance(trained.model, batches, by=by)
            for share in SHARES:
                smaller = own_copy(prune_experts(trained.model, importance, keep=share))
                name = name_of(by, share)
                table.add(name, measured(setup, trained, smaller, seed, name))
    measures = ("pruned", "recovered", "step_ms", "parameters")
    curves = {COLUMNS[m][0]: {by: _by_share(table, by, m) for by in CRITERIA} for m in measures}
    return Result(CLAIM, [table], judge(table), measures, curves, "share of experts kept")


def name_of(by: str, share: float) -> str:
    return f"{share:.0%} by {by}"


def own_copy(model: Any) -> Any:
    """The pruned model with memory of its own: training must not reach the whole one."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def measured(setup: Setup, whole: Trained, model: Any, seed: int, name: str) -> dict[str, float]:
    """Held-out loss at once and after training on, with size and time of a step."""
    before = whole.trainer
    before.model = model
    pruned = before.bits_per_byte()
    if model is whole.model:  # it recovers too, or the others would gain by longer training
        model = own_copy(type(model)(model.config, device="meta").to_empty(device=setup.device))
        model.load_state_dict(whole.model.state_dict())
        model = model.to(setup.dtype)
    steps = max(4, setup.steps // RECOVERY)
    run = {"steps": steps, "learning_rate": setup.learning_rate / 10, "warmup_steps": 1}
    label, started = f"seed {seed + 1} of {setup.seeds}  {name}, recovery", time.perf_counter()
    recovered = train(setup, Variant(name, {}, run), seed + 1000, model=model, label=label)
    tell(label, recovered, time.perf_counter() - started)
    count = model.count_parameters()
    return {
        "pruned": pruned, "recovered": recovered.bits_per_byte,
        "step_ms": step_ms(recovered.step_ms), "parameters": count.total,
    }  # fmt: skip


def _by_share(table: Table, by: str, measure: str) -> list[tuple[float, float]]:
    points = [(share, table.mean(name_of(by, share), measure)) for share in SHARES]
    return sorted([*points, (1.0, table.mean(WHOLE, measure))])


def judge(table: Table) -> Verdict:
    """Held where half of the experts can go by some criterion, in every seed."""
    names = {by: name_of(by, HALF) for by in CRITERIA}
    worse = {
        by: [ratio - 1 for ratio in table.ratios(name, WHOLE, "recovered")]
        for by, name in names.items()
    }
    best = min(worse, key=lambda by: statistics.fmean(worse[by]))
    at_once = [ratio - 1 for ratio in table.ratios(names[best], WHOLE, "pruned")]
    smaller = table.mean(names[best], "parameters") / table.mean(WHOLE, "parameters")
    reached = [value <= ALLOWED for value in worse[best]]
    text = (
        f"Half of the experts by {best}: {smaller:.0%} of the parameters, {span(at_once)} "
        f"bits/byte at once, {span(worse[best])} after recovery (at most {ALLOWED:.0%} "
        f"{count_of(reached)}); "
        + ", ".join(f"by {by} {span(values)}" for by, values in worse.items() if by != best)
    )
    return Verdict(all(reached), text + ".")
