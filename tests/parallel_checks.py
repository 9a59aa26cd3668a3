"""What the ranks of a group check of ``ling_ops.parallel``; run by test_parallel.py."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ling_ops
from ling_ops import parallel
from ling_ops.models import LingConfig, LingForCausalLM
from ling_ops.nn import Experts, MoE, add_lora, moe_modules
from ling_ops.parallel import ParallelExperts

E, H, WIDTH, K = 8, 16, 24, 2
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def rank() -> int:
    return distributed.get_rank()


def world() -> int:
    return distributed.get_world_size()


def device() -> torch.device:
    """Where this process computes; without a process group on the CPU."""
    nccl = distributed.is_initialized() and distributed.get_backend() == "nccl"
    return torch.device("cuda" if nccl else "cpu")


def group():
    return parallel.expert_mesh().get_group("expert")


def tokens_of(ranks: list[int], ids=None, dtype=torch.float64):
    """Per rank: x, gate weights (leaves), ids, and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for tokens in ranks:
        x = torch.randn(tokens, H, generator=generator, dtype=torch.float64)
        weights = torch.rand(tokens, K, generator=generator, dtype=torch.float64)
        chosen = torch.randint(-1, E, (tokens, K), generator=generator)
        if ids is not None:
            chosen = torch.tensor(ids).expand(tokens, K).clone()
        grad = torch.randn(tokens, H, generator=generator, dtype=torch.float64)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        batch = [x.to(dtype), weights.to(wide), chosen, grad.to(dtype)]
        batch = [t.to(device()) for t in batch]
        batches.append([batch[0].requires_grad_(), batch[1].requires_grad_(), *batch[2:]])
    return batches


def compare_with_one_rank(batches, capacity=None, static=False, tolerance=1e-10, **options):
    """Every rank's outputs and gradients against all batches through whole experts."""
    torch.manual_seed(1)
    dtype = batches[0][0].dtype
    whole = Experts(E, H, WIDTH, init_std=0.3, device=device(), dtype=dtype, **options)
    if options.get("bias"):
        nn.init.normal_(whole.first_bias)
        nn.init.normal_(whole.down_bias)
    policy = ling_ops.CapacityPolicy.fixed(capacity) if capacity is not None else None
    spread = ParallelExperts(whole, group(), policy if static else None)
    outs = []
    for x, weights, ids, grad in batches:
        limit = None if policy is None else policy.capacity(None, ids.numel(), E)
        routing = ling_ops.route(ids, E, capacity=limit)
        out = whole(x, weights, ids, routing=routing)
        out.backward(grad)
        outs.append(out)
    exact = [[x.grad, weights.grad] for x, weights, _, _ in batches]
    x, weights, ids, grad = batches[rank()]
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    limit = None if policy is None else policy.capacity(None, ids.numel(), E)
    out = spread(x, weights, ids, routing=ling_ops.route(ids, E, capacity=limit))
    out.backward(grad)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out, outs[rank()], **close)
    torch.testing.assert_close(x.grad, exact[rank()][0], **close)
    torch.testing.assert_close(weights.grad, exact[rank()][1], **close)
    first, count = spread.first_expert, E // world()
    for name, parameter in spread.named_parameters():
        true = whole.get_parameter(name).grad[first : first + count]
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, true, **close)
    return spread


@check
def dropless_with_uneven_tokens(folder: Path) -> None:
    compare_with_one_rank(tokens_of([5 + 4 * r for r in range(world())]))


@check
def a_rank_without_tokens(folder: Path) -> None:
    compare_with_one_rank(tokens_of([0 if r == world() - 1 else 6 for r in range(world())]))


@check
def no_tokens_anywhere(folder: Path) -> None:
    compare_with_one_rank(tokens_of([0] * world()))


@check
def all_tokens_to_one_rank(folder: Path) -> None:
    compare_with_one_rank(tokens_of([4] * world(), ids=[0, 1]))


@check
def no_pair_is_kept(folder: Path) -> None:
    compare_with_one_rank(tokens_of([4] * world(), ids=[-1, E]))


@check
def biases_and_other_activations(folder: Path) -> None:
    batches = tokens_of([6] * world())
    compare_with_one_rank(batches, bias=True, activation="geglu")
    compare_with_one_rank(tokens_of([6] * world()), activation="relu2")
    compare_with_one_rank(tokens_of([6] * world()), activation="swiglu", swiglu_limit=1.0)


@check
def low_precision(folder: Path) -> None:
    compare_with_one_rank(tokens_of([7] * world(), dtype=torch.float32), tolerance=1e-4)
    compare_with_one_rank(tokens_of([7] * world(), dtype=torch.bfloat16), tolerance=6e-2)


@check
def capacity_by_rows_and_by_equal_splits(folder: Path) -> None:
    for factor in (0.5, 1.0, 8.0, 1e-9):
        for static in (False, True):
            batches = tokens_of([9] * world())
            compare_with_one_rank(batches, capacity=factor, static=static)
    compare_with_one_rank(tokens_of([9] * world()), capacity=1.0, static=True, bias=True)


@check
def a_mesh_with_a_timeout(folder: Path) -> None:
    """The same mesh, and none of its groups waits longer."""
    timeout = timedelta(seconds=77)
    for size in {1, 2, world()} & set(range(1, world() + 1)):
        plain, mesh = parallel.expert_mesh(size), parallel.expert_mesh(size, timeout=timeout)
        assert torch.equal(mesh.mesh, plain.mesh) and mesh.mesh_dim_names == plain.mesh_dim_names
        for name in mesh.mesh_dim_names:
            ours, theirs = mesh.get_group(name), plain.get_group(name)
            ranks = distributed.get_process_group_ranks(ours)
            assert ranks == distributed.get_process_group_ranks(theirs)
            assert ours._get_backend(device()).options._timeout == timeout
        parallel.parallelize(tiny(), mesh)(torch.zeros(1, 4, dtype=torch.int64, device=device()))


@check
def experts_must_divide(folder: Path) -> None:
    if world() > 1:
        with pytest.raises(ValueError, match=f"divides the {world() + 1} experts, got {world()}"):
            ParallelExperts(Experts(world() + 1, H, WIDTH), group(), None)
    with pytest.raises(ValueError, match=f"size must divide the {world()} ranks, got 3"):
        parallel.expert_mesh(3)
    with pytest.raises(ValueError, match=r"model must have at least one ling_ops\.nn\.MoE"):
        parallel.parallelize(nn.Linear(2, 2), parallel.expert_mesh())
    moe = MoE(H, E, K, WIDTH)
    with pytest.raises(ValueError, match="static_capacity must be False unless"):
        parallel.parallelize(moe, parallel.expert_mesh(), static_capacity=True)


@check
def a_dynamic_capacity_follows_the_loads_of_all_ranks(folder: Path) -> None:
    policy = ling_ops.CapacityPolicy.dynamic(0.1)
    moe = MoE(H, E, K, WIDTH, capacity=policy, device=device())
    parallel.parallelize(moe, parallel.expert_mesh())
    demand = [
        torch.arange(E, dtype=torch.int32, device=device()) * r for r in range(1, world() + 1)
    ]
    found = moe.capacity.capacity(demand[rank()], 1, E)
    assert torch.equal(found, policy.capacity(torch.cat(demand), 1, E))
    running = ling_ops.CapacityPolicy.dynamic(0.1, mode="running", window=4).to(device())
    moe = MoE(H, E, K, WIDTH, capacity=running, device=device())
    names = set(moe.state_dict())
    parallel.parallelize(moe, parallel.expert_mesh())
    assert set(moe.state_dict()) == names
    moe.capacity.update(demand[rank()])
    running.update(torch.cat(demand))
    assert torch.equal(moe.capacity.window.nan_to_num(-1), running.window.nan_to_num(-1))


def tiny(**changes) -> LingForCausalLM:
    torch.manual_seed(5)
    config = LingConfig(
        vocab_size=32, hidden_size=H, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=20, moe_intermediate_size=12, num_experts=E, num_experts_per_token=K,
        num_shared_experts=1, first_k_dense_replace=1, init_std=0.2, **changes,
    )  # fmt: skip
    return LingForCausalLM(config, device=device(), dtype=torch.float64)


def train_step(model, ids, mesh=None) -> torch.Tensor:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    if mesh is not None:
        parallel.average_gradients(model, mesh)
    return parallel.clip_gradients(model, 0.5)


@check
def a_model_trains_as_on_one_rank(folder: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    batches = [torch.randint(32, (2, 6), generator=generator) for _ in range(world())]
    batches = [batch.to(device()) for batch in batches]
    for size in sorted({1, min(2, world()), world()}):
        for recompute in (False, True):
            whole, spread = tiny(), tiny()
            spread.activation_checkpointing = recompute
            mesh = parallel.expert_mesh(size)
            parallel.parallelize(spread, mesh)
            adams = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (whole, spread)]
            for _ in range(3):
                norms = [train_step(whole, torch.cat(batches)), None]
                norms[1] = train_step(spread, batches[rank()], mesh)
                torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
                for adam in adams:
                    adam.step()
            found = parallel.gather_tensors(spread, spread.state_dict())
            for name, tensor in whole.state_dict().items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
            first = parallel.gather_tensors(spread, spread.state_dict(), to_rank=0)
            assert (len(first) == len(found)) == (rank() == 0)


def meshes() -> list[DeviceMesh]:
    """Meshes that ``parallelize`` takes, of other names, numbers of dimensions, and few ranks."""
    pairs = min(2, world())
    shape, kind = (world() // pairs, pairs), device().type
    named = init_device_mesh(kind, shape, mesh_dim_names=("dp", "expert"))
    deep = init_device_mesh(kind, (1, *shape), mesh_dim_names=("pp", "replicate", "expert"))
    return [init_device_mesh(kind, (world(),)), named, deep, named["expert"]]


@check
def gradients_are_means_over_every_kind_of_mesh(folder: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    batches = torch.randint(32, (world(), 2, 6), generator=generator).to(device())
    for mesh in meshes():
        members = mesh.mesh.flatten()
        whole, spread = tiny(), parallel.parallelize(tiny(), mesh)
        joined = batches[members].flatten(0, 1)
        whole(joined, labels=joined).loss.backward()
        spread(batches[rank()], labels=batches[rank()]).loss.backward()
        parallel.average_gradients(spread, mesh)
        wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
        wanted = parallel.shard_tensors(spread, wanted)
        for name, parameter in spread.named_parameters():
            if name in wanted:
                torch.testing.assert_close(parameter.grad, wanted[name], msg=f"{name} of {mesh}")


@check
def static_experts_without_a_routing_keep_their_capacity(folder: Path) -> None:
    policy = ling_ops.CapacityPolicy.fixed(0.5)
    whole = Experts(E, H, WIDTH, init_std=0.3, device=device(), dtype=torch.float64)
    spread = ParallelExperts(whole, group(), policy)
    x, weights, ids, _ = tokens_of([16] * world())[rank()]
    routing = ling_ops.route(ids, E, capacity=policy.capacity(None, ids.numel(), E))
    torch.testing.assert_close(spread(x, weights, ids), whole(x, weights, ids, routing=routing))


@check
def shards_are_the_inverse_of_gathering(folder: Path) -> None:
    model, whole = tiny(), tiny()
    parallel.parallelize(model, parallel.expert_mesh())
    assert parallel.is_expert_parallel(model) and not parallel.is_expert_parallel(whole)
    local = parallel.shard_tensors(model, whole.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(local[name], tensor), name
    name = next(iter(parallel.expert_parameters(model)))
    with pytest.raises(ValueError, match=f"got {2 * E} experts, need all {E}"):
        parallel.shard_tensors(model, {name: torch.zeros(2 * E, 3)})
    names = set(parallel.expert_parameters(model))
    assert len(names) == 2 * len(moe_modules(model))
    moments = {f"{name}/exp_avg": p.detach() for name, p in whole.named_parameters()}
    assert all(
        torch.equal(value, model.get_parameter(key.split("/")[0]))
        for key, value in parallel.shard_tensors(model, moments).items()
    )


@check
def experts_are_spread_once(folder: Path) -> None:
    model, mesh = parallel.parallelize(tiny(), parallel.expert_mesh()), parallel.expert_mesh()
    shapes = [parameter.shape for parameter in model.parameters()]
    with pytest.raises(ValueError, match="model must have whole experts, got one that parallelize"):
        parallel.parallelize(model, mesh)
    assert [parameter.shape for parameter in model.parameters()] == shapes
    with pytest.raises(ValueError, match="experts must be whole ones, got a ParallelExperts"):
        ParallelExperts(moe_modules(model)[0].experts, group(), None)


@check
def only_whole_models_are_saved(folder: Path) -> None:
    """A rank's own experts are no checkpoint; what ``gather_tensors`` gives makes one."""
    pytest.importorskip("safetensors")
    model, saved = tiny().bfloat16(), folder / f"published-{rank()}"
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parallel.parallelize(model, parallel.expert_mesh())
    if world() > 1:
        has = rf"layers\.1\.mlp\.experts\.\w+ has {E // world()} of {E} experts: .*gather_tensors"
        with pytest.raises(ValueError, match=has):
            model.save_pretrained(saved)
        assert not saved.exists()
    whole = LingForCausalLM(model.config, device="meta")
    tensors = parallel.gather_tensors(model, model.state_dict())
    whole.load_state_dict(tensors, assign=True)
    whole.save_pretrained(saved)
    found = LingForCausalLM.from_pretrained(saved, device=device()).state_dict()
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in exact.items())


@check
def evaluation_needs_no_gradients(folder: Path) -> None:
    whole, spread = tiny().eval(), parallel.parallelize(tiny(), parallel.expert_mesh()).eval()
    ids = torch.randint(32, (1, 5), generator=torch.Generator().manual_seed(rank())).to(device())
    with torch.no_grad():
        torch.testing.assert_close(spread(ids).logits, whole(ids).logits)


@check
def ranks_generate_texts_of_their_own(folder: Path) -> None:
    """Prompts, numbers of tokens and ends differ, and the last rank has no prompt at all."""
    whole = tiny().double().eval()
    ids = torch.randint(whole.config.vocab_size, (world(), 2, 9), device=device())
    wanted = whole.generate(ids[rank()], max_new_tokens=4 + 3 * rank())
    spread = parallel.parallelize(copy.deepcopy(whole), parallel.expert_mesh())
    got = spread.generate(ids[rank()], max_new_tokens=4 + 3 * rank())
    assert torch.equal(got, wanted)
    end = int(wanted[0, 10]) if rank() == 0 else None  # rank 0 may end at its second token
    wanted = whole.generate(ids[rank()][:1], max_new_tokens=7, eos_token_id=end)
    assert torch.equal(spread.generate(ids[rank()][:1], max_new_tokens=7, eos_token_id=end), wanted)
    last = rank() == world() - 1
    prompts = ids[rank()][: 0 if last else 2]
    assert spread.generate(prompts, max_new_tokens=3).shape == (len(prompts), 9 if last else 12)


@check
def static_capacity_in_a_layer(folder: Path) -> None:
    torch.manual_seed(2)
    policy = ling_ops.CapacityPolicy.fixed(0.75)
    whole = MoE(H, E, K, WIDTH, capacity=policy, init_std=0.3, device=device(), dtype=torch.float64)
    spread = copy.deepcopy(whole)
    parallel.parallelize(spread, parallel.expert_mesh(), static_capacity=True)
    x = torch.randn(6, H, dtype=torch.float64, device=device()) + rank()
    torch.testing.assert_close(spread(x), whole(x))


@check
def distributed_checkpoints_fit_any_number_of_ranks(folder: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    saved = folder.parent / "dcp"
    exists = saved.exists()
    distributed.barrier()
    model = parallel.parallelize(tiny(), parallel.expert_mesh())
    if not exists:
        dcp.save(parallel.sharded_state_dict(model), checkpoint_id=saved)
        return
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    state = parallel.sharded_state_dict(model)
    dcp.load(state, checkpoint_id=saved)
    parallel.load_sharded_state_dict(model, state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, exact[name]), name


@check
def adapters_and_spread_experts_exclude_each_other(folder: Path) -> None:
    experts = Experts(E, H, WIDTH)
    spread = ParallelExperts(experts, group(), None)
    with pytest.raises(ValueError, match="it is a ParallelExperts, need Experts"):
        add_lora(spread)
    add_lora(experts)
    with pytest.raises(ValueError, match="experts must be plain ones, got LoRAExperts"):
        ParallelExperts(experts, group(), None)
