"""Expert pruning: importance against a plain loop, and that the rest of a model stays itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model_generate import SMALL
from tolerances import assert_bitwise

from ling_ops.models import LingConfig, LingForCausalLM, expert_importance, prune_experts
from ling_ops.models.pruning import CRITERIA, kept_experts, pruned_count
from ling_ops.nn import add_lora

VARIANTS = {
    "sigmoid": {},
    "softmax": {"score_function": "softmax", "use_expert_bias": False, "router_bias": True},
    "groups": {"num_groups": 4, "topk_groups": 2},
    "biases": {"mlp_bias": True, "num_shared_experts": 1, "activation": "geglu"},
    "plain": {"activation": "relu2", "capacity": "dynamic", "capacity_mode": "running"},
}


def make(device, variant: str = "sigmoid", **changes) -> LingForCausalLM:
    torch.manual_seed(0)
    config = LingConfig(**{**SMALL, **VARIANTS[variant], **changes})
    model = LingForCausalLM(config, device=device, dtype=torch.float64).eval()
    for _, layer in model.moe_layers():
        if layer.gate.expert_bias is not None:
            layer.gate.expert_bias.normal_(std=0.05)
    return model


def batches(device, count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (3, 11), generator=generator).to(device) for _ in range(count)]


def plain_importance(model: LingForCausalLM, by: str) -> dict[int, list[float]]:
    """A loop over tokens and choices, from what the routers returned in a forward of their own."""
    seen: dict[int, list] = {index: [] for index, _ in model.moe_layers()}
    handles = [
        layer.gate.register_forward_hook(
            lambda _, inputs, out, index=index: seen[index].append((inputs[0], out))
        )
        for index, layer in model.moe_layers()
    ]
    with torch.no_grad():
        for ids in batches(model.lm_head.weight.device):
            model(ids)
    for handle in handles:
        handle.remove()
    scores = {}
    for index, layer in model.moe_layers():
        scores[index] = [0.0] * layer.num_experts
        for x, routed in seen[index]:
            for t, k in itertools.product(*map(range, routed.indices.shape)):
                expert, weight = int(routed.indices[t, k]), routed.weights[t, k]
                pair = torch.tensor([[expert]], device=x.device, dtype=torch.int32)
                with torch.no_grad():
                    out = layer.experts(x[t : t + 1], torch.ones_like(weight).view(1, 1), pair)
                value = {"usage": 1.0, "gate-mass": weight, "output-norm": weight * out.norm()}
                scores[index][expert] += float(value[by])
    return scores


@pytest.mark.parametrize("by", CRITERIA)
@pytest.mark.parametrize("variant", VARIANTS)
def test_importance_is_that_of_a_plain_loop(variant, by, device):
    model = make(device, variant)
    found = expert_importance(model, batches(device), by=by)
    for index, expected in plain_importance(model, by).items():
        truth = torch.tensor(expected, device=device, dtype=torch.float64)
        torch.testing.assert_close(found[index], truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("by", CRITERIA)
def test_padding_counts_nowhere(by, device):
    """Two sequences, the second one cut: as each by itself, without what fills it up."""
    model = make(device)
    ids = batches(device)[0][:2]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 6:] = False
    found = expert_importance(model, [(ids, mask)], by=by)
    alone = expert_importance(model, [ids[:1], ids[1:, :6]], by=by)
    for index, scores in alone.items():
        torch.testing.assert_close(found[index], scores, rtol=1e-6, atol=1e-9)


def test_importance_leaves_no_trace(device):
    model = make(device).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expert_importance(model, iter(batches(device)))
    assert model.training and not any(m.gate._forward_hooks for _, m in model.moe_layers())
    for name, tensor in model.state_dict().items():
        assert_bitwise(tensor, before[name], name)


@given(
    groups=st.sampled_from([1, 2, 4]),
    size=st.integers(1, 6),
    share=st.floats(0.01, 1.0),
    data=st.data(),
)
def test_kept_experts_are_the_best_of_each_group(groups, size, share, data):
    values = st.lists(st.integers(0, 3), min_size=groups * size, max_size=groups * size)
    scores = torch.tensor(data.draw(values), dtype=torch.float64)
    count = pruned_count(groups * size, groups, share)
    kept = kept_experts(scores, count, groups).tolist()
    assert kept == sorted(set(kept)) and len(kept) == count and count % groups == 0
    for group in range(groups):
        members = list(range(group * size, (group + 1) * size))
        best = sorted(members, key=lambda e: (-scores[e], e))[: count // groups]
        assert sorted(best) == [e for e in kept if e in members]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_goes_with_its_expert(variant, device):
    model = make(device, variant)
    scores = {
        index: torch.rand(layer.num_experts, device=device) for index, layer in model.moe_layers()
    }
    before = {name: t.clone() for name, t in model.state_dict().items()}
    smaller = prune_experts(model, scores, keep=0.5)
    assert smaller.config.num_experts == 4 and model.config.num_experts == 8
    state = smaller.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in before.items():
        assert_bitwise(model.state_dict()[name], tensor, name)
        if ".experts." in name or ".gate." in name:
            layer = int(name.split(".")[2])
            tensor = tensor[kept_experts(scores[layer], 4, model.config.num_groups)]
        assert_bitwise(state[name], tensor, name)


def test_dropping_what_no_token_chooses_changes_nothing(device):
    """With selection biases that rule half of the experts out, logits stay up to rounding."""
    model = make(device)
    for _, layer in model.moe_layers():
        layer.gate.expert_bias[1::2] = -100.0
    scores = expert_importance(model, batches(device))
    assert all(int((s > 0).sum()) <= 4 for s in scores.values())
    smaller = prune_experts(model, scores, keep=0.5)
    with torch.no_grad():
        for ids in batches(device):
            torch.testing.assert_close(smaller(ids).logits, model(ids).logits)


def test_keeping_all_is_the_same_model(device):
    model = make(device, "groups")
    same = prune_experts(model, expert_importance(model, batches(device)), keep=1.0)
    assert same.config == model.config
    for name, tensor in same.state_dict().items():
        assert_bitwise(tensor, model.state_dict()[name], name)


def test_the_smaller_model_trains(device):
    model = make(device, "biases")
    scores = expert_importance(model, batches(device), by="gate-mass")
    smaller = prune_experts(model, scores, keep=0.25)
    smaller(batches(device)[0], labels=batches(device)[0]).loss.backward()
    assert all(p.requires_grad and p.grad is not None for p in smaller.parameters())


def test_it_is_written_and_read_like_any_other(tmp_path, device):
    pytest.importorskip("safetensors")
    model = make(device, num_shared_experts=1)
    smaller = prune_experts(model, expert_importance(model, batches(device)), keep=0.5)
    smaller.save_pretrained(tmp_path)
    again = LingForCausalLM.from_pretrained(tmp_path, device=device)
    assert again.config.num_experts == 4
    for name, tensor in again.state_dict().items():
        assert_bitwise(tensor, smaller.state_dict()[name], name)


def test_bad_arguments(device):
    model = make(device)
    with pytest.raises(ValueError, match="by: got 'size'"):
        expert_importance(model, batches(device), by="size")
    with pytest.raises(ValueError, match="batches: got none"):
        expert_importance(model, [])
    with pytest.raises(ValueError, match="model: got one without MoE layers"):
        expert_importance(make(device, first_k_dense_replace=3), batches(device))
    scores = expert_importance(model, batches(device))
    for keep in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="keep: got"):
            prune_experts(model, scores, keep=keep)
    first = min(scores)
    for wrong, message in (
        ({k: v for k, v in scores.items() if k != first}, f"importance: got none of layer {first}"),
        (scores | {first: scores[first][:4]}, r"has \(4,\) scores, need \(8,\)"),
        (scores | {first: scores[first] * torch.nan}, "all finite"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_experts(model, wrong, keep=0.5)
    with pytest.raises(ValueError, match=r"keep: 0\.1 leaves 1 experts per layer; num_experts_per"):
        prune_experts(model, scores, keep=0.1)


def test_adapters_come_off_first(device):
    model = make(device)
    scores = expert_importance(model, batches(device))
    add_lora(model, r=2)
    with pytest.raises(ValueError, match="model: has LoRA adapters"):
        prune_experts(model, scores, keep=0.5)


def test_modes_are_restored_one_by_one(device):
    model = make(device).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    expert_importance(model, batches(device))
    assert [module.training for module in model.modules()] == before
