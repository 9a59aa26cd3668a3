"""The script that compares training runs, in miniature on the CPU, and its verdict."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from ling_ops.cli.options import TrainOptions

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("training_curves")


def result_of(curves: ModuleType, losses: list[list[float]]) -> dict:
    pairs = zip(curves.RUNS, losses, strict=True)
    runs = {name: {"losses": values, "held_out": values[-1]} for name, values in pairs}
    return {"steps": len(losses[0]), "runs": runs}


def test_smooth_and_gap_by_hand(curves: ModuleType) -> None:
    assert curves.smooth([4.0, 2.0, 0.0, 2.0], 2) == [4.0, 3.0, 1.0, 1.0]
    assert curves.smooth([4.0, 2.0], 1) == [4.0, 2.0]
    # only the second half counts: distances 1 and 3 of the last two
    assert curves.gap([9.0, 9.0, 1.0, 0.0], [0.0, 0.0, 2.0, 3.0], 1) == 2.0


@pytest.mark.parametrize(("distance", "follows"), [(0.0, True), (0.03, True), (0.05, False)])
def test_verdict_is_the_noise_of_rounding(
    curves: ModuleType, distance: float, follows: bool
) -> None:
    """Runs of one backend at 0, 0.02, 0.04: 0.04 apart at most; the other backend is shifted."""
    levels = [3.0, 3.0 + distance, 3.02, 3.02 + distance, 3.04, 3.04 + distance]
    comparison = curves.compare(result_of(curves, [[level] * 40 for level in levels]))
    assert comparison["follows"] is follows
    assert sorted(comparison["gaps"]["kernels"]) == pytest.approx([0.02, 0.02, 0.04])
    assert sorted(comparison["gaps"]["reference"]) == pytest.approx([0.02, 0.02, 0.04])
    assert len(comparison["gaps"]["between"]) == 9
    assert ("OUTSIDE" in curves.report(comparison)) is not follows


def test_runs_share_text_and_weights(curves: ModuleType, tmp_path: Path) -> None:
    """On a CPU both backends are the reference: the same curves; each nudge gives another."""
    (tmp_path / "text").write_text("experts route tokens, tokens ask for experts. " * 60)
    options = TrainOptions(
        # of 64 tokens a mean loss moves by as much as the bound below, of 1024 by a third of it
        preset="tiny", steps=4, batch_size=16, sequence_length=64, device="cpu", dtype="bf16",
        data=[str(tmp_path / "text")], pattern="1-1", learning_rate=1e-3,
    )  # fmt: skip
    *_, result = curves.run_all(options)
    losses = [run["losses"] for run in result["runs"].values()]
    assert all(len(run) == options.steps for run in losses)
    assert losses[0::2] == losses[1::2]
    for nudged in losses[2::2]:
        assert 0 < max(abs(a - b) for a, b in zip(nudged, losses[0], strict=True)) < 2e-2
    assert losses[2] != losses[4]
    result["comparison"] = curves.compare(result)
    assert result["comparison"]["follows"]
    pytest.importorskip("matplotlib")
    curves.draw(json.loads(json.dumps(result)), tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
