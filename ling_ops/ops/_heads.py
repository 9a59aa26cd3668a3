"""What lies between a layer's projection and attention over a static cache, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import heads as reference
from . import _checks, _library  # noqa: F401
from ._backend import use_kernel

#: Limit of the kernel.
MAX_HEAD_DIM = 256


def _check(projected: Tensor, caches: dict[str, Tensor], rows: Tensor) -> None:
    _checks.shape("projected", projected, (None, None, None), "[N, Q + 2 KV, D]")
    _checks.dtype("projected", projected, _checks.FLOATS)
    tokens, heads, dim = projected.shape
    key_cache = caches["key_cache"]
    _checks.shape("key_cache", key_cache, (None, None, dim), "[rows, KV, D]")
    _checks.shape("value_cache", caches["value_cache"], tuple(key_cache.shape), "[rows, KV, D]")
    _checks.shape("rows", rows, (tokens,), "[N]")
    _checks.dtype("rows", rows, (torch.int64,))
    if heads < 2 * key_cache.shape[1]:
        raise ValueError(
            f"projected must have at least {2 * key_cache.shape[1]} heads, "
            f"two for each of key_cache, got {heads}"
        )
    for name, cache in caches.items():
        _checks.dtype(name, cache, _checks.FLOATS)
        _checks.dtype(name, cache, (key_cache.dtype,))


def _check_factors(
    dim: int, cos: Tensor, sin: Tensor, query_weight: Tensor | None, key_weight: Tensor | None
) -> None:
    _checks.shape("cos", cos, (None, None), "[positions, rotary_dim / 2]")
    _checks.shape("sin", sin, tuple(cos.shape), "[positions, rotary_dim / 2]")
    if cos.shape[0] < 1 or 2 * cos.shape[1] > dim:
        raise ValueError(
            f"cos must have a position, and at most D / 2 = {dim // 2} columns, "
            f"got {list(cos.shape)}"
        )
    if (query_weight is None) != (key_weight is None):
        missing = "query_weight" if query_weight is None else "key_weight"
        raise ValueError(f"{missing} must be given where the other norm's weight is, got None")
    for name, value in {"cos": cos, "sin": sin}.items():
        _checks.dtype(name, value, (torch.float32, torch.float64))
    for name, value in {"query_weight": query_weight, "key_weight": key_weight}.items():
        if value is not None:
            _checks.shape(name, value, (dim,), "[D]")
            _checks.dtype(name, value, _checks.FLOATS)


def _unsupported(projected: Tensor, caches: tuple[Tensor, ...]) -> str | None:
    """What the kernel can't do, if any."""
    if projected.dtype == torch.float64:
        return "the heads are float64"
    if any(cache.dtype != projected.dtype for cache in caches):
        return "the caches have another dtype than the heads"
    if projected.shape[2] % 8 or projected.shape[2] > MAX_HEAD_DIM:
        return f"heads do not have a multiple of 8 elements, at most {MAX_HEAD_DIM}"
    if any(not cache.is_contiguous() for cache in caches):
        return "the caches are not contiguous"
    return None


def _in_one_dtype(weight: Tensor | None, other: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A norm's weight as the kernel takes it: in `dtype` if both are, otherwise in fp32."""
    if weight is None or other is None:
        return None
    same = weight.dtype == other.dtype == dtype
    return (weight if same else weight.float()).contiguous()


@torch.no_grad()
def attention_heads_(
    projected: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Queries for attention; keys and values go to their rows of the caches. Without gradients.

    Queries and keys are normalised, x / sqrt(mean(x²) + eps) · weight, where there are weights, and
    rotated by the angles of their token's position, rows % positions; everything in fp32 (float64
    for float64), with one rounding. Nothing is read back to the host. A row outside the caches is
    left out: nothing is stored for that token, and its query stands at position 0. Of several
    tokens with one row, any may remain, element by element.

    Args:
        projected: [N, Q + 2 KV, D] float, each token's queries, keys and values.
        key_cache, value_cache: [rows, KV, D] float of one dtype, changed in place.
        rows: [N] int64, of the caches.
        cos, sin: [positions, rotary_dim / 2] fp32 (or float64), rotary_dim even and at most D. The
            first half of the first rotary_dim elements turns with the second.
        query_weight, key_weight: [D] float, both or neither.
        eps: of the norms.

    Returns:
        [N, Q, D] in the caches' dtype.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
    """
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    others = {**caches, "rows": rows, "cos": cos, "sin": sin}
    weights = {"query_weight": query_weight, "key_weight": key_weight}
    others |= {name: weight for name, weight in weights.items() if weight is not None}
    for name, value in {"projected": projected, **others}.items():
        _checks.tensor(name, value)
        _checks.same_device(name, value, "projected", projected)
    _check(projected, caches, rows)
    _check_factors(projected.shape[2], cos, sin, query_weight, key_weight)
    args = projected, key_cache, value_cache, rows, cos, sin
    if not use_kernel("attention_heads", projected, _unsupported(projected, (*caches.values(),))):
        return reference.attention_heads_(*args, query_weight, key_weight, eps)
    dtype = projected.dtype
    return torch.ops.ling_ops.attention_heads_(
        projected.contiguous(),
        key_cache,
        value_cache,
        rows.contiguous(),
        cos.float().contiguous(),
        sin.float().contiguous(),
        _in_one_dtype(query_weight, key_weight, dtype),
        _in_one_dtype(key_weight, query_weight, dtype),
        eps,
    )
