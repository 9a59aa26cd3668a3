"""vLLM's functions of a Mixture-of-Experts layer, for unquantised weights.

``fused_topk``, ``grouped_topk`` and ``fused_experts`` take the arguments of vLLM 0.33 and return
what it returns. Unlike vLLM's they are differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ling_ops
from ling_ops.ops import _checks

__all__ = ["fused_experts", "fused_topk", "grouped_topk"]
_SCORING = ("softmax", "sigmoid")
_INDEX_TYPES = (torch.int32, torch.int64, torch.uint32)
#: What a quantisation config may not set: it holds biases at most.
_QUANTISED = (
    "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "use_mxfp4_w4a16",
    "use_mxfp4_w4a4", "use_nvfp4_w4a4", "ocp_mx_scheme", "per_act_token_quant", "w1_scale",
    "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale", "block_shape", "quant_dtype",
    "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit",
)  # fmt: skip


def _check_gating(hidden_states: Tensor, gating_output: Tensor, scoring_func: str) -> None:
    _checks.shape("hidden_states", hidden_states, (None, None), "[T, H]")
    _checks.shape("gating_output", gating_output, (hidden_states.shape[0], None), "[T, E]")
    _checks.choice("scoring_func", scoring_func, _SCORING)


def _renormalized(weights: Tensor, renormalize: bool, scale: float = 1.0) -> Tensor:
    """vLLM divides by the sum also when a token has one expert, which topk_gate does not."""
    if renormalize and weights.shape[1] == 1:
        weights = weights / (weights + 1e-20)
    return weights if scale == 1.0 else weights * scale


def fused_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
    scoring_func: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``topk`` best experts of every token.

    Args:
        hidden_states: [T, H]; only T is used.
        gating_output: [T, E] logits, differentiable.
        topk: K.
        renormalize: divide the weights by their sum (1 where K = 1).
        indices_type: dtype of the ids; None is int32.
        scoring_func: "softmax" over all experts, or "sigmoid".

    Returns:
        weights [T, K] fp32, best first; ids [T, K]; and token_expert_indices [T, K] int32, the
        place of each pair in vLLM's choice-major order: k * T + t.
    """
    _check_gating(hidden_states, gating_output, scoring_func)
    if indices_type not in (None, *_INDEX_TYPES):
        raise ValueError(f"indices_type must be int32, int64, uint32 or None, got {indices_type}")
    weights, ids = ling_ops.topk_gate(
        gating_output, topk, score_function=scoring_func, renormalize=renormalize and topk > 1
    )
    tokens = gating_output.shape[0]
    place = torch.arange(topk * tokens, dtype=torch.int32, device=ids.device)
    place = place.view(topk, tokens).t().contiguous()
    return _renormalized(weights, renormalize), ids.to(indices_type or torch.int32), place


def grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``topk`` best experts of the ``topk_group`` best groups.

    A group counts by the sum of its two best biased scores with ``e_score_correction_bias`` [E]
    (DeepSeek-V3, Ling 2.0), and by its best score without (DeepSeek-V2). Weights are the unbiased
    scores, computed in fp32 whatever gating_output's dtype, divided by their sum if
    ``renormalize``, times ``routed_scaling_factor``.

    Returns weights [T, K] fp32, differentiable in gating_output, and ids [T, K] int32, best first.
    """
    _check_gating(hidden_states, gating_output, scoring_func)
    _checks.integer("num_expert_group", num_expert_group, 1)
    _checks.integer("topk_group", topk_group, 1, num_expert_group, " (num_expert_group)")
    rule = {"score_function": scoring_func, "renormalize": renormalize and topk > 1}
    if e_score_correction_bias is not None:
        weights, ids = ling_ops.topk_gate(
            gating_output, topk, expert_bias=e_score_correction_bias.float(),
            num_groups=num_expert_group, topk_groups=topk_group, **rule,
        )  # fmt: skip
        return _renormalized(weights, renormalize, routed_scaling_factor), ids
    experts = gating_output.shape[1]
    if experts % num_expert_group:
        raise ValueError(
            f"num_expert_group must divide the {experts} experts, got {num_expert_group}"
        )
    reachable = experts // num_expert_group * topk_group
    _checks.integer("topk", topk, 1, reachable, f" (the experts of {topk_group} groups)")
    logits = gating_output.to(torch.promote_types(gating_output.dtype, torch.float32))
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    grouped = scores.detach().view(len(scores), num_expert_group, experts // num_expert_group)
    # topk_gate selects by the given keys themselves: ties go to the lower id.
    kept = ling_ops.topk_gate(grouped.amax(2), topk_group)[1].long()
    is_kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, kept, True)
    keys = torch.where(is_kept.unsqueeze(2), grouped, -torch.inf).view_as(scores)
    ids = ling_ops.topk_gate(keys, topk)[1]
    weights = scores.gather(1, ids.long())
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return (weights * routed_scaling_factor).float(), ids


def _activation_name(activation: Any) -> str:
    """The name of vLLM's MoEActivation, which may also be given as a string."""
    name = getattr(activation, "value", activation)
    return "gelu_tanh" if name == "gelu_pytorch_tanh" else name


def _biases(quant_config: Any) -> tuple[Tensor | None, Tensor | None]:
    for name in _QUANTISED:
        value = getattr(quant_config, name, None)
        if value is not None and value is not False:
            raise ValueError(f"quant_config must be unquantised, got {name} = {value!r}")
    return getattr(quant_config, "w1_bias", None), getattr(quant_config, "w2_bias", None)


def fused_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Any = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    quant_config: Any = None,
) -> Tensor:
    """``ling_ops.fused_experts`` with vLLM's order of arguments.

    ``activation`` is vLLM's MoEActivation or its name. ``quant_config`` is None or an unquantised
    FusedMoEQuantConfig, whose ``w1_bias`` and ``w2_bias`` are used; anything quantised is an
    error. Returns [T, H] in hidden_states' dtype.
    """
    w1_bias, w2_bias = _biases(quant_config)
    return ling_ops.fused_experts(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation=_activation_name(activation),
        apply_router_weight_on_input=apply_router_weight_on_input,
        global_num_experts=global_num_experts,
        expert_map=expert_map,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
    )
