"""The benches' own cases in miniature, on the CPU: every provider runs and computes the same."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ling_ops

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The bench modules with tiny sizes and CPU tensors."""
    monkeypatch.syspath_prepend(str(BENCH))
    harness, shapes, peers = (importlib.import_module(n) for n in ("harness", "shapes", "peers"))
    layers = tuple(shapes.Layer(24, 32, 16, e, k) for e, k in ((8, 2), (16, 8)) for _ in range(4))
    monkeypatch.setattr(harness, "DEVICE", "cpu")
    monkeypatch.setattr(harness, "ROTATED_BYTES", 0)
    monkeypatch.setattr(shapes, "TRAINING", layers)
    monkeypatch.setattr(shapes, "INFERENCE", layers[::4])
    names = (
        "bench_gate", "bench_route", "bench_gemm", "bench_moe_train", "bench_moe_infer",
        "bench_lora", "bench_generate",
    )  # fmt: skip
    for name in names:
        sys.modules.pop(name, None)
    modules = {name: importlib.import_module(name) for name in names}
    for module in modules.values():
        if hasattr(module, "has_kernel"):
            monkeypatch.setattr(module, "has_kernel", lambda op: True)
    monkeypatch.setattr(modules["bench_gate"], "TOKENS", (16,))
    monkeypatch.setattr(modules["bench_moe_infer"], "TOKENS", (1, 33))
    yield modules | {"harness": harness, "peers": peers}
    for name in names:
        sys.modules.pop(name, None)


def outputs(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [p for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point()]


def agree(case: Any) -> None:
    truth = None
    for name, provider in case.providers.items():
        if name == "cublas":
            provider(0)
            continue
        case.reset()
        values = outputs(provider(case.rotations - 1))
        truth = values if truth is None else truth
        for got, expected in zip(values, truth, strict=True):
            if got.shape == expected.shape:
                close = torch.isclose(got.float(), expected.float(), rtol=5e-2, atol=5e-2)
                wrong = int((~close).view(len(close), -1).any(1).sum())
                # bf16 logits tie, and torch.topk leaves ties open: another expert for a token.
                allowed = 2 if case.bench == "moe_train" else 0
                assert wrong <= allowed, f"{case.bench} {case.what}, {name}: {wrong} rows differ"
    assert case.floor_ms > 0 and "ling_ops" in case.providers


def test_moe_and_gemm_cases(small: dict[str, ModuleType]) -> None:
    for name in ("bench_gemm", "bench_moe_train", "bench_moe_infer"):
        for case in small[name].cases():
            agree(case)


def test_lora_cases(small: dict[str, ModuleType]) -> None:
    """Every provider with LoRA leaves the same gradient of x; the frozen one leaves another."""
    bench = small["bench_lora"]
    x, case = bench.layer_case(sys.modules["shapes"].Layer(24, 32, 16, 8, 2))
    grads = {}
    for name, provider in case.providers.items():
        case.reset()
        provider(0)
        grads[name] = x.grad.float()
    ours = grads.pop("ling_ops")
    close = {name: torch.isclose(ours, g, rtol=5e-2, atol=8e-2) for name, g in grads.items()}
    wrong = {name: int((~c).any(1).sum()) for name, c in close.items()}
    assert wrong.pop("frozen") > 2 >= max(wrong.values()) and case.floor_ms > 0


def test_generation_cases(small: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step and a prompt run with every provider; a step does not depend on those before it."""
    bench = small["bench_generate"]
    sizes = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
             "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 16,
             "vocab_size": 96}  # fmt: skip
    changes = {"DEVICE": "cpu", "BATCHES": (1, 3), "CONTEXT": 8, "ROOM": 2, "PROMPT": 12,
               "CONFIG": bench.LingConfig.preset("ling-mini-2.0", **sizes)}  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(bench, name, value)
    found = list(bench.cases())
    assert [(case.what, case.shape["T"]) for case in found] == [
        ("decode", 1), ("decode", 3), ("prefill", 12),
    ]  # fmt: skip
    for case in found:
        assert case.floor_ms > 0
        results = []
        for _ in range(4):  # more than there is room for without a reset
            case.reset()
            results.append({name: provider(0) for name, provider in case.providers.items()})
        for later in results[1:]:
            assert all(torch.equal(later[name], first) for name, first in results[0].items())


def test_generation_floors(small: dict[str, ModuleType]) -> None:
    """About 1350 and 6600 tokens/s, and 300,000 in prefill, by bytes and FLOPs."""
    bench, active = small["bench_generate"], 1_432_968_192
    config = bench.LingConfig.preset("ling-mini-2.0")
    assert 1e3 / bench.decode_floor(config, active, 1) == pytest.approx(1350, rel=0.03)
    assert 64e3 / bench.decode_floor(config, active, 64) == pytest.approx(6600, rel=0.03)
    assert 8192e3 / bench.prefill_floor(config, active, 8192) == pytest.approx(320_000, rel=0.15)


def test_gate_cases(small: dict[str, ModuleType]) -> None:
    bench = small["bench_gate"]
    for case in (
        bench.forward_case("softmax_fwd", 16, 64),
        bench.forward_case("sigmoid_group_fwd", 16, 64),
        bench.backward_case(16, 64),
    ):
        agree(case)


def test_route_cases(small: dict[str, ModuleType]) -> None:
    bench = small["bench_route"]
    for what in ("fwd", "position_fwd", "probability_fwd"):
        agree(bench.route_case(what, 40, 16))
    agree(bench.gate_route_case(40, 16))
    for case in bench.move_cases(40, 32, 16):
        agree(case)
    ids = torch.randint(0, 16, (40, 8), dtype=torch.int32)
    counts, ends, token, pair, inverse = bench.route_torch(ids, 16)
    ours = ling_ops.route(ids, 16)
    for got, expected in zip(
        (counts, ends, token, pair, inverse.view(40, 8)),
        (ours.expert_counts, ours.expert_offsets[1:], ours.row_token, ours.row_pair,
         ours.token_row),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got.int(), expected)


def test_training_gradients_agree(small: dict[str, ModuleType]) -> None:
    """fwd_bwd of every provider leaves the same gradients of the experts' weights."""
    peers, shapes = small["peers"], sys.modules["shapes"]
    layer = shapes.Layer(24, 32, 16, 8, 2)
    tensors = [torch.randn(24, 32), torch.randn(8, 32, 32) / 6, torch.randn(8, 32, 16) / 4]
    weights = torch.rand(24, 2)
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(24)]).int()
    grads = []
    for call in (ling_ops.moe_mlp, peers.torch_experts):
        leaves = [t.clone().requires_grad_() for t in tensors]
        call(*leaves, weights, ids).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert shapes.training_floor(layer) > shapes.forward_floor(layer, 8, training=True)


def test_floors_of_the_known_layers() -> None:
    """The figures that targets are stated against."""
    sys.path.insert(0, str(BENCH))
    try:
        shapes = importlib.import_module("shapes")
    finally:
        sys.path.pop(0)
    floors = [round(shapes.training_floor(layer), 2) for layer in shapes.TRAINING]
    assert floors == [7.07, 26.66, 10.2, 2.35, 7.92, 2.32, 14.14, 88.22]


def test_table_and_row(small: dict[str, ModuleType]) -> None:
    harness = small["harness"]
    case = harness.Case("gate", "softmax_fwd", {"T": 64, "E": 256, "K": 8}, "float32", 0.5, {})
    contenders = [
        harness.Contender(name, None, 4, True, 1.0, 0.25, [9.0, ms, ms + 2, ms + 1])
        for name, ms in (("ling_ops", 1.0), ("torch", 3.0))
    ]
    rows = [harness._row(case, contender) for contender in contenders]
    assert (rows[0].ms, rows[0].ms_min, rows[0].ms_max) == (2.0, 1.0, 3.0)
    assert rows[0].H is None and rows[0].T == 64 and rows[0].graph
    text = harness.table(rows)
    assert "gate softmax_fwd 64,256,8" in text and "( 4.00x)" in text and "torch" in text


def test_zipf_ids_are_distinct_and_skewed(small: dict[str, ModuleType]) -> None:
    torch.manual_seed(3)
    ids = small["harness"].zipf_ids(4000, 4, 32)
    assert ids.dtype == torch.int32 and int(ids.min()) >= 0 and int(ids.max()) < 32
    assert all(len(row.unique()) == 4 for row in ids[:200])
    share = ids.flatten().bincount(minlength=32).sort(descending=True).values / 4000
    # drawn without replacement: rank 1 with odds 1/H(32) = 0.25 in each of four draws, then less
    assert 0.6 < share[0] < 0.9 and 0.35 < share[1] < 0.65 and share[-1] < 0.1


def test_verdicts(small: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    harness, verdicts = small["harness"], importlib.import_module("verdicts")

    def row(bench: str, provider: str, ms: float, tokens: int) -> Any:
        sizes = {"T": tokens, "H": 8, "I": 8, "E": 2, "K": 1}
        return harness.Row(
            bench, provider, "fwd", False, **sizes, dtype="bfloat16", ms=ms, ms_min=ms, ms_max=ms,
            floor_ms=1.0, peak_gib=0.0,
        )  # fmt: skip

    rows = [row("grouped_mm", "ling_ops", 1.0, t) for t in (1, 2)]
    rows += [row("grouped_mm", "torch", ms, t) for t, ms in ((1, 1.1), (2, 1.6))]
    text = verdicts.gemm_summary(rows)
    assert "geometric mean 1.327 of 2, least 1.100 (grouped_mm fwd 1,8,8,2,1)" in text
    assert text.count(": met") == 2
    rows[-1] = row("grouped_mm", "torch", 0.9, 2)
    text = verdicts.gemm_summary(rows)
    assert "no slower anywhere: NOT met grouped_mm fwd 2,8,8,2,1 0.900" in text
    assert "in the mean: NOT met" in text
    rows = [row("moe_train", "ling_ops", 1.05, 1)]
    rows += [row("moe_train", f"ling_ops {kind}", 1.0, 1) for kind in ("uniform", "bare")]
    lines = verdicts.training_summary(rows).splitlines()
    assert lines[0].endswith("at most 1.1: met") and lines[1].endswith("at most 1.03: NOT met")
