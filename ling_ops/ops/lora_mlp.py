"""`lora_mlp`: the experts of a layer with low-rank additions to their weights (LoRA)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..reference import lora_mlp as reference
from ..reference.lora_mlp import LowRank
from ..reference.moe_mlp import REFERENCE_STEPS
from ..reference.route import Routing
from . import _checks
from ._backend import use_kernel
from ._fused_lora import fused_lora_mlp
from .gemm import ROW_MULTIPLE, tensor_core_unsupported
from .moe_mlp import _KERNEL_STEPS, check_layer, moe_mlp
from .route import route


def _checked(name: str, low_rank: LowRank | None, proj: Tensor) -> LowRank | None:
    """The addition in the weight's dtype, of a rank that the kernels' rows can have."""
    if low_rank is None:
        return None
    experts, columns, width = proj.shape
    _checks.shape(f"{name}.a", low_rank.a, (experts, None, width), "[E, r, Kd]")
    rank = low_rank.a.shape[1]
    _checks.shape(f"{name}.b", low_rank.b, (experts, columns, rank), "[E, N, r]")
    for part, tensor in (("a", low_rank.a), ("b", low_rank.b)):
        _checks.dtype(f"{name}.{part}", tensor, _checks.FLOATS)
        _checks.same_device(f"{name}.{part}", tensor, "x", proj)
    a, b = low_rank.a.to(proj.dtype), low_rank.b.to(proj.dtype)
    if missing := -rank % ROW_MULTIPLE:
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return low_rank._replace(a=a, b=b)


def lora_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    gate_up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    swiglu_limit: float | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """`moe_mlp` whose weights are W[e] + scale B[e] A[e] (Hu et al. 2021), as two thin products.

    B A is never made: (rows A^T) B^T is added to rows W^T before the activation, or before the
    weighted sum. Beyond `moe_mlp` a training step keeps one tensor [M, r] per addition. Gradients
    are computed for those inputs alone that ask for one, so frozen weights cost nothing.

    Args:
        x, gate_up_proj, down_proj, weights, indices, gate_up_bias, down_bias, activation,
        swiglu_limit, routing: as in `ling_ops.moe_mlp`.
        gate_up_lora: `LowRank` with a [E, r, H], b [E, 2I, r] ([E, I, r] without a gate) of any
            float dtype (computed in x's), differentiable; None for none.
        down_lora: the same with a [E, r, I], b [E, H, r].

    Returns:
        [T, H] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    options = {
        "gate_up_bias": gate_up_bias, "down_bias": down_bias, "activation": activation,
        "swiglu_limit": swiglu_limit,
    }  # fmt: skip
    if gate_up_lora is None and down_lora is None:
        return moe_mlp(x, gate_up_proj, down_proj, weights, indices, routing=routing, **options)
    x, gate_up_proj, down_proj = check_layer(
        x, gate_up_proj, down_proj, weights, indices, routing=routing, **options
    )
    low = {
        "gate_up_lora": _checked("gate_up_lora", gate_up_lora, gate_up_proj),
        "down_lora": _checked("down_lora", down_lora, down_proj),
    }
    routing = route(indices, down_proj.shape[0]) if routing is None else routing
    unsupported = tensor_core_unsupported(x.dtype, H=x.shape[1], I=down_proj.shape[2])
    steps = REFERENCE_STEPS
    if use_kernel("moe_mlp", x, unsupported):
        dropped = any(part is not None and part.dropout > 0 for part in low.values())
        if gate_up_bias is None and down_bias is None and not dropped:
            return fused_lora_mlp(
                x, gate_up_proj, down_proj, weights, routing, activation=activation,
                swiglu_limit=swiglu_limit, **low,
            )  # fmt: skip
        steps = _KERNEL_STEPS
    return reference.lora_mlp(
        x, gate_up_proj, down_proj, weights, routing, steps=steps, **low, **options
    )
