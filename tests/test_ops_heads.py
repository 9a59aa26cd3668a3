"""Heads for attention over a static cache: norms, rotation and the caches' rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from compiled import needs
from hypothesis import given
from hypothesis import strategies as st
from strategies import Movable, float_dtypes, generator, lay_out, layouts, seeds
from tolerances import assert_bitwise, assert_within, truth, truth64

import ling_ops
from ling_ops.models.attention import rotary_table, rotate
from ling_ops.nn import RMSNorm
from ling_ops.ops._heads import MAX_HEAD_DIM, attention_heads_

EPS = 1e-5
#: Roundings in fp32 of an element before the one to its dtype, as the root and the products pass
#: them on: half of those of a mean of squares (sums of 8, then of 32) and of eps, two units of the
#: root, five of factors, products and their sum.
ROUNDINGS = 32
WRONG_ROWS = [-1, -(2**63), 2**63 - 1, 2**32, -5]


@dataclass(repr=False)
class Case(Movable):
    projected: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    weights: dict[str, torch.Tensor]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.projected, self.keys, self.values, self.rows, self.cos, self.sin

    @property
    def inside(self) -> torch.Tensor:
        return (self.rows >= 0) & (self.rows < len(self.keys))


def make(
    tokens: int, heads: int, kv_heads: int, dim: int, rotary_dim: int, *, dtype=torch.float32,
    normed: bool = True, weight_dtype: torch.dtype | None = None, length: int = 40, slots: int = 1,
    outside: bool = False, layout: str = "contiguous", seed: int = 0,
) -> Case:  # fmt: skip
    """Every token has a row of its own among those of at least `slots` sequences, shuffled."""
    rng, slots = generator(seed), max(slots, -(-tokens // length))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    projected = lay_out(randn(tokens, heads + 2 * kv_heads, dim), layout)
    keys, values = (randn(slots * length, kv_heads, dim) for _ in range(2))
    rows = torch.randperm(slots * length, generator=rng)[:tokens]
    if outside:
        wrong = torch.tensor([*WRONG_ROWS, slots * length])
        which = torch.rand(tokens, generator=rng) < 0.4
        rows = torch.where(which, wrong[torch.arange(tokens) % len(wrong)], rows)
    angles = rotary_table(torch.arange(length).unsqueeze(0), rotary_dim, 1e4)
    cos, sin = (table[0, 0, :, : rotary_dim // 2].contiguous() for table in angles)
    names = ("query_weight", "key_weight") if normed else ()
    weights = {name: randn(dim).to(weight_dtype or dtype) for name in names}
    return Case(projected, keys, values, rows, cos, sin, weights)


def run(projected, keys, values, rows, cos, sin, weights) -> tuple[torch.Tensor, ...]:
    """(query, keys, values), on copies of the caches."""
    keys, values = keys.clone(), values.clone()
    query = attention_heads_(projected, keys, values, rows, cos, sin, **weights, eps=EPS)
    return query, keys, values


def run_case(case: Case) -> tuple[torch.Tensor, ...]:
    return run(*case.tensors, case.weights)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dim = draw(st.one_of(st.sampled_from([64, 128]), st.integers(1, 32).map(lambda n: 8 * n)))
    rotary_dim = draw(
        st.one_of(st.sampled_from([0, dim // 16 * 16, dim]), st.integers(0, dim // 2))
    )
    return make(
        draw(st.sampled_from([0, 1, 2, 3, 7, 33, 130])),
        draw(st.integers(0, 9)),
        draw(st.integers(1, 6)),
        dim,
        rotary_dim // 2 * 2,
        dtype=draw(float_dtypes),
        normed=draw(st.booleans()),
        weight_dtype=draw(st.sampled_from([None, torch.float32])),
        length=draw(st.integers(1, 40)),
        slots=draw(st.integers(1, 4)),
        outside=draw(st.booleans()),
        layout=draw(layouts),
        seed=draw(seeds),
    )


def assert_heads(actual: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """A rotation keeps a pair's size, so the terms of an element are at most twice the largest."""
    size = 2 * exact.abs().amax(-1, keepdim=True)
    assert_within(actual, exact, magnitude=size, length=ROUNDINGS, name=name)


def check(case: Case) -> None:
    query, keys, values = run_case(case)
    exact_query, exact_keys, _ = truth64(run, *case.tensors, case.weights)
    rows, kv_heads = case.rows[case.inside], case.keys.shape[1]
    assert query.dtype == case.keys.dtype and query.is_contiguous()
    assert_heads(query, exact_query, "query")
    assert_heads(keys[rows], exact_keys[rows], "keys")
    assert_bitwise(values[rows], case.projected[case.inside][:, -kv_heads:], "values")
    others = torch.ones(len(case.keys), dtype=torch.bool, device=rows.device)
    others[rows] = False
    assert_bitwise(keys[others], case.keys[others], "other rows of keys")
    assert_bitwise(values[others], case.values[others], "other rows of values")


@given(case=cases())
def test_against_float64(device: torch.device, case: Case) -> None:
    check(case.to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rotary_dim", [0, 2, 20, 64, 128])
@pytest.mark.parametrize("heads,kv_heads", [(16, 4), (7, 3), (5, 1)])
def test_many_tokens(device, heads: int, kv_heads: int, rotary_dim: int, dtype) -> None:
    tokens = 3001 if device.type == "cuda" else 301
    sizes = tokens, heads, kv_heads, 128, rotary_dim
    check(make(*sizes, dtype=dtype, length=600, slots=7, outside=True).to(device))


def test_the_truth_is_what_the_model_does(device: torch.device) -> None:
    """RMSNorm, rotation and places as `Attention` has them, in float64."""
    case = make(9, 3, 2, 24, 16, dtype=torch.float64, length=7, slots=2).to(device)
    got, keys, values = truth(run, *case.tensors, case.weights)
    query, key, value = case.projected.split((3, 2, 2), 1)
    positions = (case.rows % 7).unsqueeze(1)
    angles = [table[:, 0].unsqueeze(1) for table in rotary_table(positions, 16, 1e4)]
    turned = []
    for heads, weight in zip((query, key), case.weights.values(), strict=True):
        norm = RMSNorm(24, eps=EPS, device=device, dtype=torch.float64)
        norm.weight.data = weight
        turned.append(rotate(norm(heads).unsqueeze(2), *angles).squeeze(2).detach())
    torch.testing.assert_close(got, turned[0])
    for token, row in enumerate(case.rows.tolist()):
        torch.testing.assert_close(keys[row], turned[1][token])
        assert torch.equal(values[row], value[token])


@pytest.mark.parametrize("rotary_dim", [64, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_does_not_see_its_batch(device, dtype, rotary_dim: int) -> None:
    """Bitwise, however many others there are, and whatever they hold."""
    case = make(2000, 16, 4, 128, rotary_dim, dtype=dtype).to(device)
    whole = run_case(case)
    case.projected[5:] = float("nan")
    for few in (1, 5):
        part = replace(case, projected=case.projected[:few], rows=case.rows[:few])
        mixed, alone = run_case(case), run_case(part)
        for results in (alone, mixed):
            assert_bitwise(results[0][:few], whole[0][:few])
            for cache, other in zip(results[1:], whole[1:], strict=True):
                assert_bitwise(cache[part.rows], other[part.rows])


def test_outside_the_caches_nothing_is_stored(device: torch.device) -> None:
    """Also where no token is inside, or the caches have no rows; queries are not rotated then."""
    case = make(len(WRONG_ROWS), 3, 2, 16, 16, normed=False).to(device)
    case.rows = torch.tensor(WRONG_ROWS, device=device)
    for rows in (len(case.keys), 0):
        case.keys, case.values = case.keys[:rows], case.values[:rows]
        query, keys, values = run_case(case)
        assert torch.equal(query, case.projected[:, :3])
        assert_bitwise(keys, case.keys)
        assert_bitwise(values, case.values)


@pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [torch.float16, torch.float32, torch.float64])
def test_caches_of_another_dtype(device, kept: torch.dtype, given: torch.dtype) -> None:
    """As under autocast: everything is stored in the caches' dtype, and so are queries."""
    case = make(5, 3, 2, 16, 8, dtype=given).to(device)
    case.keys, case.values = case.keys.to(kept), case.values.to(kept)
    query, keys, values = run_case(case)
    exact_query, exact_keys, exact_values = truth64(run, *case.tensors, case.weights)
    assert {t.dtype for t in (query, keys, values)} == {kept}
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(query.double(), exact_query, **close)
    torch.testing.assert_close(keys.double(), exact_keys, **close)
    torch.testing.assert_close(values.double(), exact_values, **close)


@pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")
@pytest.mark.parametrize("dim", [6, 12, MAX_HEAD_DIM + 8])
def test_heads_of_other_sizes(device: torch.device, dim: int) -> None:
    check(make(4, 3, 2, dim, 4, dtype=torch.bfloat16).to(device))


f, n = torch.zeros, torch.arange
ARGS = {
    "projected": f(6, 7, 16), "key_cache": f(9, 2, 16), "value_cache": f(9, 2, 16), "rows": n(6),
    "cos": f(3, 4), "sin": f(3, 4), "query_weight": f(16), "key_weight": f(16),
}  # fmt: skip
ERRORS = {
    "two dimensions": ({"projected": f(6, 112)}, "projected", "[6, 112]", "[N, Q + 2 KV, D]"),
    "integers": ({"projected": f(6, 7, 16).int()}, "projected", "int32", "bfloat16"),
    "a list": ({"rows": [0] * 6}, "rows", "list", "Tensor"),
    "another D": ({"key_cache": f(9, 2, 8)}, "key_cache", "[9, 2, 8]", "[*, *, 16]"),
    "other values": ({"value_cache": f(9, 3, 16)}, "value_cache", "[9, 3, 16]", "[9, 2, 16]"),
    "two dtypes": ({"value_cache": f(9, 2, 16).half()}, "value_cache", "float16", "float32"),
    "few heads": ({"projected": f(6, 3, 16)}, "projected", "got 3", "at least 4 heads"),
    "few rows": ({"rows": n(5)}, "rows", "[5]", "[6]"),
    "int32 rows": ({"rows": n(6).int()}, "rows", "int32", "int64"),
    "half tables": ({"cos": f(3, 4).half()}, "cos", "float16", "float32"),
    "wide tables": ({"cos": f(3, 9), "sin": f(3, 9)}, "cos", "[3, 9]", "D / 2 = 8"),
    "no position": ({"cos": f(0, 4), "sin": f(0, 4)}, "cos", "[0, 4]", "a position"),
    "other sines": ({"sin": f(3, 5)}, "sin", "[3, 5]", "[3, 4]"),
    "one norm": ({"key_weight": None}, "key_weight", "None", "the other norm's weight"),
    "wide norm": ({"query_weight": f(17)}, "query_weight", "[17]", "[16]"),
    "meta": ({"cos": f(3, 4, device="meta")}, "cos", "meta", "cpu"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str) -> None:
    changes, argument, got, needed = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=f"^{argument} must") as raised:
        attention_heads_(**{**ARGS, **changes})
    for part in (got, needed):
        assert re.search(re.escape(part), str(raised.value)), str(raised.value)


@pytest.mark.cuda
def test_one_launch(device: torch.device) -> None:
    needs("attention_heads")
    case = make(5, 16, 4, 128, 64, dtype=torch.bfloat16).to(device)
    attention_heads_(*case.tensors, **case.weights)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        attention_heads_(*case.tensors, **case.weights)
        torch.cuda.synchronize()
    kernels = [e.key for e in profile.key_averages() if e.device_time_total > 0]
    assert len(kernels) == 1 and "heads_kernel" in kernels[0], kernels


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_are_read_on_the_device(device: torch.device, backend: str) -> None:
    """A captured graph follows them, with the kernel and with PyTorch's operations."""
    case = make(5, 4, 2, 64, 32, dtype=torch.bfloat16, outside=True).to(device)
    other = make(5, 4, 2, 64, 32, dtype=torch.bfloat16, outside=True, seed=1).to(device)
    keys, values, rows = case.keys.clone(), case.values.clone(), case.rows.clone()

    def step() -> torch.Tensor:
        tables = case.cos, case.sin
        return attention_heads_(
            case.projected, keys, values, rows, *tables, **case.weights, eps=EPS
        )

    with ling_ops.use_backend(backend):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            query = step()
        for current in (case.rows, other.rows):
            keys.copy_(case.keys)
            values.copy_(case.values)
            rows.copy_(current)
            graph.replay()
            expected = run_case(replace(case, rows=current))
            for got, wanted in zip((query, keys, values), expected, strict=True):
                assert_bitwise(got, wanted)
