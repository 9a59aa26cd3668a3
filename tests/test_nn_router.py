"""``ling_ops.nn.Router``: fp32 everywhere, replay, and losses that inject their gradients."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tolerances import assert_within
from torch.nn import functional as F

import ling_ops
from ling_ops.nn import Router
from ling_ops.nn._router_product import router_product
from ling_ops.ops.gate_losses import probabilities

H, E, K, T = 16, 8, 2, 12
OPTIONS = {
    "softmax": {"score_function": "softmax"},
    "softmax_raw": {"score_function": "softmax", "renormalize": False},
    "sigmoid_groups": {
        "score_function": "sigmoid",
        "use_expert_bias": True,
        "num_groups": 4,
        "topk_groups": 2,
        "scale": 2.5,
    },
}


def make(device: torch.device, name: str = "softmax", **changes) -> Router:
    options = {"init_std": 0.5, **OPTIONS[name], **changes}
    router = Router(H, E, K, device=device, **options)
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.linspace(-0.2, 0.2, E))
    return router


def tokens(device: torch.device, count: int = T, dtype: torch.dtype = torch.float32):
    return torch.randn(count, H, device=device, dtype=dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_gate_of_its_fp32_logits(name, device):
    router, x = make(device, name), tokens(device)
    out = router(x)
    logits = F.linear(x, router.weight)
    weights, indices = ling_ops.topk_gate(
        logits,
        K,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
        num_groups=router.num_groups,
        topk_groups=router.topk_groups,
        renormalize=router.renormalize,
        scale=router.scale,
    )
    assert torch.equal(out.logits, logits)
    assert torch.equal(out.indices, indices)
    assert torch.equal(out.weights, weights)
    assert out.losses == {}


def test_bias_of_the_linear_map(device):
    router, x = make(device, bias=True), tokens(device)
    with torch.no_grad():
        router.bias.normal_()
    torch.testing.assert_close(router(x).logits, F.linear(x, router.weight, router.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_never_reaches_the_logits(dtype, autocast, device):
    router = make(device, "sigmoid_groups", dtype=dtype, z_loss_coefficient=0.1)
    x = tokens(device, dtype=dtype)
    context = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        out = router(x)
    assert out.logits.dtype == out.weights.dtype == torch.float32
    # rounding to bf16 or fp16 anywhere would show at 1e-3
    torch.testing.assert_close(out.logits, F.linear(x.float(), router.weight.float()))
    assert out.losses["z_loss"].dtype == torch.float32
    out.weights.sum().backward()
    assert router.weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_expert_bias_stays_fp32(dtype, device):
    router = make(device, "sigmoid_groups")
    exact = router.expert_bias.clone()
    router.to(dtype)
    assert router.weight.dtype == dtype
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, exact)
    assert "expert_bias" in router.state_dict()


def test_jitter_is_for_training_only(device):
    router, x = make(device, jitter=0.1), tokens(device)
    first, second = router(x).logits, router(x).logits
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    again = router(x).logits
    torch.manual_seed(3)
    assert torch.equal(router(x).logits, again)
    router.eval()
    assert torch.equal(router(x).logits, F.linear(x, router.weight))


@pytest.mark.parametrize("name", OPTIONS)
def test_replay_of_the_own_routing_changes_nothing(name, device):
    router, x = make(device, name), tokens(device)
    chosen = router(x)
    factor = torch.randn(T, K, device=device)
    (chosen.weights * factor).sum().backward()
    expected = router.weight.grad.clone()
    router.weight.grad = None
    replayed = router(x, indices=chosen.indices)
    torch.testing.assert_close(replayed.weights, chosen.weights, rtol=1e-6, atol=0)
    (replayed.weights * factor).sum().backward()
    torch.testing.assert_close(router.weight.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_replay_is_differentiable(name, dtype, device):
    router = make(device, name, dtype=torch.float64)
    indices = torch.randn(T, E, device=device).argsort(1)[:, :K].to(dtype)
    x = tokens(device, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: router(x, indices=indices).weights, (x,))


def test_replayed_bad_ids_weigh_nothing(device):
    router, x = make(device, "softmax_raw"), tokens(device)
    indices = router(x).indices.clone()
    indices[0], indices[1] = E, -1
    weights = router(x, indices=indices).weights
    assert weights[:2].eq(0).all() and weights[2:].gt(0).all()


COEFFICIENTS = {
    "balance_coefficient": 0.3,
    "sequence_balance_coefficient": 0.2,
    "z_loss_coefficient": 0.1,
}


def explicit_losses(router: Router, out, length: int) -> torch.Tensor:
    probs = probabilities(out.logits, router.score_function)
    return (
        ling_ops.load_balancing_loss(probs, out.indices, coefficient=0.3)
        + ling_ops.sequence_balancing_loss(
            probs, out.indices, sequence_length=length, coefficient=0.2
        )
        + ling_ops.router_z_loss(out.logits, coefficient=0.1)
    )


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_injected_gradient_is_the_explicit_one(name, scale, device):
    plain = make(device, name, dtype=torch.float64)
    router = make(device, name, dtype=torch.float64, **COEFFICIENTS)
    router.load_state_dict(plain.state_dict())
    router.loss_scale = scale
    x, factor = tokens(device, dtype=torch.float64), torch.randn(T, K, device=device).double()

    out = plain(x)
    losses = explicit_losses(plain, out, T // 3)
    ((out.weights * factor).sum() + scale * losses).backward()
    injected = router(x, sequence_length=T // 3)
    (injected.weights * factor).sum().backward()

    assert torch.equal(injected.weights, out.weights)
    torch.testing.assert_close(router.weight.grad, plain.weight.grad)
    torch.testing.assert_close(sum(injected.losses.values()), losses.detach())
    assert set(injected.losses) == {"balance", "sequence_balance", "z_loss"}


def test_padding_takes_no_part_in_the_losses(device):
    router = make(device, "sigmoid_groups", dtype=torch.float64, **COEFFICIENTS)
    x = tokens(device, 12, torch.float64)
    mask = torch.ones(12, dtype=torch.bool, device=device)
    mask[4:6] = mask[9:12] = False  # sequences of 6: 4 and 3 real tokens
    padded = router(x, sequence_length=6, token_mask=mask).losses
    alone = [router(part, sequence_length=len(part)).losses for part in (x[:4], x[6:9])]
    real = router(x[mask], sequence_length=1).losses
    torch.testing.assert_close(padded["balance"], real["balance"])
    torch.testing.assert_close(padded["z_loss"], real["z_loss"])
    expected = (alone[0]["sequence_balance"] + alone[1]["sequence_balance"]) / 2
    torch.testing.assert_close(padded["sequence_balance"], expected)


def test_all_padding_gives_no_loss(device):
    router = make(device, **COEFFICIENTS)
    mask = torch.zeros(T, dtype=torch.bool, device=device)
    out = router(tokens(device), sequence_length=T, token_mask=mask)
    assert all(loss == 0 for loss in out.losses.values())
    out.weights.sum().backward()
    assert router.weight.grad.isfinite().all()


def test_eval_has_no_losses_and_zero_tokens_work(device):
    router = make(device, **COEFFICIENTS)
    out = router(tokens(device, 0), sequence_length=1)
    assert out.weights.shape == (0, K) and out.losses == {}
    router.eval()
    assert router(tokens(device)).losses == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts: got 0"),
        ({"num_experts_per_token": 9}, "num_experts_per_token: got 9, need at most 8"),
        ({"num_groups": 3}, "num_groups: got 3, need a divisor of num_experts=8"),
        ({"num_groups": 2, "topk_groups": 3}, "topk_groups: got 3, need at most num_groups=2"),
        (
            {"num_groups": 8, "topk_groups": 1},
            "num_experts_per_token: got 2, need at most 1",
        ),
        ({"score_function": "tanh"}, "score_function: got 'tanh'"),
        ({"jitter": 1.0}, "jitter: got 1.0"),
        ({"z_loss_coefficient": -1.0}, "z_loss_coefficient: got -1.0"),
    ],
)
def test_bad_options(changes, message):
    options = {"hidden_size": H, "num_experts": E, "num_experts_per_token": K, **changes}
    with pytest.raises(ValueError, match=message):
        Router(**options)


def test_bad_input(device):
    router, x = make(device, sequence_balance_coefficient=0.1), tokens(device)
    with pytest.raises(ValueError, match=r"x: got shape \(12, 15\), need \[T, 16\]"):
        router(x[:, 1:])
    with pytest.raises(TypeError, match=r"x: got dtype torch\.int64"):
        router(x.long())
    with pytest.raises(ValueError, match="token_mask: got"):
        router(x, token_mask=torch.ones(T + 1, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match=r"indices: got shape \(12, 3\), need \[12, 2\]"):
        router(x, indices=torch.zeros(T, 3, dtype=torch.int32, device=device))
    with pytest.raises(TypeError, match=r"indices: got dtype torch\.float32"):
        router(x, indices=torch.zeros(T, K, device=device))
    with pytest.raises(ValueError, match="sequence_length must be the tokens per sequence"):
        router(x)


@pytest.mark.cuda
def test_bf16_product_is_as_exact_as_fp32(device):
    """Logits and gradients of the tensor-core product against float64, at a size that adds up."""
    x = torch.randn(300, 512, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(40, 512, device=device) * 512**-0.5).bfloat16().requires_grad_()
    upstream = torch.randn(300, 40, device=device)
    logits = router_product(x, weight)
    assert logits.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = F.linear(*wide)
    assert_within(logits, exact, magnitude=(wide[0].abs() @ wide[1].abs().t()), length=512)
    got = torch.autograd.grad(logits, (x, weight), upstream)
    expected = torch.autograd.grad(exact, wide, upstream.double())
    for name, one, other in zip(("x", "weight"), got, expected, strict=True):
        size = other.abs().max().item()
        assert_within(one, other, roundings=1, magnitude=size, length=512, name=name)
