"""Which sources a part of the record depends on, and the hash that ties it to them.

A file belongs to the first area whose pattern it matches, otherwise to ``common``, on which every
part depends: a new file makes parts stale until it is given an area, never the other way round.
"""

from __future__ import annotations

import hashlib
import subprocess
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOTS = ("csrc", "CMakeLists.txt", "ling_ops/ops", "ling_ops/reference", "ling_ops/nn",
         "ling_ops/models")  # fmt: skip
#: Without git, files of these kinds under the roots are taken for the tracked ones.
SUFFIXES = {".cu", ".cuh", ".h", ".hpp", ".cpp", ".py", ".txt", ".cmake"}

AREAS: dict[str, tuple[str, ...]] = {
    "lora": ("*lora*", "*/add_activate.*"),
    "gate": ("csrc/gate/*", "*/gate.h", "*/gate.py"),
    "route": ("csrc/route/*", "*/route.h", "*/capacity.h", "*/route.py"),
    "permute": ("csrc/combine/*", "*/permute.h", "*/permute.py"),
    "gemm": ("csrc/gemm/*", "*/gemm.h", "*/gemm.py", "*/_autocast.py"),
    "decode": ("csrc/decode/*", "*/decode.h", "*/_decode.py"),
    "heads": ("csrc/heads/*", "*/bindings_heads.h", "*/heads.h", "*/heads.py", "*/_heads.py"),
    "mlp": ("*/moe_mlp.py", "*/_fused_mlp.py", "*/activation.py"),
    "models": ("ling_ops/models/*",),
    "other": (
        "ling_ops/nn/*",
        "*/capacity.py",
        "*/losses.py",
        "*/gate_losses.py",
        "*/stats.py",
        "*/stats.h",
    ),
}
PARTS: dict[str, tuple[str, ...]] = {
    "tests": tuple(AREAS),
    "gate": ("gate",),
    "route": ("gate", "route"),
    "permute": ("route", "permute"),
    "gemm": ("gemm",),
    "moe_train": ("gate", "route", "permute", "gemm", "mlp", "other"),
    "moe_infer": ("route", "permute", "gemm", "mlp", "decode"),
    "lora": ("gate", "route", "permute", "gemm", "mlp", "lora"),
    "generate": ("gate", "route", "permute", "gemm", "mlp", "decode", "heads", "other", "models"),
}


def area_of(path: str) -> str:
    for area, patterns in AREAS.items():
        if any(fnmatch(path, pattern) for pattern in patterns):
            return area
    return "common"


def _git_files(root: Path) -> list[str] | None:
    """Tracked files and those about to be (not ignored); None where git can't say."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *ROOTS]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [name for name in done.stdout.decode().split("\0") if name]


def _walked_files(root: Path) -> list[str]:
    found = []
    for name in ROOTS:
        top = root / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file():
                found.append(path.relative_to(root).as_posix())
    return found


def source_files(root: Path = ROOT) -> list[str]:
    """Sorted source files under the roots, the same with git and in a bare copy of the tree."""
    names = _git_files(root)
    names = _walked_files(root) if names is None else names
    kept = {n for n in names if Path(n).suffix in SUFFIXES and "__pycache__" not in n}
    return sorted(name for name in kept if (root / name).is_file())


def part_files(part: str, root: Path = ROOT) -> list[str]:
    wanted = {"common", *PARTS[part]}
    return [name for name in source_files(root) if area_of(name) in wanted]


def part_hash(part: str, root: Path = ROOT) -> str:
    """16 hex digits over the names and contents of the part's files."""
    total = hashlib.sha256()
    for name in part_files(part, root):
        content = (root / name).read_bytes().replace(b"\r\n", b"\n")
        total.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def head_commit(root: Path = ROOT) -> str | None:
    """The commit checked out, with "+" where the sources differ from it; None without git."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        state = subprocess.run(
            ["git", "status", "--porcelain", "--", *ROOTS, "tests"],
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if state.strip() else "")
