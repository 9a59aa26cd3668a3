"""Routed and shared experts of few tokens in the same launches."""

from __future__ import annotations

from torch import Tensor

from ..reference.route import Routing
from ._autocast import is_autocast
from ._decode import SharedExpert, moe_decode, runs_decode, takes_shared
from .gemm import tensor_core_unsupported
from .moe_mlp import check_layer


def decode_with_shared(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    indices: Tensor,
    shared: SharedExpert,
    *,
    activation: str,
    swiglu_limit: float | None,
    routing: Routing | None = None,
) -> Tensor | None:
    """`moe_mlp` plus what the shared expert gives for each token, summed up in fp32 and rounded
    once; None where that takes launches of its own: many tokens, gradients, other widths or dtypes.

    The arguments are `moe_mlp`'s; no biases. `shared.up` is [S,H] with S a multiple of I.
    """
    if not all(isinstance(t, Tensor) and t.dim() == 2 for t in (x, indices)):
        return None  # `moe_mlp` says what is wrong
    if is_autocast(x.device.type):
        return None
    differentiable = (x, gate_up_proj, down_proj, weights, *shared)
    if (
        any(t is not None and t.dtype != x.dtype for t in shared)
        or tensor_core_unsupported(x.dtype, H=x.shape[1], I=down_proj.shape[2]) is not None
        or not takes_shared(shared, indices, down_proj)
        or not runs_decode(x, indices, down_proj, differentiable)
    ):
        return None
    check_layer(
        x, gate_up_proj, down_proj, weights, indices, None, None, activation, swiglu_limit, routing
    )
    return moe_decode(
        x, gate_up_proj, down_proj, weights, indices, routing, None, None, activation=activation,
        swiglu_limit=swiglu_limit, shared=shared,
    )  # fmt: skip
