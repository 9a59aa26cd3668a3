"""`grouped_gemm` and `grouped_mm`: one matrix product per expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import gemm as reference
from . import _checks, _library  # noqa: F401
from ._autocast import autocast
from ._backend import use_kernel

TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)
#: A row must be a whole number of 16-byte units for the copy engine.
ROW_MULTIPLE = 8


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, offsets):
        ctx.save_for_backward(a, b, offsets)
        return torch.ops.ling_ops.grouped_gemm(a, b, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, b, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = torch.ops.ling_ops.grouped_gemm(grad, b.transpose(1, 2), offsets)
        if ctx.needs_input_grad[1]:
            grad_b = torch.ops.ling_ops.grouped_gemm_dw(grad, a, offsets)
        return grad_a, grad_b, None


def tensor_core_unsupported(dtype: torch.dtype, **sizes: int) -> str | None:
    """What the tensor-core kernels can't do about a dtype and row lengths, if anything."""
    if dtype not in TENSOR_CORE_DTYPES:
        return f"the dtype is {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    for name, size in sizes.items():
        if size % ROW_MULTIPLE or size == 0:
            return f"{name} = {size} is not a positive multiple of {ROW_MULTIPLE}"
    return None


def _weights_for_kernel(b: Tensor) -> Tensor:
    """Weights contiguous as [E,N,Kd], or the transpose view of a contiguous [E,Kd,N]."""
    return b if b.transpose(1, 2).is_contiguous() else b.contiguous()


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """One product per expert: out[r] = a[r] @ b[e]^T for the rows r of expert e.

    Rows of expert e are offsets[e] .. offsets[e+1]; rows of no expert (past the last offset) are
    exactly zero. Offsets are read on the device, clamped to [0, M] and made non-decreasing, so
    bad ones can't reach outside the tensors. Accumulates in fp32, always in the same order.

    Args:
        a: [M, Kd] float, differentiable.
        b: [E, N, Kd] in a's dtype, differentiable; contiguous, or the transpose of a contiguous
            [E, Kd, N] (no copy is made of either).
        offsets: [E+1] int32 or int64.

    Returns:
        [M, N] in a's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
    """
    _checks.shape("a", a, (None, None), "[M, Kd]")
    _checks.shape("b", b, (None, None, a.shape[1]), "[E, N, Kd]")
    _checks.tensor("offsets", offsets)
    _checks.shape("offsets", offsets, (b.shape[0] + 1,), "[E+1]")
    _checks.dtype("offsets", offsets, _checks.IDS)
    a, b = autocast(a, b)
    _checks.dtype("a", a, _checks.FLOATS)
    _checks.dtype("b", b, (a.dtype,))
    _checks.same_device("b", b, "a", a)
    _checks.same_device("offsets", offsets, "a", a)
    unsupported = tensor_core_unsupported(a.dtype, N=b.shape[1], Kd=a.shape[1])
    if not use_kernel("grouped_gemm", a, unsupported):
        return reference.grouped_gemm(a, b, offsets)
    a, b, offsets = a.contiguous(), _weights_for_kernel(b), offsets.to(torch.int32).contiguous()
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _GroupedGemm.apply(a, b, offsets)
    return torch.ops.ling_ops.grouped_gemm(a, b, offsets)


class _GroupedGemmDw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, offsets):
        ctx.save_for_backward(dy, x, offsets)
        return torch.ops.ling_ops.grouped_gemm_dw(dy, x, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dy, x, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_dy = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_dy = torch.ops.ling_ops.grouped_gemm(x, grad, offsets)
        if ctx.needs_input_grad[1]:
            grad_x = torch.ops.ling_ops.grouped_gemm(dy, grad.transpose(1, 2), offsets)
        return grad_dy, grad_x, None


def _ragged_contraction(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """[E,N,Kd] = dy[rows of e]^T @ x[rows of e], dy [M,N], x [M,Kd]."""
    unsupported = tensor_core_unsupported(x.dtype, N=dy.shape[1], Kd=x.shape[1])
    if not use_kernel("grouped_mm", x, unsupported):
        return reference.grouped_gemm_dw(dy, x, offsets)
    dy, x = dy.contiguous(), x.contiguous()
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
        return _GroupedGemmDw.apply(dy, x, offsets)
    return torch.ops.ling_ops.grouped_gemm_dw(dy, x, offsets)


def _check_offs(offs: Tensor | None, mat_a: Tensor, mat_b: Tensor) -> Tensor | None:
    """Offsets with the leading 0 that `grouped_gemm` wants."""
    if mat_a.dim() == 3 and mat_b.dim() == 3:
        if offs is not None:
            raise ValueError("offs must be None when both matrices are 3-dimensional, got a tensor")
        return None
    if offs is None:
        raise ValueError("offs must be given when a matrix is 2-dimensional, got None")
    _checks.shape("offs", offs, (None,), "[E]")
    _checks.dtype("offs", offs, (torch.int32,))
    _checks.same_device("offs", offs, "mat_a", mat_a)
    experts = [m.shape[0] for m in (mat_a, mat_b) if m.dim() == 3]
    if experts and offs.shape[0] != experts[0]:
        raise ValueError(
            f"offs must have one end per group, [E] = [{experts[0]}], got {list(offs.shape)}"
        )
    return torch.cat([offs.new_zeros(1), offs])


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.grouped_mm` with defined tails: what no group covers is zero.

    Args:
        mat_a: [M, K] or [E, M, K] float, differentiable.
        mat_b: [K, N] or [E, K, N] in mat_a's dtype, differentiable.
        offs: [E] int32 end of each group along the ragged axis: M for 2d x 3d, N for 3d x 2d, K
            for 2d x 2d; None for 3d x 3d.
        bias: not supported, as in torch; must be None.
        out_dtype: dtype of the result; None or the dtype of the inputs.

    Returns:
        2d x 3d: [M, N], rows past offs[-1] zero. 3d x 2d: [M, N] in column order (strides
        [1, M]), columns past offs[-1] zero.
        2d x 2d: [E, M, N], empty groups zero. 3d x 3d: [E, M, N].

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
    """
    for name, matrix in (("mat_a", mat_a), ("mat_b", mat_b)):
        _checks.tensor(name, matrix)
        if matrix.dim() not in (2, 3):
            raise ValueError(f"{name} must have 2 or 3 dimensions, got {matrix.dim()}")
    mat_a, mat_b = autocast(mat_a, mat_b)
    _checks.dtype("mat_a", mat_a, _checks.FLOATS)
    _checks.dtype("mat_b", mat_b, (mat_a.dtype,))
    _checks.same_device("mat_b", mat_b, "mat_a", mat_a)
    if mat_a.shape[-1] != mat_b.shape[-2]:
        raise ValueError(
            f"mat_b must have {mat_a.shape[-1]} rows to match mat_a's columns, "
            f"got {mat_b.shape[-2]}"
        )
    if mat_a.dim() == mat_b.dim() == 3 and mat_a.shape[0] != mat_b.shape[0]:
        raise ValueError(f"mat_b must have {mat_a.shape[0]} groups, got {mat_b.shape[0]}")
    if bias is not None:
        raise ValueError("bias must be None (torch's grouped_mm takes none either)")
    if out_dtype not in (None, mat_a.dtype):
        raise ValueError(f"out_dtype must be None or {mat_a.dtype}, got {out_dtype}")
    offsets = _check_offs(offs, mat_a, mat_b)
    if offsets is None:
        return torch.bmm(mat_a, mat_b)
    if mat_a.dim() == 2 and mat_b.dim() == 3:
        return grouped_gemm(mat_a, mat_b.transpose(1, 2), offsets)
    if mat_a.dim() == 3:
        return grouped_gemm(mat_b.t(), mat_a, offsets).t()
    return _ragged_contraction(mat_a.t(), mat_b, offsets)
