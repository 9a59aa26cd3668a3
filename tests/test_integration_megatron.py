"""TransformerEngine's permutations: signatures, and results against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from signatures import assert_takes
from tolerances import assert_bitwise, assert_within, unit_roundoff

from ling_ops.integrations import megatron as shim

SIGNATURES = {
    "moe_permute": "inp, routing_map, num_out_tokens, max_token_num=-1, map_type='mask'",
    "moe_permute_with_probs": "inp, probs, routing_map, num_out_tokens",
    "moe_permute_and_pad_with_probs": "inp, probs, routing_map, tokens_per_expert, align_size",
    "moe_unpermute": (
        "inp, row_id_map, merging_probs=None, restore_shape=None, map_type='mask', probs=None, "
        "pad_offsets=None"
    ),
    "moe_sort_chunks_by_index": "inp, split_sizes, sorted_index",
    "moe_sort_chunks_by_index_with_probs": "inp, probs, split_sizes, sorted_index",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    path = f"transformer_engine.pytorch.permutation:{name}"
    assert_takes(getattr(shim, name), SIGNATURES[name], path, since="TransformerEngine 2.20")


def mask_pairs(mask: torch.Tensor) -> list[tuple[int, int]]:
    """(token, expert) of every row, by expert and then by token."""
    tokens, experts = mask.shape
    return [(t, e) for e in range(experts) for t in range(tokens) if mask[t, e]]


def leaf(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


@st.composite
def masks(draw) -> torch.Tensor:
    tokens, experts = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    return torch.rand(tokens, experts, generator=generator) < density


def rows_of(x: torch.Tensor, tokens: list[int], count: int) -> torch.Tensor:
    """x[tokens], then zeros up to ``count`` rows."""
    picked = x[torch.tensor(tokens, dtype=torch.int64, device=x.device)]
    return torch.cat([picked, x.new_zeros(count - len(tokens), x.shape[1])])


def check_sums(actual, exact, terms: int, name: str) -> None:
    """Sums in fp32 of at most ``terms`` products, rounded once to the result's dtype."""
    largest = exact.abs().max() if exact.numel() else 0.0
    assert_within(actual, exact, magnitude=4 * largest + 4, length=terms, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@given(mask=masks(), extra=st.sampled_from([None, -2, 0, 3]))
def test_mask_map_against_a_loop(device, dtype, mask, extra) -> None:
    pairs = mask_pairs(mask)
    wanted = -1 if extra is None else max(-1, len(pairs) + extra)
    count = wanted if wanted > 0 else len(pairs)
    kept = pairs[:count]
    x = leaf(mask.shape[0], 6, dtype=dtype, device=device)
    probs = leaf(*mask.shape, dtype=torch.float32, device=device)
    mask = mask.to(device)

    rows, permuted, row_map = shim.moe_permute_with_probs(x, probs, mask.int(), wanted)
    x64, probs64 = (t.detach().double().requires_grad_() for t in (x, probs))
    exact_rows = rows_of(x64, [t for t, _ in kept], count)
    exact_probs = rows_of(probs64.view(-1, 1), [t * mask.shape[1] + e for t, e in kept], count)
    assert torch.equal(rows.double(), exact_rows) and rows.dtype == dtype
    assert torch.equal(permuted.double(), exact_probs[:, 0])
    alone, same_map = shim.moe_permute(x, mask, wanted)
    assert_bitwise(alone, rows)
    assert torch.equal(same_map, row_map)

    grad, grad_probs = torch.randn_like(rows), torch.randn_like(permuted)
    torch.autograd.backward([rows, permuted], [grad, grad_probs])
    torch.autograd.backward(
        [exact_rows, exact_probs], [grad.double(), grad_probs.double()[:, None]]
    )
    check_sums(x.grad, x64.grad, mask.shape[1], "grad of inp")
    assert torch.equal(probs.grad.double(), probs64.grad)

    # and back: rows that nobody filled may hold anything
    y = leaf(count, 6, dtype=dtype, device=device)
    with torch.no_grad():
        y[len(kept) :] = torch.nan
    y64 = y.detach().double().requires_grad_()
    for merging in (None, probs.detach().requires_grad_()):
        merging64 = None if merging is None else merging.detach().double().requires_grad_()
        out = shim.moe_unpermute(y, row_map, merging, restore_shape=x.shape)
        exact = torch.zeros(x.shape, dtype=torch.float64, device=device)
        for row, (t, e) in enumerate(kept):
            weight = 1.0 if merging is None else merging64[t, e]
            index = torch.tensor([t], device=device)
            exact = exact.index_add(0, index, (weight * y64[row])[None])
        assert out.dtype == dtype
        check_sums(out, exact, mask.shape[1], "unpermute")
        if not kept:
            continue
        grad = torch.randn_like(out)
        leaves, leaves64 = ([y], [y64]) if merging is None else ([y, merging], [y64, merging64])
        found = torch.autograd.grad(out, leaves, grad)
        for got, true in zip(
            found, torch.autograd.grad(exact, leaves64, grad.double()), strict=True
        ):
            check_sums(got, true, 6, "grad of unpermute")


def test_the_number_of_rows_may_be_a_sum_of_counts(device) -> None:
    """As Megatron-LM's dispatchers hand it on."""
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]], device=device)
    x = torch.randn(3, 4, device=device)
    pairs = zip(shim.moe_permute(x, mask, mask.sum()), shim.moe_permute(x, mask, 4), strict=True)
    for counted, wanted in pairs:
        assert torch.equal(counted, wanted)
    with pytest.raises(ValueError, match=r"num_out_tokens must have shape \[\]"):
        shim.moe_permute(x, mask, mask.sum(0))


def test_mask_map_has_transformer_engines_layout(device) -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]], device=device)
    _, row_map = shim.moe_permute(torch.randn(3, 4, device=device), mask, 4)
    assert row_map.dtype == torch.int32 and tuple(row_map.shape) == (3, 7)
    assert row_map[:, -1].tolist() == [2, 0, 2]
    assert row_map[0, :2].tolist() == [2, 1] and row_map[0, 3:5].tolist() == [2, 1]
    assert row_map[2, :2].tolist() == [3, 0] and row_map[2, 3:5].tolist() == [2, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    tokens=st.integers(1, 9), choices=st.integers(1, 4), seed=st.integers(0, 2**31),
    drop=st.integers(-1, 6),
)  # fmt: skip
def test_index_map_against_a_sort(device, dtype, tokens, choices, seed, drop) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, 5, (tokens, choices), generator=generator, dtype=torch.int32)
    flat = index.flatten().tolist()
    order = sorted((i for i in range(len(flat)) if flat[i] >= 0), key=lambda i: (flat[i], i))
    wanted = -1 if drop < 0 or drop >= len(flat) else len(flat) - drop
    count = len(flat) if wanted < 0 else wanted
    kept = order[:count]
    x = leaf(tokens, 5, dtype=dtype, device=device)
    x64 = x.detach().double().requires_grad_()

    rows, row_map = shim.moe_permute(x, index.to(device), wanted, map_type="index")
    exact = rows_of(x64, [i // choices for i in kept], count)
    assert torch.equal(rows.double(), exact)
    # row_id_map goes choice by choice
    by_choice = [-1] * len(flat)
    for row, pair in enumerate(kept):
        by_choice[pair % choices * tokens + pair // choices] = row
    assert row_map.tolist() == by_choice and row_map.dtype == torch.int32
    grad = torch.randn_like(rows)
    rows.backward(grad)
    exact.backward(grad.double())
    check_sums(x.grad, x64.grad, choices, "grad of inp")

    y = leaf(count, 5, dtype=dtype, device=device)
    y64 = y.detach().double().requires_grad_()
    probs = leaf(tokens, choices, dtype=torch.float32, device=device)
    probs64 = probs.detach().double().requires_grad_()
    out = shim.moe_unpermute(y, row_map, probs, map_type="index")
    exact = torch.zeros(tokens, 5, dtype=torch.float64, device=device)
    for row, pair in enumerate(kept):
        term = probs64.flatten()[pair] * y64[row]
        exact = exact.index_add(0, torch.tensor([pair // choices], device=device), term[None])
    check_sums(out, exact, choices, "unpermute")
    if kept:
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, [y, probs], grad)
        truths = torch.autograd.grad(exact, [y64, probs64], grad.double())
        for got, true in zip(found, truths, strict=True):
            check_sums(got, true, 5, "grad of unpermute")


def test_index_map_without_probs_has_one_choice(device) -> None:
    index = torch.tensor([[2], [0], [-1], [0]], device=device)
    x = torch.randn(4, 8, device=device)
    rows, row_map = shim.moe_permute(x, index, map_type="index")
    back = shim.moe_unpermute(rows, row_map, map_type="index")
    assert torch.equal(back, torch.where(index >= 0, x, 0.0))


@pytest.mark.parametrize("align", [1, 4, 16])
@given(mask=masks())
def test_padding_of_every_expert(device, align, mask) -> None:
    tokens, experts = mask.shape
    counts = mask.sum(0)
    x = leaf(tokens, 6, dtype=torch.float32, device=device)
    probs = leaf(tokens, experts, dtype=torch.float32, device=device)
    rows, permuted, row_map, pad, padded = shim.moe_permute_and_pad_with_probs(
        x, probs, mask.to(device), counts, align
    )
    sizes = [-(-n // align) * align for n in counts.tolist()]
    assert padded.tolist() == sizes and rows.shape[0] == sum(sizes) == permuted.shape[0]
    assert (pad is None) == (sizes == counts.tolist())
    at = 0
    for expert, size in enumerate(sizes):
        members = mask[:, expert].nonzero().flatten().tolist()
        assert torch.equal(rows[at : at + size], rows_of(x, members, size))
        chosen = probs[torch.tensor(members, dtype=torch.int64, device=device), expert]
        assert torch.equal(permuted[at : at + len(members)], chosen)
        assert not permuted[at + len(members) : at + size].any()
        at += size
    out = shim.moe_unpermute(rows, row_map, probs, restore_shape=x.shape, pad_offsets=pad)
    scale = (probs * mask.to(device)).sum(1, keepdim=True)
    torch.testing.assert_close(out, scale * x, rtol=1e-5, atol=1e-4)
    out.sum().backward()
    exact = torch.autograd.grad((scale * x).sum(), [x, probs])
    for got, true in zip((x.grad, probs.grad), exact, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-4)


@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=7), seed=st.integers(0, 2**31),
    spare=st.integers(0, 2),
)  # fmt: skip
def test_chunks_in_another_order(device, sizes, seed, spare) -> None:
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    x = leaf(sum(sizes) + spare, 4, dtype=torch.float32, device=device)
    probs = leaf(x.shape[0], dtype=torch.float32, device=device)
    out, permuted = shim.moe_sort_chunks_by_index_with_probs(
        x, probs, torch.tensor(sizes), order.to(device)
    )
    chunks, probs_chunks = (t[: sum(sizes)].split(sizes) for t in (x, probs))
    if not x.shape[0]:
        return
    rest = x.shape[0] - sum(sizes)
    exact = torch.cat([*(chunks[i] for i in order), x.new_zeros(rest, 4)])
    assert torch.equal(out, exact)
    exact_probs = torch.cat([*(probs_chunks[i] for i in order), probs.new_zeros(rest)])
    assert torch.equal(permuted, exact_probs)
    alone = shim.moe_sort_chunks_by_index(x, torch.tensor(sizes), order)
    assert torch.equal(alone, exact)
    grad, grad_probs = torch.randn_like(out), torch.randn_like(permuted)
    got = torch.autograd.grad([out, permuted], [x, probs], [grad, grad_probs])
    true = torch.autograd.grad([exact, exact_probs], [x, probs], [grad, grad_probs])
    for mine, theirs in zip(got, true, strict=True):
        assert torch.equal(mine, theirs)


def test_empty_inputs(device) -> None:
    empty = torch.zeros(0, 8, device=device, requires_grad=True)
    mask = torch.zeros(0, 4, dtype=torch.bool, device=device)
    rows, probs, row_map = shim.moe_permute_with_probs(
        empty, torch.zeros(0, 4, device=device), mask
    )
    assert rows.shape == (0, 8) and probs.shape == (0,)
    assert shim.moe_unpermute(rows, row_map, restore_shape=(0, 8)).shape == (0, 8)
    none = torch.zeros(3, 4, dtype=torch.bool, device=device)
    rows, row_map = shim.moe_permute(torch.ones(3, 8, device=device), none)
    out = shim.moe_unpermute(rows, row_map, restore_shape=(3, 8))
    assert rows.shape == (0, 8) and out.shape == (3, 8) and not out.any()


def test_errors_name_the_argument(device) -> None:
    x = torch.randn(4, 8, device=device)
    mask = torch.ones(4, 2, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"inp must have dtype .*got int8"):
        shim.moe_permute(x.to(torch.int8), mask)
    with pytest.raises(ValueError, match=r"map_type must be one of 'mask', 'index', got 'both'"):
        shim.moe_permute(x, mask, map_type="both")
    with pytest.raises(ValueError, match=r"routing_map must have shape \[T, E\]"):
        shim.moe_permute(x, mask[:3])
    with pytest.raises(ValueError, match="routing_map must have dtype int32, int64"):
        shim.moe_permute(x, mask, map_type="index")
    with pytest.raises(ValueError, match=r"probs must have shape \[T, E\]"):
        shim.moe_permute_with_probs(x, x, mask)
    with pytest.raises(ValueError, match="align_size must be at least 1, got 0"):
        shim.moe_permute_and_pad_with_probs(x, mask.float(), mask, mask.sum(0), 0)
    rows, row_map = shim.moe_permute(x, mask)
    with pytest.raises(ValueError, match="probs must be None when merging_probs is given"):
        shim.moe_unpermute(rows, row_map, mask.float(), (4, 8), probs=mask.float())
    with pytest.warns(DeprecationWarning, match="merging_probs"):
        shim.moe_unpermute(rows, row_map, restore_shape=(4, 8), probs=mask.float())


def test_behind_megatrons_permute_fusion() -> None:
    """Megatron-LM's own unfused functions agree with the fused ones that are ours."""
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    before = dict(vars(moe_utils))
    undo = shim.install()
    try:
        assert {"fused_topk_with_score_function", "fused_moe_aux_loss"} <= set(vars(moe_utils))
        tokens, experts = 11, 5
        mask = torch.rand(tokens, experts) < 0.4
        x = torch.randn(tokens, 8, requires_grad=True)
        probs = torch.rand(tokens, experts, requires_grad=True)
        results = []
        for fused in (False, True):
            rows, permuted, indices = moe_utils.permute(
                x, mask, probs=probs, num_out_tokens=mask.sum(), fused=fused
            )[:3]
            out = moe_utils.unpermute(
                rows * permuted[:, None], indices, x.shape, fused=fused, routing_map=mask
            )
            sizes, order = mask.sum(0), torch.tensor([3, 1, 0, 4, 2])
            sorted_rows = moe_utils.sort_chunks_by_idxs(rows, sizes, order, fused=fused)[0]
            grads = torch.autograd.grad(
                [out.square().sum(), sorted_rows.square().sum()], [x, probs]
            )
            results.append((rows, permuted, out, sorted_rows, *grads))
        for unfused, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, unfused, rtol=0, atol=64 * unit_roundoff(x.dtype))
    finally:
        undo()
    assert vars(moe_utils) == before
