"""`ling-ops study`: measures by hand, verdicts both ways, and every study on a minute scale."""

from __future__ import annotations

import json

import pytest
import torch
from cli_runner import run_here, write_text

from ling_ops.cli import main
from ling_ops.cli.study import NAMES, balance, capacity, hierarchy, measures, prune, sparsity
from ling_ops.cli.study.report import COLUMNS, Table
from ling_ops.models import LingConfig, LingForCausalLM

for needed in ("safetensors", "tensorboard", "rich"):
    pytest.importorskip(needed)
image = pytest.importorskip("matplotlib.image")


def entry(load, **values):
    return {"utilization": load, "drop_rate": 0.0, "capacity": None, "max_vio": 0.0, **values}


def test_shares_and_extremes_by_hand():
    """Two events, two layers, two experts; shares are means of each event's own shares."""
    layers = [
        [entry([1.0, 1.0]), entry([1.5, 0.5])],
        [entry([0.5, 1.5]), entry([3.0, 1.0])],
    ]
    assert measures.shares(layers) == [[0.375, 0.625], [0.75, 0.25]]
    assert measures.extremes(layers) == (0.5, 1.5)
    assert measures.shares([[entry([0.0, 0.0])]]) == [[0.0, 0.0]]


def test_settled_is_the_last_quarter():
    assert measures.settled([[n] for n in range(8)]) == [[6], [7]]
    assert measures.settled([[0]]) == [[0]]


def test_padding_by_hand():
    """1.5 times the fair share at 20 % drops: 1.5 / 0.8 rows per kept one; dropless has none."""
    event = [entry([1, 1], capacity=1.5, drop_rate=0.2), entry([1, 1])]
    assert measures.padding([event]) == pytest.approx((1.5 / 0.8 - 1) / 2)
    assert measures.step_ms([9.0, 9.0, 9.0, 1.0, 5.0, 2.0]) == 2.0
    assert measures.step_ms([4.0, 6.0]) == 5.0


def test_drops_and_the_tuned_capacity_by_hand():
    """Of shares .5 .3 .1 .1, a capacity of 1.2 x .25 = .3 drops .2; for .1 it is 1.6 x .25."""
    load = [0.5, 0.3, 0.1, 0.1]
    assert capacity.drop_rate(load, 1.2) == pytest.approx(0.2)
    assert capacity.drop_rate(load, 4.0) == 0
    assert capacity.tuned_factor([load], 0.1) == pytest.approx(1.6)
    mean = capacity.tuned_factor([load, [0.25] * 4], 0.1)
    assert sum(capacity.drop_rate(x, mean) for x in (load, [0.25] * 4)) / 2 == pytest.approx(0.1)


def test_drifting_skew():
    """The rules differ as they should; the numbers repeat with the seed."""
    first, second = capacity.drifting(0), capacity.drifting(0)
    assert first == second != capacity.drifting(1)
    dropped = {name: values["drop_rate"] for name, values in first.items()}
    assert dropped[capacity.BATCH] <= 0.02 < 0.08 < dropped[capacity.FIXED]
    assert dropped[capacity.REROUTE] < dropped[capacity.FIXED] / 10
    assert all(values["padding"] > 0 for values in first.values())


def table(**rows: dict[str, float]) -> Table:
    found = Table("t")
    for name, values in rows.items():
        found.add(name, values)
    return found


def filled(names, changes, **common):
    """A table with the same measures everywhere but for `changes`, by variant."""
    return table(**{name: {**common, **changes.get(name, {})} for name in names})


@pytest.mark.parametrize(
    ("most", "low", "high", "held"),
    [(2.5, 0.97, 1.1, True), (2.3, 0.97, 1.1, False), (2.5, 0.9, 1.1, False),
     (2.5, 0.97, 1.3, False)],
)  # fmt: skip
def test_verdict_of_balance(most, low, high, held):
    names = (balance.NONE, "auxiliary, sequence", balance.BIAS)
    changes = {
        balance.NONE: {"high_share": most},
        balance.BIAS: {"low_share": low, "high_share": high},
    }
    found = filled(names, changes, low_share=0.1, high_share=2.0, bits_per_byte=2.0)
    verdict = balance.judge(found)
    assert verdict.held is held
    assert f"{most:.2f} times" in verdict.text and balance.BIAS in verdict.text


@pytest.mark.parametrize(
    ("ms", "bits", "held"), [(70.0, 2.02, True), (80.0, 2.02, False), (70.0, 2.03, False)]
)
def test_verdict_of_hierarchy(ms, bits, held):
    names = (hierarchy.ALL, hierarchy.THIN, hierarchy.FAIR)
    changes = {hierarchy.THIN: {"step_ms": ms, "bits_per_byte": bits}}
    found = filled(names, changes, step_ms=100.0, bits_per_byte=2.0)
    assert hierarchy.judge(found).held is held
    assert hierarchy.compared(found, hierarchy.FAIR) == (0, 0)


@pytest.mark.parametrize(
    ("training", "drift", "held"), [(0.019, 0.01, True), (0.021, 0.01, False), (0.01, 0.03, False)]
)
def test_verdict_of_capacity(training, drift, held):
    names = (capacity.DROPLESS, capacity.FIXED, capacity.REROUTE, capacity.BATCH, capacity.RUNNING)
    common = {"drop_rate": 0.08, "padding": 1.0, "bits_per_byte": 2.0}
    found = filled(names, {capacity.BATCH: {"drop_rate": training}}, **common)
    wandering = filled(names[1:], {capacity.BATCH: {"drop_rate": drift}}, **common)
    assert capacity.judge(found, wandering).held is held


@pytest.mark.parametrize(("ms", "layer", "held"), [(480.0, 1.0, True), (200.0, 5.0, True),
                                                   (200.0, 3.0, False)])  # fmt: skip
def test_verdict_of_sparsity(ms, layer, held):
    names = (sparsity.MOE, sparsity.TOTAL, sparsity.ACTIVE)
    common = {"step_ms": 100.0, "bits_per_byte": 2.0, "parameters": 5.0, "active_parameters": 1.0}
    found = filled(names, {sparsity.TOTAL: {"step_ms": ms}}, **common)
    layers = filled(names, {sparsity.TOTAL: {"layer_ms": layer}}, layer_ms=1.0)
    verdict = sparsity.judge([found, layers])
    assert verdict.held is held and "active parameters is 5.0" in verdict.text
    assert sparsity.judge([found]).held is (ms >= 470)


@pytest.mark.parametrize(("bits", "held"), [(2.03, True), (2.05, False)])
def test_verdict_of_prune(bits, held):
    names = [prune.WHOLE, *(prune.name_of(by, s) for by in prune.CRITERIA for s in prune.SHARES)]
    changes = {prune.name_of("usage", 0.5): {"recovered": bits}}
    common = {"recovered": 2.5, "pruned": 3.0, "parameters": 1.0}
    found = filled(names, changes | {prune.WHOLE: {"recovered": 2.0}}, **common)
    verdict = prune.judge(found)
    assert verdict.held is held and "by usage" in verdict.text


def test_tables_show_mean_and_half_range():
    found = Table("t")
    for value in (1.0, 2.0, 4.0):
        found.add("a", {"bits_per_byte": value, "dead_experts": 0.0})
    row = {"variant": "a", "bits/byte": "2.333 ± 1.500", "dead": "0.00"}
    assert found.words() == [row]


def test_a_pruned_copy_does_not_share_memory():
    config = LingConfig.preset("tiny", hidden_size=32, num_layers=2, layer_pattern="1-1")
    model = LingForCausalLM(config)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    scores = {index: torch.arange(8.0) for index, _ in model.moe_layers()}
    smaller = prune.own_copy(prune.prune_experts(model, scores, keep=0.5))
    for parameter in smaller.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), files=40)


@pytest.mark.parametrize("name", NAMES)
def test_every_study_runs(name, text, tmp_path):
    options = ["--steps", 4, "--seeds", 1, "--data", text, "--output", tmp_path / "out"]
    done = run_here("study", name, *options)
    assert done.returncode == 0, done.stderr
    assert "verdict: " in done.stdout and "claim: " in done.stdout
    values = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert set(values) == {
        "study", "claim", "setup", "tables", "verdict", "bars", "curves", "curve_title",
        "curve_axis",
    }  # fmt: skip
    assert isinstance(values["verdict"]["held"], bool) and values["verdict"]["text"]
    assert values["setup"]["seeds"] == [0] and values["setup"]["steps"] == 4
    assert values["setup"]["command"].startswith(f"ling-ops study {name} --seeds 1 --steps 4")
    for found in values["tables"]:
        measured = [set(seed) for seeds in found["rows"].values() for seed in seeds]
        assert measured and measured[0] <= set(COLUMNS) and all(m == measured[0] for m in measured)
    assert set(values["bars"]) <= set(next(iter(values["tables"][0]["rows"].values()))[0])
    picture = image.imread(tmp_path / "out" / f"{name}.png")
    assert picture.ndim == 3 and picture.std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--steps", "3"], "--steps must be at least 4, not 3"),
        (["--device", "cuda:99"], "no device 'cuda:99'"),
        (["--data", "nosuch"], "no such file or folder: 'nosuch'"),
    ],
)
def test_nonsense(arguments, message, capsys):
    assert main(["study", "balance", *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_unknown_study(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["study", "magic"])
    assert stopped.value.code == 2 and "balance" in capsys.readouterr().err
