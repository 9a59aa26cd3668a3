"""PEFT itself: its files and ours, and its ``target_parameters`` on ling_ops's experts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5.8")
import peft
from test_model_transformers import SIZES, mapped, theirs
from transformers_models import build

import ling_ops.integrations.transformers  # noqa: F401
from ling_ops.models import LingConfig, LingForCausalLM
from ling_ops.nn import add_lora, load_lora, save_lora
from ling_ops.nn.lora import adapters

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore")


def pair() -> tuple[LingForCausalLM, torch.nn.Module]:
    """The same weights as a Ling model and as transformers' GLM-4-MoE."""
    torch.manual_seed(0)
    model = LingForCausalLM(LingConfig(**SIZES)).eval()
    peer = theirs(model.config)
    peer.load_state_dict(mapped(model))
    return model, peer


def tokens(vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(1, vocabulary, (2, 19), generator=torch.Generator().manual_seed(2))


def redraw(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:], [*EXPERTS, "lm_head"]])
def test_peft_reads_our_files(targets, tmp_path):
    model, peer = pair()
    plain = model(tokens()).logits
    add_lora(model, r=4, alpha=8, targets=targets)
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.b, std=0.1)
    save_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(peer, tmp_path).eval()
    with torch.no_grad():
        mine, expected = model(tokens()).logits, loaded(input_ids=tokens()).logits
    assert (mine - plain).abs().max() > 1e-2
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-5)


def test_peft_reads_our_files_onto_our_model(tmp_path):
    model, _ = pair()
    base = LingForCausalLM(model.config).eval()
    base.load_state_dict(model.state_dict())
    add_lora(model, r=4, alpha=8, targets=[*EXPERTS, "query_key_value"])
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.b, std=0.1)
    save_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        mine, expected = model(tokens()).logits, loaded(tokens()).logits
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_we_read_peft_files(targets, rank_stabilised, tmp_path):
    model, peer = pair()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["lm_head"], target_parameters=targets,
        use_rslora=rank_stabilised,
    )  # fmt: skip
    wrapped = peft.get_peft_model(peer, config).eval()
    redraw(wrapped)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    names = load_lora(model, tmp_path)
    assert len(names) == 3 * len(targets) + 1
    with torch.no_grad():
        mine, expected = model(tokens()).logits, wrapped(input_ids=tokens()).logits
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_target_parameters_on_our_experts(family):
    """Logits and the adapters' gradients are those of the model's own eager experts."""
    found = {}
    for implementation in ("eager", "ling_ops"):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS)
        torch.manual_seed(0)
        model = peft.get_peft_model(build(family, implementation), config).train()
        torch.manual_seed(3)
        redraw(model)
        logits = model(tokens(64), use_cache=False).logits
        weighting = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
        (logits * weighting).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert grads and all("lora_" in name for name in grads)
        found[implementation] = {"logits": logits.detach(), **grads}
    for name, exact in found["eager"].items():
        scale = exact.abs().max()
        assert scale > 0
        error = (found["ling_ops"][name] - exact).abs().max()
        assert error <= 1e-5 * scale, name
