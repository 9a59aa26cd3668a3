"""``add_lora`` and its fellows on Ling models: what trains, merging, files, and PEFT's own."""

from __future__ import annotations

import json

import pytest
import torch

from ling_ops.models import LingConfig, LingForCausalLM
from ling_ops.nn import (
    Experts,
    add_lora,
    load_lora,
    merge_lora,
    remove_lora,
    save_lora,
    unmerge_lora,
)
from ling_ops.nn.lora import adapters

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 8,
    "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "score_function": "sigmoid", "use_expert_bias": True, "init_std": 0.15,
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = [
    None, EXPERTS[:1], EXPERTS[1:], EXPERTS, ["down_proj"], ["query_key_value", "attention.dense"],
    [*EXPERTS, "query_key_value"],
]  # fmt: skip


def make(**changes) -> LingForCausalLM:
    torch.manual_seed(0)
    return LingForCausalLM(LingConfig(**{**SIZES, **changes}), dtype=torch.float64).eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(1))


def redraw(model: torch.nn.Module) -> None:
    """An adapter's B starts at zero, which would hide its A."""
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.b, std=0.2)


def test_the_adapted_weight_of_a_narrower_adapter_is_what_the_forward_applies():
    model = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False))
    add_lora(model, r=2, targets=["0"], dtype=torch.bfloat16)
    redraw(model)
    x = torch.randn(5, 16)
    weight = model[0].adapted_weight()
    assert weight.dtype == torch.float32
    torch.testing.assert_close(model(x), x @ weight.T)


@pytest.mark.parametrize("targets", TARGETS)
def test_a_merged_model_gives_the_same_logits(targets):
    model = make()
    plain = model(ids()).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = add_lora(model, r=3, alpha=6, targets=targets)
    assert names
    # A new adapter adds zeros; the sums around them may be cut otherwise.
    torch.testing.assert_close(model(ids()).logits, plain, rtol=1e-12, atol=1e-13)
    redraw(model)
    adapted = model(ids()).logits
    assert (adapted - plain).abs().max() > 1e-3
    merge_lora(model)
    merge_lora(model)
    torch.testing.assert_close(model(ids()).logits, adapted, rtol=1e-9, atol=1e-10)
    unmerge_lora(model)
    torch.testing.assert_close(model(ids()).logits, adapted, rtol=1e-9, atol=1e-10)
    merge_lora(model)
    remove_lora(model)
    torch.testing.assert_close(model(ids()).logits, adapted, rtol=1e-9, atol=1e-10)
    assert model.state_dict().keys() == state.keys()
    assert all(p.requires_grad for p in model.parameters())
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, state[n])}
    assert {n.removesuffix(".weight") for n in changed} == set(names)


def test_only_adapters_train_and_a_step_lowers_the_loss():
    model = make().train()
    add_lora(model, r=4, targets=[*EXPERTS, "query_key_value"])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for _, a in adapters(model) for p in (a.a, a.b)}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_adapters_of_16_bit_weights_are_fp32_and_merge_with_one_rounding():
    experts = Experts(4, 16, 8, init_std=0.3, dtype=torch.bfloat16)
    before = experts.gate_up_proj.detach().clone()
    add_lora(experts, r=2, alpha=2, targets=["gate_up_proj"])
    redraw(experts)
    ((_, adapter),) = adapters(experts)
    assert adapter.a.dtype == adapter.b.dtype == torch.float32
    merge_lora(experts)
    exact = (before.double() + adapter.b.double() @ adapter.a.double()).detach()
    error = (experts.gate_up_proj.double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-6).all()
    unmerge_lora(experts)
    assert ((experts.gate_up_proj - before).abs() <= 2**-7 * (exact.abs() + before.abs())).all()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_experts_with_biases_and_without_a_gate(activation):
    experts = Experts(4, 16, 8, activation=activation, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(experts.first_bias)
    add_lora(experts, r=2)
    redraw(experts)
    x, weights = torch.randn(9, 16, dtype=torch.float64), torch.rand(9, 2)
    indices = torch.randint(0, 4, (9, 2))
    adapted = experts(x, weights, indices)
    merge_lora(experts)
    torch.testing.assert_close(experts(x, weights, indices), adapted)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"targets": ["no_such"]}, "'no_such' names none of"),
        ({"targets": "down_proj"}, "need a list of names"),
        ({"targets": []}, "need a list of names"),
        ({"r": 0}, "r: got 0"),
        ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"alpha": "a"}, "alpha: got 'a', need a positive number"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"dropout": "0.1"}, "dropout: got '0.1', need a number"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(make(), **options)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"])
def test_adapters_are_in_what_can_be_computed_with(dtype, tmp_path):
    model = make()
    for add in (add_lora, lambda m, **options: load_lora(m, tmp_path, **options)):
        with pytest.raises(TypeError, match=r"dtype: got .*, need None or one of torch\.float64"):
            add(model, dtype=dtype)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_adapters_are_added_once():
    model = make()
    add_lora(model)
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(model)
    with pytest.raises(ValueError, match="there are no experts"):
        add_lora(torch.nn.Linear(2, 2))


class Watched(Experts):
    """Experts with a forward of their own."""


def test_experts_of_another_kind_are_refused_before_anything_changes():
    model = make()
    model.model.layers[2].mlp.experts.__class__ = Watched
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts is a Watched, need Experts"):
        add_lora(model)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_a_model_with_adapters_is_not_written_as_a_checkpoint(tmp_path):
    pytest.importorskip("safetensors")
    model = make()
    add_lora(model, r=3)
    redraw(model)
    for _ in range(2):  # then merged: the adapters are still there
        with pytest.raises(ValueError, match=r"has LoRA at .*: merge_lora and remove_lora come"):
            model.save_pretrained(tmp_path / "model")
        merge_lora(model)
    assert not (tmp_path / "model").exists()
    remove_lora(model)
    model.save_pretrained(tmp_path / "model")
    again = LingForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_a_merged_model_has_no_state_dict():
    """It would load as weights and an adapter, which adds the update a second time."""
    model, fresh = make(), make()
    for each in (model, fresh):
        add_lora(each, r=3, targets=EXPERTS)
    redraw(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_lora(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.lora\.gate_up_proj is merged"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="is merged, what is loaded is not: unmerge_lora comes"):
        model.load_state_dict(state)
    unmerge_lora(model)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(ids()).logits, model(ids()).logits)
    merge_lora(model)
    remove_lora(model)
    plain = make()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(ids()).logits, model(ids()).logits)


def test_a_normed_head_is_normed_with_its_adapter():
    """What a merged head does, and its gradient."""
    model = make(norm_head=True)
    add_lora(model, r=3, targets=["lm_head"])
    redraw(model)
    out = model(ids(), labels=ids())
    out.loss.backward()
    merge_lora(model)
    torch.testing.assert_close(model(ids()).logits, out.logits, rtol=1e-9, atol=1e-10)
    adapter, grad = model.lm_head.lora, model.lm_head.lora.b.grad[5, 1].item()
    losses = []
    for shift in (1e-5, -2e-5):
        unmerge_lora(model)
        with torch.no_grad():
            adapter.b[5, 1] += shift
        merge_lora(model)
        losses.append(model(ids(), labels=ids()).loss.item())
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(grad, rel=1e-5)


def test_a_wrapped_module_keeps_its_adapter(tmp_path):
    """fully_shard gives a module a class of its own."""
    model = make()
    names = add_lora(model, r=3, targets=["query_key_value"])
    attention = model.model.layers[0].attention.query_key_value
    attention.__class__ = type("Sharded", (type(attention),), {})
    assert [site.name for site, _ in adapters(model)] == names


# --- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("targets", TARGETS)
def test_round_trip_is_exact(targets, tmp_path):
    pytest.importorskip("safetensors")
    model = make()
    names = add_lora(model, r=3, alpha=6, targets=targets)
    redraw(model)
    save_lora(model, tmp_path)
    again = make()
    assert load_lora(again, tmp_path) == names
    assert torch.equal(again(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("targets", [None, ["gate_up_proj"]])
def test_experts_without_a_model_around_them(targets, tmp_path):
    pytest.importorskip("safetensors")
    experts, again = (Experts(4, 16, 8, init_std=0.3) for _ in range(2))
    names = add_lora(experts, r=2, targets=targets)
    redraw(experts)
    save_lora(experts, tmp_path)
    assert load_lora(again, tmp_path) == names
    for (_, mine), (_, read) in zip(adapters(experts), adapters(again), strict=True):
        assert torch.equal(mine.a, read.a) and torch.equal(mine.b, read.b)


def test_a_disk_that_refuses_is_an_os_error(tmp_path):
    pytest.importorskip("safetensors")
    model = make()
    add_lora(model, r=3)
    (tmp_path / ".writing-adapter_model.safetensors").mkdir()
    with pytest.raises(OSError):
        save_lora(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


def test_what_cannot_be_written_leaves_the_old_files(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    import safetensors.torch

    def fail(*_, **__):
        raise MemoryError

    model = make()
    add_lora(model, r=3)
    save_lora(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    redraw(model)
    monkeypatch.setattr(safetensors.torch, "save", fail)
    with pytest.raises(MemoryError):
        save_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_compiled_model_has_the_names_of_its_own(tmp_path):
    pytest.importorskip("safetensors")
    model, again = make(), make()
    names = add_lora(model, r=3, targets=["query_key_value"])
    save_lora(torch.compile(model, backend="eager"), tmp_path)
    assert load_lora(torch.compile(again, backend="eager"), tmp_path) == names


def test_a_dropout_out_of_range_is_refused_when_it_is_loaded(tmp_path):
    saved(tmp_path)
    model = make()
    with pytest.raises(ValueError, match=r"dropout: got 2\.0, need a number >= 0 and < 1"):
        load_lora(model, tmp_path, dropout=2.0)
    assert not adapters(model)


def saved(tmp_path):
    pytest.importorskip("safetensors")
    model = make()
    add_lora(model, r=3, targets=EXPERTS)
    save_lora(model, tmp_path)
    return tmp_path / "adapter_config.json"


@pytest.mark.parametrize(
    "change,message",
    [
        ({"use_dora": True}, "use_dora: got True, need False"),
        ({"peft_type": "IA3"}, "need 'LORA'"),
        ({"r": 5}, r"lora_A.weight is \[24, 32\], need \[40, 32\]"),
        ({"target_parameters": ["experts.down_proj"]}, "base_layer.lora_A.weight is unexpected"),
        ({"rank_pattern": {"x": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', need True"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens: got \[3\], need None"),
        ({"use_qalora": True}, "use_qalora: got True, need False"),
        ({"lora_alpha": "8"}, "lora_alpha: got '8', need a number"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change, message, tmp_path):
    config = saved(tmp_path)
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    model = make()
    with pytest.raises(ValueError, match=message):
        load_lora(model, tmp_path)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_missing_and_damaged_files(tmp_path):
    config = saved(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_lora(make(), tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        load_lora(make(), tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        load_lora(make(), tmp_path)
    with pytest.raises(ValueError, match="0 kinds"):
        save_lora(make(), tmp_path)
