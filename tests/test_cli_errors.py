"""Whatever goes wrong, the user sees one line on stderr and a non-zero exit, never a traceback."""

from __future__ import annotations

import builtins
import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from cli_runner import command, environment, run_here, train_arguments, write_text

from ling_ops.cli import build_parser, checkpoint, main

for needed in ("safetensors", "matplotlib", "tensorboard", "rich"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """The folder of a finished run of two steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    done = run_here(*train_arguments(text, run, "--steps", 2))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def fails(capsys):
    """Run the command here; it must fail with one line, which is returned."""

    def call(*arguments: object, code: int | None = None) -> str:
        status = main([str(argument) for argument in arguments])
        err = capsys.readouterr().err
        assert status != 0 and (code is None or status == code)
        assert err.startswith("ling-ops: error: ") and err.count("\n") == 1, err
        return err

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "preset: got 'huge'"),
        (["--pattern", "2-x"], "layer_pattern: got '2-x'"),
        (["--pattern", "0-0"], "layer_pattern: got '0-0'"),
        (["--experts", "4", "--experts-per-token", "5"], "num_experts_per_token: got 5"),
        (["--experts", "0"], "experts must be at least 1"),
        (["--capacity", "elastic"], "capacity must be dropless, fixed:FACTOR or dynamic"),
        (["--capacity", "fixed:x"], "capacity 'fixed:x'"),
        (["--capacity", "fixed:-1"], "capacity_factor: got -1.0"),
        (["--capacity", "dynamic:2"], "target_drop_rate: got 2.0"),
        (["--capacity", "dynamic:0.1:never"], "capacity_mode: got 'never'"),
        (["--learning-rate", "nan"], "learning_rate must be finite"),
        (["--learning-rate", "-1"], "learning_rate must be at least 0"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--warmup-steps", "30", "--steps", "20"], "warmup_steps (30) is larger than steps"),
        (["--seed", str(2**40)], "seed must be at most"),
        (["--rank-timeout", str(10**14)], "rank_timeout must be at most 10000000, not"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "no device 'cuda:99'"),
        (["--model", "hidden=3"], "hidden: no such field"),
        (["--model", "vocab_size=100"], "vocab_size must be at least 256"),
        (["--model", "hidden_size"], "--model takes NAME=VALUE"),
        (["--model", 'hidden_size="wide"'], "hidden_size: got 'wide'"),
        (["--preset", "ling-1t", "--device", "cpu"], "training 999.7B parameters takes at least"),
        (["--resume"], "no such checkpoint"),
        (["--resume", "nowhere"], "no such checkpoint: 'nowhere'"),
        (["--data", "nowhere.txt"], "no such file or folder: 'nowhere.txt'"),
        (["--config", "nowhere.json"], "cannot read config 'nowhere.json'"),
    ],
)
def test_nonsense_settings(arguments, message, fails, text, tmp_path):
    extra = arguments if "--data" in arguments else [*arguments, "--data", text]
    assert message in fails("train", "--output", tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [("x", "WORLD_SIZE must be a positive int, not 'x'"), ("0", "not '0'"),
     ("2", "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun")],
)  # fmt: skip
def test_nonsense_from_a_launcher(size, message, fails, text, tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert message in fails(*train_arguments(text, tmp_path / "out"), code=2)


@pytest.mark.parametrize("name", ["finetune", "prune"])
def test_commands_of_one_process(name, fails, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    extra = ("--output", tmp_path / "out", "--keep", "0.5") if name == "prune" else ()
    message = fails(name, "--checkpoint", "a", *extra, code=2)
    assert f"{name} runs in one process; torchrun started several" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not valid"),
        ("a.json", "[1]", "must hold a table"),
        ("a.json", '{"stesp": 3}', "unknown setting 'stesp'; did you mean 'steps'?"),
        ("a.json", '{"steps": "many"}', "steps must be int, not 'many'"),
        ("a.json", '{"steps": true}', "steps must be int, not True"),
        ("a.json", '{"gate": "tanh"}', "gate must be one of softmax, sigmoid"),
        ("a.json", '{"model": 3}', "model must be a table"),
        ("a.json", '{"data": [3]}', "data must be a list of paths"),
        ("a.toml", "steps = ", "is not valid" if sys.version_info >= (3, 11) else "Python 3.11"),
    ],
)
def test_nonsense_config_files(name, content, message, fails, tmp_path):
    (tmp_path / name).write_text(content)
    assert message in fails("train", "--config", tmp_path / name, code=2)


def test_empty_folder_and_too_little_data(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    for path, message in (("empty", "no text files"), ("short.txt", "too little data")):
        extra = ["--output", tmp_path / "out"]
        assert message in fails("train", "--data", tmp_path / path, *extra)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_unreadable_file(fails, text, tmp_path, monkeypatch):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    (folder / "file_05.txt").chmod(0)
    if os.geteuid() == 0:  # root may read it all the same
        monkeypatch.setattr(builtins, "open", _refusing(builtins.open, "file_05.txt"))
    message = fails("train", "--data", folder, "--output", tmp_path / "out")
    assert "cannot read" in message and "file_05.txt" in message and "denied" in message


def _refusing(real, name):
    def call(path, *arguments, **options):
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    return call


def test_output_that_holds_a_run(fails, trained, text):
    assert "already holds a run" in fails(*train_arguments(text, trained, "--steps", 3))


def test_output_that_cannot_be_a_folder(fails, text, tmp_path):
    (tmp_path / "file").write_text("")
    assert "writing to" in fails(*train_arguments(text, tmp_path / "file" / "run"))


def test_resume_cannot_change_the_model(fails, trained):
    message = fails("train", "--resume", "--output", trained, "--gate", "softmax", code=2)
    assert "gate is 'sigmoid' in the checkpoint and cannot become 'softmax'" in message


def test_resume_from_where(fails):
    assert "--resume needs a checkpoint, or --output" in fails("train", "--resume", code=2)


@pytest.mark.parametrize("arguments", [["--gate", "tanh"], ["--steps", "many"], ["--no-such"]])
def test_wrong_flags_are_one_line_too(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith("ling-ops: error: ") and err.count("\n") == 1


def test_resume_past_the_end(fails, trained):
    message = fails("train", "--resume", "--output", trained, "--steps", 1, code=2)
    assert "past steps (1)" in message


def test_a_loss_that_explodes(fails, text, tmp_path):
    extra = ["--steps", 20, "--learning-rate", 1e30, "--clip", 0, "--checkpoint-every", 1]
    message = fails(*train_arguments(text, tmp_path / "run", *extra, "--warmup-steps", 0))
    assert "no longer finite" in message


@pytest.mark.parametrize("kind", ["model", "optimizer", "rng", "state"])
def test_corrupt_checkpoint(kind, fails, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    name = "state.json" if kind == "state" else f"{kind}.safetensors"
    path = next((run / "checkpoints").glob(f"step-*/{name}"))
    path.write_bytes(path.read_bytes()[:-9])
    assert "is damaged" in fails("train", "--resume", "--output", run)
    if kind in ("model", "state"):
        assert "is damaged" in fails("generate", "--checkpoint", run, "--prompt", "a")


def test_foreign_checkpoints(fails, tmp_path):
    (tmp_path / "state.json").write_text('{"weights": 3}')
    assert "not a ling-ops checkpoint" in fails("generate", "--checkpoint", tmp_path)
    (tmp_path / "state.json").unlink()
    assert "holds no ling-ops checkpoint" in fails("generate", "--checkpoint", tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "LlamaForCausalLM" in fails("generate", "--checkpoint", tmp_path)
    assert "no such checkpoint" in fails("generate", "--checkpoint", tmp_path / "absent")


def test_a_checkpoint_whose_tensors_are_of_another_model(fails, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    path = next((run / "checkpoints").glob("step-*/state.json"))
    state = json.loads(path.read_text())
    del state["sha256"]
    state["model"]["hidden_size"] = 64
    path.write_text(json.dumps({**state, "sha256": checkpoint._digest(state)}))
    assert "do not fit" in fails("generate", "--checkpoint", run)
    state["model"]["hidden_sise"] = 64
    path.write_text(json.dumps({**state, "sha256": checkpoint._digest(state)}))
    assert "hidden_sise: no such field" in fails("generate", "--checkpoint", run)


@pytest.mark.parametrize("at", ["model.safetensors", "metrics.jsonl", "training.png"])
def test_full_disk(at, fails, text, tmp_path, monkeypatch):
    real = checkpoint.write_file

    def full(path, content):
        if path.name.endswith(at):
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_file", full)
    run = tmp_path / "run"
    assert "the disk is full" in fails(*train_arguments(text, run, "--steps", 2))
    assert not list(run.rglob(at)) and not list(run.rglob(".writing-*"))


@pytest.mark.skipif(not os.path.exists("/proc/self/mounts"), reason="needs Linux mounts")
def test_full_disk_for_real(text, tmp_path):
    """A run inside a file system of 600 KiB, in a mount namespace of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mount = f'mount -t tmpfs -o size=600k none "{place}" && "$@"; s=$?; find "{place}"; exit $s'
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*unshare, f'mount -t tmpfs none "{place}"'], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this machine lets nobody mount a tmpfs")
    extra = ["--steps", 50, "--checkpoint-every", 1, "--keep", 50, "--log-every", 1]
    done = subprocess.run(
        [*unshare, mount, "sh", *command(*train_arguments(text, place / "run", *extra))],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("ling-ops: error: the disk is full"), done.stderr
    assert done.stderr.count("\n") == 1
    assert ".writing-" not in done.stdout


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["train", "finetune", "prune", "generate", "study", "cost"])
def test_too_little_memory_names_flags_that_the_command_has(name, error, fails, monkeypatch):
    needed = {
        "prune": ("--checkpoint", "a", "--output", "b", "--keep", "0.5"), "study": ("balance",),
        "generate": ("--checkpoint", "a"), "finetune": ("--checkpoint", "a"),
    }.get(name, ())  # fmt: skip
    module = importlib.import_module(f"ling_ops.cli.{name}")

    def run(arguments):
        raise error

    monkeypatch.setattr(module, "run", run)
    message = fails(name, *needed, code=1)
    assert "the device ran out of memory" in message
    for flag in re.findall(r"--[\w-]+", message):
        build_parser().parse_args([name, *needed, flag, "1"])
    assert ("--" in message) == (name not in ("study", "cost"))


def test_a_missing_extra_is_named(fails, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else real(name)
    )
    assert 'needs rich: run `pip install "ling-ops[train]"`' in fails("train", code=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-new-tokens", 0), ("--temperature", -1), ("--temperature", "nan"), ("--top-p", 0),
     ("--top-p", 1.5), ("--seed", -1)],
)  # fmt: skip
def test_nonsense_for_generate(option, value, fails, trained):
    assert option in fails("generate", "--checkpoint", trained, option, value, code=2)
