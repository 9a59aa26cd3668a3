"""`ling-ops cost`."""

from __future__ import annotations

import builtins
import io
import json
import sys

import pytest
import torch

from ling_ops.cli import cost_tables, main
from ling_ops.models import LingConfig
from ling_ops.models.published import write_config


def _facts(capsys, *arguments: str) -> dict:
    assert main(["cost", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_the_published_parameters(capsys):
    facts = _facts(capsys, "ling-mini-2.0", "--gpus", "8")
    assert facts["parameters"]["total"] == pytest.approx(16.256e9, rel=1e-4)
    assert facts["training_layout"]["gpus"] == 8
    assert facts["training_memory_per_gpu"]["peak_gb"] < 80


def test_degrees_and_prices_are_used(capsys):
    facts = _facts(
        capsys, "ling-flash-2.0", "--data-parallel", "16", "--tensor-parallel", "2",
        "--expert-parallel", "8", "--usd-per-gpu-hour", "2", "--gpu", "h200", "--shard", "full",
        "--serve-dtype", "fp8",
    )  # fmt: skip
    layout = facts["training_layout"]
    assert (layout["gpus"], layout["data"], layout["tensor"], layout["expert"]) == (32, 16, 2, 8)
    assert facts["training"]["gpu_usd"] == pytest.approx(2 * facts["training"]["gpu_hours"])
    assert facts["prefill_floor"]["usd_per_million_tokens"] > 0
    assert facts["decoding_floor"]["usd_per_million_tokens"] > 0


def test_money_needs_a_price(capsys):
    facts = _facts(capsys, "tiny", "--usd-per-kwh", "0")
    assert facts["training"]["gpu_usd"] is None and facts["training"]["energy_usd"] == 0
    assert facts["decoding_floor"]["usd_per_million_tokens"] is None
    assert facts["assumptions"]["usd_per_gpu_hour"] is None
    assert facts["assumptions"]["tokens"] == 1e12


def test_a_config_counts_as_its_preset_does(capsys, tmp_path):
    config = LingConfig.preset("small")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(config, torch.bfloat16, {})))
    (tmp_path / "fields.json").write_text(json.dumps(config.to_dict()))
    known = _facts(capsys, "small")
    for path in (folder, folder / "config.json", tmp_path / "fields.json"):
        assert _facts(capsys, str(path))["parameters"] == known["parameters"]
    changed = _facts(capsys, str(folder), "--model", "num_layers=6")["parameters"]
    assert 2 * changed["attention"] == known["parameters"]["attention"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_layers": 2, "num_experts": 4}',
                                  '{"architectures": ["GPT"], "hidden_size": 1}'])  # fmt: skip
def test_a_file_that_is_no_config_is_one_line(capsys, tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["cost", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "config.json" in shown.err and shown.err.count("\n") == 1


def test_one_half_alone(capsys):
    serving = _facts(capsys, "ling-mini-2.0", "--only", "serving", "--gpus", "1")
    assert "training" not in serving and serving["serving_layout"]["gpus"] == 1
    assert "decoding_floor" not in _facts(capsys, "tiny", "--only", "training")


def test_assumptions_are_those_that_a_figure_takes(capsys):
    either = {"model", "usd_per_gpu_hour", "sequence_length", "micro_batch_size",
              "activation_checkpointing", "batch_size", "context"}  # fmt: skip
    serving = _facts(capsys, "tiny", "--only", "serving", "--usd-per-kwh", "0.1")["assumptions"]
    assert set(serving) == either | {"serve_dtype", "kv_dtype"}
    training = _facts(capsys, "tiny", "--only", "training", "--usd-per-kwh", "0.1")["assumptions"]
    assert set(training) == either | {
        "tokens", "mfu", "dtype", "shard", "micro_batches", "usd_per_kwh",
    }  # fmt: skip
    assert training["usd_per_kwh"] == 0.1 and training["sequence_length"] == 4096


def _refusal(capsys, *arguments: str) -> str:
    assert main(["cost", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_the_half_that_does_not_fit_is_named(capsys):
    serving = _refusal(capsys, "ling-1t", "--gpus", "368")
    assert "serving: gpus: got 368, over which no layout fits; it fits 32" in serving
    assert "--only training leaves serving out" in serving
    facts = _facts(capsys, "ling-1t", "--gpus", "368", "--only", "training")
    assert facts["training_layout"]["gpus"] == 368
    training = _refusal(capsys, "ling-mini-2.0", "--gpus", "1")
    assert "training: gpus: got 1" in training and "--only serving leaves training" in training
    alone = _refusal(capsys, "ling-mini-2.0", "--gpus", "1", "--only", "training")
    assert "training: gpus: got 1" in alone and "--only" not in alone
    assert "training" not in _refusal(capsys, "ling-mini-2.0", "--tensor-parallel", "3")


def test_replicas_without_a_sequence_are_refused_or_counted(capsys):
    few = ("ling-mini-2.0", "--batch-size", "3", "--data-parallel", "64")
    refused = _refusal(capsys, *few)
    assert "serving: batch_size: got 3, need at least 64 for 64 GPUs" in refused
    told = _facts(capsys, *few, "--expert-parallel", "32")["serving_layout"]
    assert told["replicas_without_sequence"] == 61
    whole = _facts(capsys, "ling-mini-2.0", "--gpus", "64", "--batch-size", "256")
    assert whole["serving_layout"]["replicas_without_sequence"] == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["nosuch"], "preset"), (["ling-mini-2.0"], "preset"), (["--gpus", "3"], "--gpus"),
     (["--gpus", "0"], "--gpus"), (["--gpu", "h100"], "--gpu"), (["--mfu", "0.4"], "--mfu"),
     (["--layouts", "--only", "serving"], "--layouts, --only"), (["--power-w", "1"], "--power-w"),
     (["--model", "num_layers=2"], "--model"), (["--usd-per-kwh", "0"], "--usd-per-kwh"),
     (["--activation-checkpointing"], "--activation-checkpointing")],
)  # fmt: skip
def test_the_article_takes_no_other_flag(capsys, arguments, word):
    assert f"--article: got {word}" in _refusal(capsys, *arguments, "--article", "--json")


def test_memory_is_told_by_dtype_and_by_layout(capsys):
    facts = _facts(capsys, "ling-mini-2.0", "--gpus", "8", "--layouts")
    fp32, bf16, fp8 = facts["memory_by_dtype"]
    assert fp32["weight_gb"] == 2 * bf16["weight_gb"] > 2 * fp8["weight_gb"]
    assert fp32["activation_gb"] > bf16["activation_gb"] > 0 and "activation_gb" not in fp8
    rows = facts["training_layouts"]
    assert next(row for row in rows if row["tensor"] == 2 and row["expert"] == 4)["data"] == 4
    assert all(row["data"] * row["tensor"] == 8 for row in rows + facts["serving_layouts"])
    assert main(["cost", "ling-mini-2.0", "--gpus", "8", "--layouts"]) == 0
    assert "yes" in capsys.readouterr().out


def test_article_table_marks_the_electricity(capsys):
    assert main(["cost", "--article"]) == 0
    rows = capsys.readouterr().out.splitlines()
    row = next(line for line in rows if line.strip().startswith("electricity"))
    assert "6.451" in row and "does not follow" in row
    text = "\n".join(" ".join(line.split()) for line in rows)
    assert "first token, dense 10T 1,200 to 2,000 at least 8,013 ms does not follow" in text
    assert "first token, MoE 10T 350 to 600 at least 1,011 ms does not follow" in text
    assert "memory of MoE 10T parameters at most 280 5,000 GB does not follow" in text


def test_a_terminal_gets_rich_tables_and_plain_ones_without_rich(monkeypatch):
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown() -> str:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        cost_tables.show({"memory_per_gpu": {"weight_gb": 1.5}})
        return screen.getvalue()

    assert "│" in shown()
    kept = builtins.__import__

    def without_rich(name, *arguments, **options):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return kept(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    text = shown()
    assert "│" not in text and "weight_gb" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--usd-per-gpu-hour", "-1"], "usd_per_gpu_hour"), (["--gpu", "x"], "gpu"),
     (["--usd-per-gpu-hour", "1e300"], "usd_per_gpu_hour"), (["--tokens", "1e300"], "tokens"),
     (["--tokens", "1e-320"], "tokens"), (["--mfu", "1e-320"], "mfu"), (["--mfu", "nan"], "mfu"),
     (["--bf16-tflops", "1e300"], "bf16_tflops"), (["--batch-size", "-1"], "batch_size"),
     (["--batch-size", "9" * 400], "batch_size"), (["--gpus", "9" * 400], "gpus"),
     (["--model", "hidden_size=" + "9" * 400], "hidden_size"),
     (["--model", "num_layers=1000000000"], "at most 1,000"),
     (["--model", "num_experts=1000000000"], "at most 10,000"),
     (["--dtype", "int1"], "need one of bf16, fp16, fp8"),
     (["--only", "serving", "--context", "1000000000"], "a shorter context"),
     (["--usd-per-kwh", "-1"], "usd_per_kwh"), (["--tokens", "-5"], "tokens"),
     (["--tokens", "nan"], "tokens"), (["--mfu", "0"], "mfu"), (["--mfu", "1.2"], "mfu"),
     (["--gpus", "1"], "at least"), (["--gpus", "-2"], "gpus"), (["--gpus", "0"], "gpus"),
     (["--context", "0"], "context"), (["--batch-size", "0"], "batch_size"),
     (["--sequence-length", "-1"], "sequence_length"), (["--micro-batch-size", "0"], "batch_size"),
     (["--model", "num_experts_per_token=300"], "num_experts_per_token"),
     (["--memory-gb", "-1"], "memory_gb"), (["--shard", "half"], "shard"),
     (["--tensor-parallel", "3"], "num_heads=16"), (["--expert-parallel", "7"], "num_experts=256"),
     (["--data-parallel", "0"], "data_parallel"),
     (["--data-parallel", "4", "--gpus", "5"], "data_parallel x tensor_parallel = 4"),
     (["--data-parallel", "4", "--expert-parallel", "8"], "expert_parallel"),
     (["--dtype", "int1"], "dtype"), (["--serve-dtype", "int1"], "dtype"),
     (["--gpu", "a100", "--dtype", "fp8"], "no fp8"), (["--sequence-length", "9999999"], "not fit"),
     (["--only", "serving", "--gpus", "1", "--memory-gb", "24"], "at least"),
     (["--only", "serving", "--mfu", "7"], "mfu"),
     (["--only", "serving", "--tokens", "-5"], "tokens"),
     (["--only", "serving", "--dtype", "int1"], "dtype"),
     (["--only", "serving", "--shard", "x"], "shard"),
     (["--only", "serving", "--micro-batches", "0"], "micro_batches"),
     (["--only", "serving", "--usd-per-kwh", "-1"], "usd_per_kwh"),
     (["--only", "serving", "--micro-batch-size", "0"], "micro_batch_size"),
     (["--only", "training", "--batch-size", "-5"], "batch_size"),
     (["--only", "training", "--serve-dtype", "int1"], "serve_dtype"),
     (["--only", "training", "--kv-dtype", "int1"], "kv_dtype")],
)  # fmt: skip
def test_nonsense_is_one_line(capsys, arguments, word):
    assert main(["cost", "ling-mini-2.0", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and word in shown.err and shown.err.count("\n") == 1
