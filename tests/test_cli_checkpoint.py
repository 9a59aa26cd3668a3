"""Checkpoints are whole or absent, whatever happens while they are written or lie around."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal

import pytest
import torch

pytest.importorskip("safetensors")

from ling_ops.cli import checkpoint
from ling_ops.cli.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from ling_ops.cli.errors import CommandError

STATE = {"settings": {"steps": 3}, "model": {"hidden_size": 8}}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((3, 4), float(step)), "h": torch.ones(5, dtype=torch.bfloat16)},
        "rng": {"cpu": torch.arange(7, dtype=torch.uint8)},
    }


def save(root, step: int, keep: int = 2):
    return save_checkpoint(root, step=step, state=STATE, tensors=tensors(step), keep=keep)


def names(root) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    save(root, 1)
    return root


def test_round_trip(root):
    found = load_checkpoint(find_checkpoint(root.parent), groups=("model", "rng"))
    assert found.state["step"] == 1 and found.state["settings"] == STATE["settings"]
    for group, members in tensors(1).items():
        assert found.tensors[group].keys() == members.keys()
        for name, tensor in members.items():
            assert torch.equal(found.tensors[group][name], tensor)
            assert found.tensors[group][name].dtype == tensor.dtype


def test_keeps_the_last_n_and_no_leftovers(root):
    (root / ".writing-step-00000009").mkdir()
    for step in (2, 3, 4):
        save(root, step, keep=2)
    assert names(root) == ["latest", "step-00000003", "step-00000004"]
    assert find_checkpoint(root.parent).name == "step-00000004"


def test_an_earlier_step_that_goes_on_supersedes_later_ones(root):
    """They are of a run that was abandoned, and no `latest` may fall back to them."""
    for step in (20, 30, 21, 22):
        save(root, step, keep=2)
    assert names(root) == ["latest", "step-00000021", "step-00000022"]


def test_saving_a_step_again_supersedes_it(root):
    folder = save(root, 1)
    assert names(root) == ["latest", "step-00000001-2"]
    assert find_checkpoint(root.parent) == folder
    assert load_checkpoint(folder, groups=("model",)).state["step"] == 1
    save(root, 2)
    assert names(root) == ["latest", "step-00000001-2", "step-00000002"]


def test_found_by_run_by_checkpoints_folder_and_by_name(root):
    folder = root / "step-00000001"
    assert {find_checkpoint(path) for path in (root.parent, root, folder)} == {folder}


def test_a_lost_pointer_means_the_newest(root):
    save(root, 2)
    (root / "latest").write_text("step-00000077\n")
    assert find_checkpoint(root.parent).name == "step-00000002"
    (root / "latest").unlink()
    assert find_checkpoint(root.parent).name == "step-00000002"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_killed_at_any_write_or_rename(again, root):
    """The process dies before its n-th write or rename, for every n until a save completes."""
    step, deaths = (1 if again else 2), 0
    while _save_dying_at(root, step, deaths + 1):
        deaths += 1
        found = load_checkpoint(find_checkpoint(root.parent), groups=("model", "rng"))
        assert found.state["step"] in (1, step)
        shutil.rmtree(root)
        save(root, 1)
    assert deaths >= 5
    assert names(root)[-1] == ("step-00000001-2" if again else "step-00000002")


def _save_dying_at(root, step: int, call: int) -> bool:
    """Whether a child that saves `step` was killed at its call-th write or rename."""
    child = os.fork()
    if child == 0:
        left = [call]

        def dying(real):
            def stand_in(*arguments):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            return stand_in

        checkpoint.write_file = dying(checkpoint.write_file)
        os.rename, os.replace = dying(os.rename), dying(os.replace)
        save(root, step)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("failing", ["model.safetensors", "rng.safetensors", "state.json"])
def test_a_full_disk_leaves_the_earlier_checkpoint(failing, root, monkeypatch):
    real = checkpoint.write_file

    def full(path, content):
        if path.name == failing:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(CommandError, match="disk is full"):
        save(root, 2)
    assert names(root) == ["latest", "step-00000001"]
    assert (root / "latest").read_text() == "step-00000001\n"


def test_a_full_disk_while_the_pointer_moves(root, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(CommandError, match="disk is full"):
        save(root, 2)
    assert (root / "latest").read_text() == "step-00000001\n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        lambda content: b"\xff" * 8 + content[8:],
    ],
    ids=["cut", "half", "empty", "one-bit", "header"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_damage_is_noticed(name, damage, root):
    path = root / "step-00000001" / name
    content = damage(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(CommandError, match=r"damaged|not a ling-ops checkpoint"):
        load_checkpoint(root / "step-00000001", groups=("model",))


def test_a_missing_tensor_file_is_noticed(root):
    (root / "step-00000001" / "model.safetensors").unlink()
    with pytest.raises(CommandError, match=r"model\.safetensors is missing"):
        load_checkpoint(root / "step-00000001", groups=("model",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "is not a ling-ops checkpoint"),
        ({"version": 99}, "version 99"),
        ({"step": 4}, "SHA-256"),
        ({"files": {}}, "SHA-256"),
        ({"sha256": None}, "SHA-256"),
    ],
)
def test_foreign_and_later_formats(change, message, root):
    path = root / "step-00000001" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CommandError, match=message):
        load_checkpoint(path.parent, groups=("model",))


def test_folders_that_hold_none(tmp_path):
    with pytest.raises(CommandError, match="no such checkpoint"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CommandError, match="holds no ling-ops checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"foreign")
    with pytest.raises(CommandError, match="holds no ling-ops checkpoint"):
        find_checkpoint(tmp_path)


def test_errors_are_one_line():
    assert str(CommandError("one\n  two\nthree")) == "one two three"
