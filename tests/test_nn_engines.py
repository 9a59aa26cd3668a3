"""``ling_ops.nn.MoE`` under what training engines do to a layer, in one process.

Recomputing its forward (activation checkpointing), and FSDP2, which takes the full parameters
away after the forward and puts them back, in the same tensors, before the backward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tolerances import assert_bitwise
from torch.utils.checkpoint import checkpoint

from ling_ops.nn import MoE

H, E, K, I = 64, 8, 2, 64


def make(device: torch.device, dtype: torch.dtype) -> tuple[MoE, torch.Tensor]:
    torch.manual_seed(3)
    layer = MoE(H, E, K, I, num_shared_experts=1, balance_coefficient=0.01, init_std=0.1,
                device=device, dtype=dtype)  # fmt: skip
    return layer, torch.randn(96, H, device=device, dtype=dtype)


def gradients(run, layer: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = run(x)
    out.float().square().mean().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **found}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(
    device: torch.device, dtype: torch.dtype, reentrant: bool
) -> None:
    layer, x = make(device, dtype)
    expected = gradients(layer, layer, x)
    found = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x)
    for name, right in expected.items():
        assert_bitwise(found[name], right, name)


@pytest.fixture
def one_rank(device: torch.device, tmp_path) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0,
                            world_size=1)  # fmt: skip
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("reshard", [True, False])
def test_fully_shard(device: torch.device, reshard: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer, x = make(device, torch.bfloat16)
    expected = gradients(layer, layer, x)
    sharded = copy.deepcopy(layer)
    fully_shard(sharded, mesh=init_device_mesh(device.type, (1,)), reshard_after_forward=reshard)
    for _ in range(2):
        found = gradients(sharded, sharded, x)
        for name, right in expected.items():
            assert_bitwise(whole(found[name]), right, name)
