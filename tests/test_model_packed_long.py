"""Generation as it is used: long texts, half precision, graph replays, devices, threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from test_model_packed import ids, make, teacher

import ling_ops as lo
from ling_ops.models import LingConfig, LingForCausalLM, generation
from ling_ops.models.packed import PackedModel


@pytest.fixture
def preset(device):
    def build(name: str, dtype: torch.dtype, **changes) -> LingForCausalLM:
        torch.manual_seed(0)
        config = LingConfig.preset(name, **changes)
        return LingForCausalLM(config, device=device, dtype=dtype).eval()

    return build


def close_calls(model: LingForCausalLM, text: torch.Tensor) -> torch.Tensor:
    """Positions of a text after which groups, experts or the next token change in float64 where
    logits move by 1e-5: twice what fp32's rounding does to those of `small`, 5e-6 of a spread of 1.
    """
    exact, near = copy.deepcopy(model).double(), torch.zeros_like(text, dtype=torch.bool)

    def watch(gate, _, routed):
        for _ in range(32):
            moved = routed.logits + 1e-5 * torch.randn_like(routed.logits).sign()
            ids = gate._choose(moved, {"sequence_length": None, "token_mask": None})[1]
            near.logical_or_((ids.sort(1)[0] != routed.indices.sort(1)[0]).any(1))

    for _, moe in exact.moe_layers():
        moe.gate.register_forward_hook(watch)
    with torch.no_grad(), lo.use_backend("reference"):
        best = exact(text[None]).logits[0].topk(2)[0]
    return near | (best[:, 0] - best[:, 1] < 2e-5)


LONG = [("tiny", 200), pytest.param("small", 2000, marks=pytest.mark.cuda)]


@pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")
@pytest.mark.parametrize("name,tokens", LONG)
def test_long_texts_are_the_reference_s(name, tokens, preset, device):
    """Token for token, in float64: in fp32 some of so many choices are ties."""
    model = preset(name, torch.float64)
    text = model.generate(torch.randint(0, 256, (1, 16), device=device), max_new_tokens=tokens)[0]
    assert torch.equal(teacher(model, text[:16], text[16:]), text[16:])


@pytest.mark.parametrize("name,tokens", LONG)
def test_texts_in_fp32_are_the_reference_s_up_to_the_first_tie(name, tokens, preset, device):
    model, compared = preset(name, torch.float32), 0
    prompts = torch.randint(0, 256, (tokens // 50, 16), device=device)
    for text in model.generate(prompts, max_new_tokens=100):
        ties = close_calls(model, text[:-1]).nonzero()
        clear = int(ties[0]) if len(ties) else len(text) - 1  # tokens before the first tie
        new = max(clear - 15, 0)
        wanted = teacher(model, text[:16], text[16:])
        assert torch.equal(wanted[:new], text[16 : 16 + new])
        compared += new
    assert compared >= tokens, f"ties left only {compared} tokens to compare"


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 5, 80])
def test_replays_are_the_eager_steps(batch, preset, device, monkeypatch):
    """Bitwise: the graph against eager steps, with prompts of several lengths."""
    model = preset("small", torch.bfloat16)
    mask = torch.ones(batch, 20, dtype=torch.bool, device=device)
    mask[::2, :7] = False
    x = torch.randint(0, 256, (batch, 20), device=device)
    replayed = model.generate(x, max_new_tokens=60, token_mask=mask)
    engine = PackedModel(model, batch, 30)
    with torch.no_grad():
        engine.prefill(*generation.pack(x, mask))
        engine.step(x[:, 0], more=True)
    assert engine._graph is not None
    monkeypatch.setattr(generation, "WORTH_A_GRAPH", 1000)
    assert torch.equal(model.generate(x, max_new_tokens=60, token_mask=mask), replayed)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype, preset, device):
    """The flash path against the model without a cache, on the same weights.

    Every token takes all experts: a choice that rounding turns would be all that is seen.
    """
    every = {"num_experts": 16, "num_experts_per_token": 16, "num_groups": 1, "topk_groups": 1}
    model = preset("small", dtype, **every)
    lengths, engine = [300, 1, 77], PackedModel(model, 3, 310)
    x, more = torch.randint(0, 256, (3, 300), device=device), torch.randint(0, 256, (3, 10))
    more = more.to(device)
    with torch.no_grad():
        got = [engine.prefill(torch.cat([x[b, :n] for b, n in enumerate(lengths)]), lengths)]
        got += [engine.step(column, more=True).clone() for column in more.unbind(1)]
        wide = preset("small", torch.float32, **every)
        wide.load_state_dict(model.state_dict())
        for b, n in enumerate(lengths):
            tokens = torch.cat([x[b, :n], more[b]])[None]
            truth = wide(tokens).logits[0, n - 1 :]
            error = (torch.stack([step[b] for step in got]).float() - truth).norm()
            plain = (model(tokens).logits[0, n - 1 :].float() - truth).norm()
            assert error <= 1.5 * plain + 1e-3 * truth.norm()


@pytest.mark.cuda
def test_steps_without_flash_attention_see_every_key(device):
    """Heads of 12 elements: what attention reads there grows step by step, unlike a graph."""
    model, x = make(device, torch.bfloat16, head_dim=12), ids(device, 2, 5)
    steps = []
    for more in (False, True):
        engine = PackedModel(model, 2, 60)
        with torch.no_grad():
            engine.prefill(x.flatten(), [5, 5])
            steps.append(torch.stack([engine.step(x[:, 0], more=more).clone() for _ in range(40)]))
    assert torch.equal(*steps)


@pytest.mark.cuda
def test_another_device_than_the_current_one(preset):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = preset("small", torch.bfloat16)
    x = torch.randint(0, 256, (2, 20), device="cuda:0")
    texts = []
    for name in ("cuda:0", "cuda:1", "cuda:0"):
        seen = []
        out = model.to(name).generate(x.to(name), max_new_tokens=60, streamer=seen.append)
        assert torch.equal(torch.stack(seen, dim=1), out[:, 20:].cpu())
        texts.append(out.cpu())
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


@pytest.mark.cuda
def test_other_threads_may_pin_memory_meanwhile(preset, device):
    """As a data loader's do; a capture must not forbid it them."""
    model, stop = preset("small", torch.bfloat16), threading.Event()
    x = torch.randint(0, 256, (1, 20), device=device)
    expected, failures = model.generate(x, max_new_tokens=30), []

    def pin() -> None:
        kept = []
        while not stop.is_set():
            try:
                kept.append(torch.empty(2**12 * (1 + len(kept) % 64), pin_memory=True))
            except RuntimeError as error:
                failures.append(error)
                return
            if len(kept) == 512:
                kept.clear()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for _ in range(5):
            assert torch.equal(model.generate(x, max_new_tokens=30), expected)
    finally:
        stop.set()
        thread.join()
    assert not failures
