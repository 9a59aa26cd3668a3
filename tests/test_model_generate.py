"""Incremental decoding equals the full forward; sampling is deterministic and stays in bounds."""

from __future__ import annotations

import pytest
import torch

from ling_ops.models import LingConfig, LingForCausalLM
from ling_ops.models.generation import sample

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8,
    "num_experts_per_token": 2, "first_k_dense_replace": 1, "score_function": "sigmoid",
    "use_expert_bias": True, "init_std": None,
}  # fmt: skip


@pytest.fixture
def model(device) -> LingForCausalLM:
    return LingForCausalLM(LingConfig(**SMALL), device=device, dtype=torch.float64).eval()


def ids(device, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (batch, length), device=device)


@pytest.mark.parametrize("chunks", [[10], [1] * 10, [4, 1, 1, 4], [1, 9]])
def test_cached_decoding_is_the_full_forward(chunks, model, device):
    x = ids(device, 2, 10)
    full = model(x).logits
    cache = model.new_cache(2, 10)
    parts = [model(part, cache=cache).logits for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full)
    assert cache.length == 10


@pytest.mark.parametrize("chunks", [[6, 1, 1, 1, 1], [7, 3]])
def test_cached_decoding_with_padding_is_the_sequence_alone(chunks, model, device):
    x = ids(device, 2, 10)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :4] = False
    cache, parts, token_mask = model.new_cache(2, 12), [], mask[:, : chunks[0]]
    for part in x.split(chunks, dim=1):
        parts.append(model(part, cache=cache, token_mask=token_mask).logits)
        token_mask = None
    logits = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits[:1, 4:], model(x[:1, 4:]).logits)
    torch.testing.assert_close(logits[1:], model(x[1:]).logits)


def test_greedy_is_the_argmax_of_the_full_forward(model, device):
    x = ids(device, 3, 5)
    out = model.generate(x, max_new_tokens=8)
    expected = x
    for _ in range(8):
        chosen = model(expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, chosen], dim=1)
    assert torch.equal(out, expected)


def test_padded_prompts_continue_as_if_alone(model, device):
    x = ids(device, 2, 6)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :3] = False
    out = model.generate(x, max_new_tokens=6, token_mask=mask)
    assert torch.equal(out[:1, 3:], model.generate(x[:1, 3:], max_new_tokens=6))
    assert torch.equal(out[1:], model.generate(x[1:], max_new_tokens=6))


def test_same_seed_same_text(model, device):
    x = ids(device, 2, 4)

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        options = {"temperature": 1.5, "top_p": 0.9, "generator": generator}
        return model.generate(x, max_new_tokens=12, **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_end_of_sequence(model, device):
    x = ids(device, 3, 4)
    free = model.generate(x, max_new_tokens=10)
    eos = free[0, 6].item()
    out = model.generate(x, max_new_tokens=10, eos_token_id=eos)
    for row, reference in zip(out[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        end = reference.index(eos) + 1 if eos in reference else len(reference)
        assert row[:end] == reference[: min(end, len(row))]
        assert all(token == eos for token in row[end:])
    alone = model.generate(x[:1], max_new_tokens=10, eos_token_id=eos)
    assert alone[0, -1] == eos and alone.shape[1] <= 7


def test_streamer_sees_every_token_in_order(model, device):
    x, seen = ids(device, 2, 4), []
    out = model.generate(x, max_new_tokens=5, streamer=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), out[:, 4:].cpu())


def test_mode_is_restored_and_zero_tokens_are_allowed(model, device):
    x = ids(device, 1, 4)
    model.train()
    assert torch.equal(model.generate(x, max_new_tokens=0), x)
    assert model.training
    model.eval()
    model.generate(x, max_new_tokens=1)
    assert not model.training


def test_top_p_keeps_the_nucleus(device):
    probs = torch.tensor([[0.1, 0.5, 0.25, 0.15]], device=device)
    logits = probs.log().expand(400, 4)

    def drawn(top_p: float) -> set[int]:
        return set(sample(logits, temperature=1.0, top_p=top_p).tolist())

    assert drawn(1e-9) == {1}
    assert drawn(0.5) == {1}
    assert drawn(0.7) == {1, 2}
    assert drawn(0.8) == {1, 2, 3}
    assert drawn(1.0) == {0, 1, 2, 3}


def test_temperature(device):
    logits = torch.tensor([[0.0, 1.0, 3.0]], device=device).expand(2000, 3)
    assert sample(logits).eq(2).all()
    cold = sample(logits, temperature=0.5).eq(2).float().mean().item()
    hot = sample(logits, temperature=4.0).eq(2).float().mean().item()
    for share, temperature in ((cold, 0.5), (hot, 4.0)):
        assert abs(share - torch.softmax(logits[0] / temperature, 0)[2].item()) < 0.05


def test_an_empty_batch_has_no_logits(model, device):
    assert model(ids(device, 0, 4)).logits.shape == (0, 4, 40)
    assert model(ids(device, 2, 0)).logits.shape == (2, 0, 40)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_models_generate_the_same(where, model, device, tmp_path):
    """accelerate keeps the weights elsewhere: what a module says of its device is no device."""
    accelerate = pytest.importorskip("accelerate")
    x = ids(device, 2, 9)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :4] = False
    wanted = model.generate(x, max_new_tokens=6, token_mask=mask)
    if where == "memory":
        model = accelerate.cpu_offload(model, execution_device=device)
    else:
        model = accelerate.disk_offload(model, tmp_path, execution_device=device)
    assert model.lm_head.weight.is_meta
    assert torch.equal(model.generate(x, max_new_tokens=6, token_mask=mask), wanted)


def test_bad_input(model, device):
    x = ids(device, 2, 4)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1] = False
    for options, message in (
        ({"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature: got -1.0"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p: got 0.0"),
        ({"max_new_tokens": 1, "token_mask": mask}, "token_mask: got row 1 all padding"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(x, **options)
    with pytest.raises(TypeError, match=r"eos_token_id: got \[1, 2\], need an int or None"):
        model.generate(x, max_new_tokens=1, eos_token_id=[1, 2])
    with pytest.raises(ValueError, match=r"input_ids: got shape \(2, 0\)"):
        model.generate(x[:, :0], max_new_tokens=1)
    cache = model.new_cache(2, 3)
    with pytest.raises(ValueError, match="need at most max_length=3"):
        model(x, cache=cache)
    with pytest.raises(ValueError, match="input_ids: got a batch of 1, need 2"):
        model(x[:1], cache=cache)
    cache = model.new_cache(2, 4)
    model(x, cache=cache)
    cache.reset()
    assert cache.length == 0 and model(x, cache=cache).logits.shape == (2, 4, 40)
