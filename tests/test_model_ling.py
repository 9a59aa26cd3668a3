"""``LingForCausalLM``: loss, masks, recomputation, replay, dtypes, compilation, state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from ling_ops.models import LingConfig, LingForCausalLM, next_token_loss
from ling_ops.nn import router_losses

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8,
    "num_experts_per_token": 2, "num_shared_experts": 1, "layer_pattern": "1-2-1-2",
    "score_function": "sigmoid", "use_expert_bias": True, "num_groups": 4, "topk_groups": 2,
    "routed_scaling_factor": 2.5, "init_std": None,
}  # fmt: skip


def make(device, dtype=None, **changes) -> LingForCausalLM:
    return LingForCausalLM(LingConfig(**{**SMALL, **changes}), device=device, dtype=dtype)


def ids(device, batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (batch, length), device=device)


def test_loss_is_the_shifted_cross_entropy(device):
    model, x = make(device), ids(device)
    output = model(x, labels=x)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    labels = x.clone()
    labels[:, :6] = -100
    expected = F.cross_entropy(output.logits[:, 5:-1].flatten(0, 1), x[:, 6:].flatten())
    torch.testing.assert_close(model(x, labels=labels).loss, expected)


def test_loss_of_nothing_is_zero(device):
    logits = torch.randn(2, 1, 5, device=device, requires_grad=True)
    loss = next_token_loss(logits, torch.zeros(2, 1, dtype=torch.long, device=device))
    loss.backward()
    assert loss == 0 and logits.grad.eq(0).all()


def test_a_token_sees_only_the_past(device):
    model, x = make(device, torch.float64).eval(), ids(device)
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SMALL["vocab_size"]
    before, after = model(x).logits, model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(side, device):
    model, x = make(device, torch.float64).eval(), ids(device)
    mask = torch.ones_like(x, dtype=torch.bool)
    real = slice(5, None) if side == "left" else slice(0, 7)
    mask[0] = False
    mask[0, real] = True
    padded = model(x, labels=x, token_mask=mask)
    alone = [model(x[:1, real]).logits, model(x[1:]).logits]
    torch.testing.assert_close(padded.logits[:1, real], alone[0])
    torch.testing.assert_close(padded.logits[1:], alone[1])
    assert padded.logits.isfinite().all()
    targets = torch.cat([x[0, real][1:], x[1, 1:]])
    chosen = torch.cat([alone[0][0, :-1], alone[1][0, :-1]])
    torch.testing.assert_close(padded.loss, F.cross_entropy(chosen, targets))


def test_learns(device):
    model = make(device, z_loss_coefficient=1e-4, balance_coefficient=1e-2)
    x = ids(device, 4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_expert_biases()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(40)) < 1.0 and losses[-1] < 0.5 * losses[0]
    assert set(router_losses(model)) == {"z_loss", "balance"}
    biases = [moe.gate.expert_bias for _, moe in model.moe_layers()]
    assert len(biases) == 2 and all(bias.abs().max() > 0 for bias in biases)


@pytest.mark.parametrize("capacity", ["dropless", "fixed", "dynamic"])
def test_recomputation_changes_no_gradient_and_no_count(capacity, device):
    options = {"capacity": capacity, "router_jitter": 0.1, "balance_coefficient": 0.1}
    plain, recomputing = make(device, **options), make(device, **options)
    recomputing.load_state_dict(plain.state_dict())
    recomputing.activation_checkpointing = True
    x = ids(device)
    for model in (plain, recomputing):
        torch.manual_seed(1)
        model(x, labels=x).loss.backward()
        model.update_expert_biases()
    named = zip(plain.named_parameters(), recomputing.parameters(), strict=True)
    tolerance = 0.0 if device.type == "cpu" else 1e-5  # scatter-adds of the fp32 path on a GPU
    for (_, mine), theirs in named:
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    for (_, mine), (_, theirs) in zip(plain.moe_layers(), recomputing.moe_layers(), strict=True):
        assert torch.equal(mine.gate.expert_bias, theirs.gate.expert_bias)


def test_replay_repeats_a_routing(device):
    model, x = make(device, router_jitter=0.3), ids(device)
    model(x)
    routing = [moe.last_indices for _, moe in model.moe_layers()]
    model.eval()
    replayed = model(x, replay_indices=routing).logits
    free = model(x).logits
    assert not torch.equal(replayed, free)  # the jitter had moved some tokens
    for (_, moe), indices in zip(model.moe_layers(), routing, strict=True):
        moe.gate.expert_bias.normal_()
        assert indices.shape == (24, 2)
    assert torch.equal(model(x, replay_indices=routing).logits, replayed)


@pytest.mark.parametrize("family", ["swiglu", "article"])
def test_every_parameter_gets_a_gradient(family, device):
    changes = {}
    if family == "article":
        changes = {
            "activation": "gelu", "mlp_bias": True, "router_bias": True, "use_qk_norm": False,
            "score_function": "softmax", "renormalize": False, "num_groups": 1, "topk_groups": 1,
            "use_expert_bias": False,
        }  # fmt: skip
    model, x = make(device, **changes), ids(device, 4, 32)
    model(x, labels=x).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_autocast(device):
    model, x = make(device), ids(device)
    exact = model(x, labels=x)
    with torch.autocast(device.type, torch.bfloat16):
        output = model(x, labels=x)
    assert output.loss.dtype == torch.float32
    assert abs(output.loss.item() - exact.loss.item()) < 0.05
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bf16_model(device):
    model, x = make(device, torch.bfloat16), ids(device)
    output = model(x, labels=x)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert all(moe.gate.expert_bias.dtype == torch.float32 for _, moe in model.moe_layers())


def test_full_graph_compilation(device):
    model, x = make(device), ids(device)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    output, expected = compiled(x, labels=x), model(x, labels=x)
    torch.testing.assert_close(output.logits, expected.logits)
    output.loss.backward()
    expected.loss.backward()
    for mine, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_state_dict_round_trip(device):
    model, x = make(device, capacity="dynamic", capacity_mode="running"), ids(device)
    model(x, labels=x).loss.backward()
    model.update_expert_biases()
    other = make(device, capacity="dynamic", capacity_mode="running")
    other.load_state_dict(model.state_dict())
    model.eval()
    other.eval()
    assert torch.equal(other(x).logits, model(x).logits)


def test_meta_model_can_be_materialised(device):
    model = make("meta", capacity="dynamic", capacity_mode="running")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device=device).reset_parameters()
    loss = model(x := ids(device), labels=x).loss
    assert abs(loss.item() - math.log(40)) < 1.0


def test_same_seed_same_model(device):
    torch.manual_seed(7)
    first = make(device)
    torch.manual_seed(7)
    second = make(device)
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_initialisation_follows_the_config(device):
    model = make(device, init_std=0.05, hidden_size=128)
    for name in ("model.word_embeddings", "model.layers.0.attention.dense", "lm_head"):
        assert abs(model.get_submodule(name).weight.std().item() / 0.05 - 1) < 0.1
    assert model.model.norm.weight.eq(1).all()
    model = make(device, init_std=None, hidden_size=128)
    assert abs(model.model.word_embeddings.weight.std().item() - 1) < 0.1
    assert abs(model.lm_head.weight.std().item() * 128**0.5 - 1) < 0.1


def test_bad_input(device):
    model, x = make(device), ids(device)
    with pytest.raises(ValueError, match=r"input_ids: got shape \(12,\), need \[B, S\]"):
        model(x[0])
    with pytest.raises(TypeError, match=r"input_ids: got dtype torch\.float32"):
        model(x.float())
    with pytest.raises(ValueError, match="labels: got shape"):
        model(x, labels=x[:, 1:])
    with pytest.raises(ValueError, match=r"token_mask: got torch\.int64"):
        model(x, token_mask=torch.ones_like(x))
    with pytest.raises(ValueError, match="replay_indices: got 1 tensors, need 2"):
        model(x, replay_indices=[x])
    with pytest.raises(ValueError, match="last_logits_only: got True, need False with labels"):
        model(x, labels=x, last_logits_only=True)
