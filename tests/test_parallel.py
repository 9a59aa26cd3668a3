"""Expert parallelism on 2 and 4 processes, against the same experts on one."""

from __future__ import annotations

import pytest
import torch
from parallel_checks import CHECKS
from ranks import report, run_checks
from torch import distributed

GROUPS = [2, 4]

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Ranks → check → error. The first group writes the checkpoint that the second reads."""
    root = tmp_path_factory.mktemp("groups")
    found = {}
    for ranks in GROUPS:
        folder = root / str(ranks)
        folder.mkdir()
        found[ranks] = run_checks("parallel_checks", ranks, folder)
    return found


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("ranks", GROUPS)
def test_gloo(results, ranks, name) -> None:
    report(results[ranks], name)


@pytest.fixture(scope="module", params=[1, 2])
def nccl_results(request, tmp_path_factory):
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} CUDA devices")
    folder = tmp_path_factory.mktemp("nccl")
    return run_checks("parallel_checks", request.param, folder, backend="nccl")


@pytest.mark.cuda
@pytest.mark.parametrize("name", CHECKS)
def test_nccl(nccl_results, name) -> None:
    report(nccl_results, name)
