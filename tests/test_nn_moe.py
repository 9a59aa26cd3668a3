"""``ling_ops.nn.Experts`` and ``MoE``: sums over experts, capacities, masks, replay, transforms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from ling_ops import CapacityPolicy
from ling_ops.nn import MLP, Experts, MoE

H, E, K, I = 16, 8, 2, 24
GATED = ["swiglu", "geglu", "geglu_tanh"]
PLAIN = ["gelu", "gelu_tanh", "silu", "relu2"]


def make(device: torch.device, **changes) -> MoE:
    options = {"init_std": 0.3, "device": device, **changes}
    return MoE(H, E, K, I, **options)


def skewed(layer: MoE, device: torch.device, tokens: int = 256) -> torch.Tensor:
    """Tokens [T,H] that prefer the first experts of ``layer``."""
    preferred = layer.gate.weight.detach().float()[:3].mean(0)
    x = torch.randn(tokens, H, device=device) + 1.5 * preferred / preferred.norm()
    return x.to(layer.gate.weight.dtype)


def loop(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The layer's definition, expert by expert, with an ``MLP`` for each."""
    routed = layer.gate(x)
    out = torch.zeros_like(x)
    for expert in range(layer.num_experts):
        one = as_mlp(layer.experts, expert)
        weight = (routed.weights * (routed.indices == expert)).sum(1, keepdim=True)
        out = out + weight.to(x.dtype) * one(x)
    return out


def as_mlp(experts: Experts, index: int) -> MLP:
    """Expert ``index`` as a dense layer."""
    bias = experts.down_bias is not None
    first = experts.first_weight
    mlp = MLP(
        H, experts.intermediate_size, activation=experts.activation,
        swiglu_limit=experts.swiglu_limit, bias=bias, device=first.device, dtype=first.dtype,
    )  # fmt: skip
    names = ("gate_proj", "up_proj") if experts.gated else ("up_proj",)
    with torch.no_grad():
        for name, part in zip(names, first[index].chunk(len(names)), strict=True):
            getattr(mlp, name).weight.copy_(part)
        mlp.down_proj.weight.copy_(experts.down_proj[index])
        if bias:
            for name, part in zip(names, experts.first_bias[index].chunk(len(names)), strict=True):
                getattr(mlp, name).bias.copy_(part)
            mlp.down_proj.bias.copy_(experts.down_bias[index])
    return mlp


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", GATED + PLAIN)
def test_is_the_weighted_sum_of_its_experts(activation, bias, device):
    layer = make(device, activation=activation, expert_mlp_bias=bias, dtype=torch.float64)
    if bias:
        with torch.no_grad():
            layer.experts.first_bias.normal_()
            layer.experts.down_bias.normal_()
    x = torch.randn(20, H, device=device, dtype=torch.float64)
    torch.testing.assert_close(layer(x), loop(layer, x))
    names = {name.split(".")[-1] for name, _ in layer.experts.named_parameters()}
    first = "gate_up" if activation in GATED else "up"
    expected = {f"{first}_proj", "down_proj"}
    assert names == (expected | {f"{first}_bias", "down_bias"} if bias else expected)


def test_swiglu_limit(device):
    layer = make(device, swiglu_limit=0.2, num_shared_experts=1, dtype=torch.float64)
    x = torch.randn(20, H, device=device, dtype=torch.float64)
    torch.testing.assert_close(layer(x), loop(layer, x) + layer.shared_experts(x))
    unlimited = make(device, num_shared_experts=1, dtype=torch.float64)
    unlimited.load_state_dict(layer.state_dict())
    assert not torch.allclose(unlimited(x), layer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_adding_the_shared_experts_in_place_changes_no_gradient(bias, device):
    layer = make(device, num_shared_experts=2, expert_mlp_bias=bias, dtype=torch.float64)
    x = torch.randn(7, H, device=device, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    upstream = torch.randn_like(x)
    found = torch.autograd.grad(layer(x), inputs, upstream)
    seen = []
    layer.experts.register_forward_hook(lambda _, inputs, out: seen.append(out))
    out = layer(x)  # a hook keeps the experts' own output as it was
    for name, grad in zip(
        range(len(found)), torch.autograd.grad(out, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found[name], grad)
    torch.testing.assert_close(out, seen[0] + layer.shared_experts(x))


@pytest.mark.parametrize("register", ["full_backward_hook", "full_backward_pre_hook"])
def test_backward_hooks_of_every_part_run(register, device):
    layer, seen = make(device, num_shared_experts=1), []
    shared = layer.shared_experts
    for part in (layer.experts, shared, shared.up_proj, shared.down_proj):
        getattr(part, f"register_{register}")(lambda module, *_: seen.append(module))
    layer(torch.randn(5, H, device=device, requires_grad=True)).sum().backward()
    assert set(seen) == {layer.experts, shared, shared.up_proj, shared.down_proj}


def test_hooks_of_all_modules_run(device):
    layer, seen = make(device, num_shared_experts=1), []
    hook = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(5, H, device=device))
    finally:
        hook.remove()
    assert set(layer.modules()) - set(seen) <= {layer.capacity}


def test_a_forward_set_on_the_shared_experts_runs(device):
    """As accelerate sets one: no shortcut goes round it."""
    layer = make(device, num_shared_experts=1)
    x = torch.randn(5, H, device=device)
    before, down = layer(x), layer.shared_experts.down_proj
    without = before - layer.shared_experts(x)
    down.forward = lambda a: 2 * type(down).forward(down, a)
    torch.testing.assert_close(layer(x), before + (before - without))
    layer.shared_experts.forward = lambda inputs: torch.zeros_like(inputs)
    torch.testing.assert_close(layer(x), without)


def test_shared_experts_of_another_dtype_are_promoted(device):
    layer = make(device, num_shared_experts=1)
    layer.shared_experts.double()
    x = torch.randn(5, H, device=device)
    pre = layer.shared_experts.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    assert layer(x).dtype == torch.float64
    pre.remove()


def test_shared_experts_are_one_ungated_mlp(device):
    layer = make(device, num_shared_experts=2)
    x = torch.randn(2, 5, H, device=device)
    assert layer.shared_experts.up_proj.weight.shape == (2 * I, H)
    out = layer(x)
    shared = layer.shared_experts(x)
    layer.shared_experts = None
    torch.testing.assert_close(out, layer(x) + shared)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_gradients(score_function, device):
    layer = MoE(
        4, 4, 2, 3, score_function=score_function, init_std=0.5, device=device,
        dtype=torch.float64, num_shared_experts=1,
    )  # fmt: skip
    x = torch.randn(5, 4, device=device, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = tuple(p.detach().clone().requires_grad_() for p in parameters)
    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("capacity", [None, CapacityPolicy.fixed(1.0)])
def test_padding_goes_nowhere(capacity, device):
    layer = make(device, num_shared_experts=1, capacity=capacity, dtype=torch.float64)
    x = torch.randn(2, 6, H, device=device, dtype=torch.float64)
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[0, 3:] = False
    out = layer(x, token_mask=mask)
    torch.testing.assert_close(out[~mask], layer.shared_experts(x)[~mask])
    assert layer.expert_counts.sum() == 9 * K
    if capacity is None:
        torch.testing.assert_close(out[mask], layer(x)[mask])


def test_padding_takes_no_capacity(device):
    layer = make(device, capacity=CapacityPolicy.fixed(1.0))
    x = torch.randn(1, H, device=device).repeat(16, 1)  # all tokens want the same experts
    mask = torch.zeros(16, dtype=torch.bool, device=device)
    mask[-3:] = True
    layer(x, token_mask=mask)
    stats = layer.stats()
    assert stats["drop_rate"] == 0 and stats["tokens_dropped"] == 0  # capacity 4 of 3 wanted


def test_fixed_capacity_drops_what_is_over(device):
    layer = make(device, capacity=CapacityPolicy.fixed(1.25))
    layer(skewed(layer, device))
    limit = 80  # ceil(1.25 · 256 · 2 / 8)
    counts = layer.expert_counts.long()
    expected = (counts - limit).clamp(min=0).sum() / counts.sum()
    assert counts.sum() == 512 and expected > 0.05
    torch.testing.assert_close(layer.stats()["drop_rate"], expected.float())
    torch.testing.assert_close(layer.stats()["utilization"], counts / 256)


def test_dynamic_capacity_meets_its_target(device):
    layer = make(device, capacity=CapacityPolicy.dynamic(0.02))
    layer(skewed(layer, device))
    assert 0 < layer.stats()["drop_rate"] <= 0.02


def test_running_capacity_uses_past_steps_only(device):
    from ling_ops.nn import accumulate_expert_counts

    policy = CapacityPolicy.dynamic(0.02, mode="running", margin=0.0, quantile=1.0)
    layer = make(device, capacity=policy)
    x = skewed(layer, device)
    layer(x)
    assert layer.stats()["drop_rate"] == 0  # nothing known yet: the largest capacity
    layer(x)
    assert layer.stats()["drop_rate"] == 0  # a second forward (a recomputation) is no step
    accumulate_expert_counts(layer)
    layer(x)
    assert 0 < layer.stats()["drop_rate"] <= 0.02
    restored = make(device, capacity=policy)
    restored.load_state_dict(layer.state_dict())
    restored(x)
    assert torch.equal(restored.stats()["drop_rate"], layer.stats()["drop_rate"])


def test_reroute_lowers_the_drop_rate(device):
    plain = make(device, capacity=CapacityPolicy.fixed(1.25))
    rerouting = make(device, capacity=CapacityPolicy.fixed(1.25), reroute_rounds=2)
    rerouting.load_state_dict(plain.state_dict())
    x = skewed(plain, device)
    plain(x)
    out = rerouting(x)
    before, after = plain.stats(), rerouting.stats()
    assert after["drop_rate"] < before["drop_rate"] / 2
    assert torch.equal(rerouting.expert_counts, plain.expert_counts)  # demand, not the outcome
    out.sum().backward()
    assert rerouting.gate.weight.grad.isfinite().all()


def test_probability_priority_keeps_more_gate_mass(device):
    position = make(device, capacity=CapacityPolicy.fixed(0.8))
    probability = make(device, capacity=CapacityPolicy.fixed(0.8), capacity_priority="probability")
    probability.load_state_dict(position.state_dict())
    x = skewed(position, device)
    position(x)
    probability(x)
    assert probability.stats()["drop_rate"] == position.stats()["drop_rate"]
    assert probability.stats()["gate_mass_dropped"] < position.stats()["gate_mass_dropped"]


def test_dropped_tokens_get_exactly_zero(device):
    layer = make(device, capacity=CapacityPolicy.fixed(0.25), dtype=torch.float64)
    x = torch.randn(1, H, device=device, dtype=torch.float64).repeat(64, 1).requires_grad_()
    out = layer(x)  # capacity 4: only the first four tokens fit
    assert out[:4].abs().sum() > 0 and torch.count_nonzero(out[4:]) == 0
    out.sum().backward()
    assert torch.count_nonzero(x.grad[4:]) == 0
    assert layer.stats()["tokens_dropped"] == 60


def test_each_layer_keeps_its_own_policy():
    policy = CapacityPolicy.dynamic(mode="running")
    first, second = MoE(H, E, K, I, capacity=policy), MoE(H, E, K, I, capacity=policy)
    assert first.capacity is not policy and first.capacity is not second.capacity


@pytest.mark.parametrize(
    "capacity", [None, CapacityPolicy.fixed(1.0), CapacityPolicy.dynamic(0.02)]
)
def test_replay_repeats_the_layer(capacity, device):
    layer = make(
        device, capacity=capacity, jitter=0.2, score_function="sigmoid", use_expert_bias=True
    )
    x = torch.randn(3, 7, H, device=device)
    layer(x)
    indices = layer.last_indices
    layer.eval()
    expected = layer(x, replay_indices=indices)
    assert torch.equal(layer.last_indices, indices)
    layer.gate.expert_bias.copy_(torch.randn(E))  # would choose other experts
    assert not torch.equal(layer(x), expected)
    assert torch.equal(layer(x, replay_indices=indices), expected)


def test_zero_tokens(device):
    layer = make(device, num_shared_experts=1, balance_coefficient=0.1, z_loss_coefficient=0.1)
    out = layer(torch.zeros(0, H, device=device))
    out.sum().backward()
    assert out.shape == (0, H) and layer.expert_counts.sum() == 0
    assert layer.experts.down_proj.grad.eq(0).all()


def test_nan_stays_in_its_token(device):
    layer = make(device)
    x = torch.randn(8, H, device=device)
    x[3] = float("nan")
    out = layer(x)
    others = torch.arange(8) != 3
    assert out[3].isnan().all() and out[others].isfinite().all()


def test_full_graph_compilation(device):
    layer = make(
        device, num_shared_experts=1, score_function="sigmoid", use_expert_bias=True,
        balance_coefficient=0.01, z_loss_coefficient=0.01, num_groups=4, topk_groups=2,
    )  # fmt: skip
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, H, device=device)
    out, expected = compiled(x), layer(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(compiled.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert torch.equal(compiled.expert_counts, layer.expert_counts)
    assert torch.equal(compiled.stats()["max_vio"], layer.stats()["max_vio"])


def test_meta_device_and_materialisation(device):
    layer = MoE(
        H, E, K, I, num_shared_experts=1, score_function="sigmoid", use_expert_bias=True,
        capacity=CapacityPolicy.dynamic(mode="running"), device="meta",
    )  # fmt: skip
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    for shared in (0, 1):
        plain = MoE(H, E, K, I, num_shared_experts=shared, device="meta")
        for training in (True, False):
            assert plain.train(training)(torch.empty(4, H, device="meta")).shape == (4, H)
    layer.to_empty(device=device).reset_parameters()
    assert layer(torch.randn(4, H, device=device)).isfinite().all()
    assert layer.gate.expert_bias.eq(0).all() and layer.stats()["drop_rate"] == 0


def test_autocast(device):
    layer = make(device, num_shared_experts=1)
    x = torch.randn(2, 9, H, device=device)
    exact = layer(x)
    with torch.autocast(device.type, torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16 and layer._last["weights"].dtype == torch.float32
    assert (out - exact).abs().max() < 0.02 * exact.abs().max()
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_copies_and_pickles_after_a_forward(device):
    layer = make(device)
    x = torch.randn(4, H, device=device)
    out = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), out)


@pytest.mark.parametrize(
    ("std", "expected"), [(0.02, (0.02, 0.02, 0.02)), (None, (64**-0.5, 64**-0.5, 32**-0.5))]
)
def test_initialisation(std, expected, device):
    layer = MoE(64, 16, 2, 32, init_std=std, device=device)
    weights = (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj)
    for weight, size in zip(weights, expected, strict=True):
        assert abs(weight.std().item() / size - 1) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "activation: got 'tanh'"),
        ({"activation": "gelu", "swiglu_limit": 1.0}, "swiglu_limit: needs activation='swiglu'"),
        ({"swiglu_limit": -1.0}, "swiglu_limit: got -1.0"),
        ({"capacity_priority": "random"}, "capacity_priority: got 'random'"),
        ({"reroute_rounds": -1}, "reroute_rounds: got -1"),
        ({"num_shared_experts": 1.5}, "num_shared_experts: got 1.5"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        MoE(H, E, K, I, **changes)


def test_bad_input(device):
    layer = make(device)
    with pytest.raises(RuntimeError, match="no forward yet"):
        layer.stats()
    with pytest.raises(ValueError, match=r"x: got shape \(4, 15\), need \[..., 16\]"):
        layer(torch.zeros(4, 15, device=device))
    with pytest.raises(
        ValueError, match=r"token_mask: got torch.bool \(5,\), need torch.bool \(4,\)"
    ):
        layer(torch.zeros(4, H, device=device), token_mask=torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize(
    "name,change",
    [
        ("indices", lambda x, w, i: (x, w, i[:, 0])),
        ("indices", lambda x, w, i: (x, w, i[None])),
        ("indices", lambda x, w, i: (x, w, i.tolist())),
        ("x", lambda x, w, i: (x[0], w, i)),
        ("weights", lambda x, w, i: (x, w[:1], i)),
    ],
)
def test_what_is_wrong_with_the_experts_input_is_named(name, change, device):
    """A half-precision layer with shared experts, which could go along with few tokens."""
    moe = MoE(64, 8, 2, 32, num_shared_experts=1, device=device, dtype=torch.bfloat16)
    x, weights = torch.randn(5, 64, device=device).bfloat16(), torch.rand(5, 2, device=device)
    indices = torch.zeros(5, 2, dtype=torch.int64, device=device)
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=f"^{name} "):
        moe.all_experts(*change(x, weights, indices))
