"""Fixtures shared by every test: the device, the truth, hypothesis profiles.

The one suite runs on a CPU and on a GPU.  ``device`` is the GPU where there is one; there the
public functions run kernels and are compared with the reference, elsewhere they are the
reference and are checked by properties, worked examples and float64 gradients.

``LING_OPS_HYPOTHESIS=thorough`` draws many more examples than the default profile ``ci``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import ling_ops

sys.path.insert(0, str(Path(__file__).resolve().parent))

_HEALTH = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.function_scoped_fixture,
]
settings.register_profile(
    "ci",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=_HEALTH,
)
settings.register_profile(
    "thorough", max_examples=400, deadline=None, suppress_health_check=_HEALTH
)
settings.load_profile(os.environ.get("LING_OPS_HYPOTHESIS", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "xdist_group(name): one worker (pytest-xdist, loadgroup)")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which package is under test: a shadowed install is the usual surprise."""
    where = Path(ling_ops.__file__).parent
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [f"ling_ops: {where}", f"torch: {torch.__version__}, gpu: {gpu}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
