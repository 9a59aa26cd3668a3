"""Weight gradients with one operand gathered: `moe_dw`, and `moe_dw_add_` into fp32 buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import OFFSET_STYLES, Movable, generator, low_precision, make_offsets, seeds
from tolerances import assert_bitwise, assert_within

from ling_ops.reference import moe_mlp as reference

OPS = torch.ops.ling_ops


@dataclass(frozen=True, repr=False)
class DwCase(Movable):
    dy: torch.Tensor  # [M,N], or [T,N] where dy is gathered
    x: torch.Tensor  # [T,Kd], or [M,Kd] where dy is gathered
    row_token: torch.Tensor  # [M] int32; outside [0,T): a row of zeros
    offsets: torch.Tensor  # [E+1] int32
    gather_x: bool

    @property
    def rows(self) -> torch.Tensor:
        """The operand that is in row order."""
        return self.dy if self.gather_x else self.x


def make_case(
    tokens: int, rows: int, experts: int, n: int, kd: int, *, gather_x: bool, style: str, seed: int,
    dtype: torch.dtype = torch.bfloat16,
) -> DwCase:  # fmt: skip
    gen = generator(seed)
    dy_rows, x_rows = (rows, tokens) if gather_x else (tokens, rows)
    row_token = torch.randint(-1, tokens, (rows,), generator=gen, dtype=torch.int32)
    return DwCase(
        torch.randn(dy_rows, n, generator=gen).to(dtype),
        torch.randn(x_rows, kd, generator=gen).to(dtype),
        row_token,
        make_offsets(experts, rows, style, seed),
        gather_x,
    )


@st.composite
def cases(draw: st.DrawFn) -> DwCase:
    return make_case(
        draw(st.sampled_from([1, 7, 200])),
        draw(st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130, 500])),
        draw(st.sampled_from([1, 2, 3, 8, 40])),
        draw(st.sampled_from([8, 64, 72, 128, 136, 264, 520])),
        draw(st.sampled_from([8, 40, 128, 136, 256, 296])),
        gather_x=draw(st.booleans()),
        style=draw(st.sampled_from(OFFSET_STYLES)),
        seed=draw(seeds),
        dtype=draw(low_precision),
    )


def gradient(case: DwCase) -> torch.Tensor:
    return OPS.moe_dw(case.dy, case.x, case.row_token, case.offsets, case.gather_x)


def exact(case: DwCase, map_to=torch.Tensor.double) -> torch.Tensor:
    return reference.moe_dw(
        map_to(case.dy), map_to(case.x), case.row_token, case.offsets, case.gather_x
    )


def size(case: DwCase) -> torch.Tensor:
    return exact(case, lambda t: t.double().abs())


@given(case=cases())
def test_gradient_against_float64(device: torch.device, case: DwCase) -> None:
    case = case.to(device)
    out = gradient(case)
    assert out.dtype == case.x.dtype
    assert_within(out, exact(case), magnitude=size(case), length=len(case.row_token))
    empty = out[case.offsets.diff() == 0]
    assert_bitwise(empty, torch.zeros_like(empty), "empty experts")
    assert_bitwise(gradient(case), out, "a second run")


@given(case=cases())
def test_added_to_a_buffer(device: torch.device, case: DwCase) -> None:
    """The sum is not rounded to the operands' dtype; empty experts keep every bit."""
    case = case.to(device)
    start = torch.randn(exact(case).shape, device=device)
    buffer = start.clone()
    start[case.offsets.diff() == 0] = buffer[case.offsets.diff() == 0] = float("nan")
    OPS.moe_dw_add_(buffer, case.dy, case.x, case.row_token, case.offsets, case.gather_x)
    assert_within(
        buffer,
        start.double() + exact(case),
        magnitude=size(case) + start.double().abs().nan_to_num(),
        length=len(case.row_token) + 1,
    )
    again = start.clone()
    OPS.moe_dw_add_(again, case.dy, case.x, case.row_token, case.offsets, case.gather_x)
    assert_bitwise(again, buffer, "a second run")


@given(case=cases(), bad=st.integers(0, 39))
def test_nan_stays_in_its_expert(device: torch.device, case: DwCase, bad: int) -> None:
    """One expert's rows and the rows of none are NaN; others' sums end right beside them."""
    case = case.to(device)
    bad %= len(case.offsets) - 1
    first, end = case.offsets[bad : bad + 2].tolist()
    clean = gradient(case)
    case.rows[first:end] = float("nan")
    case.rows[int(case.offsets[-1]) :] = float("nan")
    out = gradient(case)
    others = torch.arange(len(out), device=device) != bad
    assert_bitwise(out[others], clean[others])
    assert out[bad].isnan().all() or first == end


@pytest.mark.parametrize("gather_x", [True, False])
def test_tables_with_a_stride_and_bad_offsets(device: torch.device, gather_x: bool) -> None:
    """Rows of a wider tensor; offsets out of order or range stay in bounds."""
    case = make_case(50, 90, 4, 24, 40, gather_x=gather_x, style="full", seed=1).to(device)
    wide = [
        torch.full((len(t), 64), torch.nan, device=device).bfloat16() for t in (case.dy, case.x)
    ]
    for t, source in zip(wide, (case.dy, case.x), strict=True):
        t[:, 8 : 8 + source.shape[1]] = source
    views = replace(case, dy=wide[0][:, 8:32], x=wide[1][:, 8:48])
    assert_bitwise(gradient(views), gradient(case))
    for bad in ([0, 200, 9, 5, 2**31 - 1], [-7, 3, 2, 2, 60]):
        offsets = torch.tensor(bad, dtype=torch.int32, device=device)
        tame = offsets.clamp(0, 90).cummax(0).values
        assert_bitwise(
            gradient(replace(case, offsets=offsets)), gradient(replace(case, offsets=tame))
        )


@pytest.mark.parametrize("experts,rows,n,kd", [(128, 1000, 128, 64), (3, 700, 1032, 520)])
@pytest.mark.parametrize("gather_x", [True, False])
def test_larger_shapes(
    device: torch.device, experts: int, rows: int, n: int, kd: int, gather_x: bool
) -> None:
    case = make_case(200, rows, experts, n, kd, gather_x=gather_x, style="empty_experts", seed=2)
    test_gradient_against_float64.hypothesis.inner_test(device, case)
    test_added_to_a_buffer.hypothesis.inner_test(device, case)
