"""Runs named checks in n processes that form a gloo group, and reports each check by name."""

from __future__ import annotations

import importlib
import json
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

#: A rank that waits longer for another has lost it.
TIMEOUT = timedelta(seconds=60)
#: All checks of a group, with the start of its processes on a busy machine.
LIMIT_S = 300.0


def _process(rank: int, ranks: int, module: str, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    checks: dict[str, Callable[[Path], None]] = importlib.import_module(module).CHECKS
    results = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check(Path(folder))
            results[name] = ""
        except pytest.skip.Exception as skipped:
            results[name] = f"skip: {skipped}"
        except Exception:
            results[name] = traceback.format_exc()
        # Ranks that went on alone would meet the others in the wrong call.
        failed = torch.tensor([not results[name]], dtype=torch.int32)
        failed = failed.cuda() if backend == "nccl" else failed
        distributed.all_reduce(failed, op=distributed.ReduceOp.MIN)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))
    distributed.barrier()
    distributed.destroy_process_group()


def run_checks(module: str, ranks: int, folder: Path, backend: str = "gloo") -> dict[str, str]:
    """Name → "" or what went wrong, of all ``CHECKS`` of a module on ``ranks`` processes."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.start_processes(
        _process, (ranks, module, str(folder), backend), nprocs=ranks, join=False,
        start_method="spawn",
    )  # fmt: skip
    try:
        until = time.monotonic() + LIMIT_S
        while not context.join(timeout=5):
            if time.monotonic() > until:
                pytest.fail(f"{ranks} ranks did not finish {module} in {LIMIT_S:.0f} s")
    finally:
        for process in context.processes:
            process.kill()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    merged: dict[str, str] = {}
    for rank in range(ranks):
        for name, error in json.loads((folder / f"rank-{rank}.json").read_text()).items():
            if error or name not in merged:
                merged[name] = f"rank {rank}: {error}" if error else ""
    return merged


def report(results: dict[str, str], name: str) -> None:
    """Pass, skip or fail by one check's result."""
    error = results[name]
    if ": skip: " in error:
        pytest.skip(error)
    assert not error, error
