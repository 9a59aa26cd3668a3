"""Shim between pip and CMake; CMakeLists.txt owns sources, flags and architectures.

LING_OPS_CUDA=auto  build the kernels where a CUDA toolkit and a CUDA torch are found (default)
LING_OPS_CUDA=on    insist; also builds beside a CPU torch
LING_OPS_CUDA=off   pure Python
LING_OPS_ARCHS, LING_OPS_STRICT, MAX_JOBS are handed to CMake where set.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MINIMUM_TORCH = (2, 11)
# Wanted only where kernels are compiled, so that a pure-Python install downloads none of it.
# torch is not among them: the build uses the one that is installed.
NATIVE_REQUIREMENTS = [
    "cmake>=3.24,<5",
    "ninja>=1.11,<2",
    "pybind11>=3.0,<4",
    "nvidia-cutlass>=4.2,<4.3",
]
TORCH_QUERY = """
import importlib.util, json, pathlib
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin is not None:
    root = pathlib.Path(spec.origin).parent
    facts = {}
    exec((root / "version.py").read_text(), facts)
    print(json.dumps({"dir": str(root), "version": facts["__version__"], "cuda": facts["cuda"]}))
"""


class Plan(NamedTuple):
    """Whether kernels are compiled, why (not), with which torch and nvcc."""

    build: bool
    reason: str
    torch: dict[str, str]
    nvcc: str


def find_torch() -> dict[str, str]:
    """The torch of the environment installed into, not of pip's isolated build environment."""
    environ = dict(os.environ)
    environ.pop("PYTHONNOUSERSITE", None)
    paths = environ.pop("PYTHONPATH", "").split(os.pathsep)
    kept = [path for path in paths if path and "pip-build-env" not in path]
    if kept:
        environ["PYTHONPATH"] = os.pathsep.join(kept)
    command = [sys.executable, "-c", TORCH_QUERY]
    result = subprocess.run(
        command, env=environ, cwd="/", capture_output=True, text=True, check=False
    )
    return json.loads(result.stdout) if result.returncode == 0 and result.stdout.strip() else {}


def find_nvcc() -> str:
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(f"{root}/bin/nvcc" for root in roots if root)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, filter(None, candidates)) if path), "")


def make_plan(mode: str, torch: dict[str, str], nvcc: str) -> Plan:
    """Applies LING_OPS_CUDA; SystemExit where `on` cannot be met."""
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"LING_OPS_CUDA={mode!r}: expected auto, on or off")
    if mode == "off":
        return Plan(False, "installed with LING_OPS_CUDA=off", torch, nvcc)
    missing = ""
    if not torch:
        missing = f"no torch in the environment of {sys.executable}"
    elif tuple(int(part) for part in torch["version"].split(".")[:2]) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        missing = f"torch {torch['version']} found, torch >= {minimum} needed"
    elif not nvcc:
        missing = "no CUDA toolkit (nvcc) found; set CUDA_HOME"
    elif mode == "auto" and not torch["cuda"]:
        missing = f"torch {torch['version']} is not a CUDA build"
    if missing and mode == "on":
        raise SystemExit(f"LING_OPS_CUDA=on: {missing}")
    if missing:
        return Plan(False, f"{missing} (at install time)", torch, nvcc)
    return Plan(True, f"compiled by {nvcc} beside torch {torch['version']}", torch, nvcc)


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cutlass = importlib.util.find_spec("cutlass_library").submodule_search_locations[0]
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "CMAKE_CUDA_COMPILER": PLAN.nvcc,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": destination,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LING_OPS_TORCH_DIR": PLAN.torch["dir"],
            "LING_OPS_CUTLASS_INCLUDE": Path(cutlass, "source", "include"),
        }
        for key in ("LING_OPS_ARCHS", "LING_OPS_STRICT"):
            if key in os.environ:
                options[key] = os.environ[key]
        source = Path(__file__).resolve().parent
        defines = [f"-D{key}={value}" for key, value in options.items()]
        # --fresh: a cache from an earlier install names that install's deleted build environment.
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", source, "-B", self.build_temp]
        subprocess.run([*configure, *defines], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", self.build_temp, "--parallel", jobs], check=True)


class BuildPython(build_py):
    """Leaves a note in the package that tells `ling_ops._extension` why kernels are missing."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            note = {"kernels": PLAN.build, "reason": PLAN.reason}
            Path(self.build_lib, "ling_ops", "_build.json").write_text(json.dumps(note) + "\n")


PLAN = make_plan(os.environ.get("LING_OPS_CUDA", "auto"), find_torch(), find_nvcc())

if __name__ == "__main__":
    kernels = "with" if PLAN.build else "WITHOUT"
    print(f"ling_ops: {kernels} CUDA kernels: {PLAN.reason}", file=sys.stderr)
    setup(
        ext_modules=[CMakeExtension("ling_ops._C")] if PLAN.build else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
        setup_requires=NATIVE_REQUIREMENTS if PLAN.build else [],
    )
