"""Generation over the static cache equals the model without any cache, whatever shares a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model_generate import SMALL

import ling_ops as lo
from ling_ops.models import LingConfig, LingForCausalLM, generation, packed
from ling_ops.models.packed import PackedModel

VARIANTS = {
    "grouped": {},
    "plain": {"use_qk_norm": False, "norm_head": True, "mlp_bias": True, "num_shared_experts": 2},
    "whole": {"num_kv_heads": 4, "partial_rotary_factor": 1.0, "num_shared_experts": 1},
    "unrotated": {"partial_rotary_factor": 0.0},
}


def make(device, dtype=torch.float64, **changes) -> LingForCausalLM:
    torch.manual_seed(0)
    model = LingForCausalLM(LingConfig(**{**SMALL, **changes}), device=device, dtype=dtype)
    with torch.no_grad():  # norms at one would hide which weight belongs to which head
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def ids(device, *shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, device=device)


def ragged(device, lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded prompts and their mask; "left", "right", or "mixed" by turns."""
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool, device=device)
    for row, length in enumerate(lengths):
        right = side == "right" or (side == "mixed" and row % 2)
        mask[row, slice(0, length) if right else slice(longest - length, longest)] = True
    return ids(device, len(lengths), longest), mask


def teacher(model: LingForCausalLM, prompt: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The reference's greedy choices along a text, from one forward without a cache."""
    whole = torch.cat([prompt, text])
    with torch.no_grad(), lo.use_backend("reference"):
        logits = model(whole[None, :-1]).logits[0]
    return logits[len(prompt) - 1 :].argmax(-1)


@pytest.mark.parametrize("chunk", [3, 5, 4096])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_without_a_cache(variant, chunk, device, monkeypatch):
    monkeypatch.setattr(packed, "CHUNK", chunk)
    model, lengths = make(device, **VARIANTS[variant]), [7, 1, 4]
    x, more = ids(device, 3, 7), ids(device, 3, 4)
    engine = PackedModel(model, 3, 7 + 4)
    with torch.no_grad():
        prompts = torch.cat([x[b, :n] for b, n in enumerate(lengths)])
        got = [engine.prefill(prompts, lengths)]
        got += [engine.step(column, more=False).clone() for column in more.unbind(1)]
        for b, n in enumerate(lengths):
            whole = model(torch.cat([x[b, :n], more[b]])[None]).logits[0, n - 1 :]
            torch.testing.assert_close(torch.stack([step[b] for step in got]), whole)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right", "mixed"]),
    data=st.data(),
)
def test_a_sequence_does_not_see_its_batch(lengths, side, data, device):
    model = make(device)
    x, mask = ragged(device, lengths, side)
    eos = data.draw(st.one_of(st.none(), st.integers(0, SMALL["vocab_size"] - 1)))
    out = model.generate(x, max_new_tokens=6, token_mask=mask, eos_token_id=eos)
    new = out[:, x.shape[1] :]
    for row in range(len(lengths)):
        alone = model.generate(x[row][mask[row]][None], max_new_tokens=6, eos_token_id=eos)
        alone = alone[0, lengths[row] :]
        assert torch.equal(new[row, : len(alone)], alone)
        assert eos is None or bool((new[row, len(alone) :] == eos).all())


def test_ended_sequences_take_no_capacity(device):
    """Four times the same token, and room for one: the last finds it if the others have ended."""
    model = make(device, capacity="fixed", capacity_factor=0.5)
    same = ids(device, 1).expand(4)
    rates = []
    for active in (4, 1):
        engine = PackedModel(model, 4, 6)
        with torch.no_grad():
            engine.prefill(same, [1] * 4)
            engine.active[: 4 - active] = False
            engine.step(same, more=False)
        rates.append([float(moe.stats()["drop_rate"]) for _, moe in model.moe_layers()])
    assert min(rates[0]) > 0 and max(rates[1]) == 0


def test_long_text_is_the_reference_s(device):
    model = make(device, torch.float32)
    x = ids(device, 2, 5)
    out = model.generate(x, max_new_tokens=300)
    for row in out:
        assert torch.equal(teacher(model, row[:5], row[5:]), row[5:])


def test_streaming_is_read_in_step(device):
    """Every token reaches the streamer, on the host, also where the run ends early."""
    model, x, seen = make(device), ids(device, 2, 4), []
    free = model.generate(x, max_new_tokens=9)
    assert seen == []
    eos = int(free[0, 6])
    out = model.generate(x[:1], max_new_tokens=9, eos_token_id=eos, streamer=seen.append)
    assert all(tokens.device.type == "cpu" and tokens.shape == (1,) for tokens in seen)
    assert torch.equal(torch.stack(seen, dim=1), out[:, 4:].cpu())
    assert int(seen[-1]) == eos and len(seen) == out.shape[1] - 4 <= 3


def test_a_streamer_s_error_leaves_the_model_as_it_was(device):
    model = make(device).train()

    def fail(_) -> None:
        raise RuntimeError("no paper")

    with pytest.raises(RuntimeError, match="no paper"):
        model.generate(ids(device, 1, 3), max_new_tokens=4, streamer=fail)
    assert model.training


def test_masks_that_do_not_fit(device):
    model, x = make(device), ids(device, 2, 4)
    with pytest.raises(ValueError, match=r"token_mask: got torch\.bool \(2, 3\)"):
        model.generate(x, max_new_tokens=1, token_mask=torch.ones_like(x[:, :3]).bool())
    with pytest.raises(TypeError, match=r"input_ids: got dtype torch\.float64"):
        model.generate(x.double(), max_new_tokens=1)


def test_hooks_and_other_layers_are_kept(device):
    """What was put in place of a linear layer, or hooked to it, takes part in generation."""
    model, x = make(device, num_shared_experts=1), ids(device, 2, 4)
    calls = []
    dense = model.model.layers[1].attention.dense
    dense.register_forward_hook(lambda module, args, out: calls.append(1) or out * 0.5)
    out = model.generate(x, max_new_tokens=5)
    for row in out:
        assert torch.equal(teacher(model, row[:4], row[4:]), row[4:])
    assert calls


@pytest.fixture
def preset(device):
    def build(name: str, dtype: torch.dtype, **changes) -> LingForCausalLM:
        torch.manual_seed(0)
        config = LingConfig.preset(name, **changes)
        return LingForCausalLM(config, device=device, dtype=dtype).eval()

    return build


@pytest.mark.cuda
def test_two_thousand_tokens_are_the_reference_s(preset, device):
    model = preset("small", torch.float32)
    prompt = torch.randint(0, 256, (1, 16), device=device)
    text = model.generate(prompt, max_new_tokens=2000)[0]
    assert torch.equal(teacher(model, text[:16], text[16:]), text[16:])


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
def test_half_precision_logits(preset, device):
    """The flash path against the model without a cache, on the same weights."""
    model = preset("small", torch.bfloat16)
    lengths, engine = [300, 1, 77], PackedModel(model, 3, 310)
    x, more = torch.randint(0, 256, (3, 300), device=device), torch.randint(0, 256, (3, 10))
    more = more.to(device)
    with torch.no_grad():
        got = [engine.prefill(torch.cat([x[b, :n] for b, n in enumerate(lengths)]), lengths)]
        got += [engine.step(column, more=True).clone() for column in more.unbind(1)]
        wide = preset("small", torch.float32)
        wide.load_state_dict(model.state_dict())
        for b, n in enumerate(lengths):
            tokens = torch.cat([x[b, :n], more[b]])[None]
            truth = wide(tokens).logits[0, n - 1 :]
            error = (torch.stack([step[b] for step in got]).float() - truth).norm()
            plain = (model(tokens).logits[0, n - 1 :].float() - truth).norm()
            assert error <= 1.5 * plain + 0.01 * truth.norm()
