"""x · weightᵀ in fp32 on bf16 operands, without copies of x in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class _BFloat16Product(torch.autograd.Function):
    """Products of bf16 numbers are exact in fp32, and cuBLAS adds them up in fp32.

    In the backward the fp32 gradient stands as the sum of two bf16 numbers, which leaves out
    2^-17 of it: far less than the rounding of the results to bf16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        tokens, experts = grad.shape
        halves = grad.new_empty(tokens, 2 * experts, dtype=x.dtype)
        high, low = halves.chunk(2, dim=1)
        high.copy_(grad)
        torch.sub(grad, high, out=low)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = halves @ torch.cat([weight, weight])
        if ctx.needs_input_grad[1]:
            sums = torch.mm(halves.t(), x, out_dtype=torch.float32)
            grad_weight = sums.view(2, *weight.shape).sum(0).to(weight.dtype)
        return grad_x, grad_weight


def router_product(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 (float64 for float64) logits ``[T,E]`` of x ``[T,H]`` and weight ``[E,H]``.

    On a GPU an fp32 product of bf16 tensors takes ten times as long as one on the tensor cores,
    which is as exact.
    """
    bf16 = x.dtype == weight.dtype == torch.bfloat16
    if bf16 and x.is_cuda and not torch.compiler.is_compiling():
        return _BFloat16Product.apply(x, weight)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype))
