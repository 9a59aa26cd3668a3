"""Loads the compiled module `_C`, or says why there is none.

Nothing here touches the CUDA driver: importing creates no context.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from ling_ops._version import __version__

MINIMUM_TORCH = (2, 11)


class Extension(NamedTuple):
    """The compiled module (None without one), the reason why there is none, and its build facts.

    `facts` holds strings: version, cuda, archs, gemm_archs, torch_built, torch_minimum, cutlass.
    """

    module: ModuleType | None
    reason: str
    facts: dict[str, str]


@functools.cache
def load() -> Extension:
    """Loads `_C` once per process.

    A missing binary is no error: the reason is returned. The environment variable `LING_OPS_BINARY`
    names another file to load; `LING_OPS_BINARY=none` loads nothing.

    Raises:
        ImportError: torch is too old, or a binary is there that cannot be loaded or belongs to
            another version of the package. The message names both sides.
    """
    check_torch(torch.__version__)
    chosen = os.environ.get("LING_OPS_BINARY", "")
    if chosen == "none":
        return Extension(None, "switched off by LING_OPS_BINARY=none", {})
    if chosen:
        return load_binary(Path(chosen))
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        binary = folder / f"_C{suffix}"
        if binary.exists():
            return load_binary(binary)
    return Extension(None, absence_reason(folder), {})


def check_torch(version: str) -> None:
    """Raises ImportError for a torch older than the stable ABI that this package is built on."""
    if version_pair(version) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"ling_ops {__version__} needs torch >= {minimum}; this Python has torch {version} "
            f"({Path(torch.__file__).parent})"
        )


def version_pair(version: str) -> tuple[int, int]:
    """(major, minor) of a version string such as "2.11.0+cu130"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ImportError(f"cannot read the torch version {version!r}")
    return int(match[1]), int(match[2])


def absence_reason(folder: Path) -> str:
    """Why `folder` holds no binary for this Python."""
    foreign = sorted(path.name for path in folder.glob("_C.*.so"))
    if foreign:
        wanted = importlib.machinery.EXTENSION_SUFFIXES[0]
        return (
            "the compiled module is for another Python: "
            f"found {', '.join(foreign)}; wanted _C{wanted}"
        )
    note = folder / "_build.json"
    if note.exists():
        return f"no compiled kernels: {json.loads(note.read_text())['reason']}"
    return "no compiled kernels: this source tree was not built"


def load_binary(path: Path) -> Extension:
    """Imports one binary file as `ling_ops._C` and checks that it belongs here."""
    spec = importlib.util.spec_from_file_location("ling_ops._C", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not an extension module of Python {sys.version.split()[0]}")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"the compiled module {path} does not load: {error}. "
            f"ling_ops {__version__} builds it for torch >= {minimum}; "
            f"this is Python {sys.version.split()[0]} with torch {torch.__version__}. "
            "Reinstall ling_ops, or set LING_OPS_BINARY=none to run without kernels."
        ) from error
    facts = dict(module.build_facts())
    if facts["version"] != __version__:
        raise ImportError(
            f"the compiled module {path} is of ling_ops {facts['version']}, "
            f"the Python files are of {__version__}. Reinstall ling_ops."
        )
    return Extension(module, "", facts)


def arch_reason(archs: str, capability: tuple[int, int]) -> str:
    """Why code for `archs` cannot run on a device, naming both; empty where it can.

    Args:
        archs: CMake's words separated by spaces, such as "80-real 90a-real 80-virtual".
        capability: (major, minor) of the device.
    """
    if any(runs_on(arch, capability) for arch in archs.split()):
        return ""
    device = f"sm_{capability[0]}{capability[1]}"
    return f"the kernels were compiled for {archs or 'no architecture'}; the device is {device}"


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """CUDA's rules: machine code runs from its minor version on within a major one, PTX on anything
    later, architecture-specific code ("90a") on exactly that one."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", arch)
    if match is None:
        return False
    built = (int(match[1]), int(match[2]))
    if match[3] == "a":
        return built == capability
    if match[3] == "f" or match[4] == "real":
        return built[0] == capability[0] and built <= capability
    return built <= capability
