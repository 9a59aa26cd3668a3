"""Whole models of transformers on ling_ops against their own eager experts."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="5.8")
import transformers
from tolerances import LAYER_ROUNDINGS, assert_bitwise, assert_within, unit_roundoff
from transformers_models import FAMILIES, all_experts, build, experts_of

import ling_ops
import ling_ops.integrations.transformers as integration
from ling_ops.ops import _backend

pytestmark = pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")

FUSED = {"nemotron_h": "relu2", "gpt_oss": None}


def tokens(device: torch.device, length: int = 23) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, 64, (2, length), generator=generator).to(device)


def weighting_of(logits: torch.Tensor) -> torch.Tensor:
    """Weights of an objective, the same numbers in every dtype from bf16 on."""
    weighting = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    return weighting.bfloat16().to(logits)


def results(model, input_ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Logits, and the gradients of all parameters for a fixed weighting of the logits."""
    logits = model(input_ids, use_cache=False).logits
    names, parameters = zip(*model.named_parameters(), strict=True)
    objective = (logits * weighting_of(logits)).sum()
    grads = torch.autograd.grad(objective, parameters, allow_unused=True)
    return {"logits": logits.detach(), **dict(zip(names, grads, strict=True))}


def assert_agrees(actual: dict, exact: dict, naive: dict, layers: int) -> None:
    for name, truth in exact.items():
        if truth is None:
            assert actual[name] is None and naive[name] is None, name
            continue
        assert_within(
            actual[name], truth, naive=naive[name], roundings=LAYER_ROUNDINGS * layers, name=name
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_all_gradients_agree(family, device, monkeypatch):
    model = build(family, "eager").to(device)
    input_ids = tokens(device)
    naive = results(model, input_ids)
    exact = results(copy.deepcopy(model).double(), input_ids)
    calls = []
    recognize = integration._recognize
    monkeypatch.setattr(integration, "_recognize", lambda m: calls.append(m) or recognize(m))
    model.set_experts_implementation("ling_ops")
    actual = results(model, input_ids)
    layers = sum(1 for module in model.modules() if hasattr(module, "is_concatenated"))
    assert len(calls) == layers > 0
    assert_agrees(actual, exact, naive, model.config.num_hidden_layers)
    experts = next(n for n, grad in exact.items() if "experts" in n and "down_proj" in n)
    assert exact[experts].abs().max() > 1e-2  # the experts are seen in the objective


def assert_as_good(actual: dict, exact: dict, naive: dict, layers: int) -> None:
    """In the norm of a tensor: at most twice eager's error, and what rounding alone may add.

    Both are samples of the same roundings in another order, and a norm over a tensor scatters far
    less than its largest element. Roundings have independent signs, so that n of them add up to
    sqrt(n); they rule where eager's error is small by luck.
    """
    for name, truth in exact.items():
        if truth is None:
            assert actual[name] is None and naive[name] is None, name
            continue
        assert actual[name].dtype == naive[name].dtype, name
        error, usual = (float((found[name].double() - truth).norm()) for found in (actual, naive))
        rounding = math.sqrt(LAYER_ROUNDINGS * layers) * unit_roundoff(torch.bfloat16)
        bound = 2 * usual + rounding * float(truth.norm())
        told = f"error {error:.3g}, eager's {usual:.3g}, allowed {bound:.3g}"
        assert error <= bound, f"{name}: {told}"


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_models_are_as_good_as_eager_ones(family, device, monkeypatch):
    """In the kernels' dtype and sizes: a GPU that has the kernels must run them.

    Every token takes all experts, so that a rounding cannot flip a choice.
    """
    model = build(family, "eager", dtype=torch.bfloat16, **all_experts(family)).to(device)
    input_ids = tokens(device)
    naive = results(model, input_ids)
    exact = results(copy.deepcopy(model).double(), input_ids)
    assert experts_of(model).down_proj.dtype == torch.bfloat16
    fallbacks = set()
    monkeypatch.setattr(_backend, "_warned", fallbacks)  # else each is told once per process
    model.set_experts_implementation("ling_ops")
    actual = results(model, input_ids)
    assert_as_good(actual, exact, naive, model.config.num_hidden_layers)
    if ling_ops.backend_info()["ops"]["moe_mlp"]["backend"] == "cuda":
        assert not fallbacks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kind_of_path_is_the_expected_one(family):
    integration.register("another_name")
    renamed = integration.explain(build(family, "another_name"))
    assert renamed and all(how["active"] for how in renamed.values())
    told = integration.explain(build(family, "ling_ops"))
    assert told and all(
        entry["activation"] == FUSED.get(family, "swiglu") and entry["active"]
        for entry in told.values()
    )
    assert all(bool(entry["reason"]) == (entry["activation"] is None) for entry in told.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_gives_the_same_tokens(family, device):
    model = build(family, "eager").to(device)
    prompt = tokens(device, 5)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, **arguments)
    model.set_experts_implementation("ling_ops")
    assert torch.equal(model.generate(prompt, **arguments), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_bit(family, device):
    model = build(family, "ling_ops").to(device).train()
    plain = results(model, tokens(device))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, grad in results(model, tokens(device)).items():
        assert_bitwise(grad, plain[name], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_compiles_without_a_break(family, device):
    model = build(family, "ling_ops").to(device)
    plain = results(model, tokens(device))
    torch._dynamo.reset()
    # What recognizes an activation must also work when the first call is a traced one.
    integration_cache().cache_clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    logits = compiled(tokens(device), use_cache=False).logits
    (logits * weighting_of(logits)).sum().backward()
    assert_within(logits, plain["logits"].double(), roundings=LAYER_ROUNDINGS * 2, name="logits")
    for name, parameter in model.named_parameters():
        if plain[name] is not None:
            assert_within(
                parameter.grad, plain[name].double(), roundings=LAYER_ROUNDINGS * 2, name=name
            )


def integration_cache():
    from ling_ops.integrations import _activations

    return _activations._compare


def test_a_few_training_steps_stay_together(device):
    losses = {}
    for implementation in ("eager", "ling_ops"):
        model = build("olmoe", implementation).to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses[implementation] = []
        for _ in range(4):
            loss = model(tokens(device), labels=tokens(device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[implementation].append(loss.item())
    assert losses["ling_ops"] == pytest.approx(losses["eager"], rel=1e-5)
    assert losses["ling_ops"][-1] < losses["ling_ops"][0]


def test_the_name_works_wherever_transformers_takes_one(tmp_path, device):
    model = build("mixtral", "eager").to(device)
    expected = model(tokens(device)).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="ling_ops"
    ).to(device)
    assert loaded.config._experts_implementation == "ling_ops"
    torch.testing.assert_close(loaded(tokens(device)).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="ling_ops"):  # transformers lists what it knows
        loaded.set_experts_implementation("no_such_thing")


def test_another_name_can_be_registered():
    integration.register("another_name")
    model = build("mixtral", "another_name")
    assert experts_of(model).config._experts_implementation == "another_name"
    model(tokens(torch.device("cpu")))


def test_missing_or_old_transformers_is_named(monkeypatch):
    from transformers.integrations import moe

    with monkeypatch.context() as patch:
        patch.setattr(moe, "use_experts_implementation", lambda experts_class=None: experts_class)
        with pytest.raises(ImportError, match=r"5\.8 or later.*ling-ops\[hf\]"):
            integration.register()
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match=r"5\.8 or later.*ling-ops\[hf\]"):
        integration.register()
