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


def result_of(curves: ModuleType, **losses: list[float]) -> dict:
    names = dict(zip(("kernels", "reference", "nudged", "other"), curves.RUNS, strict=True))
    runs = {names[k]: {"losses": v, "held_out": v[-1]} for k, v in losses.items()}
    return {"steps": len(losses["kernels"]), "runs": runs}


def test_smooth_and_gap_by_hand(curves: ModuleType) -> None:
    assert curves.smooth([4.0, 2.0, 0.0, 2.0], 2) == [4.0, 3.0, 1.0, 1.0]
    assert curves.smooth([4.0, 2.0], 1) == [4.0, 2.0]
    # only the second half counts: distances 1 and 3 of the last two
    assert curves.gap([9.0, 9.0, 1.0, 0.0], [0.0, 0.0, 2.0, 3.0], 1) == 2.0


@pytest.mark.parametrize(("distance", "follows"), [(0.01, True), (0.02, True), (0.03, False)])
def test_verdict_is_the_band_of_another_seed(
    curves: ModuleType, distance: float, follows: bool
) -> None:
    base = [3.0] * 40
    result = result_of(
        curves,
        kernels=base,
        reference=[value - distance for value in base],
        nudged=[value + 0.001 for value in base],
        other=[value + 0.02 for value in base],
    )
    comparison = curves.compare(result)
    assert comparison["follows"] is follows
    assert comparison["gaps"] == {
        "reference": distance, "kernels, nudged": 0.001, "kernels, other seed": 0.02,
    }  # fmt: skip
    assert ("OUTSIDE" in curves.report(comparison)) is not follows


def test_runs_share_text_and_weights(curves: ModuleType, tmp_path: Path) -> None:
    """On a CPU both backends are the reference: the same curve; other weights give another."""
    (tmp_path / "text").write_text("experts route tokens, tokens ask for experts. " * 60)
    options = TrainOptions(
        preset="tiny", steps=4, batch_size=2, sequence_length=32, device="cpu", dtype="fp32",
        data=[str(tmp_path / "text")], pattern="1-1", learning_rate=1e-3,
    )  # fmt: skip
    *_, result = curves.run_all(options)
    losses = [run["losses"] for run in result["runs"].values()]
    assert all(len(run) == options.steps for run in losses)
    assert losses[0] == losses[1]
    assert abs(losses[2][0] - losses[0][0]) < 1e-3
    assert abs(losses[3][0] - losses[0][0]) > 1e-3
    result["comparison"] = curves.compare(result)
    assert result["comparison"]["gaps"]["reference"] == 0 and result["comparison"]["follows"]
    pytest.importorskip("matplotlib")
    curves.draw(json.loads(json.dumps(result)), tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
