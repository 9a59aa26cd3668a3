"""Checkpoints that are whole or absent: safetensors for tensors, JSON for the rest, no pickle.

    <run>/checkpoints/latest                      the name of the newest checkpoint folder
    <run>/checkpoints/step-00000100/state.json    format, step, settings, SHA-256 of all files
                                   /model.safetensors, /optimizer.safetensors, /rng.safetensors

A checkpoint is written to a temporary folder beside its place, flushed to the disk, and renamed;
only then does `latest` move. A crash at any point leaves the earlier checkpoint in force.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ling_ops.cli.errors import CommandError, describe_os_error

FORMAT = "ling_ops.checkpoint"
VERSION = 1
STATE = "state.json"
LATEST = "latest"
_TEMPORARY = ".writing-"


@dataclass
class Checkpoint:
    """A checkpoint read back: its folder, its JSON state and its groups of tensors."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]


def save_checkpoint(
    root: Path, *, step: int, state: dict[str, Any], tensors: dict[str, dict[str, torch.Tensor]],
    keep: int,
) -> Path:  # fmt: skip
    """Write a checkpoint under `root`, make it the latest, and drop all but the last `keep`.

    `tensors` maps a group name (one file each) to tensors by name; `state` must be JSON-able.
    Raises CommandError when the disk is full or refuses, leaving no partial checkpoint.
    """
    final = _free_name(root, step)
    temporary = root / f"{_TEMPORARY}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        _write_contents(temporary, {**state, "step": step}, tensors)
        os.rename(temporary, final)
        _sync_folder(root)
        write_atomically(root / LATEST, (final.name + "\n").encode())
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise describe_os_error(error, f"the checkpoint of step {step} in {str(root)!r}") from error
    _prune(root, keep, final)
    return final


def _free_name(root: Path, step: int) -> Path:
    """step-N, or step-N-2 and so on: a folder cannot be replaced in one move, so none ever is."""
    final, copies = root / f"step-{step:08d}", 1
    while final.exists():
        copies += 1
        final = root / f"step-{step:08d}-{copies}"
    return final


def _write_contents(folder: Path, state: dict, tensors: dict) -> None:
    from safetensors.torch import save

    files = {}
    for group, members in tensors.items():
        content = save({name: t.detach().cpu().contiguous() for name, t in members.items()})
        write_file(folder / f"{group}.safetensors", content)
        files[f"{group}.safetensors"] = {
            "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
    whole = {"format": FORMAT, "version": VERSION, "files": files, **state}
    whole["sha256"] = _digest(whole)
    write_file(folder / STATE, json.dumps(whole, indent=1).encode())
    _sync_folder(folder)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write `content` and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        write_file(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _prune(root: Path, keep: int, newest: Path) -> None:
    """Remove all but `newest` and the keep - 1 before it, of each step the last one written."""
    others = [folder for folder in _step_folders(root) if folder != newest]
    last_of_step = {_order(folder)[0]: folder for folder in others}
    # A run that went on from an earlier step leaves later ones behind, which are not its own.
    earlier = [folder for step, folder in last_of_step.items() if step < _order(newest)[0]]
    kept = earlier[max(0, len(earlier) - (keep - 1)) :]
    # Renamed first: a folder that is half deleted must not look like a checkpoint.
    for folder in others:
        if folder not in kept:
            doomed = root / f"{_TEMPORARY}{folder.name}"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(folder, doomed)
    for leftover in root.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def _order(folder: Path) -> tuple[int, int]:
    """(step, copy) of a step folder."""
    _, step, *copy = folder.name.split("-")
    return int(step), int(copy[0]) if copy else 1


def _step_folders(root: Path) -> list[Path]:
    pattern = re.compile(r"step-\d+(-\d+)?")
    found = [p for p in root.glob("step-*") if p.is_dir() and pattern.fullmatch(p.name)]
    return sorted(found, key=_order)


def has_checkpoint(run: Path) -> bool:
    """Whether the run folder holds a checkpoint."""
    return bool(_step_folders(run / "checkpoints"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` names: itself, or the latest of a run folder."""
    path = Path(path)
    if (path / STATE).is_file():
        return path
    for root in (path / "checkpoints", path):
        pointer = root / LATEST
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8", errors="replace").strip()
            if "/" not in name and name.startswith("step-") and (root / name).is_dir():
                return root / name
        # A crash between two renames can leave the pointer behind the folders.
        if steps := _step_folders(root):
            return steps[-1]
    if not path.exists():
        raise CommandError(f"no such checkpoint: {str(path)!r}")
    raise CommandError(f"{str(path)!r} holds no ling-ops checkpoint")


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint folder lies in, or None if it was moved elsewhere."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" else None


def load_checkpoint(folder: Path, *, groups: tuple[str, ...]) -> Checkpoint:
    """Read and verify a checkpoint's state and the named groups of tensors (on the CPU).

    Raises CommandError if it is foreign, of a later version, incomplete or damaged.
    """
    try:
        content = (folder / STATE).read_bytes()
        state = json.loads(content)
    except FileNotFoundError as error:
        raise CommandError(f"{str(folder)!r} holds no ling-ops checkpoint") from error
    except OSError as error:
        raise describe_os_error(error, "reading the checkpoint") from error
    except ValueError as error:
        raise _damaged(folder, f"{STATE} is not valid JSON") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CommandError(f"{str(folder)!r} is not a ling-ops checkpoint")
    if state.get("version") != VERSION:
        raise CommandError(
            f"{str(folder)!r} has checkpoint version {state.get('version')!r}; this ling-ops "
            f"reads version {VERSION}"
        )
    if state.pop("sha256", None) != _digest(state):
        raise _damaged(folder, f"{STATE} differs from its recorded SHA-256")
    return Checkpoint(folder, state, {g: _load_group(folder, state["files"], g) for g in groups})


def _load_group(folder: Path, files: dict[str, Any], group: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = f"{group}.safetensors"
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise _damaged(folder, f"{name} is missing") from error
    except OSError as error:
        raise describe_os_error(error, "reading the checkpoint") from error
    expected = files.get(name)
    digest = hashlib.sha256(content).hexdigest()
    if not isinstance(expected, dict) or digest != expected.get("sha256"):
        raise _damaged(folder, f"{name} differs from its recorded SHA-256")
    try:
        return load(content)
    except (SafetensorError, ValueError) as error:
        raise _damaged(folder, f"{name}: {error}") from error


def _damaged(folder: Path, reason: str) -> CommandError:
    return CommandError(
        f"the checkpoint {str(folder)!r} is damaged ({reason}); resume from another step-* folder"
    )
