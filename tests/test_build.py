"""The build shim, and the binary where one exists."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ling_ops import _extension

ROOT = Path(__file__).resolve().parents[1]
CUDA_TORCH = {"dir": "/t", "version": "2.11.0+cu130", "cuda": "13.0"}
CPU_TORCH = {"dir": "/t", "version": "2.13.0+cpu", "cuda": ""}


@pytest.fixture(scope="module")
def shim() -> ModuleType:
    """setup.py as a module; its `setup()` call is guarded."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("ling_ops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("mode", "found", "nvcc", "build", "reason"),
    [
        ("auto", CUDA_TORCH, "/nvcc", True, "compiled by /nvcc"),
        ("auto", CPU_TORCH, "/nvcc", False, "not a CUDA build"),
        ("auto", CUDA_TORCH, "", False, "no CUDA toolkit"),
        ("auto", {}, "/nvcc", False, "no torch"),
        ("auto", {**CUDA_TORCH, "version": "2.10.0"}, "/nvcc", False, "torch >= 2.11 needed"),
        ("on", CPU_TORCH, "/nvcc", True, "2.13.0+cpu"),
        ("off", CUDA_TORCH, "/nvcc", False, "LING_OPS_CUDA=off"),
    ],
)
def test_plan(
    shim: ModuleType, mode: str, found: dict[str, str], nvcc: str, build: bool, reason: str
) -> None:
    plan = shim.make_plan(mode, found, nvcc)
    assert plan.build is build
    assert reason in plan.reason


@pytest.mark.parametrize(
    ("mode", "found", "nvcc", "message"),
    [
        ("on", {}, "/nvcc", "no torch"),
        ("on", CPU_TORCH, "", "no CUDA toolkit"),
        ("on", {**CPU_TORCH, "version": "2.9.1"}, "/nvcc", "torch 2.9.1 found"),
        ("yes", CUDA_TORCH, "/nvcc", "expected auto, on or off"),
    ],
)
def test_plan_insists(
    shim: ModuleType, mode: str, found: dict[str, str], nvcc: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        shim.make_plan(mode, found, nvcc)


def test_build_finds_the_torch_of_this_environment(
    shim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "pip-build-env-x" / "site"
    (overlay / "torch").mkdir(parents=True)
    (overlay / "torch" / "__init__.py").touch()
    (overlay / "torch" / "version.py").write_text("__version__ = '0.0'; cuda = None")
    monkeypatch.setenv("PYTHONPATH", str(overlay))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    found = shim.find_torch()
    assert found["version"] == torch.__version__
    assert Path(found["dir"]) == Path(torch.__file__).parent


def test_minimum_torch_is_one_truth(shim: ModuleType) -> None:
    major, minor = _extension.MINIMUM_TORCH
    assert (major, minor) == shim.MINIMUM_TORCH
    assert f'"torch>={major}.{minor}"' in (ROOT / "pyproject.toml").read_text()
    target = f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    assert target in (ROOT / "CMakeLists.txt").read_text()


def test_only_the_binder_sees_torch_and_python() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.name not in ("bindings.cpp", "bindings_routing.h", "bindings_util.h"):
            includes = re.findall(r"#include\s*[<\"]([^>\"]+)", path.read_text())
            foreign = [
                name for name in includes if re.match(r"(torch|ATen|c10|pybind11|Python)", name)
            ]
            assert not foreign, path


def test_pure_python_wheel(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(ROOT / "ling_ops", source / "ling_ops", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    subprocess.run(
        [*command, "-w", str(tmp_path), str(source)],
        env={**os.environ, "LING_OPS_CUDA": "off"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        note = json.loads(archive.read("ling_ops/_build.json"))
    assert {"ling_ops/__init__.py", "ling_ops/py.typed", "ling_ops/cli/__init__.py"} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cu"))]
    assert note == {"kernels": False, "reason": "installed with LING_OPS_CUDA=off"}


def test_source_distribution_holds_all_that_a_build_and_the_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("csrc", "tests", "bench", "docs", "ling_ops"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in (
        "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CMakeLists.txt",
        "CHANGELOG.md", "CONTRIBUTING.md", "dev",
    ):  # fmt: skip
        shutil.copy(ROOT / name, source)
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=300
    )
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "csrc/bindings.cpp", "tests/conftest.py"} <= files
    assert files - packed == set()


@pytest.fixture(scope="module")
def binary() -> Path:
    extension = _extension.load()
    if extension.module is None:
        pytest.skip(f"no binary to look at: {extension.reason}")
    return Path(extension.module.__file__)


def test_binary_tells_what_it_was_built_for(binary: Path) -> None:
    facts = _extension.load().facts
    assert set(facts) >= {
        "version",
        "cuda",
        "archs",
        "gemm_archs",
        "torch_built",
        "torch_minimum",
        "cutlass",
    }
    assert facts["torch_minimum"] == ".".join(map(str, _extension.MINIMUM_TORCH))
    assert "90a-real" in facts["gemm_archs"].split()


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_binary_uses_only_the_stable_abi(binary: Path) -> None:
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", str(binary)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    unstable = [line for line in symbols.splitlines() if re.search(r"\b(at|c10|torch)::", line)]
    assert not unstable
    assert "torch_library_impl" in symbols
    assert not re.search(r"\bU cuda\w", symbols), "the CUDA runtime must be linked statically"


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_binary_shows_nothing_but_its_entry_point(binary: Path) -> None:
    """A C++ runtime that the compiler linked in must not mix with the one torch has loaded."""
    command = ["nm", "--dynamic", "--defined-only", "--format=just-symbols", str(binary)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert symbols.split() == ["PyInit__C"]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_binary_is_not_tied_to_the_build_machine(binary: Path) -> None:
    command = ["readelf", "--dynamic", str(binary)]
    section = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", section)
    assert not re.search(r"R(UN)?PATH", section)
    assert not [name for name in needed if re.match(r"lib(cuda|torch_cuda|torch_python|c10)", name)]
