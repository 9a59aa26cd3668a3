"""What runs where: use_backend, backend_info, and one warning per reason."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from compiled import NO_FAULT, needs

import ling_ops
from ling_ops import FallbackWarning, _extension, backend_info, grouped_gemm, topk_gate, use_backend
from ling_ops.ops import _backend, _decode

OPS = {"topk_gate", "route", "reroute", "capacity", "routing_stats"}
OPS |= {"permute", "unpermute", "grouped_gemm", "grouped_mm", "moe_mlp"}


def test_info_says_what_runs_and_why() -> None:
    info = backend_info()
    assert info["version"] == ling_ops.__version__ and info["torch"] == torch.__version__
    assert set(info["ops"]) >= OPS
    for op, state in info["ops"].items():
        assert state["backend"] in ("cuda", "reference") and state["reason"], op
    assert isinstance(info["extension"]["loaded"], bool)
    if not torch.cuda.is_available():
        assert {state["backend"] for state in info["ops"].values()} == {"reference"}


def test_use_backend_nests_and_survives_errors() -> None:
    def backends() -> set[str]:
        return {state["reason"] for state in backend_info()["ops"].values()}

    before = backends()
    with pytest.raises(RuntimeError), use_backend("reference"):
        assert backends() == {"use_backend('reference') is in force"}
        with use_backend("auto"):
            assert backends() == before
        assert backends() != before
        raise RuntimeError
    assert backends() == before


@pytest.mark.parametrize(
    "block,holds",
    [(lambda: use_backend("reference"), lambda: _backend.chosen() == "reference"),
     (ling_ops.batch_invariant, _decode.is_batch_invariant)],
)  # fmt: skip
def test_blocks_of_two_threads_may_end_in_any_order(block, holds) -> None:
    """What a block promises holds until its end, and no longer than the last one."""
    first, second = block(), block()
    assert not holds()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert holds()
    second.__exit__(None, None, None)
    assert not holds()


def test_the_reference_gives_the_same_result_on_a_cpu() -> None:
    logits = torch.randn(5, 8)
    with use_backend("reference"):
        forced = topk_gate(logits, 2)
    for actual, expected in zip(topk_gate(logits, 2), forced, strict=True):
        assert torch.equal(actual, expected)


def test_a_cpu_tensor_never_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_gate(torch.randn(3, 4, dtype=torch.float64), 2)
        grouped_gemm(torch.randn(3, 5), torch.randn(1, 3, 5), torch.tensor([0, 3]))


def test_import_is_quick_and_creates_no_context() -> None:
    """Measured in processor time, so that a busy machine doesn't fail it."""
    code = (
        "import torch, time; start = time.process_time(); import ling_ops\n"
        "took = time.process_time() - start\n"
        "assert not torch.cuda.is_initialized(), 'a CUDA context was created'\n"
        "print(took)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0, "import takes more than 2 s beyond torch's own"


@pytest.mark.cuda
def test_one_warning_names_the_reason(device: torch.device) -> None:
    code = (
        "import torch, warnings, ling_ops\n"
        "x = torch.randn(4, 8, dtype=torch.float64, device='cuda')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    [ling_ops.topk_gate(x, 2) for _ in range(3)]\n"
        "found = [w for w in caught if issubclass(w.category, ling_ops.FallbackWarning)]\n"
        "assert len(found) == 1, caught\n"
        "print(found[0].message)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "topk_gate" in done.stdout


@pytest.mark.cuda
def test_a_fallback_is_still_right(device: torch.device) -> None:
    """Rows that the tensor cores can't take go through PyTorch, visibly."""
    a, b = torch.randn(9, 7, device=device).bfloat16(), torch.randn(2, 5, 7, device=device)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        out = grouped_gemm(a, b.bfloat16(), offsets)
    expected = torch.cat([a[:4] @ b[0].bfloat16().T, a[4:] @ b[1].bfloat16().T])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "reason,outcome",
    [
        ("no compiled kernels: this source tree was not built", pytest.skip.Exception),
        ("switched off by LING_OPS_BINARY=none", pytest.skip.Exception),
        ("the kernels were compiled for 90a-real; the device is sm_80", pytest.skip.Exception),
        ("PyTorch sees no CUDA device", pytest.skip.Exception),
        ("the compiled module is for another Python: found _C.cp312.so", pytest.fail.Exception),
        ("use_backend('reference') is in force", pytest.fail.Exception),
    ],
)
def test_a_kernel_that_should_be_there_is_not_skipped(reason, outcome, monkeypatch) -> None:
    """What tests of kernels do without a kernel."""
    state = {"ops": {"route": {"backend": "reference", "reason": reason}}}
    monkeypatch.setattr(ling_ops, "backend_info", lambda: state)
    with pytest.raises(outcome, match="route has no kernel here"):
        needs("route")


def test_the_reasons_to_skip_are_those_that_are_given(tmp_path) -> None:
    not_built, other_gpu = (
        _extension.absence_reason(tmp_path),
        _extension.arch_reason("90a", (8, 0)),
    )
    assert not_built.startswith(NO_FAULT) and other_gpu.startswith(NO_FAULT)
