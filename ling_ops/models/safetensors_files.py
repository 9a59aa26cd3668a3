"""The weight files of a checkpoint folder: safetensors, one or many, with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .published import CheckpointError, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TEMPORARY = ".writing-"


def _library():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'checkpoints need safetensors: run `pip install "ling-ops[hf]"`'
        ) from error
    return safetensors


def weight_files(folder: Path) -> list[Path]:
    """The weight files that the index names, or the single file. CheckpointError if none."""
    if (folder / INDEX).is_file():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise CheckpointError(f"{folder / INDEX}: weight_map is missing or empty")
        names = sorted(set(map(str, mapping.values())))
        if strange := [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]:
            raise CheckpointError(f"{folder / INDEX}: not the name of a file here: {strange[0]!r}")
    else:
        names = [SINGLE]
    if absent := [name for name in names if not (folder / name).is_file()]:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is pickled and is never read)" if pickled else ""
        raise CheckpointError(f"{folder}: {', '.join(absent)} missing{hint}")
    return [folder / name for name in names]


class WeightFiles:
    """Memory-mapped weight files: the shape and dtype of every key, and its tensor on demand."""

    def __init__(self, folder: Path) -> None:
        library = _library()
        self._place = {}
        for path in weight_files(folder):
            try:
                handle = library.safe_open(path, framework="pt", device="cpu")
            except (library.SafetensorError, ValueError) as error:
                raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
            for key in handle.keys():  # noqa: SIM118  (the handle is no mapping)
                if key in self._place:
                    raise CheckpointError(f"{path}: {key} is in another file too")
                self._place[key] = handle

    def __iter__(self) -> Iterator[str]:
        """All keys, file by file."""
        return iter(self._place)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._place[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        # One element tells; a whole tensor would be read from the disk.
        piece = self._place[key].get_slice(key)
        return (piece[:1] if piece.get_shape() else self[key]).dtype

    def __getitem__(self, key: str) -> Tensor:
        return self._place[key].get_tensor(key)


def shards(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Keys in order, cut into runs of at most ``limit`` bytes (a larger tensor stands alone)."""
    runs: list[list[str]] = [[]]
    room = limit
    for key, size in sizes:
        if runs[-1] and size > room:
            runs.append([])
            room = limit
        runs[-1].append(key)
        room -= size
    return runs


def write_weights(
    folder: Path, sizes: list[tuple[str, int]], tensor: Callable[[str], Tensor], limit: int
) -> None:
    """Write all keys, ``tensor(key)`` (CPU, contiguous) being asked for one file's keys at a time.

    A file gets its name when it is whole and on the disk, and the index comes last.
    """
    library, runs = _library(), shards(sizes, limit)
    for old in folder.glob(f"{_TEMPORARY}*"):
        old.unlink()
    total, mapping = sum(size for _, size in sizes), {}
    for number, keys in enumerate(runs, 1):
        name = SINGLE
        if len(runs) > 1:
            name = f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        temporary = folder / f"{_TEMPORARY}{name}"
        content = {key: tensor(key) for key in keys}
        library.torch.save_file(content, temporary, metadata={"format": "pt"})
        del content
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
        mapping |= dict.fromkeys(keys, name)
    if len(runs) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": mapping})


def write_json(path: Path, values: dict) -> None:
    """Replace ``path``: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
