"""The record's own logic, on fabricated records: hashes, merging, --check, the plot."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130", "cuda": "13.0"}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module("record")
    finally:
        sys.path.pop(0)


@pytest.fixture
def sources(bench: ModuleType) -> ModuleType:
    return sys.modules["sources"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small source tree without git."""
    files = {
        "CMakeLists.txt": "project(x)",
        "csrc/bindings.cpp": "binder",
        "csrc/include/ling/gate.h": "gate header",
        "csrc/gate/gate.cu": "gate kernel",
        "csrc/gemm/kernel.cuh": "gemm kernel",
        "ling_ops/ops/gate.py": "gate = 1",
        "ling_ops/ops/_library.py": "library = 1",
        "ling_ops/reference/gate.py": "truth = 1",
        "ling_ops/nn/moe.py": "moe = 1",
        "ling_ops/models/packed.py": "packed = 1",
        "ling_ops/cli/train.py": "no part depends on this",
    }
    for name, text in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


def row(kind: str, **values: Any) -> dict[str, Any]:
    base = {
        "bench": kind, "provider": "ling_ops", "what": "fwd", "graph": False, "T": 64, "H": 2048,
        "I": 512, "E": 256, "K": 8, "dtype": "bfloat16", "ms": 2.0, "ms_min": 1.9, "ms_max": 2.2,
        "floor_ms": 1.0, "peak_gib": 0.1,
    }  # fmt: skip
    return base | values


def full_record(bench: ModuleType, tree: Path) -> dict[str, Any]:
    record = bench.empty_record(FACTS)
    record["sources"] = {part: bench.part_hash(part, tree) for part in bench.PARTS}
    record["tests"] = {"passed": 9, "failed": 0, "skipped": 1, "commit": "abc"}
    record["rows"] = [row(kind) for _, kinds in bench.SCRIPTS.values() for kind in kinds]
    return record


@pytest.mark.parametrize(
    "name,slug",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("Unknown", "unknown"),
    ],
)
def test_file_name_of_a_device(bench: ModuleType, name: str, slug: str) -> None:
    assert bench.gpu_slug(name) == slug


def test_every_part_has_a_bench_and_sources(bench: ModuleType) -> None:
    assert set(bench.SCRIPTS) | {"tests"} == set(bench.PARTS)
    for script, _ in bench.SCRIPTS.values():
        assert (ROOT / "bench" / script).is_file()


def test_the_hash_follows_the_parts_own_sources(bench: ModuleType, tree: Path) -> None:
    def hashes() -> dict[str, str]:
        return {part: bench.part_hash(part, tree) for part in bench.PARTS}

    before = hashes()
    changes = {
        "csrc/gate/gate.cu": {"tests", "gate", "route", "moe_train", "lora", "generate"},
        "csrc/gemm/kernel.cuh": {"tests", "gemm", "moe_train", "moe_infer", "lora", "generate"},
        "ling_ops/nn/moe.py": {"tests", "moe_train", "generate"},
        "ling_ops/models/packed.py": {"tests", "generate"},
        "ling_ops/ops/_library.py": set(bench.PARTS),
        "csrc/bindings.cpp": set(bench.PARTS),
        "ling_ops/cli/train.py": set(),
    }
    for name, expected in changes.items():
        original = (tree / name).read_text()
        (tree / name).write_text(original + " changed")
        after = hashes()
        assert {part for part in before if before[part] != after[part]} == expected, name
        (tree / name).write_text(original)
    assert hashes() == before


def test_new_and_renamed_files_count(bench: ModuleType, tree: Path) -> None:
    before = bench.part_hash("gate", tree)
    (tree / "csrc/gate/gate.cu").rename(tree / "csrc/gate/other.cu")
    assert bench.part_hash("gate", tree) != before
    (tree / "csrc/gate/other.cu").rename(tree / "csrc/gate/gate.cu")
    (tree / "ling_ops/ops/brand_new.py").write_text("")
    assert bench.part_hash("gate", tree) != before, "an unknown file concerns every part"


def test_build_products_do_not_count(bench: ModuleType, tree: Path) -> None:
    before = bench.part_hash("tests", tree)
    for name in ("ling_ops/ops/__pycache__/gate.cpython-312.pyc", "csrc/gate/gate.o",
                 "ling_ops/ops/__pycache__/x.py"):  # fmt: skip
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("built")
    assert bench.part_hash("tests", tree) == before


def test_line_endings_do_not_count(bench: ModuleType, tree: Path) -> None:
    path = tree / "csrc/gate/gate.cu"
    path.write_bytes(b"a\nb\n")
    before = bench.part_hash("gate", tree)
    path.write_bytes(b"a\r\nb\r\n")
    assert bench.part_hash("gate", tree) == before


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_hash_is_the_same_with_and_without_git(
    bench: ModuleType, sources: ModuleType, tree: Path, tmp_path: Path
) -> None:
    bare = {part: bench.part_hash(part, tree) for part in bench.PARTS}
    (tree / ".gitignore").write_text("__pycache__/\n*.so\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], cwd=tree, check=True)
    assert {part: bench.part_hash(part, tree) for part in bench.PARTS} == bare  # untracked yet
    subprocess.run([*git, "add", "."], cwd=tree, check=True)
    subprocess.run([*git, "commit", "-qm", "x"], cwd=tree, check=True)
    assert {part: bench.part_hash(part, tree) for part in bench.PARTS} == bare
    head = sources.head_commit(tree)
    assert len(head) == 40
    (tree / "csrc/gate/gate.cu").write_text("changed")
    assert sources.head_commit(tree) == head + "+"
    (tree / "csrc/gate/gate.cu").unlink()
    assert bench.part_hash("gate", tree) != bare["gate"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_this_trees_hash_needs_no_git(
    bench: ModuleType, sources: ModuleType, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    for name in sources.ROOTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name)
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    assert sources.source_files(copy) == sources.source_files(ROOT)
    for part in bench.PARTS:
        assert bench.part_hash(part, copy) == bench.part_hash(part, ROOT)


def test_a_part_replaces_only_its_own_rows(bench: ModuleType, tree: Path) -> None:
    record = full_record(bench, tree)
    bench.merge_rows(record, "permute", [row("permute", ms=7.0)])
    kinds = [r["bench"] for r in record["rows"]]
    assert kinds == [
        "gate",
        "route",
        "permute",
        "gemm",
        "grouped_mm",
        "moe_train",
        "moe_infer",
        "lora",
        "generate",
    ]
    assert [r["ms"] for r in record["rows"] if r["bench"] == "permute"] == [7.0]


def test_saving_and_loading(bench: ModuleType, tree: Path, tmp_path: Path) -> None:
    record = full_record(bench, tree)
    path = tmp_path / "deep" / "h100.json"
    bench.save(record, path)
    assert bench.load(path) == record
    assert [p.name for p in path.parent.iterdir()] == ["h100.json"]
    lines = path.read_text().splitlines()
    assert sum('"bench"' in line for line in lines) == len(record["rows"])
    empty = bench.empty_record(FACTS)
    bench.save(empty, path)
    assert bench.load(path) == empty


def test_rows_of_two_machines_do_not_mix(bench: ModuleType, tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    bench.save(full_record(bench, tree), path)
    assert bench.starting_record(path, FACTS, ["gate"])["rows"]
    assert not bench.starting_record(path, FACTS, list(bench.PARTS))["rows"]
    with pytest.raises(bench.RecordError, match=r"torch '2\.11\.0\+cu130'.*'2\.12\.0'"):
        bench.starting_record(path, FACTS | {"torch": "2.12.0"}, ["gate"])


def test_check(bench: ModuleType, tree: Path, tmp_path: Path, capsys: Any) -> None:
    parts, results = list(bench.PARTS), tmp_path / "results"
    assert bench.check(results, parts, tree) == 1
    record = full_record(bench, tree)
    bench.save(record, results / "h100.json")
    assert bench.check(results, parts, tree) == 0
    capsys.readouterr()

    (tree / "csrc/gemm/kernel.cuh").write_text("faster")
    assert bench.check(results, parts, tree) == 1
    stale = [line for line in capsys.readouterr().out.splitlines() if "stale" in line]
    assert {line.split(": ")[1] for line in stale} == {
        "tests",
        "gemm",
        "moe_train",
        "moe_infer",
        "lora",
        "generate",
    }
    assert bench.check(results, ["gate"], tree) == 0


def test_check_finds_missing_parts_failed_tests_and_lost_rows(
    bench: ModuleType, tree: Path
) -> None:
    record = full_record(bench, tree)
    del record["sources"]["route"]
    record["tests"]["failed"] = 2
    record["rows"] = [r for r in record["rows"] if r["bench"] != "gate"]
    assert bench.problems(record, list(bench.PARTS), tree) == {
        "route": "not recorded",
        "tests": "2 tests failed",
        "gate": "has no rows",
    }


def test_check_command(tmp_path: Path) -> None:
    """The real command, without a GPU; a broken record is one line, not a traceback."""
    command = [sys.executable, str(ROOT / "bench" / "record.py"), "--check", "--results"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no record" in done.stdout
    (tmp_path / "h100.json").write_text("{")
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "can't be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_counting_tests(bench: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="12" failures="1" errors="1" skipped="3"/></testsuites>'
    )
    assert bench.count_tests(report) == {"passed": 7, "failed": 2, "skipped": 3}


def test_plot(tree: Path, bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = full_record(bench, tree)
    record["date"], record["rows"] = "2026-01-01T00:00:00+00:00", []
    for provider, ms in (("ling_ops", 2.0), ("torch", 3.0)):
        for tokens in (64, 8192):
            sizes = {"provider": provider, "ms": ms, "T": tokens}
            record["rows"] += [
                row("moe_train", what="fwd_bwd", **sizes),
                row("gate", what="softmax_fwd", H=None, I=None, **sizes),
                row("moe_infer", **sizes),
            ]
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(record))
    command = [sys.executable, str(ROOT / "bench" / "plot.py"), str(path)]
    subprocess.run(command, check=True)
    assert path.with_suffix(".png").stat().st_size > 20_000
