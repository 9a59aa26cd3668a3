"""Rows from every rank to every rank, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def _all_to_all(
    x: Tensor,
    out_splits: list[int] | None,
    in_splits: list[int] | None,
    group: distributed.ProcessGroup,
) -> Tensor:
    rows = x.shape[0] if out_splits is None else sum(out_splits)
    out = x.new_empty(rows, *x.shape[1:])
    distributed.all_to_all_single(out, x.contiguous(), out_splits, in_splits, group=group)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out_splits, in_splits, group):
        ctx.splits, ctx.group = (in_splits, out_splits), group
        return _all_to_all(x, out_splits, in_splits, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _all_to_all(grad, *ctx.splits, ctx.group), None, None, None


def exchange(
    x: Tensor,
    out_splits: list[int] | None,
    in_splits: list[int] | None,
    group: distributed.ProcessGroup,
) -> Tensor:
    """Sends ``in_splits[r]`` rows of x ``[M, ...]`` to rank r and returns what all ranks sent.

    Rows come back in rank order, ``out_splits[r]`` of them from rank r. None means equal splits
    of M rows. Differentiable: gradients take the way back. All ranks of ``group`` must call it,
    forward and backward, also with no rows.
    """
    return _Exchange.apply(x, out_splits, in_splits, group)


def gather_counts(counts: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """[R, ...]: every rank's integer ``counts``."""
    out = counts.new_empty(distributed.get_world_size(group), *counts.shape)
    distributed.all_gather(list(out.unbind()), counts.contiguous(), group=group)
    return out
