"""Gradients of a model whose replicated parts and experts see different tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from .experts import ParallelExperts
from .layout import EXPERT, expert_parameters

#: Gradients are summed in pieces of about this many bytes: few calls, little memory.
BUCKET_BYTES = 32 * 2**20


def _buckets(grads: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or size >= BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel() * grad.element_size()
    if bucket:
        yield bucket


def _sum_over(group: distributed.ProcessGroup, grads: list[Tensor]) -> None:
    if distributed.get_world_size(group) == 1:
        return
    for bucket in _buckets(grads):
        flat = torch.cat([grad.flatten() for grad in bucket])
        distributed.all_reduce(flat, group=group)
        for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Their gradients; one that this rank lacks is zero, since others may have it."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in trained]


@torch.no_grad()
def average_gradients(model: nn.Module, mesh: DeviceMesh, *, experts_only: bool = False) -> None:
    """Makes every ``.grad`` that of the mean of all ranks' losses. Call before the optimizer.

    ``mesh`` as in ``parallelize``. Replicated parameters are averaged over all its ranks. Those of
    experts hold the sum over the ranks that sent rows to them already: they are summed over the
    mesh's other dimensions and divided by the number of ranks. ``experts_only``: where DDP or
    FSDP averages the rest.
    """
    experts = expert_parameters(model)
    world = mesh.size()
    shared = _gradients(experts.values())
    if mesh.ndim == 1:
        everyone = mesh.get_group()
    else:
        everyone = distributed.group.WORLD
        for name in mesh.mesh_dim_names:
            if name != EXPERT:
                _sum_over(mesh[name].get_group(), shared)
    rest: list[Tensor] = []
    if not experts_only:
        rest = _gradients(p for name, p in model.named_parameters() if name not in experts)
        _sum_over(everyone, rest)
    for grad in shared + rest:
        grad.div_(world)


@torch.no_grad()
def clip_gradients(
    model: nn.Module,
    max_norm: float,
    *,
    gradients: dict[str, Tensor] | None = None,
) -> Tensor:
    """Clips the norm of all gradients, the experts of all ranks among them; returns the norm.

    A ``max_norm`` of 0 or less only measures. ``gradients``: name → tensor, to take instead of
    the parameters' ``.grad`` (a mixed-precision optimizer's copies).
    """
    if gradients is None:
        named = model.named_parameters()
        gradients = {name: p.grad for name, p in named if p.grad is not None}
    experts = expert_parameters(model)
    spread = [grad for name, grad in gradients.items() if name in experts]
    rest = [grad for name, grad in gradients.items() if name not in experts]
    norms = [nn.utils.get_total_norm(grads).double() for grads in (spread, rest)]
    if gradients:  # the norm of none is on the host
        norms = [norm.to(next(iter(gradients.values())).device) for norm in norms]
    squares = norms[0].square()
    if experts:
        holder = next(m for m in model.modules() if isinstance(m, ParallelExperts))
        distributed.all_reduce(squares, group=holder.group)
    norm = (squares + norms[1].square()).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in gradients.values():
            grad.mul_(scale.to(grad.dtype))
    return norm.float()
