"""The permutation functions of TransformerEngine that Megatron-LM's MoE layers call.

Same names, arguments, results and map layouts as ``transformer_engine.pytorch.permutation`` of
TransformerEngine 2.20, on any device. ``install()`` puts them behind Megatron-LM's
``moe_permute_fusion``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ling_ops.ops import _checks
from ling_ops.ops._moves import gather_rows, inverse, sum_rows

__all__ = [
    "install",
    "moe_permute",
    "moe_permute_and_pad_with_probs",
    "moe_permute_with_probs",
    "moe_sort_chunks_by_index",
    "moe_sort_chunks_by_index_with_probs",
    "moe_unpermute",
]
#: Other names that Megatron-LM imports with those that ``install()`` sets.
_ROUTER_FUSIONS = (
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
    "fused_topk_with_score_function",
)
_MAP_TYPES = ("mask", "index")
_MASKS = (torch.bool, torch.uint8, torch.int8, *_checks.IDS)


def _check_tokens(inp: Tensor, name: str = "inp") -> None:
    _checks.shape(name, inp, (None, None), "[T, H]")
    _checks.dtype(name, inp, _checks.FLOATS)


def _check_map(routing_map: Tensor, inp: Tensor, map_type: str) -> None:
    _checks.choice("map_type", map_type, _MAP_TYPES)
    meaning = "[T, E]" if map_type == "mask" else "[T, K]"
    _checks.shape("routing_map", routing_map, (inp.shape[0], None), meaning)
    _checks.dtype("routing_map", routing_map, _MASKS if map_type == "mask" else _checks.IDS)
    _checks.same_device("routing_map", routing_map, "inp", inp)


def _wanted(num_out_tokens: int | Tensor | None) -> int | None:
    """The number of rows that was asked for; None for all."""
    if num_out_tokens is None:
        return None
    if isinstance(num_out_tokens, Tensor):  # a sum of counts, as Megatron-LM's dispatchers give it
        _checks.shape("num_out_tokens", num_out_tokens, (), "[]")
        _checks.dtype("num_out_tokens", num_out_tokens, _checks.IDS)
        num_out_tokens = int(num_out_tokens)
    _checks.integer("num_out_tokens", num_out_tokens, -1)
    return num_out_tokens if num_out_tokens > 0 else None


def _mask_rows(mask: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """(row [T,E] int32, row_id_map [T,2E+1] int32) of a routing mask.

    Rows go by expert, then by token. row_id_map holds for each token its rows, last first, then
    from column E on their experts, and in the last column how many there are.
    """
    tokens, experts = mask.shape
    by_expert = mask.t().reshape(-1)
    rows = torch.where(by_expert, by_expert.cumsum(0) - 1, -1)
    rows = torch.where(rows < num_out, rows, -1).view(experts, tokens).t()
    last_first, expert = rows.sort(dim=1, descending=True)
    expert = torch.where(last_first >= 0, expert, -1)
    kept = (rows >= 0).sum(1, keepdim=True)
    return rows.int(), torch.cat([last_first, expert, kept], dim=1).int()


def _map_rows(row_id_map: Tensor, pad_offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows [T,E] int32 or -1, experts [T,E] int64) of a mask's row_id_map [T,2E+1]."""
    experts = (row_id_map.shape[1] - 1) // 2
    column = torch.arange(experts, device=row_id_map.device)
    known = column < row_id_map[:, -1:]
    expert = torch.where(known, row_id_map[:, experts : 2 * experts], 0).long()
    rows = row_id_map[:, :experts]
    if pad_offsets is not None:
        rows = rows + pad_offsets.to(rows.dtype)[expert]
    return torch.where(known, rows, -1).int(), expert


def _permute_mask(
    inp: Tensor, mask: Tensor, num_out: int | None, probs: Tensor | None, pad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rows, row_id_map, permuted probs) of a routing mask; ``pad`` moves each expert's rows."""
    mask = mask != 0
    num_out = int(mask.sum()) if num_out is None else num_out
    rows, row_id_map = _mask_rows(mask, num_out)
    if pad is not None:
        rows = torch.where(rows >= 0, rows + pad.to(rows.dtype), -1)
    pair = inverse(rows, num_out)
    row_token = torch.where(pair >= 0, pair // max(1, mask.shape[1]), -1).int()
    out = gather_rows(inp, row_token, _map_rows(row_id_map, pad)[0])
    if probs is None:
        return out, row_id_map, None
    if not pair.numel():
        return out, row_id_map, probs.reshape(-1)[:0]
    chosen = probs.reshape(-1).gather(0, pair.clamp(min=0))
    return out, row_id_map, torch.where(pair >= 0, chosen, 0.0)


def _permute_index(inp: Tensor, index: Tensor, num_out: int | None) -> tuple[Tensor, Tensor]:
    """(rows, row_id_map [K*T] int32, choice by choice) of expert ids."""
    tokens, choices = index.shape
    pairs = tokens * choices
    num_out = pairs if num_out is None else num_out
    ids = index.reshape(-1)
    order = torch.where(ids < 0, torch.iinfo(ids.dtype).max, ids).argsort(stable=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(pairs, device=order.device))
    row = torch.where((ids >= 0) & (row < num_out), row, -1).view(tokens, choices).int()
    pair = inverse(row, num_out)
    row_token = torch.where(pair >= 0, pair // choices, -1).int()
    return gather_rows(inp, row_token, row), row.t().reshape(-1)


def moe_permute(
    inp: Tensor,
    routing_map: Tensor,
    num_out_tokens: int | None = -1,
    max_token_num: int = -1,
    map_type: str = "mask",
) -> tuple[Tensor, Tensor]:
    """Copies tokens into expert order: by expert, then by token (and choice).

    Args:
        inp: [T, H] float, differentiable.
        routing_map: map_type "mask": [T, E], nonzero where a token goes to an expert. "index":
            [T, K] int32 or int64 expert ids; a negative id is left out (TransformerEngine gives
            it the first rows).
        num_out_tokens: rows wanted. Those past it are dropped, and rows that nothing fills are
            zero. 0, -1 and None mean all, which a mask must be summed on the host for.
        max_token_num: not needed here.
        map_type: "mask" or "index".

    Returns:
        rows [num_out_tokens, H] in inp's dtype, and row_id_map int32 for ``moe_unpermute``:
        [T, 2E+1] of a mask, [K*T] of an index.
    """
    _check_tokens(inp)
    _check_map(routing_map, inp, map_type)
    wanted = _wanted(num_out_tokens)
    if map_type == "index":
        _checks.ids("routing_map", routing_map)
        return _permute_index(inp, routing_map, wanted)
    return _permute_mask(inp, routing_map, wanted, None, None)[:2]


def _check_probs(probs: Tensor, routing_map: Tensor) -> None:
    _checks.shape("probs", probs, tuple(routing_map.shape), "[T, E]")
    _checks.dtype("probs", probs, _checks.FLOATS)
    _checks.same_device("probs", probs, "routing_map", routing_map)


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int | None = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """``moe_permute`` of a mask, and the rows' probabilities.

    probs ``[T, E]`` float, differentiable. Returns rows, permuted probs ``[num_out_tokens]`` in
    probs' dtype, and row_id_map.
    """
    _check_tokens(inp)
    _check_map(routing_map, inp, "mask")
    _check_probs(probs, routing_map)
    rows, row_id_map, permuted = _permute_mask(
        inp, routing_map, _wanted(num_out_tokens), probs, None
    )
    return rows, permuted, row_id_map


def moe_permute_and_pad_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, tokens_per_expert: Tensor, align_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """``moe_permute_with_probs`` with every expert's rows filled up with zeros.

    Each expert gets a multiple of ``align_size`` rows; tokens_per_expert ``[E]`` are the column
    sums of the mask. Returns rows, permuted probs, row_id_map, pad_offsets ``[E]`` int64 for
    ``moe_unpermute`` (None if nothing was filled up), and the padded tokens per expert ``[E]``.
    Reads the number of rows on the host.
    """
    _check_tokens(inp)
    _check_map(routing_map, inp, "mask")
    _check_probs(probs, routing_map)
    _checks.shape("tokens_per_expert", tokens_per_expert, (routing_map.shape[1],), "[E]")
    _checks.integer("align_size", align_size, 1)
    counts = tokens_per_expert.to(inp.device).long()
    padded = (counts + align_size - 1) // align_size * align_size
    total, plain = torch.stack([padded.sum(), counts.sum()]).tolist()
    pad = None if total == plain else (padded - counts).cumsum(0) - (padded - counts)
    rows, row_id_map, permuted = _permute_mask(inp, routing_map, total, probs, pad)
    return rows, permuted, row_id_map, pad, padded


def _merging_probs(merging_probs: Tensor | None, probs: Tensor | None) -> Tensor | None:
    if probs is None:
        return merging_probs
    if merging_probs is not None:
        raise ValueError("probs must be None when merging_probs is given: they are the same")
    warnings.warn("probs is now named merging_probs", DeprecationWarning, stacklevel=3)
    return probs


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | tuple[int, int] | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """Brings rows back to their tokens and adds them up, in fp32.

    Args:
        inp: [M, H] rows, differentiable.
        row_id_map: second result of ``moe_permute`` (third of the others).
        merging_probs: factors of the rows, differentiable: [T, E] with a mask's map, [T, K] with
            an index's; None: a plain sum with a mask, and K = 1 with an index.
        restore_shape: (T, H) of the result; None: inp's shape. With an index's map T is known.
        map_type: "mask" or "index", as it was given to ``moe_permute``.
        probs: the older name of merging_probs.
        pad_offsets: [E], fourth result of ``moe_permute_and_pad_with_probs``.

    Returns:
        [T, H] in inp's dtype.
    """
    _check_tokens(inp)
    _checks.choice("map_type", map_type, _MAP_TYPES)
    _checks.tensor("row_id_map", row_id_map)
    _checks.dtype("row_id_map", row_id_map, _checks.IDS)
    _checks.same_device("row_id_map", row_id_map, "inp", inp)
    weights = _merging_probs(merging_probs, probs)
    if weights is not None:
        _checks.shape("merging_probs", weights, (None, None), "[T, K] or [T, E]")
        _checks.dtype("merging_probs", weights, _checks.FLOATS)
        _checks.same_device("merging_probs", weights, "inp", inp)
    if map_type == "index":
        choices = 1 if weights is None else weights.shape[1]
        tokens = row_id_map.numel() if weights is None else weights.shape[0]
        _checks.shape("row_id_map", row_id_map, (tokens * choices,), "[K*T]")
        rows = row_id_map.view(choices, tokens).t()
        return sum_rows(inp, rows.contiguous().int(), weights)
    tokens = (inp.shape if restore_shape is None else restore_shape)[0]
    _checks.shape("row_id_map", row_id_map, (tokens, None), "[T, 2E+1]")
    rows, experts = _map_rows(row_id_map, pad_offsets)
    if weights is not None:
        _checks.shape("merging_probs", weights, tuple(rows.shape), "[T, E]")
        weights = weights.gather(1, experts)
    return sum_rows(inp, rows, weights)


def _chunk_sources(split_sizes: Tensor, sorted_index: Tensor, num_rows: int, device) -> Tensor:
    """[num_rows] int64: the input row of each output row, -1 past the end of all chunks."""
    sizes, order = split_sizes.to(device).long(), sorted_index.to(device).long()
    starts, moved = sizes.cumsum(0) - sizes, sizes[order]
    ends = moved.cumsum(0)
    row = torch.arange(num_rows, device=device)
    chunk = torch.searchsorted(ends, row, right=True).clamp(max=max(0, order.numel() - 1))
    source = starts[order][chunk] + row - (ends - moved)[chunk]
    return torch.where(row < ends[-1], source, -1)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """The chunks of inp ``[M, H]`` in another order.

    split_sizes ``[C]`` are the chunks' rows, sorted_index ``[C]`` a permutation of the chunks: the
    result's first is chunk sorted_index[0]. Both may be on the host. Rows of no chunk are zero.
    """
    return _sort_chunks(inp, None, split_sizes, sorted_index)[0]


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """``moe_sort_chunks_by_index`` of inp ``[M, H]`` and of probs ``[M]``."""
    _checks.tensor("inp", inp)
    _checks.shape("probs", probs, (inp.shape[0],), "[M]")
    return _sort_chunks(inp, probs, split_sizes, sorted_index)


def _sort_chunks(inp, probs, split_sizes, sorted_index):
    _check_tokens(inp)
    _checks.shape("split_sizes", split_sizes, (None,), "[C]")
    _checks.shape("sorted_index", sorted_index, tuple(split_sizes.shape), "[C]")
    for name, value in (("split_sizes", split_sizes), ("sorted_index", sorted_index)):
        _checks.dtype(name, value, _checks.IDS)
    if not inp.shape[0] or not split_sizes.numel():
        return inp, probs
    source = _chunk_sources(split_sizes, sorted_index, inp.shape[0], inp.device)
    back = inverse(source.unsqueeze(1), inp.shape[0]).int().unsqueeze(1)
    out = gather_rows(inp, source.int(), back)
    if probs is None:
        return out, None
    return out, torch.where(source >= 0, probs.gather(0, source.clamp(min=0)), 0.0)


def install() -> Callable[[], None]:
    """Puts these functions behind ``moe_permute_fusion`` of Megatron-LM.

    Sets the ``fused_*`` names of ``megatron.core.transformer.moe.moe_utils``, whether
    TransformerEngine is installed or not. Returns a function that undoes it. Raises ImportError
    without Megatron-LM (``pip install megatron-core``).
    """
    try:
        from megatron.core.transformer.moe import moe_utils
    except ImportError as error:
        raise ImportError(
            "ling_ops.integrations.megatron.install needs Megatron-LM: "
            "run `pip install megatron-core`"
        ) from error
    functions = {
        "HAVE_TE": True,
        "fused_permute": moe_permute,
        "fused_permute_with_probs": moe_permute_with_probs,
        "fused_permute_and_pad_with_probs": moe_permute_and_pad_with_probs,
        "fused_unpermute": moe_unpermute,
        "fused_sort_chunks_by_index": moe_sort_chunks_by_index,
        "fused_sort_chunks_by_index_with_probs": moe_sort_chunks_by_index_with_probs,
    }
    names = vars(moe_utils)
    if not names["HAVE_TE"]:
        # Asked for once HAVE_TE is True; missing, they would be a NameError there, not a message.
        functions |= {name: None for name in _ROUTER_FUSIONS if name not in names}
    if not names["HAVE_TE"] and "is_te_min_version" in names:
        # Asked whether unpermute knows pad_offsets; without TransformerEngine it would raise.
        functions["is_te_min_version"] = lambda *_, **__: True
    before = {name: names[name] for name in functions if name in names}
    names.update(functions)

    def undo() -> None:
        for name in functions:
            del names[name]
        names.update(before)

    return undo
