"""`ling-ops train`: what it writes, and that a resumed run is the same run."""

from __future__ import annotations

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_runner import run_here, step_files, train_arguments, write_text

from ling_ops.cli import main
from ling_ops.cli.checkpoint import load_checkpoint
from ling_ops.cli.modeling import build_model, saved_config
from ling_ops.cli.optimizer import Optimizer
from ling_ops.cli.runs import output_folder
from ling_ops.cli.trainer import Trainer

pytest.importorskip("safetensors")
image = pytest.importorskip("matplotlib.image")
pytest.importorskip("tensorboard")
pytest.importorskip("rich")

STEPS, EVERY = 8, 2
COUNTERS = ["--checkpoint-every", EVERY, "--keep", 10, "--validate-every", 4, "--log-every", 1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """(run folder, completed process) of one whole run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = run_here(*train_arguments(text, run, "--steps", STEPS, *COUNTERS))
    assert done.returncode == 0, done.stderr
    return run, done


def events(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_states_baseline_and_result(finished):
    _, done = finished
    assert done.stderr == ""
    result = next(line for line in done.stdout.splitlines() if line.startswith("final validation"))
    assert "order-0 entropy" in result and result.count("bits/byte") == 2


def test_metrics_schema(finished):
    run, _ = finished
    train = [event for event in events(run) if event["event"] == "train"]
    assert [event["step"] for event in train] == list(range(1, STEPS + 1))
    for event in train:
        assert set(event) == {
            "event", "step", "loss", "bits_per_byte", "learning_rate", "gradient_norm",
            "tokens_per_s", "elapsed_s", "layers",
        }  # fmt: skip
        assert event["bits_per_byte"] == pytest.approx(event["loss"] / math.log(2))
        assert [layer["layer"] for layer in event["layers"]] == [1, 3]
        for layer in event["layers"]:
            assert len(layer["utilization"]) == 4
            assert sum(layer["utilization"]) == pytest.approx(2, abs=1e-5)
            assert layer["max_vio"] == pytest.approx(max(layer["utilization"]) * 2 - 1, abs=1e-5)
            assert 0 <= layer["drop_rate"] <= 1 and 0 <= layer["gate_mass_dropped"] <= 1
    valid = [event for event in events(run) if event["event"] == "validation"]
    assert [event["step"] for event in valid] == [4, STEPS]
    assert 0 < valid[0]["order0_bits_per_byte"] == valid[1]["order0_bits_per_byte"] < 8


def test_learns(finished):
    losses = [event["loss"] for event in events(finished[0]) if event["event"] == "train"]
    assert losses[-1] < losses[0] - 0.2


def test_tensorboard_has_the_same_numbers(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, _ = finished
    board = accumulator.EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    losses = [event["loss"] for event in events(run) if event["event"] == "train"]
    assert [point.value for point in board.Scalars("train/loss")] == pytest.approx(losses)
    assert len(board.Scalars("layer_01/max_vio")) == STEPS


def test_picture_shows_something(finished):
    picture = image.imread(finished[0] / "training.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    colours = {tuple(pixel) for row in (picture[::7, ::7, :3] * 15).astype(int) for pixel in row}
    assert len(colours) > 10


def test_checkpoints_hold_no_pickle_and_point_to_the_last(finished):
    root = finished[0] / "checkpoints"
    assert (root / "latest").read_text() == f"step-{STEPS:08d}\n"
    names = {path.name for path in root.rglob("*") if path.is_file()}
    groups = {"model.safetensors", "optimizer.safetensors", "rng.safetensors"}
    assert names == {"latest", "state.json", *groups}


@pytest.mark.parametrize("step", [2, 6])
def test_resume_is_bit_for_bit(step, finished, tmp_path):
    run, _ = finished
    folder = run / "checkpoints" / f"step-{step:08d}"
    done = run_here("train", "--resume", folder, "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert step_files(tmp_path / "again", STEPS) == step_files(run, STEPS)
    first = {e["step"]: e["loss"] for e in events(run) if e["event"] == "train"}
    again = {e["step"]: e["loss"] for e in events(tmp_path / "again") if e["event"] == "train"}
    assert again == {s: loss for s, loss in first.items() if s > step}


def test_resume_in_place_continues_the_metrics(finished, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished[0], run)
    for step in range(6, STEPS + 1, EVERY):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "checkpoints" / "latest").write_text("step-00000004\n")
    done = run_here("train", "--resume", "--output", run)
    assert done.returncode == 0, done.stderr
    assert step_files(run, STEPS) == step_files(finished[0], STEPS)
    assert [e["step"] for e in events(run)] == [e["step"] for e in events(finished[0])]


def test_another_seed_is_another_run(finished, text, tmp_path):
    extra = ["--steps", 1, "--seed", 1, "--checkpoint-every", 0]
    assert train_here(text, tmp_path / "run", *extra) == 0
    losses = [run_events[0]["loss"] for run_events in map(events, (finished[0], tmp_path / "run"))]
    assert losses[0] != losses[1]


def test_bf16_resumes_bit_for_bit(text, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    extra = ["--steps", 4, "--dtype", "bf16", "--checkpoint-every", 2, "--keep", 2]
    assert train_here(text, run, *extra) == 0
    folder = run / "checkpoints" / "step-00000002"
    assert main(["train", "--resume", str(folder), "--output", str(again)]) == 0
    assert step_files(again, 4) == step_files(run, 4)


def test_masters_of_bf16_weights_come_from_an_fp32_checkpoint(finished):
    folder = finished[0] / "checkpoints" / f"step-{STEPS:08d}"
    found = load_checkpoint(folder, groups=("model", "optimizer"))
    model = build_model(saved_config(found.state), torch.device("cpu"), torch.bfloat16)
    optimizer = Optimizer(model, weight_decay=0.0)
    optimizer.load_state_tensors(found.tensors["optimizer"], found.tensors["model"])
    for name, master in optimizer.masters.items():
        assert torch.equal(master, found.tensors["model"][name])


def test_more_steps_on_other_data_say_so(finished, tmp_path, capsys):
    other = write_text(tmp_path / "other", files=23)
    arguments = ["train", "--resume", finished[0], "--output", tmp_path / "run"]
    arguments += ["--steps", STEPS + 1, "--data", other]
    assert main([str(argument) for argument in arguments]) == 0
    assert "warning: the data differ" in capsys.readouterr().err


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("capacity", ["dropless", "fixed:1.25", "dynamic:0.02"])
def test_runs_on_the_device_at_hand(capacity, gate, device, text, tmp_path, capsys):
    extra = ["--steps", 2, "--device", "auto", "--capacity", capacity, "--gate", gate]
    assert train_here(text, tmp_path / "run", *extra) == 0
    assert f"steps on {device.type}" in capsys.readouterr().out


def test_a_config_file_and_flags_on_top(text, tmp_path, capsys):
    config = tmp_path / "run.json"
    settings = {"steps": 3, "batch_size": 2, "sequence_length": 16, "validation_bytes": 64}
    config.write_text(json.dumps({**settings, "data": str(text), "model": {"hidden_size": 64}}))
    arguments = ["train", "--config", config, "--steps", 2, "--output", tmp_path / "run"]
    arguments += ["--model", "moe_intermediate_size=16"]
    assert main([str(argument) for argument in arguments]) == 0
    state = json.loads(next((tmp_path / "run").glob("checkpoints/*/state.json")).read_text())
    assert state["step"] == 2 and state["settings"]["sequence_length"] == 16
    assert state["model"]["hidden_size"] == 64 and state["model"]["moe_intermediate_size"] == 16


def test_a_resumed_run_with_nothing_left_to_do_is_saved_too(finished, tmp_path):
    other = tmp_path / "other"
    folder = finished[0] / "checkpoints" / f"step-{STEPS:08d}"
    done = run_here("train", "--resume", folder, "--output", other)
    assert done.returncode == 0, done.stderr
    assert step_files(other, STEPS) == step_files(finished[0], STEPS)


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    """Each name is taken when it is given, not when the run writes first."""
    monkeypatch.chdir(tmp_path)
    names = [output_folder(Namespace(), "tiny", None) for _ in range(3)]
    assert names == [Path("runs", name) for name in ("tiny", "tiny-2", "tiny-3")]


def test_each_process_gets_its_own_gpu_s_random_state_back(tmp_path, monkeypatch):
    got, state = [], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: got.append(value))
    trainer = Trainer.__new__(Trainer)
    trainer.ranks = SimpleNamespace(rank=1, shard=lambda model, tensors: tensors)
    trainer.optimizer = SimpleNamespace(load_state_tensors=lambda *tensors: None)
    trainer.model, trainer.device, trainer.output = None, torch.device("cuda"), tmp_path
    rng = {"cpu": state, "cpu.1": state, "cuda": "main's", "cuda.1": "its own"}
    tensors = {"optimizer": {}, "model": {}, "rng": rng}
    folder = tmp_path / "checkpoints" / "step-00000003"
    trainer.restore(SimpleNamespace(tensors=tensors, state={"step": 3}, folder=folder))
    assert got == ["its own"] and trainer.saved_step == trainer.step == 3


def test_runs_of_the_same_preset_get_folders_of_their_own(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = train_arguments(text, "unused", "--steps", 1)
    at = arguments.index("--output")
    del arguments[at : at + 2]
    for _ in range(2):
        assert main([str(argument) for argument in arguments]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]


def train_here(text, run, *extra):
    """Train in this process; returns the exit status."""
    return main([str(argument) for argument in train_arguments(text, run, *extra)])
