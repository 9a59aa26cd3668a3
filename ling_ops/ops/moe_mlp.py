"""`moe_mlp` and `fused_experts`: the experts of a layer, from tokens to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import moe_mlp as reference
from ..reference.activation import ACTIVATIONS, GATED
from ..reference.route import Routing
from . import _checks
from ._autocast import autocast
from ._backend import use_kernel
from ._decode import moe_decode, runs_decode
from ._fused_mlp import fused_moe_mlp
from .gemm import grouped_gemm, tensor_core_unsupported
from .permute import check_routing, permute, unpermute
from .route import route

_KERNEL_STEPS = reference.Steps(permute, grouped_gemm, unpermute)


def _check_weights(x, gate_up_proj, down_proj, activation) -> None:
    _checks.shape("x", x, (None, None), "[T, H]")
    _checks.shape("down_proj", down_proj, (None, x.shape[1], None), "[E, H, I]")
    experts, _, intermediate = down_proj.shape
    if activation in GATED:
        name, width, meaning = "gate_up_proj", 2 * intermediate, "[E, 2I, H]"
    else:
        name, width, meaning = "up_proj", intermediate, "[E, I, H]"
    _checks.shape(name, gate_up_proj, (experts, width, x.shape[1]), meaning)
    for name, tensor in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        _checks.same_device(name, tensor, "x", x)


def _check_biases(x, gate_up_proj, down_proj, gate_up_bias, down_bias) -> None:
    for name, bias, proj in (
        ("gate_up_bias", gate_up_bias, gate_up_proj),
        ("down_bias", down_bias, down_proj),
    ):
        if bias is not None:
            _checks.shape(name, bias, tuple(proj.shape[:2]), "[E, N]")
            _checks.dtype(name, bias, _checks.FLOATS)
            _checks.same_device(name, bias, "x", x)


def _check_main_grads(main_grads, gate_up_proj, down_proj) -> None:
    if main_grads is None:
        return
    if not isinstance(main_grads, (tuple, list)) or len(main_grads) != 2:
        raise TypeError(
            f"main_grads must be a pair of tensors (gate_up, down), got {type(main_grads).__name__}"
        )
    for name, buffer, proj in zip(
        ("main_grads[0]", "main_grads[1]"), main_grads, (gate_up_proj, down_proj), strict=True
    ):
        _checks.shape(name, buffer, tuple(proj.shape), "the weight's shape")
        _checks.dtype(name, buffer, (torch.float32, torch.float64))
        _checks.same_device(name, buffer, "x", proj)


def _check_gate(x: Tensor, weights: Tensor, indices: Tensor) -> None:
    _checks.ids("indices", indices, x.shape[0])
    _checks.shape("weights", weights, tuple(indices.shape), "[T, K]")
    _checks.dtype("weights", weights, _checks.FLOATS)
    _checks.same_device("weights", weights, "x", x)
    _checks.same_device("indices", indices, "x", x)


def _check_limit(activation: str, swiglu_limit: float | None) -> None:
    if swiglu_limit is None:
        return
    if activation not in GATED:
        raise ValueError(
            f"swiglu_limit must be None for activation {activation!r}, got {swiglu_limit}"
        )
    _checks.positive("swiglu_limit", swiglu_limit)


def _check_routing(routing: Routing | None, indices: Tensor, num_experts: int) -> None:
    if routing is None:
        return
    check_routing(routing, indices.device)
    _checks.shape("routing.token_row", routing.token_row, tuple(indices.shape), "[T, K]")
    _checks.shape("routing.expert_counts", routing.expert_counts, (num_experts,), "[E]")


def check_layer(
    x, gate_up_proj, down_proj, weights, indices, gate_up_bias, down_bias, activation,
    swiglu_limit, routing,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x and both weights, in the dtype of autocast; raises for what `moe_mlp` cannot take."""
    _checks.choice("activation", activation, ACTIVATIONS)
    _check_weights(x, gate_up_proj, down_proj, activation)
    x, gate_up_proj, down_proj = autocast(x, gate_up_proj, down_proj)
    _checks.dtype("x", x, _checks.FLOATS)
    _checks.dtype("gate_up_proj", gate_up_proj, (x.dtype,))
    _checks.dtype("down_proj", down_proj, (x.dtype,))
    _check_gate(x, weights, indices)
    _check_biases(x, gate_up_proj, down_proj, gate_up_bias, down_bias)
    _check_limit(activation, swiglu_limit)
    _check_routing(routing, indices, down_proj.shape[0])
    return x, gate_up_proj, down_proj


def moe_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    swiglu_limit: float | None = None,
    routing: Routing | None = None,
    main_grads: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The experts of a Mixture-of-Experts layer.

    out[t] = sum over k of weights[t,k] * down_e(act(gate_up_e(x[t]))), e = indices[t,k]. Products
    accumulate in fp32; so does the sum over k. A pair with an id outside [0, E), or dropped by
    `routing`, adds exactly zero to the output and to every gradient. A token's result is bitwise
    the same in every batch; without gradients, few tokens (T <= 64, T * K <= 4 E and
    <= 512) are a class of their own, whose kernels round elsewhere; under
    `ling_ops.batch_invariant()` they are not.

    Args:
        x: [T, H] float, differentiable.
        gate_up_proj: [E, 2I, H] in x's dtype, gate rows first, then up rows; [E, I, H] for
            activations without a gate; differentiable.
        down_proj: [E, H, I] in x's dtype, differentiable.
        weights: [T, K] gate weights, differentiable.
        indices: [T, K] int32 or int64 expert ids.
        gate_up_bias: [E, 2I] (or [E, I]), or None; differentiable.
        down_bias: [E, H], or None; added before the gate weight; differentiable.
        activation: "swiglu", "geglu" (erf), "geglu_tanh", "gelu", "gelu_tanh", "silu", "relu2".
        swiglu_limit: L > 0: silu(g).clamp(max=L) * u.clamp(-L, L); for gated activations.
        routing: of these `indices`, from `ling_ops.route` with a capacity or mask; None routes all
            pairs (dropless).
        main_grads: fp32 buffers in the shapes of gate_up_proj and down_proj. The weights'
            gradients are added to them, and the weights' own `.grad` stays None.

    Returns:
        [T, H] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    x, gate_up_proj, down_proj = check_layer(
        x, gate_up_proj, down_proj, weights, indices, gate_up_bias, down_bias, activation,
        swiglu_limit, routing,
    )  # fmt: skip
    _check_main_grads(main_grads, gate_up_proj, down_proj)
    unsupported = tensor_core_unsupported(x.dtype, H=x.shape[1], I=down_proj.shape[2])
    differentiable = (x, gate_up_proj, down_proj, weights, gate_up_bias, down_bias)
    if unsupported is None and runs_decode(x, indices, down_proj, differentiable):
        return moe_decode(
            x,
            gate_up_proj,
            down_proj,
            weights,
            indices,
            routing,
            gate_up_bias,
            down_bias,
            activation=activation,
            swiglu_limit=swiglu_limit,
        )
    steps = reference.REFERENCE_STEPS
    if use_kernel("moe_mlp", x, unsupported):
        if gate_up_bias is None and down_bias is None:
            return fused_moe_mlp(
                x,
                gate_up_proj,
                down_proj,
                weights,
                indices,
                routing,
                activation=activation,
                swiglu_limit=swiglu_limit,
                main_grads=main_grads,
            )
        steps = _KERNEL_STEPS
    routing = route(indices, down_proj.shape[0]) if routing is None else routing
    return reference.moe_mlp(
        x,
        gate_up_proj,
        down_proj,
        weights,
        routing,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        swiglu_limit=swiglu_limit,
        main_grads=main_grads,
        steps=steps,
    )


#: vLLM's activation names.
_VLLM_ACTIVATIONS = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_tanh": "geglu_tanh",
    "silu_no_mul": "silu",
    "gelu_no_mul": "gelu",
    "gelu_tanh_no_mul": "gelu_tanh",
    "relu2_no_mul": "relu2",
}


def _check_expert_map(expert_map: Tensor | None, global_num_experts: int, ids: Tensor) -> None:
    if expert_map is None:
        return
    _checks.shape("expert_map", expert_map, (None,), "[global experts]")
    _checks.dtype("expert_map", expert_map, _checks.IDS)
    _checks.same_device("expert_map", expert_map, "topk_ids", ids)
    if expert_map.shape[0] == 0:
        raise ValueError("expert_map must hold at least one expert, got shape [0]")
    if global_num_experts not in (-1, expert_map.shape[0]):
        raise ValueError(
            f"global_num_experts must be -1 or the size of expert_map ({expert_map.shape[0]}), "
            f"got {global_num_experts}"
        )


def _local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Ids of this rank's experts; -1 where another rank holds the expert or the id is bad."""
    if expert_map is None:
        return topk_ids
    valid = (topk_ids >= 0) & (topk_ids < expert_map.shape[0])
    mapped = expert_map[topk_ids.clamp(0, expert_map.shape[0] - 1).long()]
    return torch.where(valid, mapped, -1).to(topk_ids.dtype)


def fused_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    inplace: bool = False,
    activation: str = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    """`moe_mlp` under vLLM's names, for unquantised weights.

    Args:
        hidden_states: [T, H] float.
        w1: [E, 2I, H], gate rows first ([E, I, H] for "..._no_mul" activations).
        w2: [E, H, I].
        topk_weights: [T, K] gate weights.
        topk_ids: [T, K] int32 or int64; global ids if `expert_map` is given.
        inplace: write the result into `hidden_states` and return it.
        activation: "silu" (SwiGLU), "gelu", "gelu_tanh", or "silu_no_mul", "gelu_no_mul",
            "gelu_tanh_no_mul", "relu2_no_mul" for experts without a gate.
        apply_router_weight_on_input: scale the input instead of the output; needs K = 1.
        global_num_experts: size of `expert_map`, or -1.
        expert_map: [global experts] integer, local id of each global expert or -1.
        w1_bias, w2_bias: [E, 2I] and [E, H], or None.

    Returns:
        [T, H] in hidden_states' dtype (autocast's dtype under autocast, unless `inplace`).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    _checks.choice("activation", activation, tuple(_VLLM_ACTIVATIONS))
    _checks.shape("hidden_states", hidden_states, (None, None), "[T, H]")
    _checks.ids("topk_ids", topk_ids, hidden_states.shape[0])
    _checks.shape("topk_weights", topk_weights, tuple(topk_ids.shape), "[T, K]")
    _check_expert_map(expert_map, global_num_experts, topk_ids)
    x = hidden_states
    if apply_router_weight_on_input:
        if topk_ids.shape[1] != 1:
            raise ValueError(
                "apply_router_weight_on_input must be False unless K = 1, "
                f"got K = {topk_ids.shape[1]}"
            )
        x = (x * topk_weights.to(x.dtype)).to(x.dtype)
        topk_weights = torch.ones_like(topk_weights)
    out = moe_mlp(
        x,
        w1,
        w2,
        topk_weights,
        _local_ids(topk_ids, expert_map),
        gate_up_bias=w1_bias,
        down_bias=w2_bias,
        activation=_VLLM_ACTIVATIONS[activation],
    )
    return hidden_states.copy_(out) if inplace else out
