"""How far a result may be from the truth, and why.

Integer results (ids, counts, offsets, rows) are exact: they are compared with ``torch.equal``.

Floating-point results are compared with the reference run in float64 on the same (already
rounded) inputs.  An element may be off by at most the larger of

1. ``1.5 x`` the largest error of the same computation done by PyTorch's own products in the
   kernel's dtype (the reference in that dtype: "naive").  The factor leaves room for another
   order of summation, not for another precision; the largest error of the tensor stands for
   the element's own because a single naive element may be right by luck.
2. one rounding of the result to its dtype plus what fp32 accumulation of ``length`` terms can
   lose: ``u(dtype) |truth| + length u(fp32) sum |a_i b_i|``.  The second term is the standard
   bound of recursive summation; ``magnitude`` is ``sum |a_i b_i|`` computed in float64.
3. for an op composed of several products, ``roundings`` roundings on the scale of the largest
   element: its intermediates (h, a, y, and their gradients) are kept in the dtype too.  Large
   tensors are ruled by 1; in small ones the naive error is too small a sample.

``u`` is the unit roundoff, half the spacing of the dtype at 1: 2^-8 for bf16, 2^-11 for fp16,
2^-24 for fp32.  Scores (exp, division) lose a few more units in fp32: ``SCORE_ULPS``.

No bound applies where the truth is not finite: there the result must be not finite in the same
way (NaN for NaN, the same infinity for an infinity).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import ling_ops

NAIVE_FACTOR = 1.5
#: A layer of a model rounds some dozen tensors (norms, projections, rotation, scores, softmax,
#: values, router, two products of experts, activation, sums), and as many in the backward.
LAYER_ROUNDINGS = 24
SCORE_ULPS = 16  # exp (2 ulps), its sum over E (log2 E by pairs, or E in order), one division


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def truth(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``fn`` by the reference, on the same device and dtypes."""
    with ling_ops.use_backend("reference"):
        return fn(*args, **kwargs)


def upcast(value: Any) -> Any:
    """Floating tensors of a (nested) argument in float64; leaves keep ``requires_grad``."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(upcast, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(upcast, value))
    if isinstance(value, dict):
        return {key: upcast(item) for key, item in value.items()}
    return value


def truth64(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``fn`` by the reference in float64 on the given, already rounded inputs."""
    return truth(fn, *upcast(args), **upcast(kwargs))


def assert_within(
    actual: torch.Tensor,
    exact: torch.Tensor,
    *,
    naive: torch.Tensor | None = None,
    magnitude: torch.Tensor | float = 0.0,
    length: int = 1,
    roundings: int = 0,
    name: str = "result",
) -> None:
    """Check ``actual`` against float64 ``exact`` by the module's rule."""
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, truth {exact.shape}"
    if actual.numel() == 0:
        return
    got = actual.detach().double()
    exact = exact.detach().double().to(got.device)
    finite = exact.isfinite()
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in other places"
    assert torch.equal(got[exact.isinf()], exact[exact.isinf()]), f"{name}: infinities differ"
    bound = unit_roundoff(actual.dtype) * exact.abs()
    bound = bound + length * unit_roundoff(torch.float32) * magnitude
    bound = bound + torch.finfo(actual.dtype).tiny  # the last rounding may be to a subnormal
    if finite.any():
        bound = bound.clamp(min=roundings * unit_roundoff(actual.dtype) * exact[finite].abs().max())
    if naive is not None:
        error = (naive.detach().double() - exact)[finite].abs()
        bound = bound.clamp(min=NAIVE_FACTOR * error.max().item() if error.numel() else 0.0)
    excess = ((got - exact).abs() - bound)[finite]
    if excess.numel() and excess.max() > 0:
        worst = excess.argmax()
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {excess.numel()} elements are too far off; "
            f"worst {got[finite][worst]:.8g} against {exact[finite][worst]:.8g}, "
            f"allowed {bound[finite][worst]:.3g}"
        )


def assert_scores(
    actual: torch.Tensor, exact: torch.Tensor, *, spread: float, name: str = "weights"
) -> None:
    """Gate weights: fp32 arithmetic on logits that lie within ``spread`` of each other.

    The subtraction of the maximum rounds an exponent of size up to ``spread``, and exp turns
    that absolute error into a relative one; the sum in a renormalisation does so once more.
    """
    size = exact.double().abs().nan_to_num(0.0, 0.0, 0.0)
    length = SCORE_ULPS + int(2 * min(spread, 110.0))  # exp underflows beyond
    assert_within(actual, exact, magnitude=size, length=length, name=name)


def assert_bitwise(actual: torch.Tensor, expected: torch.Tensor, name: str = "result") -> None:
    """Same bits, so that NaN equals NaN and -0.0 differs from +0.0."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    if actual.is_floating_point():
        size = actual.element_size()
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        actual, expected = actual.contiguous().view(bits), expected.contiguous().view(bits)
    different = int((actual != expected).sum())
    assert different == 0, f"{name}: {different} of {actual.numel()} elements differ in bits"
