"""moe_mlp and fused_experts: the dense definition, accuracy, gradients, drops, main gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import GATED, ID_STYLES, PLAIN, MlpCase, make_mlp, mlp_cases
from tolerances import assert_bitwise, assert_within, truth, truth64, upcast

from ling_ops import fused_experts, moe_mlp, route

# What is kept in the low precision on the way: h, a, y, and then the gradients of y, a, h.
FORWARD_ROUNDINGS, BACKWARD_ROUNDINGS = 3, 6
LEAVES = ("x", "gate_up", "down", "weights")
FORMULAS = {
    "swiglu": lambda g, u: F.silu(g) * u,
    "geglu": lambda g, u: F.gelu(g) * u,
    "geglu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda h: F.relu(h) ** 2,
}


def run(case: MlpCase, **options: object) -> torch.Tensor:
    return moe_mlp(*case.tensors, **case.options, **options)


def dense(case: MlpCase) -> torch.Tensor:
    """Every expert on every token, weighted by the gate weights of the pairs that chose it."""
    ids = case.indices.long()
    experts = len(case.down)
    chosen = F.one_hot(torch.where((ids >= 0) & (ids < experts), ids, experts), experts + 1)
    share = (case.weights.unsqueeze(-1) * chosen[..., :experts]).sum(1)  # [T,E]
    h = torch.einsum("th,enh->ten", case.x, case.gate_up)
    if "gate_up_bias" in case.options:
        h = h + case.options["gate_up_bias"]
    name, limit = case.options["activation"], case.options.get("swiglu_limit")
    if name in GATED:
        gate, up = h.chunk(2, dim=-1)
        if limit is None:
            a = FORMULAS[name](gate, up)
        else:
            a = F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    else:
        a = FORMULAS[name](h)
    y = torch.einsum("tei,ehi->teh", a, case.down)
    if "down_bias" in case.options:
        y = y + case.options["down_bias"]
    return torch.einsum("te,teh->th", share, y)


@pytest.mark.parametrize("activation", [*GATED, *PLAIN, "clamped"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("style", ID_STYLES)
def test_equals_the_dense_mixture(
    device: torch.device, activation: str, bias: bool, style: str
) -> None:
    limit = 0.2 if activation == "clamped" else None  # below the minimum of silu, -0.28
    name = "swiglu" if activation == "clamped" else activation
    case = make_mlp(19, 6, 5, 4, 2, activation=name, bias=bias, limit=limit, style=style)
    case = case.to(device)
    torch.testing.assert_close(truth(run, case), dense(case))


@given(case=mlp_cases(dtypes=st.sampled_from([torch.bfloat16, torch.float16, torch.float32])))
def test_accuracy_against_float64(device: torch.device, case: MlpCase) -> None:
    case = case.to(device)
    out = run(case)
    exact = truth64(moe_mlp, *case.tensors, **case.options)
    assert out.dtype == case.x.dtype and out.shape == case.x.shape
    # fp32 rounding of the sums, as large as the terms: at worst all of a token's terms add up.
    size = exact.abs().max() if exact.numel() else 0.0
    length = case.x.shape[1] + case.down.shape[2]
    assert_within(
        out,
        exact,
        naive=truth(run, case),
        magnitude=size,
        length=length,
        roundings=FORWARD_ROUNDINGS,
    )


def widen(case: MlpCase) -> MlpCase:
    return MlpCase(*(upcast(t.detach()) for t in case.tensors), upcast(case.options))


def gradients(case: MlpCase, upstream: torch.Tensor, **options: object) -> dict[str, torch.Tensor]:
    leaves = {name: getattr(case, name).detach().clone().requires_grad_() for name in LEAVES}
    biases = {
        name: case.options[name].detach().clone().requires_grad_()
        for name in ("gate_up_bias", "down_bias")
        if name in case.options
    }
    out = moe_mlp(*leaves.values(), case.indices, **(case.options | biases), **options)
    leaves |= biases
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return dict(zip(leaves, grads, strict=True))


@given(case=mlp_cases())
def test_gradients_against_float64(device: torch.device, case: MlpCase) -> None:
    case = case.to(device)
    upstream = torch.randn_like(case.x)
    actual, naive = gradients(case, upstream), truth(gradients, case, upstream)
    exact = truth(gradients, widen(case), upstream.double())
    length = case.x.shape[0] + case.x.shape[1] + case.down.shape[2]
    for name, want in exact.items():
        size = want.abs().max() if want.numel() else 0.0
        assert_within(
            actual[name],
            want,
            naive=naive[name],
            magnitude=size,
            length=length,
            roundings=BACKWARD_ROUNDINGS,
            name=f"gradient of {name}",
        )
    idle = route(case.indices, len(case.down)).expert_counts == 0
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        if name in actual:
            assert (actual[name][idle] == 0).all(), f"an idle expert got a gradient of {name}"


@pytest.mark.parametrize("inner", [1032, 2056])
def test_gradients_of_wide_experts(device: torch.device, inner: int) -> None:
    """Beyond the width up to which a kernel gathers rows for dW: gate_up's, then down's too."""
    case = make_mlp(40, 16, inner, 4, 2, dtype=torch.bfloat16, seed=10)
    test_gradients_against_float64.hypothesis.inner_test(device, case)


@pytest.mark.parametrize("tokens", [1919, 1920, 3000])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("style", ["uniform", "skewed", "empty_experts", "one_expert"])
def test_many_rows_an_expert(device, tokens: int, activation: str, style: str) -> None:
    """On both sides of 640 rows an expert, where kernels go over to pairs of blocks."""
    case = make_mlp(
        tokens, 136, 264, 3, 1, dtype=torch.bfloat16, activation=activation, style=style
    )
    test_accuracy_against_float64.hypothesis.inner_test(device, case)
    test_gradients_against_float64.hypothesis.inner_test(device, case)


@pytest.mark.parametrize("activation", [*GATED, *PLAIN])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(device: torch.device, activation: str, bias: bool) -> None:
    case = make_mlp(5, 3, 2, 3, 2, activation=activation, bias=bias, seed=1).to(device)
    leaves = [getattr(case, name).requires_grad_() for name in LEAVES]
    names = [name for name in ("gate_up_bias", "down_bias") if name in case.options]
    leaves += [case.options[name].requires_grad_() for name in names]

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        biases = dict(zip(names, tensors[4:], strict=True))
        return moe_mlp(*tensors[:4], case.indices, **(case.options | biases))

    assert truth(torch.autograd.gradcheck, layer, leaves)


def test_gradcheck_with_drops_and_a_limit(device: torch.device) -> None:
    case = make_mlp(6, 3, 2, 2, 1, limit=0.4, seed=2).to(device)
    routing = route(case.indices, 2, capacity=2)
    leaves = [getattr(case, name).requires_grad_() for name in LEAVES]

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return moe_mlp(*tensors, case.indices, routing=routing, **case.options)

    assert truth(torch.autograd.gradcheck, layer, leaves)


@pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=4) if any(n)])
def test_every_subset_of_requires_grad(device: torch.device, needs: tuple[bool, ...]) -> None:
    """Only the gradients that are required are computed, and they don't depend on the others."""
    case = make_mlp(33, 16, 8, 4, 2, dtype=torch.float32, bias=True, seed=3).to(device)
    upstream = torch.randn_like(case.x)
    everything = gradients(case, upstream)
    leaves = {
        name: getattr(case, name).detach().clone().requires_grad_(need)
        for name, need in zip(LEAVES, needs, strict=True)
    }
    moe_mlp(*leaves.values(), case.indices, **case.options).backward(upstream)
    for (name, leaf), need in zip(leaves.items(), needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_bitwise(leaf.grad, everything[name], name)


def test_no_gradient_needed(device: torch.device) -> None:
    case = make_mlp(9, 16, 8, 4, 2, dtype=torch.float32).to(device)
    assert not run(case).requires_grad
    with torch.no_grad():
        case.x.requires_grad_()
        assert not run(case).requires_grad


# --- drops ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_dropped_pairs_add_exactly_zero(
    device: torch.device, dtype: torch.dtype, bias: bool
) -> None:
    """As if their weight were zero, in the output and in every gradient; NaN is not seen."""
    case = make_mlp(40, 16, 8, 4, 2, dtype=dtype, bias=bias, style="skewed", seed=4).to(device)
    routing = route(case.indices, 4, capacity=6)
    dropped = routing.token_row < 0
    gone = dropped.all(1)
    assert gone.any() and not gone.all()
    upstream = torch.randn_like(case.x)
    case.x[gone] = float("nan")
    case.weights[dropped] = float("nan")
    assert (run(case, routing=routing)[gone] == 0).all()
    grads = gradients(case, upstream, routing=routing)
    assert (grads["x"][gone] == 0).all() and (grads["weights"][dropped] == 0).all()
    assert all(grad.isfinite().all() for grad in grads.values())

    case.x[gone] = 0.0
    case.weights[dropped] = 0.0
    plain = gradients(case, upstream)
    torch.testing.assert_close(run(case, routing=routing), run(case))
    for name in ("x", "gate_up", "down"):
        torch.testing.assert_close(grads[name], plain[name])


def test_ids_out_of_range_add_nothing(device: torch.device) -> None:
    case = make_mlp(30, 16, 8, 4, 2, dtype=torch.float32, seed=5).to(device)
    bad = torch.tensor([-1, 4, 2**31 - 1, -(2**31)], device=device)
    case.indices[::3, 1] = bad.repeat(3)[:10].int()
    with_bad = run(case)
    weights = case.weights.clone()
    weights[::3, 1] = 0
    case.indices[::3, 1] = case.indices[::3, 0]
    torch.testing.assert_close(
        with_bad, moe_mlp(case.x, case.gate_up, case.down, weights, case.indices, **case.options)
    )


def test_nan_stays_in_its_token(device: torch.device) -> None:
    case = make_mlp(20, 16, 8, 4, 2, dtype=torch.float32, seed=6).to(device)
    clean = run(case)
    case.x[3] = float("nan")
    case.weights[7, 1] = float("nan")
    out = run(case)
    bad = out.isnan().any(1)
    assert bad.nonzero().flatten().tolist() == [3, 7]
    assert_bitwise(out[~bad], clean[~bad])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_tokens(device: torch.device, dtype: torch.dtype) -> None:
    case = make_mlp(0, 16, 8, 4, 2, dtype=dtype).to(device)
    grads = truth(gradients, case, case.x) if dtype == torch.float64 else gradients(case, case.x)
    assert grads["x"].shape == (0, 16)
    assert not grads["gate_up"].any() and not grads["down"].any()


def test_all_experts_chosen(device: torch.device) -> None:
    case = make_mlp(7, 8, 8, 4, 4).to(device)
    torch.testing.assert_close(truth(run, case), dense(case))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_a_routing_made_before_changes_nothing(device: torch.device, ids: torch.dtype) -> None:
    case = make_mlp(21, 16, 8, 4, 2, dtype=torch.float32, seed=7).to(device)
    indices = case.indices.to(ids)
    args = (case.x, case.gate_up, case.down, case.weights, indices)
    assert_bitwise(moe_mlp(*args, routing=route(indices, 4)), run(case))


def test_strides_do_not_matter(device: torch.device) -> None:
    case = make_mlp(21, 16, 8, 4, 2, dtype=torch.bfloat16, seed=8).to(device)
    wide = torch.zeros(21, 32, dtype=torch.bfloat16, device=device)
    wide[:, :16] = case.x
    other = moe_mlp(
        wide[:, :16],
        case.gate_up.transpose(1, 2).contiguous().transpose(1, 2),
        case.down.transpose(1, 2).contiguous().transpose(1, 2),
        case.weights.t().contiguous().t(),
        case.indices.t().contiguous().t(),
    )
    exact = truth64(moe_mlp, *case.tensors)
    assert_within(other, exact, naive=truth(run, case), magnitude=exact.abs().max(), length=24)


# --- main gradients ------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_main_grads_accumulate(device: torch.device, dtype: torch.dtype) -> None:
    case = make_mlp(50, 16, 8, 4, 2, dtype=dtype, seed=9).to(device)
    case.gate_up.requires_grad_(), case.down.requires_grad_(), case.x.requires_grad_()
    start = [torch.randn_like(t, dtype=torch.float32) for t in (case.gate_up, case.down)]
    main = [t.clone() for t in start]
    upstream = torch.randn_like(case.x)
    for _ in range(2):
        run(case, main_grads=tuple(main)).backward(upstream)
    assert case.gate_up.grad is None and case.down.grad is None
    exact = truth(gradients, widen(case), upstream.double())
    naive = truth(gradients, case, upstream)
    added = {
        name: (after - before).double() / 2
        for name, before, after in zip(("gate_up", "down"), start, main, strict=True)
    }
    for name, gradient in added.items():
        slack = 1e-6 * float(gradient.abs().max())
        error = (naive[name].double() - exact[name]).abs().max().item()
        assert (gradient - exact[name]).abs().max() <= 1.5 * error + slack
    half = case.x.grad / 2  # of two equal gradients
    assert_within(half, exact["x"], naive=naive["x"], roundings=BACKWARD_ROUNDINGS, name="x")


@pytest.mark.filterwarnings("ignore:Using backward")
def test_main_grads_stay_out_of_a_kept_graph(device: torch.device) -> None:
    case = make_mlp(6, 16, 8, 4, 2, dtype=torch.float32).to(device)
    case.gate_up.requires_grad_(), case.down.requires_grad_()
    main = tuple(torch.zeros_like(t) for t in (case.gate_up.detach(), case.down.detach()))
    run(case, main_grads=main).square().sum().backward(create_graph=True)
    assert all(t.grad_fn is None and t.abs().sum() > 0 for t in main)


def test_an_unused_expert_s_bias_gets_no_gradient(device: torch.device) -> None:
    """Rows that belong to no expert lie behind the last one's, whose bias here has no slope."""
    case = make_mlp(3, 16, 8, 3, 1, dtype=torch.float32, activation="gelu_tanh", bias=True)
    case = case.to(device)
    case.indices.copy_(torch.tensor([[0], [-1], [1]]))
    bias = case.options["gate_up_bias"]
    bias[2] = torch.inf
    bias.requires_grad_()
    run(case).sum().backward()
    assert torch.equal(bias.grad[2], torch.zeros_like(bias.grad[2]))


# --- fused_experts -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name,ours",
    [
        ("silu", "swiglu"),
        ("gelu", "geglu"),
        ("gelu_tanh", "geglu_tanh"),
        ("silu_no_mul", "silu"),
        ("gelu_no_mul", "gelu"),
        ("relu2_no_mul", "relu2"),
    ],
)
def test_fused_experts_is_moe_mlp(device: torch.device, name: str, ours: str) -> None:
    case = make_mlp(12, 16, 8, 4, 2, activation=ours, dtype=torch.float32).to(device)
    assert_bitwise(fused_experts(*case.tensors, activation=name), run(case))


def test_fused_experts_with_an_expert_map(device: torch.device) -> None:
    """Rank 1 of 2 holds global experts 2 and 3; the others add nothing."""
    case = make_mlp(12, 16, 8, 4, 2, dtype=torch.float32).to(device)
    halves = []
    for rank in range(2):
        held = slice(2 * rank, 2 * rank + 2)
        table = torch.full((4,), -1, dtype=torch.int32, device=device)
        table[held] = torch.arange(2, dtype=torch.int32, device=device)
        halves.append(
            fused_experts(
                case.x,
                case.gate_up[held],
                case.down[held],
                case.weights,
                case.indices,
                expert_map=table,
                global_num_experts=4,
            )
        )
    torch.testing.assert_close(halves[0] + halves[1], run(case))


def test_fused_experts_in_place_and_weight_on_input(device: torch.device) -> None:
    case = make_mlp(12, 16, 8, 4, 1, activation="relu2", dtype=torch.float32).to(device)
    x = case.x.clone()
    out = fused_experts(x, *case.tensors[1:], activation="relu2_no_mul", inplace=True)
    assert out is x
    assert_bitwise(out, run(case))
    weighted = fused_experts(
        *case.tensors, activation="relu2_no_mul", apply_router_weight_on_input=True
    )
    # relu2 is homogeneous of degree two
    squared = moe_mlp(*case.tensors[:3], case.weights**2, case.indices, activation="relu2")
    torch.testing.assert_close(weighted, squared)
