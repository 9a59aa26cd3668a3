"""``MoE`` with shared experts on few tokens, without gradients: one operator for all experts."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled import needs

import ling_ops
from ling_ops.nn import MoE
from ling_ops.ops._decode import decode_limit

H, E, K, I = 16, 8, 2, 24
LIMIT = decode_limit(K, E)
pytestmark = pytest.mark.cuda


def make(device: torch.device, **changes) -> MoE:
    options = {"init_std": 0.3, "device": device, "dtype": torch.bfloat16, **changes}
    return MoE(H, E, K, I, **options).eval()


@pytest.mark.parametrize("tokens", [0, 1, 5, LIMIT, LIMIT + 1])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_few_tokens_take_the_shared_experts_along(tokens, shared, activation, device):
    """One operator where no gradient is wanted: up to a number of tokens."""
    needs("moe_decode")
    layer = make(device, num_shared_experts=shared, activation=activation)
    x = torch.randn(tokens, H, device=device).bfloat16()
    with torch.no_grad(), torch.profiler.profile() as profile:
        out = layer(x)
    names = {event.key for event in profile.key_averages()}
    assert ("ling_ops::moe_decode" in names) == (tokens <= LIMIT)
    assert ("aten::addmm_" in names) == (tokens > LIMIT)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad(), ling_ops.use_backend("reference"):
        want = exact.experts(x.double(), *exact.gate(x.double())[:2])
        want += exact.shared_experts(x.double())
    torch.testing.assert_close(out.double(), want, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("change", ["hook", "bias", "dtype", "gradient", "autocast", "width"])
def test_shared_experts_that_take_their_own_launches(change, device):
    needs("moe_decode")
    options = {"num_shared_experts": 1}
    if change == "bias":
        options["expert_mlp_bias"] = True
    if change == "width":
        options["shared_intermediate_size"] = I + 8
    layer = make(device, **options)
    if change == "hook":
        layer.shared_experts.up_proj.register_forward_hook(lambda *_: None)
    if change == "dtype":
        layer.shared_experts.float()
        layer.shared_experts.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    x = torch.randn(4, H, device=device).bfloat16()
    with (
        torch.set_grad_enabled(change == "gradient"),
        torch.autocast("cuda", torch.bfloat16, enabled=change == "autocast"),
    ):
        assert layer._decode(x, torch.rand(4, K, device=device), ids(device), None) is None
        assert layer(x).isfinite().all()


def ids(device: torch.device) -> torch.Tensor:
    return torch.zeros(4, K, dtype=torch.int32, device=device)
