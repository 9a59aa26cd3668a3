"""Importing the package: quick, no CUDA context, clear errors for what does not fit."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ling_ops import _extension

ROOT = Path(_extension.__file__).parents[1]


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter that imports the same ling_ops as this one."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def output_of(code: str, **environ: str) -> str:
    result = run_python(code, **environ)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_creates_no_cuda_context() -> None:
    code = "import torch, ling_ops; print(torch.cuda.is_initialized())"
    assert output_of(code) == "False"


def test_import_takes_under_two_seconds_beyond_torch() -> None:
    code = (
        "import torch, time; start = time.perf_counter(); import ling_ops; "
        "print(time.perf_counter() - start)"
    )
    # Repeats serve a machine that is busy or has no byte code yet.
    assert any(float(output_of(code)) < 2.0 for _ in range(4))


def test_import_loads_no_optional_dependency() -> None:
    optional = ["rich", "tensorboard", "matplotlib", "transformers", "safetensors"]
    code = f"""
import sys, torch
before = set(sys.modules)
import ling_ops
print(sorted(set({optional}) & (set(sys.modules) - before)))
"""
    assert output_of(code) == "[]"


def test_fork_after_import_can_compute() -> None:
    code = """
import os, sys
import torch, ling_ops
child = os.fork()
if child == 0:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights, indices = ling_ops.topk_gate(torch.tensor([[0.0, 2.0, 1.0]], device=device), 2)
    os._exit(0 if indices.tolist() == [[1, 2]] else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_old_torch_is_refused_by_name() -> None:
    with pytest.raises(ImportError, match=r"needs torch >= 2\.11.*has torch 2\.10\.1\+cu128"):
        _extension.check_torch("2.10.1+cu128")


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git123", "2.14.1+cu130", "3.0"])
def test_new_torch_is_accepted(version: str) -> None:
    _extension.check_torch(version)


def test_unreadable_torch_version_is_named() -> None:
    with pytest.raises(ImportError, match="'main'"):
        _extension.check_torch("main")


def test_broken_binary_names_both_sides(tmp_path: Path) -> None:
    broken = tmp_path / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    broken.write_bytes(b"not an ELF file")
    with pytest.raises(ImportError) as caught:
        _extension.load_binary(broken)
    message = str(caught.value)
    assert str(broken) in message
    assert "torch >= 2.11" in message
    assert torch.__version__ in message


def test_broken_binary_fails_the_import_and_can_be_switched_off(tmp_path: Path) -> None:
    broken = tmp_path / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    broken.write_bytes(b"")
    result = run_python("import ling_ops", LING_OPS_BINARY=str(broken))
    assert result.returncode != 0
    assert "LING_OPS_BINARY=none" in result.stderr
    assert "switched off" in output_of(
        "from ling_ops import _extension; print(_extension.load().reason)", LING_OPS_BINARY="none"
    )


def test_missing_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"absent\.so"):
        _extension.load_binary(tmp_path / "absent.so")


def test_absence_reason_names_a_binary_for_another_python(tmp_path: Path) -> None:
    (tmp_path / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    reason = _extension.absence_reason(tmp_path)
    assert "cpython-399" in reason
    assert importlib.machinery.EXTENSION_SUFFIXES[0] in reason


def test_absence_reason_repeats_the_installer(tmp_path: Path) -> None:
    (tmp_path / "_build.json").write_text('{"kernels": false, "reason": "no toolkit"}')
    assert _extension.absence_reason(tmp_path) == "no compiled kernels: no toolkit"
    (tmp_path / "_build.json").unlink()
    assert "not built" in _extension.absence_reason(tmp_path)


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80-virtual", (9, 0), True),
        ("80-virtual", (7, 5), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("100-real", (10, 3), True),
        ("120-real", (12, 1), True),
        ("100f-real", (10, 3), True),
        ("100f-real", (11, 0), False),
        ("90", (9, 0), True),
        ("native", (9, 0), False),
    ],
)
def test_which_device_runs_which_code(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert _extension.runs_on(arch, capability) is runs


def test_missing_arch_names_both_sides() -> None:
    assert _extension.arch_reason("80-real 90a-real", (9, 0)) == ""
    reason = _extension.arch_reason("90a-real", (8, 0))
    assert "90a-real" in reason
    assert "sm_80" in reason
