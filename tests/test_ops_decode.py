"""`moe_mlp` without gradients on few tokens: the decode kernels, up to and past their limits."""

from __future__ import annotations

import math

import pytest
import torch
from compiled import needs
from hypothesis import given
from hypothesis import strategies as st
from strategies import GATED, PLAIN, MlpCase, generator, make_mlp
from tolerances import assert_bitwise, assert_within, truth, truth64

import ling_ops as lo
from ling_ops import moe_mlp
from ling_ops.ops import _decode
from ling_ops.ops._decode import MAX_PAIRS, MAX_TOKENS, decode_limit
from ling_ops.reference.activation import ACTIVATIONS

ROUNDINGS = 2  # a and the output; h and y stay in fp32
LOW = [torch.bfloat16, torch.float16]


def run(case: MlpCase, **options: object) -> torch.Tensor:
    return moe_mlp(*case.tensors, **case.options, **options)


def check(case: MlpCase, **options: object) -> None:
    out = run(case, **options)
    exact = truth64(moe_mlp, *case.tensors, **case.options, **options)
    assert_within(
        out,
        exact,
        naive=truth(run, case, **options),
        magnitude=exact.abs().max() if exact.numel() else 0.0,
        length=case.x.shape[1] + case.down.shape[2],
        roundings=ROUNDINGS,
    )


@st.composite
def decode_cases(draw: st.DrawFn) -> MlpCase:
    experts = draw(st.sampled_from([1, 3, 8, 33, 100, 300]))
    return make_mlp(
        draw(st.integers(0, MAX_TOKENS + 2)),
        8 * draw(st.integers(1, 40)),
        8 * draw(st.integers(1, 40)),
        experts,
        draw(st.integers(1, min(experts, 8))),
        dtype=draw(st.sampled_from(LOW)),
        activation=draw(st.sampled_from([*GATED, *PLAIN])),
        bias=draw(st.booleans()),
        style=draw(st.sampled_from(["uniform", "skewed", "one_expert", "bad_ids"])),
        seed=draw(st.integers(0, 99)),
    )


@given(case=decode_cases())
def test_equals_the_reference(device: torch.device, case: MlpCase) -> None:
    check(case.to(device))


@st.composite
def shared_cases(draw: st.DrawFn) -> tuple[MlpCase, _decode.SharedExpert]:
    """A layer without biases and a shared expert one to three times as wide as the others."""
    experts, slices = draw(st.sampled_from([1, 3, 40, 256])), draw(st.integers(1, 3))
    case = make_mlp(
        draw(st.one_of(st.integers(0, 6), st.integers(0, MAX_TOKENS))),
        8 * draw(st.sampled_from([1, 7, 32, 265])),
        8 * draw(st.integers(1, 33)),
        experts,
        draw(st.integers(1, min(experts, 7))),
        dtype=draw(st.sampled_from(LOW)),
        activation=draw(st.sampled_from([*GATED, *PLAIN])),
        style=draw(st.sampled_from(["uniform", "skewed", "one_expert", "bad_ids"])),
        seed=draw(st.integers(0, 99)),
    )
    hidden, width = case.x.shape[1], slices * case.down.shape[2]
    gen = generator(7)
    gate, up = (
        (torch.randn(width, hidden, generator=gen) / hidden**0.5).to(case.x.dtype) for _ in range(2)
    )
    down = (torch.randn(hidden, width, generator=gen) / width**0.5).to(case.x.dtype)
    gated = case.options["activation"] in GATED
    return case, _decode.SharedExpert(gate if gated else None, up, down)


def with_shared(x, gate_up, down, weights, indices, gate, up, shared_down, *, activation):
    return torch.ops.ling_ops.moe_decode(
        x, gate_up, down, weights.to(torch.promote_types(x.dtype, torch.float32)), indices, None,
        None, None, gate, up, shared_down, ACTIVATIONS.index(activation), math.inf,
    )  # fmt: skip


def check_shared(case: MlpCase, shared: _decode.SharedExpert) -> None:
    tensors, options = (*case.tensors, *shared), {"activation": case.options["activation"]}
    exact = truth64(reference_with_shared, *tensors, **options)
    assert_within(
        with_shared(*tensors, **options),
        exact,
        naive=reference_with_shared(*tensors, **options),
        magnitude=exact.abs().max() if exact.numel() else 0.0,
        length=case.x.shape[1] + case.down.shape[2] + shared.up.shape[0],
        roundings=ROUNDINGS,
    )


def reference_with_shared(x, gate_up, down, weights, indices, gate, up, shared_down, *, activation):
    """By the definition: the layer, and the shared expert as a layer of one expert."""
    first = up if gate is None else torch.cat([gate, up])
    every = torch.zeros(len(x), 1, dtype=torch.int32, device=x.device)
    return truth(moe_mlp, x, gate_up, down, weights, indices, activation=activation) + truth(
        moe_mlp, x, first[None], shared_down[None], torch.ones_like(every, dtype=weights.dtype),
        every, activation=activation,
    )  # fmt: skip


@given(drawn=shared_cases())
def test_a_shared_expert_in_the_same_launches(device: torch.device, drawn) -> None:
    case, shared = drawn
    shared = _decode.SharedExpert(*(None if t is None else t.to(device) for t in shared))
    check_shared(case.to(device), shared)


@pytest.mark.cuda
def test_a_shared_expert_changes_no_token_by_the_batch(device: torch.device) -> None:
    case = make_mlp(MAX_TOKENS, 264, 200, 128, 8, dtype=torch.bfloat16, style="skewed").to(device)
    gate, up = (torch.randn(400, 264, device=device).bfloat16() / 16 for _ in range(2))
    shared = gate, up, torch.randn(264, 400, device=device).bfloat16() / 16
    whole = with_shared(*case.tensors, *shared, activation="swiglu")
    for size in (1, 3, 4, 17, 33):
        for first in range(0, MAX_TOKENS, size):
            part = slice(first, first + size)
            some = with_shared(*case.take(part).tensors, *shared, activation="swiglu")
            assert_bitwise(some, whole[part], f"{first} + {size}")


def test_which_shared_experts_go_along() -> None:
    """The same for every number of tokens: nothing but the layer decides."""

    def takes(width: int, k: int = 8, experts: int = 256, inner: int = 512) -> bool:
        shared = _decode.SharedExpert(None, torch.empty(width, 0), torch.empty(0, width))
        down = torch.empty(experts, 0, inner)
        every = {_decode.takes_shared(shared, torch.empty(t, k), down) for t in (0, 1, 54, 64)}
        assert len(every) == 1
        return every.pop()

    assert takes(512) and takes(1024) and not takes(1536)
    assert takes(1536, experts=64) and takes(4608, k=1) and not takes(5120, k=1)
    assert not takes(256) and not takes(768) and not takes(0)
    assert takes(512, experts=1899) and not takes(512, experts=1900)


@pytest.mark.parametrize("experts,k,slices", [(1899, 1, 9), (1899, 8, 2), (16, 1, 9), (64, 2, 8)])
def test_as_many_shared_experts_as_go_along(device: torch.device, experts, k, slices) -> None:
    """The most shared memory: a wide layer of few choices, and all tokens."""
    inner = 904 if device.type == "cuda" else 16
    case = make_mlp(64, 16, inner, experts, k, dtype=torch.bfloat16, style="skewed").to(device)
    gate, up = (torch.randn(slices * inner, 16, device=device).bfloat16() / 4 for _ in range(2))
    down = torch.randn(16, slices * inner, device=device).bfloat16() / inner**0.5
    check_shared(case, _decode.SharedExpert(gate, up, down))


@pytest.mark.parametrize(
    "shape,most",
    [((8, 256), 64), ((8, 128), 64), ((8, 64), 32), ((2, 8), 16), ((1, 8), 32), ((32, 64), 8),
     ((1, 4096), 64), ((1, 4097), 0)],
)  # fmt: skip
def test_threshold(shape: tuple[int, int], most: int) -> None:
    """(k, experts) -> the largest number of tokens."""
    assert decode_limit(*shape) == most


@pytest.mark.cuda
@pytest.mark.parametrize("experts,k", [(8, 2), (64, 8), (256, 8), (64, 1), (40, 32)])
def test_every_number_of_tokens(device: torch.device, experts: int, k: int) -> None:
    """All of 0 .. 130: on both sides of the threshold in tokens and of that in pairs."""
    whole = make_mlp(130, 72, 136, experts, k, dtype=torch.bfloat16, style="skewed").to(device)
    for tokens in range(131):
        check(whole.take(slice(tokens)))


@pytest.mark.parametrize("hidden", [2040, 2112, 2120, 4104])
@pytest.mark.parametrize("tokens", [1, 4, 5, 64])
def test_wide_outputs(device: torch.device, hidden: int, tokens: int) -> None:
    """More strips of the output than an H100 has multiprocessors, 132, and fewer."""
    check(make_mlp(tokens, hidden, 72, 36, 2, dtype=torch.float16, style="skewed").to(device))


@pytest.mark.cuda
@pytest.mark.parametrize("hidden", [264, 4104])
@pytest.mark.parametrize("dtype", LOW)
def test_a_token_does_not_depend_on_the_batch(device, dtype: torch.dtype, hidden: int) -> None:
    case = make_mlp(MAX_TOKENS, hidden, 200, 128, 4, dtype=dtype, style="skewed").to(device)
    whole = run(case)
    order = torch.randperm(MAX_TOKENS, generator=generator(0)).to(device)
    assert_bitwise(run(case.take(order)), whole[order], "permuted")
    for size in (1, 7, 8, 9, 16, 17, 33):
        for first in range(0, MAX_TOKENS, size):
            part = slice(first, first + size)
            assert_bitwise(run(case.take(part)), whole[part], f"{first} + {size}")


def test_one_path_holds_in_its_block_only() -> None:
    x = torch.zeros(1, 8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out"), lo.batch_invariant():
            with lo.batch_invariant():
                assert _decode.is_batch_invariant()
            assert _decode.is_batch_invariant() and not _decode.runs_decode(x, x, x[None], ())
            raise RuntimeError("out")
        assert not _decode.is_batch_invariant()


@pytest.mark.cuda
@pytest.mark.parametrize("experts,k", [(8, 2), (256, 8)])
def test_one_path_gives_the_same_bits_in_every_batch(
    device: torch.device, experts: int, k: int
) -> None:
    """From one token to thousands, on both sides of the threshold, and with gradients."""
    case = make_mlp(3000, 264, 200, experts, k, dtype=torch.bfloat16, style="skewed").to(device)
    with lo.batch_invariant():
        whole = run(case)
        for size in (1, 2, 7, 33, 64, 65, 130, 1000):
            for first in (0, 1500, 3000 - size):
                part = slice(first, first + size)
                assert_bitwise(run(case.take(part)), whole[part], f"{first} + {size}")
    case.x.requires_grad_()
    with torch.enable_grad():
        assert_bitwise(run(case).detach(), whole, "with gradients")


@pytest.mark.cuda
def test_crowded_and_repeated_experts(device: torch.device) -> None:
    """More pairs of one expert than a tile of tokens holds, and one expert twice in a token."""
    case = make_mlp(MAX_TOKENS, 64, 64, 128, 4, dtype=torch.bfloat16).to(device)
    case.indices[:, 1:] = 2
    check(case)


@pytest.mark.cuda
def test_padding_tokens_change_nothing(device: torch.device) -> None:
    """Tokens with NaN in x and weights and ids of no expert: zero for them, the rest bitwise."""
    case = make_mlp(24, 64, 96, 48, 4, dtype=torch.bfloat16).to(device)
    expected = run(case.take(slice(16)))
    case.x[16:] = torch.nan
    case.weights[16:] = torch.nan
    case.indices[16:20] = -1
    case.indices[20:] = 48
    out = run(case)
    assert_bitwise(out[:16], expected)
    assert_bitwise(out[16:], torch.zeros_like(out[16:]))


@pytest.mark.cuda
def test_dropped_pairs(device: torch.device) -> None:
    case = make_mlp(48, 64, 64, 64, 2, dtype=torch.bfloat16, style="skewed").to(device)
    routing = lo.route(case.indices, 64, capacity=5)
    assert (routing.token_row < 0).any()
    check(case, routing=routing)


@pytest.mark.cuda
def test_many_experts(device: torch.device) -> None:
    check(make_mlp(32, 16, 16, 4096, 16, dtype=torch.float16).to(device))


@pytest.mark.cuda
def test_a_thousand_replays_with_new_routing(device: torch.device) -> None:
    case = make_mlp(16, 128, 128, 32, 4, dtype=torch.bfloat16).to(device)
    eager_ids = torch.randint(-1, 33, (1000, 16, 4), device=device, dtype=torch.int32)
    run(case)
    graph = torch.cuda.CUDAGraph()
    ids = case.indices.int()
    with torch.cuda.graph(graph):
        out = moe_mlp(case.x, case.gate_up, case.down, case.weights, ids, **case.options)
    different = torch.zeros((), device=device)
    for new in eager_ids:
        ids.copy_(new)
        graph.replay()
        eager = moe_mlp(case.x, case.gate_up, case.down, case.weights, new, **case.options)
        different += (out != eager).sum()
    assert different == 0


@pytest.mark.cuda
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_the_decode_kernels_run(device: torch.device, ids: torch.dtype) -> None:
    """By name, so that a threshold that sends these calls elsewhere is noticed."""
    needs("moe_decode")
    case = make_mlp(MAX_PAIRS // 8, 64, 64, 256, 8, dtype=torch.bfloat16).to(device)
    with torch.profiler.profile() as profile:
        moe_mlp(case.x, case.gate_up, case.down, case.weights, case.indices.to(ids))
    assert "ling_ops::moe_decode" in {event.key for event in profile.key_averages()}
