"""``lora_mlp`` against ``moe_mlp`` on the materialised weights W + scale B A."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_indices, seeds
from tolerances import assert_within, truth, unit_roundoff

import ling_ops
from ling_ops.ops import _fused_lora
from ling_ops.ops.lora_mlp import LowRank, lora_mlp
from ling_ops.reference.activation import ACTIVATIONS, GATED

ROUNDINGS = 16

SETTINGS = st.fixed_dictionaries({
    "tokens": st.sampled_from([0, 1, 7, 40]), "experts": st.sampled_from([1, 4, 9]),
    "choices": st.integers(1, 3), "rank": st.sampled_from([1, 4, 8, 20]),
    "activation": st.sampled_from(ACTIVATIONS), "targets": st.sampled_from(["u", "d", "ud"]),
    "ids": st.sampled_from(["uniform", "one_expert", "bad_ids"]), "seed": seeds,
})  # fmt: skip


def make(dtype, device, *, tokens, experts, choices, rank, activation, targets, ids, seed):
    """x, weights and additions [x, first, down, a1, b1, a2, b2], gate weights, ids."""
    torch.manual_seed(seed)
    h, i = 16, 24
    width = 2 * i if activation in GATED else i
    shapes = [(tokens, h), (experts, width, h), (experts, h, i), (experts, rank, h),
              (experts, width, rank), (experts, rank, i), (experts, h, rank)]  # fmt: skip
    tensors = [(torch.randn(s) * s[-1] ** -0.5).to(device, dtype) for s in shapes]
    weights = torch.rand(tokens, choices, device=device)
    if ids == "one_expert":
        indices = torch.zeros(tokens, choices, dtype=torch.int64)
    else:
        indices = make_indices(tokens, choices, experts, ids, seed)
    weights = weights[:, : indices.shape[1]]
    return tensors, weights, indices.to(device)


def low_ranks(a1, b1, a2, b2, targets, scale=0.5):
    return {
        "gate_up_lora": LowRank(a1, b1, scale) if "u" in targets else None,
        "down_lora": LowRank(a2, b2, scale) if "d" in targets else None,
    }


def materialised(x, first, down, a1, b1, a2, b2, weights, indices, targets, activation):
    first = first + 0.5 * b1 @ a1 if "u" in targets else first
    down = down + 0.5 * b2 @ a2 if "d" in targets else down
    return ling_ops.moe_mlp(x, first, down, weights, indices, activation=activation)


def pair_sizes(tensors, indices, targets, activation):
    """|y of the pair| |gradient of its token|: at most what a gate weight's gradient sums up."""
    ones = torch.ones(len(indices), 1, dtype=torch.float64, device=indices.device)
    y = [
        materialised(*tensors, ones, indices[:, k : k + 1], targets, activation).norm(dim=1)
        for k in range(indices.shape[1])
    ]
    return torch.stack(y, dim=1) * upstream(tensors[0]).norm(dim=1, keepdim=True)


def upstream(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def with_gradients(run, tensors, weights):
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, weights)]
    out = run(*leaves[:-1], leaves[-1])
    grads = torch.autograd.grad(out, leaves, upstream(out), allow_unused=True)
    return [out.detach(), *grads]


@given(SETTINGS)
def test_equals_the_materialised_weights(settings):
    tensors, weights, indices = make(torch.float64, "cpu", **settings)
    how, activation = settings["targets"], settings["activation"]

    def ours(x, first, down, *rest):
        return lora_mlp(
            x, first, down, rest[-1], indices, activation=activation, **low_ranks(*rest[:-1], how)
        )

    def exact(*all_):
        return materialised(*all_, indices, how, activation)

    weights = weights.double()
    for got, expected in zip(
        with_gradients(ours, tensors, weights), with_gradients(exact, tensors, weights), strict=True
    ):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("targets", ["u", "d", "ud"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradients(targets, activation):
    tensors, weights, indices = make(
        torch.float64, "cpu", tokens=4, experts=3, choices=2, rank=2, activation=activation,
        targets=targets, ids="uniform", seed=3,
    )  # fmt: skip
    leaves = [t.requires_grad_() for t in (*tensors, weights.double())]

    def run(x, first, down, *rest):
        return lora_mlp(
            x, first, down, rest[-1], indices, activation=activation,
            **low_ranks(*rest[:-1], targets),
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves)


def fused(routing, targets, activation, limit):
    """The nodes that run on a GPU; on CPU tensors their operators have CPU implementations."""

    def run(x, first, down, *rest):
        low = {"gate_up_lora": None, "down_lora": None, **low_ranks(*rest[:-1], targets)}
        return _fused_lora.fused_lora_mlp(
            x, first, down, rest[-1], routing, activation=activation, swiglu_limit=limit, **low
        )

    return run


@given(SETTINGS, st.sampled_from([None, 3]), st.sampled_from([None, 0.5]))
def test_the_nodes_of_the_kernels_in_float64(settings, capacity, limit):
    """Output and every gradient, with dropped pairs whose gate weights are NaN, and empty rows."""
    tensors, weights, indices = make(torch.float64, "cpu", **settings)
    how, activation = settings["targets"], settings["activation"]
    limit = limit if activation in GATED else None
    routing = ling_ops.route(indices, settings["experts"], capacity=capacity)
    weights[routing.token_row < 0] = float("nan")

    def exact(x, first, down, a1, b1, a2, b2, gates):
        first = first + 0.5 * b1 @ a1 if "u" in how else first
        down = down + 0.5 * b2 @ a2 if "d" in how else down
        return ling_ops.moe_mlp(
            x, first, down, gates, indices, routing=routing, activation=activation,
            swiglu_limit=limit,
        )  # fmt: skip

    run = fused(routing, how, activation, limit)
    *mine, gates = with_gradients(run, tensors, weights)
    *right, right_gates = with_gradients(exact, tensors, weights)
    torch.testing.assert_close(gates, right_gates, rtol=1e-6, atol=1e-7)  # fp32, as the weights
    for got, expected in zip(mine, right, strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_the_nodes_under_the_compiler():
    """One graph, though an operator of it changes a tensor in place."""
    tensors, weights, indices = make(
        torch.float64, "cpu", tokens=9, experts=4, choices=2, rank=8, activation="swiglu",
        targets="ud", ids="bad_ids", seed=0,
    )  # fmt: skip
    run = fused(ling_ops.route(indices, 4), "ud", "swiglu", None)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, expected in zip(
        with_gradients(compiled, tensors, weights), with_gradients(run, tensors, weights),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


class _Calls:
    """Operators that note their names."""

    def __init__(self):
        self.names = []

    def __getattr__(self, name):
        self.names.append(name)
        return getattr(torch.ops.ling_ops, name)


def test_the_nodes_spend_nothing_on_what_is_frozen(monkeypatch):
    tensors, weights, indices = make(
        torch.float64, "cpu", tokens=8, experts=4, choices=2, rank=8, activation="swiglu",
        targets="ud", ids="uniform", seed=0,
    )  # fmt: skip
    for addition in tensors[3:]:
        addition.requires_grad_()
    routing = ling_ops.route(indices, 4)
    calls = _Calls()

    def refused(*_):
        raise AssertionError("a frozen weight's gradient was computed")

    out = fused(routing, "ud", "swiglu", None)(*tensors, weights)
    monkeypatch.setattr(_fused_lora, "_OPS", calls)
    monkeypatch.setattr(_fused_lora, "_weight_grad", refused)
    out.sum().backward()
    assert all(t.grad is None for t in tensors[:3])
    assert all(t.grad.abs().max() > 0 for t in tensors[3:])
    # x is frozen too: of the rows' gradients only the thin ones, and nothing is summed per token
    assert calls.names.count("grouped_gemm") == 1 and "combine" not in calls.names


@pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")
@given(SETTINGS, st.sampled_from([torch.bfloat16, torch.float16]))
def test_low_precision(device, settings, dtype):
    """On a GPU the kernels' path; elsewhere the definition, which rounds between its steps."""
    tensors, weights, indices = make(dtype, device, **settings)
    how, activation = settings["targets"], settings["activation"]

    def ours(x, first, down, *rest):
        return lora_mlp(
            x, first, down, rest[-1], indices, activation=activation, **low_ranks(*rest[:-1], how)
        )

    wide = [t.double() for t in tensors]
    exact = truth(with_gradients, ours, wide, weights.double())
    naive = truth(with_gradients, ours, tensors, weights)
    # The gate weights and their gradients are fp32; what they sum up is rounded as the rest.
    sizes = truth(pair_sizes, wide, indices, how, activation)
    rounded = sizes * ROUNDINGS * unit_roundoff(dtype) / unit_roundoff(torch.float32)
    for name, got, expected, plain in zip(
        ("out", "x", "first", "down", "a1", "b1", "a2", "b2", "weights"),
        with_gradients(ours, tensors, weights), exact, naive, strict=True,
    ):  # fmt: skip
        if expected is None:
            assert got is None
        else:
            size = rounded if name == "weights" else 0.0
            assert_within(
                got, expected, naive=plain, magnitude=size, roundings=ROUNDINGS, name=name
            )


def test_frozen_weights_get_no_gradient_and_additions_do():
    tensors, weights, indices = make(
        torch.float32, "cpu", tokens=8, experts=4, choices=2, rank=4, activation="swiglu",
        targets="ud", ids="uniform", seed=0,
    )  # fmt: skip
    for addition in tensors[3:]:
        addition.requires_grad_()
    out = lora_mlp(*tensors[:3], weights, indices, **low_ranks(*tensors[3:], "ud"))
    out.sum().backward()
    assert all(t.grad is None for t in tensors[:3])
    assert all(t.grad.abs().max() > 0 for t in tensors[3:])


def test_without_additions_it_is_moe_mlp():
    tensors, weights, indices = make(
        torch.float32, "cpu", tokens=8, experts=4, choices=2, rank=4, activation="swiglu",
        targets="ud", ids="uniform", seed=0,
    )  # fmt: skip
    args = (*tensors[:3], weights, indices)
    assert torch.equal(lora_mlp(*args), ling_ops.moe_mlp(*args))


def test_dropout_scales_and_drops_what_enters_a():
    tensors, weights, indices = make(
        torch.float64, "cpu", tokens=400, experts=4, choices=2, rank=4, activation="swiglu",
        targets="d", ids="uniform", seed=0,
    )  # fmt: skip
    low = LowRank(*tensors[5:], 0.5, 0.5)
    args = (*tensors[:3], weights.double(), indices)
    dropped = [lora_mlp(*args, down_lora=low) for _ in range(200)]
    kept = lora_mlp(*args, down_lora=low._replace(dropout=0.0))
    assert not torch.allclose(dropped[0], dropped[1])
    error = (torch.stack(dropped).mean(0) - kept).abs().mean()
    assert error < 0.15 * (dropped[0] - kept).abs().mean()  # 1 / sqrt(200) = 0.07


@pytest.mark.parametrize(
    "change,message",
    [
        ({"a": torch.zeros(4, 2, 15)}, r"gate_up_lora\.a must have shape"),
        ({"b": torch.zeros(4, 48, 3)}, r"gate_up_lora\.b must have shape"),
        ({"a": torch.zeros(4, 2, 16, dtype=torch.int32)}, r"gate_up_lora\.a must have dtype"),
    ],
)
def test_errors_name_the_argument(change, message):
    low = LowRank(torch.zeros(4, 2, 16), torch.zeros(4, 48, 2))._replace(**change)
    x, first, down = torch.zeros(3, 16), torch.zeros(4, 48, 16), torch.zeros(4, 16, 24)
    with pytest.raises(ValueError, match=message):
        lora_mlp(x, first, down, torch.zeros(3, 2), torch.zeros(3, 2, dtype=int), gate_up_lora=low)


@pytest.mark.parametrize(
    "activation,limit,message",
    [
        ("swiglu", -1.0, "swiglu_limit must be .*got -1.0"),
        ("gelu", 1.0, "swiglu_limit must be None for activation 'gelu', got 1.0"),
    ],
)
def test_a_limit_is_checked_as_in_moe_mlp(activation, limit, message):
    tensors, weights, indices = make(
        torch.float32, "cpu", tokens=3, experts=4, choices=2, rank=2, activation=activation,
        targets="u", ids="uniform", seed=0,
    )  # fmt: skip
    low = LowRank(*tensors[3:5])
    options = {"gate_up_lora": low, "activation": activation, "swiglu_limit": limit}
    with pytest.raises(ValueError, match=message):
        lora_mlp(*tensors[:3], weights, indices, **options)
