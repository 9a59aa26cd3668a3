"""`ling-ops prune`: smaller checkpoints that load like any other, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runner import run_here, train_arguments, write_text
from tolerances import assert_bitwise

from ling_ops.cli import generate, main, prune
from ling_ops.models import LingConfig, LingForCausalLM, prune_experts

for needed in ("safetensors", "matplotlib", "tensorboard", "rich"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, text folder) of a byte model with four experts per layer."""
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder / "text")
    extra = ["--steps", 20, "--learning-rate", 0.01, "--experts", 4, "--experts-per-token", 1]
    done = run_here(*train_arguments(text, folder / "run", *extra))
    assert done.returncode == 0, done.stderr
    return folder / "run", text


def arguments(trained, output, *extra: object) -> list[str]:
    run, text = trained
    given = ["prune", "--checkpoint", run, "--data", text, "--output", output, "--tokens", 512,
             "--sequence-length", 32, "--device", "cpu", *extra]  # fmt: skip
    return [str(item) for item in given]


@pytest.mark.parametrize("by", ["usage", "gate-mass", "output-norm"])
def test_the_result_is_a_checkpoint(by, trained, tmp_path, capsys):
    output = tmp_path / "small"
    assert main(arguments(trained, output, "--keep", "0.5", "--by", by)) == 0
    said = capsys.readouterr().out
    assert f"by {by}" in said and "2 of 4 experts held" in said and "2 experts per layer" in said
    assert "measuring 512 tokens" in said and "asked for" not in said
    model = LingForCausalLM.from_pretrained(output)
    assert model.config.num_experts == 2
    command = ["generate", "--checkpoint", str(output), "--max-new-tokens", "4", "--device", "cpu"]
    assert main(command) == 0
    capsys.readouterr()
    tuned = ["finetune", "--checkpoint", output, "--data", trained[1], "--output", tmp_path / "ft",
             "--steps", 2, "--sequence-length", 32, "--validation-bytes", 256,
             "--method", "full", "--device", "cpu"]  # fmt: skip
    assert main([str(item) for item in tuned]) == 0
    assert LingForCausalLM.from_pretrained(tmp_path / "ft" / "model").config.num_experts == 2


def test_keeping_all_is_exact(trained, tmp_path, capsys):
    from ling_ops.cli.checkpoint import find_checkpoint, load_checkpoint

    assert main(arguments(trained, tmp_path / "same", "--keep", "1")) == 0
    model = LingForCausalLM.from_pretrained(tmp_path / "same")
    original = load_checkpoint(find_checkpoint(trained[0]), groups=("model",)).tensors["model"]
    for name, tensor in model.state_dict().items():
        assert_bitwise(tensor, original[name], name)


def test_a_published_checkpoint_keeps_its_tokenizer(trained, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    config = LingConfig.preset(
        "ling-mini-2.0", vocab_size=300, hidden_size=64, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, intermediate_size=80, moe_intermediate_size=24,
        num_experts=32,
    )  # fmt: skip
    LingForCausalLM(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "whole")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["def name(x): return x"] * 9, vocab_size=290)
    tokenizer.save(str(tmp_path / "whole" / "tokenizer.json"))
    beside = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in beside[1:]:
        (tmp_path / "whole" / name).write_text('{"mine": 1}', encoding="utf-8")
    given = arguments((tmp_path / "whole", trained[1]), tmp_path / "half", "--keep", "0.5")
    assert main(given) == 0
    half = LingForCausalLM.from_pretrained(tmp_path / "half")
    assert half.config.num_experts == 16 and half.config.num_groups == config.num_groups
    assert half.lm_head.weight.dtype == torch.bfloat16
    said = json.loads((tmp_path / "half" / "config.json").read_text())
    assert said["num_experts"] == 16 and said["architectures"] == ["BailingMoeV2ForCausalLM"]
    for name in beside:
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--keep", "0"], "--keep must be above 0 and at most 1"),
        (["--keep", "1.5"], "--keep must be above 0 and at most 1"),
        (["--keep", "nan"], "--keep must be above 0 and at most 1"),
        (["--keep", "0.5", "--tokens", "0"], "--tokens must be at least 1"),
        (["--keep", "0.5", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--keep", "0.5", "--sequence-length", "1"], "--sequence-length must be at least 2"),
        (["--keep", "0.5", "--data", "nosuch"], "no such file or folder: 'nosuch'"),
        (["--keep", "0.5", "--sequence-length", "999999", "--tokens", "999999"], "too little data"),
        (["--keep", "0.5", "--checkpoint", "nosuch"], "no such checkpoint: 'nosuch'"),
    ],
)
def test_nonsense(extra, message, trained, tmp_path, capsys):
    assert main(arguments(trained, tmp_path / "x", *extra)) != 0
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_share_that_leaves_too_few(trained, tmp_path, capsys, monkeypatch):
    run, text = tmp_path / "run", trained[1]
    done = run_here(*train_arguments(text, run, "--steps", 1))  # two experts per token
    assert done.returncode == 0, done.stderr
    given = arguments((run, text), tmp_path / "x", "--keep", "0.25")
    # Said before anything is read but the configuration, for both kinds of checkpoint.
    monkeypatch.setattr(generate, "load", None)
    assert main(given) == 2
    assert "--keep 0.25 leaves 1 experts per layer" in capsys.readouterr().err
    sizes = {"hidden_size": 32, "num_layers": 1, "layer_pattern": None, "num_experts": 8}
    LingForCausalLM(LingConfig.preset("tiny", **sizes)).save_pretrained(tmp_path / "published")
    given = arguments((tmp_path / "published", text), tmp_path / "x", "--keep", "0.1")
    assert main(given) == 2
    assert "--keep 0.1 leaves 1 experts per layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "length", "said"),
    [
        (1, 100_000, "measuring 1 tokens by usage, in sequences of 1\n"),
        (50, 100_000, "measuring 50 tokens by usage, in sequences of 50\n"),
        (50, 32, "measuring 32 tokens by usage, in sequences of 32\n"),
    ],
)
def test_no_more_tokens_than_asked_for(tokens, length, said, trained, tmp_path, capsys):
    extra = ["--keep", "0.5", "--tokens", tokens, "--sequence-length", length]
    assert main(arguments(trained, tmp_path / "x", *extra)) == 0
    assert said in capsys.readouterr().out


def test_another_share_than_asked_for_is_told(trained, tmp_path, capsys):
    """Whatever the difference: of 4 experts, 0.4 keeps 2, 0.7 keeps 3."""
    for keep, told in (("0.4", "kept 50% of the experts where 40%"), ("0.7", "kept 75%")):
        assert main(arguments(trained, tmp_path / keep, "--keep", keep)) == 0
        assert told in capsys.readouterr().out


def test_a_folder_that_is_not_empty(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(arguments(trained, tmp_path, "--keep", "0.5")) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
def test_an_interrupted_write_leaves_no_half_folder(
    error, exists, trained, tmp_path, monkeypatch, capsys
):
    """It ends between weights and configuration; the same command then goes through."""
    from ling_ops.models import pretrained

    def stop(*_):
        raise error

    output = tmp_path / "small"
    if exists:
        output.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(pretrained, "write_json", stop)
        assert main(arguments(trained, output, "--keep", "0.5")) != 0
    assert [path.name for path in tmp_path.rglob("*")] == ["small"] * exists
    assert capsys.readouterr().err.count("\n") == 1
    assert main(arguments(trained, output, "--keep", "0.5")) == 0
    assert LingForCausalLM.from_pretrained(output).config.num_experts == 2


def test_a_folder_below_a_file(trained, tmp_path, capsys):
    """Said before the experts are measured."""
    (tmp_path / "mine.txt").write_text("mine")
    assert main(arguments(trained, tmp_path / "mine.txt" / "x", "--keep", "0.5")) == 2
    said = capsys.readouterr()
    assert "mine.txt' is a file" in said.err and "measuring" not in said.out


def test_a_folder_that_is_a_file(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(arguments(trained, tmp_path / "mine.txt", "--keep", "0.5")) == 2
    assert "is a file" in capsys.readouterr().err


def test_the_share_that_is_told_is_that_of_the_kept(capsys):
    """Groups keep their own best: of 9 8 | 7 6 | 1 1 | 1 1 one each, 9 + 7 + 1 + 1 of 34."""
    sizes = {"hidden_size": 32, "num_layers": 1, "layer_pattern": None, "num_experts": 8,
             "num_experts_per_token": 2, "num_groups": 4, "topk_groups": 2}  # fmt: skip
    model = LingForCausalLM(LingConfig.preset("tiny", **sizes))
    scores = {0: torch.tensor([9.0, 8, 7, 6, 1, 1, 1, 1])}
    prune._conclude(model, prune_experts(model, scores, keep=0.5), scores, Path("x"), 0.5)
    said = capsys.readouterr().out
    assert "4 of 8 experts held 52.9%" in said and "asked for" not in said
    prune._conclude(model, prune_experts(model, scores, keep=0.3), scores, Path("x"), 0.3)
    assert "kept 50% of the experts where 30% were asked for" in capsys.readouterr().out
