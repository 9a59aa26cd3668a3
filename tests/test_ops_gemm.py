"""grouped_gemm and grouped_mm: accuracy, zero tails and empty groups, layouts, gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import GemmCase, gemm_cases, generator, make_offsets, seeds
from tolerances import assert_bitwise, assert_within, truth

from ling_ops import grouped_gemm, grouped_mm

all_dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@given(case=gemm_cases(dtypes=all_dtypes))
def test_product_against_float64(device: torch.device, case: GemmCase) -> None:
    case = case.to(device)
    out = grouped_gemm(case.a, case.b, case.offsets)
    assert out.dtype == case.a.dtype and out.shape == (len(case.a), case.b.shape[1])
    a, b = case.a.double(), case.b.double()
    assert_within(
        out,
        truth(grouped_gemm, a, b, case.offsets),
        naive=truth(grouped_gemm, case.a, case.b, case.offsets),
        magnitude=truth(grouped_gemm, a.abs(), b.abs(), case.offsets),
        length=a.shape[1],
    )
    tail = out[int(case.offsets[-1]) :]
    assert_bitwise(tail, torch.zeros_like(tail))


@given(case=gemm_cases(dtypes=st.just(torch.float64)))
def test_each_group_is_a_product_of_its_slices(device: torch.device, case: GemmCase) -> None:
    case = case.to(device)
    out = truth(grouped_gemm, case.a, case.b, case.offsets)
    bounds = case.offsets.tolist()
    for expert, (first, end) in enumerate(pairwise(bounds)):
        torch.testing.assert_close(out[first:end], case.a[first:end] @ case.b[expert].T)


@given(case=gemm_cases())
def test_weights_may_be_a_transposed_view(device: torch.device, case: GemmCase) -> None:
    case = case.to(device)
    straight = GemmCase(case.a, case.b.contiguous(), case.offsets)
    view = GemmCase(case.a, case.b.transpose(1, 2).contiguous().transpose(1, 2), case.offsets)
    for layout in (straight, view):
        test_product_against_float64.hypothesis.inner_test(device, layout)


@given(case=gemm_cases())
def test_nan_stays_in_its_row_and_its_expert(device: torch.device, case: GemmCase) -> None:
    case = case.to(device)
    used = int(case.offsets[-1])
    a, b = case.a.clone(), case.b.clone()
    b[0] = float("nan")
    a[used:] = float("nan")
    out = grouped_gemm(a, b, case.offsets)
    first_end = int(case.offsets[1])
    assert out[:first_end].isnan().all() and not out[first_end:].isnan().any()
    assert (out[used:] == 0).all()


@given(case=gemm_cases())
def test_gradients_against_float64(device: torch.device, case: GemmCase) -> None:
    case = case.to(device)
    upstream = torch.randn(len(case.a), case.b.shape[1], device=device).to(case.a.dtype)

    def gradients(a: torch.Tensor, b: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        return torch.autograd.grad(grouped_gemm(a, b, case.offsets), (a, b), up)

    tensors = (case.a, case.b, upstream)
    actual, naive = gradients(*tensors), truth(gradients, *tensors)
    exact = truth(gradients, *(t.double() for t in tensors))
    sizes = truth(gradients, *(t.double().abs() for t in tensors))
    lengths = (case.b.shape[1], len(case.a))
    for name, got, plain, want, size, length in zip(
        ("grad_a", "grad_b"), actual, naive, exact, sizes, lengths, strict=True
    ):
        assert_within(got, want, naive=plain, magnitude=size, length=length, name=name)
    empty = case.offsets.diff() == 0
    assert_bitwise(actual[1][empty], torch.zeros_like(actual[1][empty]), "empty experts' grad_b")
    assert (actual[0][int(case.offsets[-1]) :] == 0).all()


def test_gradcheck_twice(device: torch.device) -> None:
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=device)
    a = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    b = torch.randn(3, 4, 3, dtype=torch.float64, device=device, requires_grad=True)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return grouped_gemm(a, b, offsets)

    assert truth(torch.autograd.gradcheck, product, (a, b))
    assert truth(torch.autograd.gradgradcheck, product, (a, b))


@pytest.mark.parametrize(
    "offsets", [[0, 5, 3, 8], [0, 5, 9, 20], [0, 2**31 - 1, 0, 8], [4, 5, 6, 7], [0, -5, 3, 8]]
)
def test_offsets_out_of_order_stay_in_bounds(device: torch.device, offsets: list[int]) -> None:
    """Only the data shows it, so it is defined: clamped to [0, M] and made non-decreasing."""
    a = torch.randn(8, 16, device=device).bfloat16()
    b = torch.randn(3, 8, 16, device=device).bfloat16()
    ends = torch.tensor(offsets, dtype=torch.int32, device=device)
    tame = ends.clamp(0, 8).cummax(0).values
    out = grouped_gemm(a, b, ends)
    assert_bitwise(out, grouped_gemm(a, b, tame))
    assert (out[: int(tame[0])] == 0).all() and (out[int(tame[-1]) :] == 0).all()


@pytest.mark.parametrize(
    "experts,rows,n,kd",
    [(128, 1000, 128, 64), (300, 301, 16, 24), (4, 513, 1032, 520), (2, 129, 8, 1024)],
)
def test_larger_shapes(device: torch.device, experts: int, rows: int, n: int, kd: int) -> None:
    gen = generator(0)
    case = GemmCase(
        torch.randn(rows, kd, generator=gen).bfloat16(),
        (torch.randn(experts, n, kd, generator=gen) / kd**0.5).bfloat16(),
        make_offsets(experts, rows, "empty_experts", 0),
    )
    test_product_against_float64.hypothesis.inner_test(device, case)


# --- grouped_mm: torch.nn.functional.grouped_mm's four layouts -----------------------------------
LAYOUTS = ["2d_3d", "3d_2d", "2d_2d", "3d_3d"]


def grouped_mm_operands(
    layout: str, groups: int, style: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    m, n, k, total = 24, 40, 32, 96
    gen = generator(seed)
    offs = make_offsets(groups, total // 8, style, seed)[1:] * 8
    shapes = {
        "2d_3d": ((total, k), (groups, k, n)),
        "3d_2d": ((groups, m, k), (k, total)),
        "2d_2d": ((m, total), (total, n)),
        "3d_3d": ((groups, m, k), (groups, k, n)),
    }[layout]
    a, b = (torch.randn(*shape, generator=gen).bfloat16() for shape in shapes)
    # Row-major times column-major, the strides that torch's own kernels ask for.
    if layout in ("2d_3d", "3d_3d"):
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "3d_2d":
        b = b.t().contiguous().t()
    return a, b, None if layout == "3d_3d" else offs


def loop_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None) -> torch.Tensor:
    """torch.matmul of every group's slices; zero where no group writes."""
    if offs is None:
        return torch.bmm(a, b)
    bounds = [0, *offs.tolist()]
    spans = [slice(first, end) for first, end in pairwise(bounds)]
    if a.dim() == 2 and b.dim() == 2:
        return torch.stack([a[:, span] @ b[span] for span in spans])
    if a.dim() == 2:
        out = a.new_zeros(len(a), b.shape[2])
        for group, span in enumerate(spans):
            out[span] = a[span] @ b[group]
        return out
    out = a.new_zeros(a.shape[1], b.shape[1])
    for group, span in enumerate(spans):
        out[:, span] = a[group] @ b[:, span]
    return out


grouped_mm_cases = {
    "groups": st.sampled_from([1, 2, 5]),
    "style": st.sampled_from(["full", "tail", "empty_experts", "one_expert", "all_empty"]),
    "seed": seeds,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(**grouped_mm_cases)
def test_grouped_mm(device: torch.device, layout: str, groups: int, style: str, seed: int) -> None:
    a, b, offs = grouped_mm_operands(layout, groups, style, seed)
    a, b, offs = a.to(device), b.to(device), offs if offs is None else offs.to(device)
    out = grouped_mm(a, b, offs=offs)
    exact = loop_mm(a.double(), b.double(), offs)
    assert out.dtype == a.dtype
    assert_within(
        out,
        exact,
        naive=loop_mm(a, b, offs),
        magnitude=loop_mm(a.double().abs(), b.double().abs(), offs),
        length=96,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_mm_is_torchs_function(device: torch.device, layout: str) -> None:
    a, b, offs = grouped_mm_operands(layout, 4, "full", 3)
    if offs is not None:  # torch's kernels take no empty groups in every layout
        offs = torch.tensor([16, 48, 72, 96], dtype=torch.int32, device=device)
    a, b = a.to(device), b.to(device)
    ours, theirs = grouped_mm(a, b, offs=offs), F.grouped_mm(a, b, offs=offs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_mm_gradients(device: torch.device, layout: str) -> None:
    a, b, offs = grouped_mm_operands(layout, 3, "tail", 4)
    a, b, offs = a.to(device), b.to(device), offs if offs is None else offs.to(device)

    def gradients(function, a, b):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        out = function(a, b, offs)
        up = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(out.dtype)
        return torch.autograd.grad(out, (a, b), up)

    actual = gradients(lambda a, b, offs: grouped_mm(a, b, offs=offs), a, b)
    naive = gradients(loop_mm, a, b)
    exact = gradients(loop_mm, a.double(), b.double())
    for got, plain, want in zip(actual, naive, exact, strict=True):
        assert_within(got, want, naive=plain, magnitude=want.abs().max(), length=96)


def test_grouped_mm_gradcheck(device: torch.device) -> None:
    for layout in LAYOUTS:
        a, b, offs = grouped_mm_operands(layout, 2, "tail", 5)
        a, b = (
            t[..., :8, :].double().to(device) if t.dim() == 3 else t.double().to(device)
            for t in (a, b)
        )
        if a.dim() == 3:
            a = a[..., : b.shape[-2]]
        elif b.dim() == 3:
            a = a[:, : b.shape[-2]]
        offs = offs if offs is None else offs.to(device)
        leaves = (a.requires_grad_(), b.requires_grad_())
        assert truth(
            torch.autograd.gradcheck,
            lambda a, b, o=offs: grouped_mm(a, b, offs=o),
            leaves,
            fast_mode=True,
        )


def test_grouped_mm_refuses_what_torch_refuses(device: torch.device) -> None:
    a, b, offs = grouped_mm_operands("2d_3d", 2, "full", 6)
    a, b, offs = a.to(device), b.to(device), offs.to(device)
    assert torch.equal(grouped_mm(a, b, offs=offs, out_dtype=a.dtype), grouped_mm(a, b, offs=offs))
    for option in ({"out_dtype": torch.float16}, {"bias": torch.zeros(2, 40, device=device)}):
        for function, error in ((grouped_mm, ValueError), (F.grouped_mm, RuntimeError)):
            with pytest.raises(error):
                function(a, b, offs=offs, **option)


# --- weight gradients ----------------------------------------------------------------------------
@pytest.mark.parametrize("style", ["full", "tail", "empty_experts", "one_expert"])
@pytest.mark.parametrize(
    "rows,columns,contraction,experts",
    # outputs that end within a 64-column box, or leave whole boxes of a tile outside
    [(700, 264, 520, 8), (757, 8, 296, 22), (96, 40, 32, 3), (1, 8, 8, 1), (1500, 72, 136, 300)],
)
def test_weight_gradient_of_ragged_shapes(
    device: torch.device, rows: int, columns: int, contraction: int, experts: int, style: str
) -> None:
    gen = generator(rows)
    dy = torch.randn(rows, columns, generator=gen).bfloat16().to(device)
    x = torch.randn(rows, contraction, generator=gen).bfloat16().to(device)
    offsets = make_offsets(experts, rows, style, 5).to(device)
    out = torch.ops.ling_ops.grouped_gemm_dw(dy, x, offsets)
    spans = [slice(first, end) for first, end in pairwise(offsets.tolist())]
    exact = torch.stack([dy[s].double().T @ x[s].double() for s in spans])
    size = torch.stack([dy[s].double().abs().T @ x[s].double().abs() for s in spans])
    assert_within(out, exact, magnitude=size, length=rows)
    for span, gradient in zip(spans, out, strict=True):
        assert span.stop > span.start or not gradient.any()
