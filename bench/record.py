"""The record of tests and speed on one GPU: bench/results/<gpu>.json.

    python bench/record.py                      all parts, on a GPU
    python bench/record.py --part gate          one part (or several), merged into the record
    python bench/record.py --check              no GPU: does the record belong to these sources?

In a copy of the tree without git, say which commit it is of: ``--commit HASH``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sources import PARTS, ROOT, head_commit, part_hash

RESULTS = ROOT / "bench" / "results"
#: part -> (script, kinds of rows that it writes)
SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gate": ("bench_gate.py", ("gate",)),
    "route": ("bench_route.py", ("route",)),
    "permute": ("bench_route.py", ("permute", "combine")),
    "gemm": ("bench_gemm.py", ("gemm", "grouped_mm")),
    "moe_train": ("bench_moe_train.py", ("moe_train",)),
    "moe_infer": ("bench_moe_infer.py", ("moe_infer",)),
    "lora": ("bench_lora.py", ("lora",)),
    "generate": ("bench_generate.py", ("generate",)),
}
Record = dict[str, Any]


class RecordError(Exception):
    """Something that one line can explain."""


# --- the record as data --------------------------------------------------------------------------
def gpu_slug(name: str) -> str:
    """File name of a device: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = re.split(r"[\s\-]+", name.lower())
    words = [w for w in words if w not in ("nvidia", "geforce", "tesla", "quadro", "amd")]
    for count, word in enumerate(words, 1):
        if re.search(r"\d", word):
            return "".join(words[:count])
    return "".join(words) or "gpu"


def empty_record(facts: dict[str, str]) -> Record:
    return {**facts, "date": "", "sources": {}, "tests": {}, "ceilings": {}, "rows": []}


def starting_record(path: Path, facts: dict[str, str], parts: Sequence[str]) -> Record:
    """What a run adds to: nothing for a run of all parts, the record at hand for some.

    Rows of one record must come from one device and one version of everything.
    """
    if set(parts) == set(PARTS) or not path.exists():
        return empty_record(facts)
    record = load(path)
    for key, value in facts.items():
        if record.get(key) != value:
            raise RecordError(
                f"{path.name} is of {key} {record.get(key)!r}, this machine has {value!r}: "
                "run all parts for a new record"
            )
    return record


def load(path: Path) -> Record:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} can't be read: {error}") from error


def merge_rows(record: Record, part: str, rows: list[dict[str, Any]]) -> None:
    """Replace a part's rows, keeping the order of parts."""
    kinds = SCRIPTS[part][1]
    order = [kind for _, kinds_ in SCRIPTS.values() for kind in kinds_]
    kept = [row for row in record["rows"] if row["bench"] not in kinds]
    record["rows"] = sorted(kept + rows, key=lambda row: order.index(row["bench"]))


def dump(record: Record) -> str:
    """JSON with one row per line, so that a change of one figure is a change of one line."""
    head = json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in record["rows"])
    return head[:-2] + ',\n "rows": [\n' + rows + "\n ]\n}\n"


def save(record: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(dump(record))
    os.replace(partial, path)


# --- --check -------------------------------------------------------------------------------------
def problems(record: Record, parts: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """part -> what is wrong with it; empty if the record belongs to the sources."""
    found = {}
    for part in parts:
        recorded = record.get("sources", {}).get(part)
        if recorded is None:
            found[part] = "not recorded"
        elif recorded != part_hash(part, root):
            found[part] = "stale: its sources have changed since"
        elif part == "tests" and record["tests"].get("failed", 1):
            found[part] = f"{record['tests'].get('failed', 'unknown')} tests failed"
        elif part != "tests" and not any(r["bench"] in SCRIPTS[part][1] for r in record["rows"]):
            found[part] = "has no rows"
    return found


def check(results: Path, parts: Sequence[str], root: Path = ROOT) -> int:
    """Print the state of every part of every record; 0 if all belong to the sources, else 1."""
    paths = sorted(results.glob("*.json"))
    if not paths:
        print(f"no record in {results}")
        return 1
    wrong = False
    for path in paths:
        found = problems(load(path), parts, root)
        wrong |= bool(found)
        for part in parts:
            print(f"{path.stem}: {part}: {found.get(part, 'up to date')}")
    return int(wrong)


# --- running parts -------------------------------------------------------------------------------
def environment() -> dict[str, str]:
    """Children import the very package that this process found."""
    import ling_ops

    here = str(Path(ling_ops.__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path}


def machine_facts() -> dict[str, str]:
    """Device and versions; refuses a machine whose figures would be the fallback's."""
    import torch

    import ling_ops

    if not torch.cuda.is_available():
        raise RecordError("a record needs a CUDA device (--check does not)")
    extension = ling_ops.backend_info()["extension"]
    if not extension["loaded"]:
        raise RecordError(f"ling_ops has no compiled kernels: {extension['reason']}")
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


def measure_ceilings() -> dict[str, float]:
    """Best of a few: dense bf16 product of 8192^3, and a device copy counted both ways."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").fill_(7)
    target = torch.empty_like(source)

    def best_ms(call) -> float:
        times = []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return min(times[2:])

    flops = 2 * 8192**3 / best_ms(lambda: torch.mm(a, b)) / 1e9
    copied = 2 * 2**31 / best_ms(lambda: target.copy_(source)) / 1e9
    return {"bf16_tflops": round(flops, 1), "copy_tb_s": round(copied, 3)}


def count_tests(report: Path) -> dict[str, int]:
    """Totals of a JUnit report."""
    suites = list(xml.etree.ElementTree.parse(report).getroot().iter("testsuite"))
    total = {k: sum(int(s.get(k, 0)) for s in suites)
             for k in ("tests", "failures", "errors", "skipped")}  # fmt: skip
    failed = total["failures"] + total["errors"]
    return {
        "passed": total["tests"] - failed - total["skipped"],
        "failed": failed,
        "skipped": total["skipped"],
    }


def run_tests(commit: str, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   f"--junitxml={report}"]  # fmt: skip
        if workers > 1 and importlib.util.find_spec("xdist"):
            command += ["-n", str(workers), "--dist", "loadgroup"]
        # From tests/, so that a source tree without a binary doesn't shadow an installed package.
        subprocess.run(command, cwd=ROOT / "tests", env=environment(), check=False)
        if not report.exists():
            raise RecordError("pytest wrote no report")
        return {**count_tests(report), "commit": commit}


def run_bench(part: str) -> list[dict[str, Any]]:
    script, kinds = SCRIPTS[part]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "rows.json"
        command = [sys.executable, str(ROOT / "bench" / script), "--json", str(output)]
        done = subprocess.run(
            [*command, "--only", *kinds], env=environment(), cwd=ROOT / "bench", check=False
        )
        if done.returncode or not output.exists():
            raise RecordError(f"{script} ended with status {done.returncode}")
        return json.loads(output.read_text())


def run_parts(parts: Sequence[str], results: Path, commit: str, workers: int) -> int:
    """Run parts one after the other, writing the record after each; 1 if any went wrong."""
    facts = machine_facts()
    path = results / f"{gpu_slug(facts['device'])}.json"
    record = starting_record(path, facts, parts)
    if any(part != "tests" for part in parts):
        record["ceilings"] = measure_ceilings()
        print(f"ceilings: {record['ceilings']}")
    wrong = False
    for part in parts:
        print(f"--- {part}", flush=True)
        start, before = time.perf_counter(), part_hash(part)
        try:
            if part == "tests":
                record["tests"] = run_tests(commit, workers)
                wrong |= record["tests"]["failed"] > 0
                print(f"tests: {record['tests']}")
            else:
                merge_rows(record, part, run_bench(part))
        except RecordError as error:
            print(f"{part}: {error}", file=sys.stderr)
            wrong = True
            continue
        record["sources"][part] = before
        record["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        save(record, path)
        print(f"--- {part}: {time.perf_counter() - start:.0f} s, written to {path}", flush=True)
    return int(wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--check", action="store_true", help="compare hashes; needs no GPU")
    parser.add_argument("--commit", help="commit of this tree, where git can't tell")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1),
                        help="processes of the test run")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return check(options.results, options.part)
        commit = options.commit or head_commit()
        if commit is None:
            raise RecordError("git can't tell the commit of this tree: say --commit HASH")
        return run_parts(options.part, options.results, commit, options.workers)
    except RecordError as error:
        print(f"record: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
