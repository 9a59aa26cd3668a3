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
from ling_ops.models.whole import WholeModel, runs_whole

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


@pytest.mark.parametrize("chunk", [3, 5, 4096, None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_without_a_cache(variant, chunk, device, monkeypatch):
    monkeypatch.setattr(packed, "CHUNK", chunk)
    model, lengths = make(device, **VARIANTS[variant]), [7, 1, 4]
    x, more = ids(device, 3, 7), ids(device, 3, 4)
    engine = (WholeModel if chunk is None else PackedModel)(model, 3, 7 + 4)
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


@pytest.mark.parametrize("kind", [PackedModel, WholeModel])
def test_ended_sequences_take_no_capacity(kind, device):
    """Four times the same token, and room for one: the last finds it if the others have ended."""
    model = make(device, capacity="fixed", capacity_factor=0.5)
    same = ids(device, 1).expand(4)
    rates = []
    for active in (4, 1):
        engine = kind(model, 4, 6)
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


class Lagging(generation._Reader):
    """Reads as on a GPU: once the next step is queued."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.lags, self.copied = True, self

    def put(self, tokens: torch.Tensor) -> None:
        self.host = tokens.to("cpu", copy=True)

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("new", [1, 2, 9])
@pytest.mark.parametrize("ends", [False, True])
def test_reading_behind_the_next_step_changes_nothing(ends, new, device, monkeypatch):
    model, x = make(device), ids(device, 2, 4)
    eos = int(model.generate(x, max_new_tokens=9)[0, 6]) if ends else None
    found = []
    for reader in (generation._Reader, Lagging):
        monkeypatch.setattr(generation, "_Reader", reader)
        for batch in (x, x[:1]):
            seen = []
            options = {"eos_token_id": eos, "streamer": seen.append}
            out = model.generate(batch, max_new_tokens=new, **options)
            assert torch.equal(torch.stack(seen, dim=1), out[:, 4:].cpu())
            found.append(out)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_the_first_token_waits_for_no_step(device, monkeypatch):
    """The first step may take a capture; from then on a step is queued before a token is read."""
    monkeypatch.setattr(generation, "_Reader", Lagging)
    order, step = [], PackedModel.step
    monkeypatch.setattr(
        PackedModel, "step", lambda *args, **options: order.append("step") or step(*args, **options)
    )
    make(device).generate(
        ids(device, 1, 3), max_new_tokens=4, streamer=lambda _: order.append("read")
    )
    assert order == ["read", "step", "step", "read", "step", "read", "read"]


def test_a_streamer_s_error_leaves_the_model_as_it_was(device):
    model = make(device).train()
    model.model.layers[1].eval()  # frozen, as fine-tuning may have it
    before = [module.training for module in model.modules()]

    def fail(_) -> None:
        raise RuntimeError("no paper")

    with pytest.raises(RuntimeError, match="no paper"):
        model.generate(ids(device, 1, 3), max_new_tokens=4, streamer=fail)
    assert [module.training for module in model.modules()] == before and model.training


def test_masks_that_do_not_fit(device):
    model, x = make(device), ids(device, 2, 4)
    with pytest.raises(ValueError, match=r"token_mask: got torch\.bool \(2, 3\)"):
        model.generate(x, max_new_tokens=1, token_mask=torch.ones_like(x[:, :3]).bool())
    with pytest.raises(TypeError, match=r"input_ids: got dtype torch\.float64"):
        model.generate(x.double(), max_new_tokens=1)


def test_a_full_cache_is_an_error(device):
    """Nothing is written into the next sequence's rows; what is rewound can be taken again."""
    model, x = make(device), ids(device, 2, 3)
    engine = PackedModel(model, 2, 4)
    with torch.no_grad():
        with pytest.raises(ValueError, match="lengths: got 5, need at most max_length=4"):
            engine.prefill(ids(device, 7), [5, 2])
        engine.prefill(x.flatten(), [3, 3])
        first = engine.step(x[:, 0], more=False).clone()
        with pytest.raises(ValueError, match="tokens: got one more, need at most 4"):
            engine.step(x[:, 0], more=False)
        engine.rewind(3)
        assert torch.equal(engine.step(x[:, 0], more=False), first)


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


def replaced(module: torch.nn.Module) -> None:
    """Another forward in place of the class's, as accelerate puts one."""
    old = module.forward
    module.forward = lambda *args, **options: old(*args, **options) * -2.0


def subclassed(module: torch.nn.Module) -> None:
    class Changed(type(module)):
        def forward(self, *args, **options):
            return super().forward(*args, **options) * -2.0

    module.__class__ = Changed


def hooked(module: torch.nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: out * -2.0)


@pytest.mark.parametrize("change", [hooked, replaced, subclassed])
@pytest.mark.parametrize("name", ["", "attention", "attention.key_layernorm", "attention.dense"])
def test_changes_of_whole_layers_are_kept(name, change, device):
    """What is done to modules that generation would take apart takes part in it."""
    model, eos = make(device), 3
    x, mask = ragged(device, [5, 2, 4], "right")
    free = model.generate(x, max_new_tokens=12, token_mask=mask)
    assert not runs_whole(model)
    change(model.model.layers[1].get_submodule(name))
    assert runs_whole(model) or (name == "attention.dense" and change is not replaced)
    out = model.generate(x, max_new_tokens=12, token_mask=mask)
    assert not torch.equal(out, free)
    ended = model.generate(x, max_new_tokens=12, token_mask=mask, eos_token_id=eos)
    for row, real in enumerate(mask):
        text = out[row, x.shape[1] :]
        assert torch.equal(teacher(model, x[row][real], text), text)
        end = text.tolist().index(eos) + 1 if eos in text else len(text)
        end = min(end, ended.shape[1] - x.shape[1])
        assert torch.equal(ended[row, x.shape[1] :][:end], text[:end])


@pytest.mark.parametrize("change", [None, "flash", "hook", "experts", "capacity"])
def test_what_a_graph_can_hold(change, device, monkeypatch):
    """A step is captured only if every replay would do the same as running it."""
    monkeypatch.setattr(packed, "use_kernel", lambda *_: True)
    model = make(device, torch.bfloat16, **({"capacity": "fixed"} if change == "capacity" else {}))
    engine = PackedModel(model, 1, 8)
    engine._flash_runs = change != "flash"
    if change == "hook":
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    elif change == "experts":
        model.model.layers[1].mlp.experts = torch.nn.Identity()  # of no known sizes
    assert engine._can_capture() is (change is None)
