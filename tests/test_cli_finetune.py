"""`ling-ops finetune`: what trains, what it writes, that it resumes bit by bit, and its errors."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys

import pytest
import torch
from cli_runner import run_here, step_files, train_arguments, write_text
from tolerances import assert_bitwise

from ling_ops.cli import main
from ling_ops.cli.checkpoint import load_checkpoint
from ling_ops.cli.data import load_text
from ling_ops.cli.finetune import FinetuneTrainer, fingerprint
from ling_ops.cli.text import TokenizerText
from ling_ops.cli.tokens import load_tokens, tokenize
from ling_ops.models import LingConfig, LingForCausalLM
from ling_ops.nn import load_lora, merge_lora

for needed in ("matplotlib", "tensorboard", "rich"):
    pytest.importorskip(needed)
safetensors_torch = pytest.importorskip("safetensors.torch")

SMALL = ["--device", "cpu", "--batch-size", 2, "--sequence-length", 32, "--validation-bytes", 256]
COUNTERS = ["--checkpoint-every", 2, "--keep", 10, "--log-every", 1, "--validate-every", 0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of `ling-ops train` on one text."""
    folder = tmp_path_factory.mktemp("base")
    extra = ["--steps", 20, "--learning-rate", 0.01]
    done = run_here(*train_arguments(write_text(folder / "text"), folder / "run", *extra))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Another text than that of the base."""
    folder = tmp_path_factory.mktemp("other")
    for number in range(24):
        lines = [f"Line {line} of file {number} speaks of experts.\n" for line in range(30)]
        (folder / f"page_{number:02d}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def arguments(base, text, output, *extra: object) -> list[object]:
    return [
        "finetune", "--checkpoint", base, "--data", text, "--output", output, *SMALL, *COUNTERS,
        *extra,
    ]  # fmt: skip


def settings_of_finished(method: str) -> list[object]:
    extra = ["--steps", 6, "--method", method, "--learning-rate", 0.01, "--accumulate", 2]
    return [*extra, "--lora-dropout", 0.1, "--merge"] if method == "lora" else extra


@pytest.fixture(scope="module", params=["lora", "full"])
def finished(request, base, text, tmp_path_factory):
    """(method, run folder, completed process) of a whole run of six steps."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    done = run_here(*arguments(base, text, run, *settings_of_finished(request.param)))
    assert done.returncode == 0, done.stderr
    return request.param, run, done


def tensors_of(folder):
    return safetensors_torch.load_file(folder / "model.safetensors")


def test_learns_and_says_from_where_to_where(finished):
    _, run, done = finished
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (e["bits_per_byte"] for e in events if e["event"] == "validation")
    assert last < first - 0.05
    assert done.stderr == "" and f"final validation: {first:.3f} -> {last:.3f} bits/byte" in (
        done.stdout
    )


def test_lora_keeps_only_adapters_and_the_base_stays(finished, base):
    method, run, _ = finished
    kept = load_checkpoint(run / "checkpoints" / "step-00000006", groups=("model",)).tensors
    trained = {n for n in kept["model"] if ".lora." in n}
    before = load_checkpoint(base / "checkpoints" / "step-00000020", groups=("model",)).tensors
    if method == "full":
        assert set(kept["model"]) == set(before["model"]) and not trained
        return
    assert trained and {n.rpartition(".")[2] for n in trained} == {"a", "b"}
    others = set(kept["model"]) - trained
    parameters = dict(model_of(base).named_parameters())
    assert not others & set(parameters)  # buffers: selection biases, the capacity's window
    for name in others:
        if name.endswith("expert_bias"):
            assert_bitwise(kept["model"][name], before["model"][name], name)


def model_of(base) -> LingForCausalLM:
    found = load_checkpoint(base / "checkpoints" / "step-00000020", groups=("model",))
    model = LingForCausalLM(LingConfig.from_dict(found.state["model"]))
    model.load_state_dict(found.tensors["model"])
    return model.eval()


def test_the_adapter_and_the_merged_model_are_the_model_that_was_validated(finished, base):
    method, run, _ = finished
    model = LingForCausalLM.from_pretrained(run / "model")
    if method == "lora":
        adapted = model_of(base)
        load_lora(adapted, run / "adapter")
        merge_lora(adapted)
        ids = torch.arange(40)[None] % 7 + 100
        assert_bitwise(adapted(ids).logits, model(ids).logits, "logits")
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base) and config["r"] == 16
    else:
        assert not (run / "adapter").exists()
        kept = load_checkpoint(run / "checkpoints" / "step-00000006", groups=("model",)).tensors
        for name, tensor in model.state_dict().items():
            assert_bitwise(tensor, kept["model"][name], name)


def test_generate_takes_the_results(finished, base, capsysbinary):
    method, run, _ = finished
    greedy = ["--device", "cpu", "--temperature", "0", "--max-new-tokens", "12", "--prompt", "Li"]
    assert main(["generate", "--checkpoint", str(run / "model"), *greedy]) == 0
    merged = capsysbinary.readouterr().out
    if method == "lora":
        adapter = ["--checkpoint", str(base), "--adapter", str(run / "adapter")]
        assert main(["generate", *adapter, *greedy]) == 0
        assert capsysbinary.readouterr().out == merged
    assert main(["generate", "--checkpoint", str(base), *greedy]) == 0
    assert capsysbinary.readouterr().out != merged


def test_a_resumed_run_is_the_same_run(finished, base, text, tmp_path):
    """Also after the base moved, and bit by bit with dropout and a capacity window."""
    method, run, _ = finished
    part, moved = tmp_path / "part", tmp_path / "moved"
    shutil.copytree(run, part)
    shutil.copytree(base, moved)
    for step in (4, 6):
        shutil.rmtree(part / "checkpoints" / f"step-0000000{step}")
    (part / "checkpoints" / "latest").write_text("step-00000002\n")
    done = run_here("finetune", "--resume", "--output", part, "--checkpoint", moved)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and "at step 2" in done.stdout
    for name, content in step_files(run, 6).items():
        assert step_files(part, 6)[name] == content, name
    if method == "full":
        assert (part / "model" / "model.safetensors").read_bytes() == (
            run / "model" / "model.safetensors"
        ).read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("stopped_after", [0, 3])
def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_happened(
    finished, stopped_after, base, text, tmp_path, monkeypatch
):
    """Also before the first step, while the base is validated."""
    method, run, _ = finished
    part = tmp_path / "part"
    name = "update_expert_biases" if stopped_after else "_validate"
    called, original = [], getattr(FinetuneTrainer, name)

    def interrupted(trainer, *arguments):
        called.append(None)
        if len(called) == max(1, stopped_after):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(FinetuneTrainer, name, interrupted)
        done = run_here(*arguments(base, text, part, *settings_of_finished(method)))
    assert done.returncode == 0, done.stderr
    assert f"stopped by SIGTERM after step {stopped_after}, which is saved" in done.stdout
    assert not (part / "adapter").exists() and not (part / "model").exists()
    done = run_here("finetune", "--resume", "--output", part)
    assert done.returncode == 0, done.stderr
    for file, content in step_files(run, 6).items():
        assert step_files(part, 6)[file] == content, file
    # With LoRA this is --merge, which only the first command had.
    for name, tensor in tensors_of(run / "model").items():
        assert_bitwise(tensors_of(part / "model")[name], tensor, name)


def test_a_run_goes_on_from_any_working_folder(base, text, tmp_path, monkeypatch, capsys):
    """Base and text were named relative to where the run began."""
    for name, target in (("base", base), ("text", text)):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main([str(a) for a in arguments("base", "text", "run", "--steps", 1)]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["finetune", "--resume", "--output", str(tmp_path / "run"), "--steps", "2"]) == 0
    said = capsys.readouterr()
    assert "at step 1" in said.out and said.err == ""


def test_recomputing_layers_changes_nothing(base, text, tmp_path):
    for recompute in ("none", "layers"):
        extra = ["--steps", 2, "--recompute", recompute, "--learning-rate", 0.01]
        done = run_here(*arguments(base, text, tmp_path / recompute, *extra))
        assert done.returncode == 0, done.stderr
    states = [step_files(tmp_path / r, 2)["optimizer.safetensors"] for r in ("none", "layers")]
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the published format with a tokenizer of 300 tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("published")
    config = LingConfig.preset(
        "ling-mini-2.0", vocab_size=300, hidden_size=64, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, intermediate_size=80, moe_intermediate_size=24,
        num_experts=16,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LingForCausalLM(config, dtype=torch.bfloat16)
    model.foreign_config = {"eos_token_id": 299}
    model.save_pretrained(folder)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["Line of file speaks of experts"] * 9, vocab_size=290)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", "bf16"), ("lora", "fp32"), ("full", "bf16")]
)
def test_a_published_checkpoint_with_its_tokenizer(method, dtype, published, text, tmp_path):
    """What is merged is in the checkpoint's dtype, whatever the run's."""
    run = tmp_path / "run"
    extra = ["--steps", 3, "--method", method, "--merge", "--dtype", dtype]
    done = run_here(*arguments(published, text, run, *extra))
    assert done.returncode == 0, done.stderr
    assert "tokens to train on" in done.stdout
    assert (run / "model" / "tokenizer.json").read_bytes() == (
        published / "tokenizer.json"
    ).read_bytes()
    stored, original = tensors_of(run / "model"), tensors_of(published)
    assert stored.keys() == original.keys()
    assert {t.dtype for n, t in stored.items() if "expert_bias" not in n} == {torch.bfloat16}
    changed = {n for n in stored if not torch.equal(stored[n], original[n])}
    if method == "lora":
        assert changed and all(".experts." in name for name in changed)
    else:
        assert any("word_embeddings" in name or "embed" in name for name in changed)
    done = run_here("generate", "--checkpoint", run / "model", "--max-new-tokens", 3,
                       "--prompt", "Line")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_published_checkpoint_is_no_output(published, text, capsys):
    """A run in its folder would hide it from every command."""
    before = sorted(path.name for path in published.iterdir())
    status = main([str(a) for a in arguments(published, text, published)])
    assert status == 1 and "holds a published checkpoint" in capsys.readouterr().err
    assert sorted(path.name for path in published.iterdir()) == before


def test_tokenized_text(published, text):
    codec = TokenizerText(published, {"eos_token_id": 299})
    whole = load_text([str(text)], sequence_length=16)
    found = tokenize(whole, codec, sequence_length=16)
    for name in ("train", "validation"):
        side, ids = bytes(getattr(whole, name).tolist()), getattr(found, name)
        files = side.decode().split("\0")[:-1]
        expected = [i for file in files for i in [*codec.tokenizer.encode(file).ids, 299]]
        assert ids.tolist() == expected
    tokens = found.train.numel() + found.validation.numel()
    size = whole.train.numel() + whole.validation.numel()
    assert found.bytes_per_token == size / tokens > 1
    again = load_tokens([str(text)], codec, sequence_length=16, vocab_size=300)
    assert again.train.equal(found.train) and again.fingerprint == whole.fingerprint
    with pytest.raises(Exception, match="the text has token 299; the model knows 299"):
        load_tokens([str(text)], codec, sequence_length=16, vocab_size=299)
    # Held out as whole files, but then too short: the end of the text instead.
    longer = found.validation.numel()
    again = tokenize(whole, codec, sequence_length=longer)
    assert again.split == "the end of the text"
    assert again.validation.numel() == max(longer + 1, tokens // 20)
    assert torch.cat([again.train, again.validation]).equal(
        torch.cat([found.train, found.validation])
    )
    with pytest.raises(Exception, match="too little data"):
        tokenize(whole, codec, sequence_length=tokens // 2)


def test_the_fingerprint_is_of_the_weights_not_their_dtype(base):
    model = model_of(base)
    first = fingerprint(model)
    assert fingerprint(model.bfloat16()) == first
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert fingerprint(model) != first


@pytest.mark.parametrize(
    ("extra", "message", "code"),
    [
        (["--lora-targets", "nosuch"], "lora_targets: 'nosuch' names none of", 2),
        (["--lora-rank", "0"], "lora_rank must be at least 1, not 0", 2),
        (["--lora-alpha", "0"], "lora_alpha must be above 0, not 0.0", 2),
        (["--lora-dropout", "1"], "lora_dropout must be below 1, not 1.0", 2),
        (["--method", "full", "--lora-rank", "4"], "method full takes no lora_rank", 2),
        (["--warmup-steps", "300"], "warmup_steps (300) is larger than steps (200)", 2),
        (["--data", "nosuch"], "no such file or folder: 'nosuch'", 1),
        (["--checkpoint", "nosuch"], "no such checkpoint: 'nosuch'", 1),
    ],
)
def test_nonsense(extra, message, code, base, text, tmp_path, capsys):
    status = main([str(a) for a in arguments(base, text, tmp_path / "run", *extra)])
    err = capsys.readouterr().err
    assert status == code and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


def test_commands_name_each_other(finished, base, text, tmp_path, capsys, monkeypatch):
    method, run, _ = finished
    at = str(run / "model") if method == "full" else str(base)
    for given, message in (
        (["train", "--resume", "--output", run], "is of `ling-ops finetune`: resume it with that"),
        (["finetune", "--resume", "--output", base], "is of `ling-ops train`: resume it"),
        (["generate", "--checkpoint", run], at),
        (["finetune", "--data", text], "--checkpoint is missing"),
        (arguments(base, text, run), "already holds a run"),
        (["finetune", "--resume", "--output", run, "--lora-rank", "3"], "lora_rank is 16 in the"),
        (["finetune", "--resume", "--output", run, "--steps", "5"], "past steps (5)"),
    ):
        assert main([str(item) for item in given]) != 0
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(item) for item in arguments(base, text, tmp_path / "x")]) == 2
    assert "finetune runs in one process" in capsys.readouterr().err


def test_another_base_is_refused_on_resume(finished, base, text, tmp_path, capsys):
    _, run, _ = finished
    other = tmp_path / "other"
    done = run_here(*train_arguments(text, other, "--steps", 1))
    assert done.returncode == 0, done.stderr
    resume = ["finetune", "--resume", "--output", run, "--checkpoint", other, "--steps", 8]
    assert main([str(item) for item in resume]) == 1
    assert "is not what this run started from" in capsys.readouterr().err


def test_bits_per_byte_counts_bytes_not_tokens(published, text, tmp_path):
    run = tmp_path / "run"
    done = run_here(*arguments(published, text, run, "--steps", 1))
    assert done.returncode == 0, done.stderr
    event = next(
        e for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if e["event"] == "train"
    )  # fmt: skip
    codec = TokenizerText(published, {"eos_token_id": 299})
    found = tokenize(load_text([str(text)], sequence_length=32), codec, sequence_length=32)
    assert event["bits_per_byte"] == pytest.approx(
        event["loss"] / (math.log(2) * found.bytes_per_token)
    )


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["lora", "full"])
def test_on_a_gpu_in_bf16(method, base, text, tmp_path, device):
    """It learns, and a resumed run has the same bits."""
    run, part = tmp_path / "run", tmp_path / "part"
    extra = ["--steps", 6, "--method", method, "--learning-rate", 0.01, "--device", "cuda"]
    done = run_here(*arguments(base, text, run, *extra))
    assert done.returncode == 0, done.stderr
    assert "in bfloat16" in done.stdout
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (e["bits_per_byte"] for e in events if e["event"] == "validation")
    assert last < first
    shutil.copytree(run, part)
    for step in (4, 6):
        shutil.rmtree(part / "checkpoints" / f"step-0000000{step}")
    (part / "checkpoints" / "latest").write_text("step-00000002\n")
    done = run_here("finetune", "--resume", "--output", part)
    assert done.returncode == 0, done.stderr
    for name, content in step_files(run, 6).items():
        assert step_files(part, 6)[name] == content, name
