"""Which rank holds which experts: of a model, of its optimizer's tensors, of its checkpoints."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ling_ops.nn import moe_modules

from .experts import GroupCapacity, ParallelExperts

EXPERT = "expert"
REPLICATE = "replicate"


def expert_mesh(
    size: int | None = None,
    *,
    device_type: str | None = None,
    timeout: timedelta | None = None,
) -> DeviceMesh:
    """A mesh of all ranks with dimensions ``("replicate", "expert")``.

    ``size``: how many ranks share a layer's experts, a divisor of the number of ranks; None: all.
    The ranks of a node are neighbours on "expert". ``device_type``: "cuda" or "cpu"; None: what
    the default process group uses. ``timeout``: after which an exchange with a rank that does not
    answer fails; None: PyTorch's, which is 30 minutes (10 with NCCL) in groups that it makes anew,
    whatever the default process group has. Raises ValueError for a ``size`` that does not divide.
    """
    world = distributed.get_world_size()
    size = world if size is None else size
    if size < 1 or world % size:
        raise ValueError(f"size must divide the {world} ranks, got {size}")
    if device_type is None:
        nccl = "nccl" in distributed.get_backend_config()
        device_type = "cuda" if nccl else "cpu"
    names, ranks = (REPLICATE, EXPERT), torch.arange(world).view(world // size, size)
    if timeout is None:
        return init_device_mesh(device_type, tuple(ranks.shape), mesh_dim_names=names)
    groups = [
        distributed.new_subgroups_by_enumeration(lines.tolist(), timeout=timeout)[0]
        for lines in (ranks.T, ranks)
    ]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=names)


def _expert_dimension(mesh: DeviceMesh) -> DeviceMesh:
    if mesh.ndim == 1:
        return mesh
    if EXPERT not in (mesh.mesh_dim_names or ()):
        raise ValueError(
            f'mesh must have one dimension, or one named "{EXPERT}", got {mesh.mesh_dim_names}'
        )
    return mesh[EXPERT]


def parallelize(model: nn.Module, mesh: DeviceMesh, *, static_capacity: bool = False) -> nn.Module:
    """Spreads the experts of every ``ling_ops.nn.MoE`` of ``model`` over ``mesh``, in place.

    ``mesh`` is one-dimensional, or has all ranks and a dimension "expert" (``expert_mesh``).
    Every rank starts with the same whole model and keeps the parameters ``[E/R, ...]`` of its
    experts; all else stays replicated. Make optimizers afterwards. A dynamic capacity then
    follows the loads that all ranks send; a fixed one is C = ceil(factor·T·K/E) of each rank's
    own T tokens.

    ``static_capacity``: with a fixed capacity, send C rows for every expert, so that the host
    never waits; every rank must then have the same number of tokens in every forward.

    Returns the model. Raises ValueError where the experts do not divide, where the model has no
    MoE layer or is spread already, or where ``static_capacity`` meets another capacity.
    """
    if is_expert_parallel(model):
        raise ValueError("model must have whole experts, got one that parallelize spread already")
    dimension = _expert_dimension(mesh)
    group = dimension.get_group()
    everyone = distributed.group.WORLD if mesh.ndim > 1 else group
    layers = moe_modules(model)
    if not layers:
        raise ValueError("model must have at least one ling_ops.nn.MoE, got none")
    for layer in layers:
        if static_capacity and layer.capacity.kind != "fixed":
            raise ValueError(
                f"static_capacity must be False unless the capacity is fixed, got {layer.capacity}"
            )
        policy = layer.capacity if static_capacity else None
        GroupCapacity.adopt(layer.capacity, everyone)
        layer.experts = ParallelExperts(layer.experts, group, policy)
        layer.experts.mesh = dimension
    return model


def is_expert_parallel(model: nn.Module) -> bool:
    """Whether ``parallelize`` was called on the model."""
    return any(isinstance(module, ParallelExperts) for module in model.modules())


def _holders(model: nn.Module) -> dict[str, ParallelExperts]:
    """Name of each parameter that is spread → the module that has it."""
    return {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        if isinstance(module, ParallelExperts)
        for name, _ in module.named_parameters(recurse=False)
    }


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter ``[E/R, ...]`` of all experts that are spread."""
    return {name: model.get_parameter(name) for name in _holders(model)}


def _spread(model: nn.Module, tensors: dict[str, Tensor]):
    """(key, tensor, holder or None): keys are parameter names, maybe with "/kind" behind."""
    holders = _holders(model)
    for key, tensor in tensors.items():
        holder = holders.get(key.partition("/")[0])
        yield key, tensor, holder if tensor.dim() else None


@torch.no_grad()
def gather_tensors(
    model: nn.Module, tensors: dict[str, Tensor], *, to_rank: int | None = None
) -> dict[str, Tensor]:
    """Tensors by name as a model on one rank has them: experts ``[E, ...]`` from all ranks.

    ``tensors``: a state dict of ``model``, or optimizer tensors whose names are
    "<parameter>/<kind>". Replicated ones are handed on. With ``to_rank`` (a rank of the default
    group) the others get {}. Every rank must call it with the same names.
    """
    wanted = to_rank is None or distributed.get_rank() == to_rank
    whole = {}
    # Dicts that were read from files may be in another order on every rank.
    for key, tensor, holder in _spread(model, dict(sorted(tensors.items()))):
        if holder is not None:
            parts = tensor.new_empty(holder.num_experts, *tensor.shape[1:])
            distributed.all_gather(
                list(parts.chunk(holder.ranks)), tensor.contiguous(), group=holder.group
            )
            tensor = parts
        if wanted:
            # Off the device one by one: a whole model may not fit there.
            whole[key] = tensor if to_rank is None else tensor.cpu()
    return whole


def shard_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``gather_tensors``: of whole tensors by name, what this rank holds.

    Raises ValueError for a tensor of another number of experts.
    """
    local = {}
    for key, tensor, holder in _spread(model, tensors):
        if holder is not None:
            if len(tensor) != holder.num_experts:
                raise ValueError(
                    f"{key}: got {len(tensor)} experts, need all {holder.num_experts} of the layer"
                )
            tensor = tensor[holder.first_expert :][: holder.local_experts].clone()
        local[key] = tensor
    return local


def sharded_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict with experts as DTensors ``[E, ...]``, for torch.distributed.checkpoint.

    What it holds is the model's own memory: ``dcp.load`` into it loads the model. A checkpoint
    written with one number of ranks loads with any other that divides E.
    """
    from torch.distributed.tensor import DTensor, Shard

    holders = _holders(model)
    state = model.state_dict()
    for name, holder in holders.items():
        local = state[name].detach()
        state[name] = DTensor.from_local(local, holder.mesh, [Shard(0)], run_check=False)
    return state


@torch.no_grad()
def load_sharded_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Copies a ``sharded_state_dict`` into a model that is spread in the same way."""
    local = {
        name: value.to_local() if name in _holders(model) else value
        for name, value in state.items()
    }
    model.load_state_dict(local)
