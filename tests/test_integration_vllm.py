"""vLLM's functions: signatures, and results against their description in plain PyTorch."""

from __future__ import annotations

import importlib.util
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from signatures import assert_takes, in_source, real
from tolerances import assert_bitwise, assert_scores

import ling_ops
from ling_ops.integrations import vllm as shim

MODULES = "vllm.model_executor.layers.fused_moe."
SIGNATURES = {
    "fused_topk": (
        "hidden_states, gating_output, topk, renormalize, indices_type=None, "
        "scoring_func='softmax'",
        MODULES + "router.fused_topk_router:fused_topk",
    ),
    "grouped_topk": (
        "hidden_states, gating_output, topk, renormalize, num_expert_group=0, topk_group=0, "
        "scoring_func='softmax', routed_scaling_factor=1.0, e_score_correction_bias=None",
        MODULES + "router.grouped_topk_router:grouped_topk",
    ),
    "fused_experts": (
        "hidden_states, w1, w2, topk_weights, topk_ids, activation='silu', "
        "apply_router_weight_on_input=False, global_num_experts=-1, expert_map=None, "
        "quant_config=None",
        MODULES + "fused_moe:fused_experts",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """What is written above, and what vLLM has, where there is one to ask (CI has its source)."""
    written, path = SIGNATURES[name]
    if importlib.util.find_spec("vllm") is not None:
        assert real(path) or in_source(path), f"the installed vllm has no {path}"
    assert_takes(getattr(shim, name), written, path, since="vLLM 0.33")


def described_scores(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    return logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()


def described_groups(logits, topk, renormalize, groups, kept, scoring, scale, bias):
    """vLLM's grouped_topk in words of PyTorch: groups by best score, or two best biased ones."""
    scores = described_scores(logits, scoring)
    key = scores if bias is None else scores + bias
    grouped = key.view(len(key), groups, -1)
    if bias is None:
        group_key = grouped.amax(-1)
    else:
        group_key = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    chosen = group_key.topk(kept, dim=-1).indices
    allowed = torch.zeros_like(group_key, dtype=torch.bool).scatter(1, chosen, True)
    allowed = allowed.unsqueeze(-1).expand_as(grouped).reshape(key.shape)
    ids = key.masked_fill(~allowed, -torch.inf).topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, ids


def compare(weights, ids, exact, exact_ids, logits) -> None:
    """The same experts with the same weights, in whatever order."""
    order, exact_order = ids.argsort(1), exact_ids.argsort(1)
    assert torch.equal(ids.gather(1, order).long(), exact_ids.gather(1, exact_order))
    assert weights.dtype == torch.float32
    spread = float(logits.max() - logits.min())
    assert_scores(weights.gather(1, order), exact.gather(1, exact_order), spread=spread)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("topk", [1, 3])
def test_fused_topk(device, topk, scoring, renormalize) -> None:
    logits = torch.randn(17, 8, device=device, requires_grad=True)
    hidden = torch.empty(17, 4, device=device)
    weights, ids, place = shim.fused_topk(hidden, logits, topk, renormalize, None, scoring)
    double = logits.detach().double().requires_grad_()
    exact, exact_ids = described_scores(double, scoring).topk(topk, dim=-1)
    if renormalize:
        exact = exact / exact.sum(-1, keepdim=True)
    compare(weights, ids, exact, exact_ids, logits.detach())
    assert ids.dtype == torch.int32 and torch.equal(ids.long(), exact_ids)
    tokens = torch.arange(17, device=device)
    expected = tokens[:, None] + 17 * torch.arange(topk, device=device)
    assert place.dtype == torch.int32 and torch.equal(place.long(), expected)
    grad = torch.randn_like(weights)
    found = torch.autograd.grad(weights, logits, grad)[0]
    true = torch.autograd.grad(exact, double, grad.double())[0]
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32])
def test_type_of_the_indices(device, dtype) -> None:
    logits = torch.randn(5, 8, device=device)
    ids = shim.fused_topk(logits, logits, 2, True, dtype)[1]
    assert ids.dtype == dtype
    assert torch.equal(ids.long(), logits.topk(2).indices)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("topk", "groups", "kept"), [(4, 4, 2), (1, 2, 1), (3, 1, 1), (6, 8, 3)])
def test_grouped_topk(device, topk, groups, kept, renormalize, biased, scoring) -> None:
    logits = torch.randn(33, 16, device=device, requires_grad=True)
    bias = torch.randn(16, device=device) * 0.1 if biased else None
    weights, ids = shim.grouped_topk(
        torch.empty(33, 4, device=device), logits, topk, renormalize, groups, kept, scoring, 2.5,
        bias,
    )  # fmt: skip
    double = logits.detach().double().requires_grad_()
    exact, exact_ids = described_groups(
        double,
        topk,
        renormalize,
        groups,
        kept,
        scoring,
        2.5,
        bias if bias is None else bias.double(),
    )
    assert ids.dtype == torch.int32
    compare(weights, ids, exact, exact_ids, logits.detach())
    found = torch.autograd.grad(weights.square().sum(), logits)[0]
    true = torch.autograd.grad(exact.square().sum(), double)[0]
    torch.testing.assert_close(found.double(), true, rtol=1e-3, atol=1e-5)


def test_grouped_topk_ties_go_to_the_lower_id(device) -> None:
    logits = torch.zeros(3, 8, device=device)
    _, ids = shim.grouped_topk(logits, logits, 3, True, 4, 2, "softmax")
    assert ids.tolist() == [[0, 1, 2]] * 3


class Activation(Enum):
    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"
    RELU2_NO_MUL = "relu2_no_mul"


def layer(device, width: int, dtype=torch.float32):
    shapes = [(9, 16), (4, width, 16), (4, 16, 24), (9, 2)]
    x, w1, w2, weights = (torch.randn(*shape, device=device).to(dtype) for shape in shapes)
    ids = torch.randint(-1, 5, (9, 2), device=device)
    return x, w1 / 4, w2 / 4, weights.float(), ids


@pytest.mark.parametrize("activation", [*Activation, "silu", "gelu"])
def test_fused_experts_by_position(device, activation) -> None:
    name = getattr(activation, "value", activation)
    ours = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}.get(name, "relu2")
    x, w1, w2, weights, ids = layer(device, 24 if name.endswith("no_mul") else 48)
    out = shim.fused_experts(x, w1, w2, weights, ids, activation, False, -1, None, None)
    assert_bitwise(out, ling_ops.moe_mlp(x, w1, w2, weights, ids, activation=ours))


def test_fused_experts_with_a_map_and_weights_on_the_input(device) -> None:
    x, w1, w2, weights, ids = layer(device, 48)
    weights, ids = weights[:, :1], ids[:, :1].clamp(min=0)
    owned = torch.tensor([-1, 0, 1, -1, 2, 3], device=device)
    out = shim.fused_experts(x, w1, w2, weights, ids, "silu", True, 6, owned)
    here = owned[ids]
    scaled = x * weights
    exact = ling_ops.moe_mlp(scaled, w1, w2, torch.ones_like(weights), here)
    assert_bitwise(out, exact)


def test_quantisation_configs(device) -> None:
    x, w1, w2, weights, ids = layer(device, 48)
    biases = torch.randn(4, 48, device=device), torch.randn(4, 16, device=device)
    plain = SimpleNamespace(use_fp8_w8a8=False, w1_scale=None, w1_bias=biases[0], w2_bias=biases[1])
    out = shim.fused_experts(x, w1, w2, weights, ids, quant_config=plain)
    exact = ling_ops.moe_mlp(x, w1, w2, weights, ids, gate_up_bias=biases[0], down_bias=biases[1])
    assert_bitwise(out, exact)
    fp8 = SimpleNamespace(use_fp8_w8a8=True)
    with pytest.raises(ValueError, match="quant_config must be unquantised, got use_fp8_w8a8"):
        shim.fused_experts(x, w1, w2, weights, ids, quant_config=fp8)


def test_errors_name_the_argument(device) -> None:
    logits = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="scoring_func must be one of 'softmax', 'sigmoid'"):
        shim.fused_topk(logits, logits, 2, True, scoring_func="tanh")
    with pytest.raises(ValueError, match=r"gating_output must have shape \[T, E\]"):
        shim.fused_topk(logits[:3], logits, 2, True)
    with pytest.raises(ValueError, match="indices_type must be"):
        shim.fused_topk(logits, logits, 2, True, torch.float32)
    with pytest.raises(ValueError, match="num_expert_group must be at least 1, got 0"):
        shim.grouped_topk(logits, logits, 2, True)
    with pytest.raises(ValueError, match="num_expert_group must divide the 8 experts, got 3"):
        shim.grouped_topk(logits, logits, 2, True, 3, 2)
    with pytest.raises(ValueError, match=r"topk must be .* at most 4 .* 2 groups\), got 5"):
        shim.grouped_topk(logits, logits, 5, True, 4, 2)
    with pytest.raises(ValueError, match="activation must be one of"):
        x, w1, w2, weights, ids = layer(device, 48)
        shim.fused_experts(x, w1, w2, weights, ids, "swigluoai")
