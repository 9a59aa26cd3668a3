"""Training engines around a Ling model, on several ranks; run by test_engines.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parallel_checks import device, rank, tiny, world
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from ling_ops import parallel
from ling_ops.models import LingForCausalLM
from ling_ops.models.ling import LingLayer
from ling_ops.nn import add_lora, load_lora, merge_lora, remove_lora, save_lora, unmerge_lora
from ling_ops.nn.lora import adapters

CHECKS = {}
STEPS, RATE = 3, 1e-2


def check(function):
    CHECKS[function.__name__] = function
    return function


def batches() -> list[torch.Tensor]:
    """[B, S] of every rank."""
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randint(32, (2, 6), generator=generator) for _ in range(world())]
    return [batch.to(device()) for batch in drawn]


def whole_run(**changes) -> dict[str, torch.Tensor]:
    """The state of a model after STEPS steps on all ranks' batches in one process."""
    model = tiny(**changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    ids = torch.cat(batches())
    for _ in range(STEPS):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def steps(model: nn.Module, optimizer, after_backward=lambda: None) -> None:
    ids = batches()[rank()]
    for _ in range(STEPS):
        model(ids, labels=ids).loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(exact)
    for name, tensor in exact.items():
        torch.testing.assert_close(full(found[name]), tensor, rtol=1e-7, atol=1e-9, msg=name)


def shard(model: LingForCausalLM, **options) -> LingForCausalLM:
    """fully_shard as FSDP2 is used: every layer, then the root."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device().type, (world(),))
    for module in model.modules():
        if isinstance(module, LingLayer):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@check
def ddp(folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = tiny(use_expert_bias=True)
    wrapped = DistributedDataParallel(model)
    steps(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=RATE))
    same(model.state_dict(), whole_run(use_expert_bias=True))


@check
def ddp_with_gradient_accumulation(folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model, exact = tiny(), tiny()
    wrapped = DistributedDataParallel(model)
    ids = batches()[rank()]
    with wrapped.no_sync():
        (wrapped(ids, labels=ids).loss / 2).backward()
    (wrapped(ids, labels=ids).loss / 2).backward()
    everything = torch.cat(batches())
    exact(everything, labels=everything).loss.backward()
    for (name, parameter), right in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, right.grad, rtol=1e-7, atol=1e-9, msg=name)


@check
def fsdp2(folder: Path) -> None:
    for recompute in (False, True):
        model = tiny()
        model.activation_checkpointing = recompute
        shard(model)
        steps(model, torch.optim.AdamW(model.parameters(), lr=RATE))
        same(model.state_dict(), whole_run())


@check
def fsdp2_in_mixed_precision(folder: Path) -> None:
    """bf16 compute over fp32 parameters: the gradients are those of a bf16 copy."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(tiny().float(), mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    ids = batches()[rank()]
    seen = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        norm = full(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        assert torch.isfinite(norm) and norm > 0
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0] - 0.1


TARGETS = ["gate_up_proj", "experts.down_proj", "query_key_value"]


def adapted(dtype: torch.dtype | None = None, *others: str) -> LingForCausalLM:
    """The tiny model with adapters at experts and attention that do something."""
    model = tiny().to(dtype or torch.float64)
    torch.manual_seed(6)
    add_lora(model, r=2, targets=[*TARGETS, *others])
    for _, adapter in adapters(model):
        nn.init.normal_(adapter.b, std=0.1)
    return model


@check
def lora_beside_ddp_and_fsdp2(folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    exact, everything = adapted(), torch.cat(batches())
    optimizer = torch.optim.AdamW([p for p in exact.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        exact(everything, labels=everything).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for wrap in (DistributedDataParallel, shard):
        model = adapted()
        wrapped = wrap(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        steps(wrapped, torch.optim.AdamW(trained, lr=RATE))
        same(model.state_dict(), exact.state_dict())


@check
def lora_in_fp32_beside_bf16_weights_under_fsdp2(folder: Path) -> None:
    model = shard(adapted(torch.bfloat16))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    ids = batches()[rank()]
    seen = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0] - 0.05


@check
def adapters_come_before_engines(folder: Path) -> None:
    """Nobody would sum the gradients of adapters that are added later."""
    from torch.distributed.tensor import distribute_tensor
    from torch.nn.parallel import DistributedDataParallel

    pytest.importorskip("safetensors")
    saved = folder / f"before-{rank()}"
    save_lora(adapted(), saved)
    split, mesh = tiny(), init_device_mesh(device().type, (world(),))
    linear = split.model.layers[1].attention.query_key_value
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
    models = [
        (DistributedDataParallel(tiny()), "it is a DistributedDataParallel"),
        (nn.Sequential(DistributedDataParallel(tiny())), "0 is a DistributedDataParallel"),
        (shard(tiny()), "it is a FSDPModule"),
        (split, r"weight of model\.layers\.1\.attention\.query_key_value is a DTensor"),
    ]
    for model, found in models:
        for add in (lambda m: add_lora(m, targets=TARGETS), lambda m: load_lora(m, saved)):
            with pytest.raises(ValueError, match=f"model: .*{found}: add_lora and load_lora come"):
                add(model)
        assert not adapters(model) and all(p.requires_grad for p in model.parameters())


@check
def adapters_are_saved_under_engines(folder: Path) -> None:
    """The files are those of a plain model, also from what a forward left gathered."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.nn.parallel import DistributedDataParallel

    pytest.importorskip("safetensors")
    exact, narrow = adapted(torch.float32, "lm_head"), MixedPrecisionPolicy(torch.bfloat16)
    save_lora(exact, folder / f"plain-{rank()}", base_model="base")
    for name, wrap in (
        ("ddp", DistributedDataParallel),
        ("compiled", lambda m: torch.compile(DistributedDataParallel(m), backend="eager")),
        ("fsdp2", lambda m: shard(m, mp_policy=narrow)),
    ):
        model = wrap(adapted(torch.float32, "lm_head"))
        saved = folder / (name if name == "fsdp2" else f"{name}-{rank()}")
        if name != "compiled":
            with torch.no_grad():
                model(batches()[rank()])
        save_lora(model, saved, base_model="base")
        distributed.barrier()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            right = (folder / f"plain-{rank()}" / file).read_bytes()
            assert (saved / file).read_bytes() == right, name
        assert len(list(saved.iterdir())) == 2
        distributed.barrier()


@check
def what_needs_whole_weights_refuses_parts_of_them(folder: Path) -> None:
    model = shard(adapted())
    for _ in range(2):
        before = {name: full(tensor).clone() for name, tensor in model.state_dict().items()}
        for change in (merge_lora, unmerge_lora, remove_lora):
            with pytest.raises(ValueError, match="a rank has only a part: call save_lora here"):
                change(model)
        same(model.state_dict(), before)
        with torch.no_grad():
            model(batches()[rank()])  # leaves the root's weights gathered
    plain = shard(tiny())
    with pytest.raises(ValueError, match=r"get_model_state_dict\(model, options=StateDictOptions"):
        plain.save_pretrained(folder / "part")
    assert not (folder / "part").exists()


@check
def the_way_to_whole_weights(folder: Path) -> None:
    """What the errors name, then merged and saved on one process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    pytest.importorskip("safetensors")
    model = shard(adapted())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank() == 0:
        whole, exact = adapted(), adapted()
        nn.init.zeros_(whole.lm_head.weight)
        whole.load_state_dict(state)
        merge_lora(whole)
        merge_lora(exact)
        for mine, right in zip(whole.parameters(), exact.parameters(), strict=True):
            assert torch.equal(mine, right)


@check
def distributed_checkpoint_of_fsdp2(folder: Path) -> None:
    """Model and optimizer: saved by all ranks, loaded into a run that is not sharded at all."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    saved = folder / "fsdp2"
    model = shard(tiny())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=saved)
    plain = tiny()
    other = torch.optim.AdamW(plain.parameters(), lr=RATE)
    weights, moments = get_state_dict(plain, other)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=saved)
    set_state_dict(
        plain, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    same(plain.state_dict(), whole_run())
    for parameter, right in zip(plain.parameters(), model.parameters(), strict=True):
        moment = optimizer.state[right]["exp_avg"]
        torch.testing.assert_close(other.state[parameter]["exp_avg"], full(moment))


@check
def experts_spread_beside_ddp(folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    mesh = parallel.expert_mesh()
    model = parallel.parallelize(tiny(), mesh)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, list(parallel.expert_parameters(model))
    )
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=RATE)
    steps(wrapped, optimizer, lambda: parallel.average_gradients(model, mesh, experts_only=True))
    same(parallel.gather_tensors(model, model.state_dict()), whole_run())


@check
def experts_spread_beside_fsdp2(folder: Path) -> None:
    mesh = parallel.expert_mesh()
    model = parallel.parallelize(tiny(), mesh)
    spread = set(parallel.expert_parameters(model).values())
    shard(model, ignored_params=spread)
    # One step cannot fuse plain tensors with DTensors: a group of parameters for each.
    sharded = [p for p in model.parameters() if p not in spread]
    optimizer = torch.optim.AdamW([{"params": sharded}, {"params": list(spread)}], lr=RATE)
    steps(model, optimizer, lambda: parallel.average_gradients(model, mesh, experts_only=True))
    same(parallel.gather_tensors(model, model.state_dict()), whole_run())


@check
def compiled_with_experts_spread(folder: Path) -> None:
    mesh = parallel.expert_mesh()
    model = parallel.parallelize(tiny(), mesh)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps(compiled, optimizer, lambda: parallel.average_gradients(model, mesh))
    same(parallel.gather_tensors(model, model.state_dict()), whole_run())


@check
def a_mesh_of_two_dimensions(folder: Path) -> None:
    """Groups of one rank: experts are replicated, and averaged as everything else."""
    if world() < 2:
        pytest.skip("needs two ranks")
    mesh = parallel.expert_mesh(1)
    model = parallel.parallelize(tiny(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps(model, optimizer, lambda: parallel.average_gradients(model, mesh))
    same(model.state_dict(), whole_run())
    distributed.barrier()
