"""Text as bytes: which files, which of them are held out, and the order of batches."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from ling_ops.cli.errors import CommandError, describe_os_error

SEPARATOR = b"\0"  # ends each file, so that a model can learn where a text ends
HELD_OUT_PARTS = 20  # one file in twenty is held out
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
STDLIB_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "turtledemo"}


@dataclass
class TextData:
    """Training and held-out tokens (1-D, bytes as uint8) and where they came from."""

    train: torch.Tensor
    validation: torch.Tensor
    files: int
    description: str
    split: str
    fingerprint: str
    bytes_per_token: float = 1.0


def stdlib_files() -> list[tuple[str, Path]]:
    """(name, path) of the standard library's .py files, sorted by name, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _walk(root, SKIPPED_FOLDERS | STDLIB_SKIPPED, suffix=".py") if root.is_dir() else []
    if not files:
        raise CommandError(
            f"the sources of Python's standard library are not at {str(root)!r}; "
            "give text files with --data"
        )
    return files


def user_files(paths: list[str]) -> list[tuple[str, Path]]:
    """(name, path) of the files that `paths` name; folders are searched for text files."""
    files = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            found = _walk(path, SKIPPED_FOLDERS)
            if not found:
                raise CommandError(f"no text files in the folder {given!r}")
            files += [(f"{path.resolve().name}/{name}", file) for name, file in found]
        elif path.exists():
            files.append((path.name, path))
        else:
            raise CommandError(f"no such file or folder: {given!r}")
    return files


def _walk(root: Path, skipped: set[str], suffix: str = "") -> list[tuple[str, Path]]:
    found = []

    def refuse(error: OSError) -> None:
        raise describe_os_error(error, "reading the data")

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [d for d in folders if d not in skipped and not d.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not name.endswith(suffix) or not path.is_file():
                continue
            if suffix or _is_text(path):
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _read(path: Path, limit: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise CommandError(f"cannot read {str(path)!r}: {error.strerror}") from error


def _is_text(path: Path) -> bool:
    return b"\0" not in _read(path, 8192)


def is_held_out(name: str) -> bool:
    """Whether a file belongs to validation; depends on its name alone."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_PARTS == 0


def load_text(paths: list[str], *, sequence_length: int) -> TextData:
    """Read all files of `paths` (empty: the standard library) and hold some out.

    Files are held out by a hash of their names. Where that leaves either side with less than one
    sequence (few files), the last twentieth of the whole text is held out instead.
    Raises CommandError for unreadable, missing or too little data.
    """
    files = user_files(paths) if paths else stdlib_files()
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    fingerprint = hashlib.sha256()
    for name, path in files:
        content = _read(path)
        fingerprint.update(hashlib.sha256(content).digest() + name.encode("utf-8", "replace"))
        sides[is_held_out(name)].append(content + SEPARATOR)
    train, validation = b"".join(sides[0]), b"".join(sides[1])
    split, need = "whole files, by a hash of their names", sequence_length + 1
    if min(len(train), len(validation)) < need:
        text = train + validation
        cut = len(text) - max(need, len(text) // HELD_OUT_PARTS)
        train, validation = text[: max(cut, 0)], text[max(cut, 0) :]
        split = "the end of the text"
        if len(train) < need:
            raise CommandError(
                f"too little data: {len(text) - len(files)} bytes, but a sequence length of "
                f"{sequence_length} needs at least {2 * need}"
            )
    source = ", ".join(paths) if paths else "Python's standard library"
    return TextData(
        _tensor(train), _tensor(validation), len(files), source, split, fingerprint.hexdigest()
    )


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class BatchOrder:
    """Which windows of the text a step reads: a pure function of seed and step.

    An epoch is a permutation of all windows, shifted by a random offset, so that windows do not
    start at the same bytes every time. Nothing has to be saved to resume in the middle.
    """

    def __init__(self, text: torch.Tensor, *, sequence_length: int, batch: int, seed: int) -> None:
        self.text, self.length, self.batch, self.seed = text, sequence_length, batch, seed
        self.windows = (text.numel() - 1) // sequence_length
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def batch_at(self, index: int) -> torch.Tensor:
        """The `index`-th batch of the run, int64 [batch, sequence_length + 1]."""
        first = index * self.batch
        starts = torch.stack([self._start(first + i) for i in range(self.batch)])
        return self.text[starts[:, None] + torch.arange(self.length + 1)].long()

    def _start(self, position: int) -> torch.Tensor:
        epoch, within = divmod(position, self.windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            slack = self.text.numel() - 1 - self.windows * self.length
            shift = torch.randint(slack + 1, (), generator=generator)
            order = torch.randperm(self.windows, generator=generator)
            self._epoch, self._starts = epoch, order * self.length + shift
        return self._starts[within]


def validation_windows(text: torch.Tensor, *, sequence_length: int, limit: int) -> torch.Tensor:
    """Windows spread evenly over held-out text, int64 [n, sequence_length + 1].

    n is at most `limit` // sequence_length (at least 1); windows do not overlap in what they
    predict.
    """
    windows = (text.numel() - 1) // sequence_length
    count = max(1, min(windows, limit // sequence_length))
    starts = torch.arange(count) * windows // count * sequence_length
    return text[starts[:, None] + torch.arange(sequence_length + 1)].long()


def order0_entropy(windows: torch.Tensor) -> float:
    """Entropy in bits per byte of the predicted bytes of `windows` [n, sequence_length + 1].

    H = -sum_b f_b log2 f_b with f_b the frequency of byte b: what the best code that knows
    these frequencies, and no context, needs.
    """
    counts = torch.bincount(windows[:, 1:].flatten()).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum() / math.log(2))
