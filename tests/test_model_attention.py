"""FlashAttention 4 for prompts: when it is taken, and that it reads what PyTorch's kernel reads."""

from __future__ import annotations

import itertools
import math
import re
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

import ling_ops as lo
from ling_ops.models import LingConfig, LingForCausalLM, packed
from ling_ops.models import _attention_backend as backend
from ling_ops.models.packed import PackedModel


@pytest.fixture
def fresh():
    """`load` asks again, and afterwards too."""
    backend.load.cache_clear()
    yield
    backend.load.cache_clear()


@pytest.mark.parametrize(
    "tokens,sequences,expected",
    [(4095, 1, False), (4096, 1, True), (16384, 256, True), (16384, 257, False)],
)
def test_size_alone_decides(tokens, sequences, expected):
    assert backend.pays(tokens, sequences) is expected


def test_no_other_device_takes_it(monkeypatch):
    def fail() -> None:
        raise AssertionError("loaded without need")

    monkeypatch.setattr(backend, "load", fail)
    assert not backend.runs_flash_attention_4(torch.empty(4096, 2, 64), 1, 1)


@pytest.mark.parametrize(
    "version,expected",
    [
        ("4.0.0a40", False), ("4.0.0b35", False), ("4.0.0b36", True), ("4.0.0b101", True),
        ("4.0.0b36.dev1", False), ("4.0.0b40.dev3", True), ("4.0.0b36.post1", True),
        ("4.0.0b36+cu13", True), ("4.0.0rc1", True), ("4.0", True), ("4.0.0.dev1", False),
        ("4.0.0.post1", True), ("4.0.1rc1", True), ("4.0.2", True), ("4.1", False),
        ("4.1.0b1", False), ("14.0", False),
    ],
)  # fmt: skip
def test_the_versions_are_those_of_the_extra(version, expected):
    assert backend.is_tried(version) is expected
    specifiers = pytest.importorskip("packaging.specifiers")
    project = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    named = re.search(r"flash-attn-4([^;\"]+)", project)[1]
    assert specifiers.SpecifierSet(named, prereleases=True).contains(version) is expected


def test_without_the_package_there_is_no_warning(fresh, monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(backend.metadata, "version", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.load() is None


def test_an_install_that_does_not_load_is_warned_of_once(fresh, monkeypatch):
    monkeypatch.setattr(backend.metadata, "version", lambda _: "4.0.0b36")
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    with pytest.warns(lo.FallbackWarning, match=r"4\.0\.0b36 does not load"):
        assert backend.load() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.load() is None


def test_a_version_that_was_not_tried_is_warned_of(fresh, monkeypatch):
    monkeypatch.setattr(backend.metadata, "version", lambda _: "4.2.0")
    with pytest.warns(lo.FallbackWarning, match=r"4\.2\.0 is not in"):
        assert backend.load() is None


def needs_flash_attention_4(device: torch.device) -> None:
    """Skip where it can't be: it is an extra, for one kind of GPU. Installed, it must load."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a Hopper GPU: elsewhere it is not taken")
    try:
        metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the extra attention")
    assert backend.load() is not None, "flash-attn-4 is installed and not taken"


def attend_in_fp64(query, key, value, sizes, room):
    """Sequence by sequence; ``sizes`` are (tokens, keys) of each."""
    outs, begin, group = [], 0, query.shape[1] // key.shape[1]
    for b, (new, keys) in enumerate(sizes):
        rows = slice(b * room, b * room + keys)
        q = query[begin : begin + new].double().transpose(0, 1)
        k, v = (t[rows].double().transpose(0, 1).repeat_interleave(group, 0) for t in (key, value))
        last = torch.arange(keys - new, keys, device=q.device).unsqueeze(1)
        hidden = torch.arange(keys, device=q.device) > last
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        begin += new
    return torch.cat(outs)


SIZES = {
    "one": ([(2048, 2048)], 2048),
    "ragged": ([(300, 300), (1, 1), (77, 77)], 310),
    "behind a past": ([(1000, 4000)], 4500),
    "some without tokens": ([(0, 700), (128, 128), (500, 900), (0, 0)], 1024),
}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(16, 4, 128), (4, 4, 64), (16, 1, 128), (16, 2, 64)])
@pytest.mark.parametrize("name", SIZES)
def test_it_reads_what_pytorch_s_attention_reads(name, heads, dtype, device):
    needs_flash_attention_4(device)
    (sizes, room), (count, kv, dim) = SIZES[name], heads
    wide = torch.randn(sum(new for new, _ in sizes), count + kv, dim, device=device).to(dtype)
    query = wide[:, :count]  # a view of wider rows, as in the model
    key, value = (torch.randn(len(sizes) * room, kv, dim, device=device).to(dtype) for _ in "kv")
    for b, (_, keys) in enumerate(sizes):  # what lies behind the keys is another's
        key[b * room + keys : (b + 1) * room] = 50
        value[b * room + keys : (b + 1) * room] = 5000
    integers = {"dtype": torch.int32, "device": device}
    starts = torch.tensor([0, *itertools.accumulate(new for new, _ in sizes)], **integers)
    bounds = torch.arange(len(sizes) + 1, **integers) * room
    used = torch.tensor([keys for _, keys in sizes], **integers)
    got = backend.flash_attention_4(query, key, value, starts, bounds, used)
    plain = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, bounds, room, room, 0.0, True, False, seqused_k=used
    )[0]
    truth = attend_in_fp64(query, key, value, sizes, room)
    assert torch.equal(backend.flash_attention_4(query, key, value, starts, bounds, used), got)
    assert (got - truth).norm() <= 1.5 * (plain - truth).norm() + 1e-5 * truth.norm()


@pytest.mark.cuda
def test_a_long_prompt_s_logits(device, monkeypatch):
    """With it and without, against fp32; every token takes all experts: nothing is a choice."""
    needs_flash_attention_4(device)
    every = {"num_experts": 16, "num_experts_per_token": 16, "num_groups": 1, "topk_groups": 1}
    config = LingConfig.preset("small", **every)
    model = LingForCausalLM(config, device=device, dtype=torch.bfloat16).eval()
    wide = LingForCausalLM(config, device=device, dtype=torch.float32).eval()
    wide.load_state_dict(model.state_dict())
    lengths, taken = [1900, 33, 700], []
    monkeypatch.setattr(packed, "CHUNK", 1500)  # the second pass reads keys of the first
    tokens = torch.randint(0, 256, (sum(lengths),), device=device)

    def watch(*arguments):
        taken.append(len(arguments[0]))
        return backend.flash_attention_4(*arguments)

    monkeypatch.setattr(packed, "flash_attention_4", watch)
    monkeypatch.setattr(backend, "FEWEST_TOKENS", 1000)
    with torch.no_grad():
        got = PackedModel(model, 3, 2000).prefill(tokens, lengths)
        with lo.batch_invariant():
            plain = PackedModel(model, 3, 2000).prefill(tokens, lengths)
        truth = torch.cat([wide(t[None]).logits[0, -1:] for t in tokens.split(lengths)])
    assert taken == [1500] * config.num_layers + [1133] * config.num_layers
    assert (got - truth).norm() <= 1.5 * (plain - truth).norm() + 1e-3 * truth.norm()
