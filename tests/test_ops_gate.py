"""topk_gate: which experts, in which order, with which weights and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import GateCase, expert_counts, gate_cases, many_expert_counts
from tolerances import assert_scores, assert_within, truth, truth64, unit_roundoff

from ling_ops import topk_gate

# Exact comparison of the selection is fair where a rounding of the score cannot reorder it:
# saturated scores differ by subnormals, which a kernel may flush.
SCORED_STYLES = ["normal", "grid", "constant", "masked", "bad_rows", "special"]


def gate(case: GateCase) -> tuple[torch.Tensor, torch.Tensor]:
    return topk_gate(case.logits, case.k, **case.options)


def ahead(keys: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Whether expert ``first`` comes before ``second``: larger key, NaN last, then lower id."""
    a, b = keys.gather(1, first), keys.gather(1, second)
    same = (a == b) | (a.isnan() & b.isnan())
    return (a > b) | (b.isnan() & ~a.isnan()) | (same & (first < second))


def assert_ordered(keys: torch.Tensor, indices: torch.Tensor, among: torch.Tensor) -> None:
    """``indices`` are the first ones of ``among`` (bool [T,E]) in order of ``keys``."""
    tokens, experts = keys.shape
    ids = indices.long()
    assert ahead(keys, ids[:, :-1], ids[:, 1:]).all()
    rest = among.clone().scatter_(1, ids, False)
    everyone = torch.arange(experts, device=keys.device).expand(tokens, -1)
    last = ids[:, -1:].expand(-1, experts)
    assert (ahead(keys, last, everyone) | ~rest).all()


def assert_valid_ids(indices: torch.Tensor, experts: int) -> None:
    assert indices.dtype == torch.int32
    assert ((indices >= 0) & (indices < experts)).all()
    ordered = indices.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all(), "an expert was chosen twice"


@given(case=gate_cases(plain=True, experts=expert_counts | many_expert_counts))
def test_softmax_picks_the_largest_logits(device: torch.device, case: GateCase) -> None:
    case = case.to(device)
    weights, indices = gate(case)
    assert weights.shape == indices.shape == (len(case.logits), case.k)
    assert weights.dtype == torch.float32
    assert_valid_ids(indices, case.num_experts)
    everyone = torch.ones_like(case.logits, dtype=torch.bool)
    assert_ordered(case.logits.float(), indices, everyone)


@given(case=gate_cases(plain=True))
def test_softmax_selection_equals_the_reference(device: torch.device, case: GateCase) -> None:
    case = case.to(device)
    assert torch.equal(gate(case)[1], truth(gate, case)[1])


@given(case=gate_cases())
def test_ids_are_valid_on_any_input(device: torch.device, case: GateCase) -> None:
    weights, indices = gate(case.to(device))
    assert_valid_ids(indices, case.num_experts)
    groups = case.options["num_groups"]
    used = (indices // (case.num_experts // groups)).sort(dim=1).values
    if len(used):
        distinct = 1 + (used[:, 1:] != used[:, :-1]).sum(1)
        assert distinct.max() <= case.options["topk_groups"]
    clean = case.logits.isfinite().all(dim=1).to(device)
    assert weights[clean].isfinite().all(), "NaN leaked out of its token"


@given(case=gate_cases(styles=SCORED_STYLES))
def test_scored_selection_equals_the_reference(device: torch.device, case: GateCase) -> None:
    """Differences are allowed only where a perturbed reference picks the same experts.

    The perturbation is one affine map per token, so that equal keys stay equal: exact ties
    must be resolved exactly.
    """
    case = case.to(device)
    actual, expected = gate(case)[1], truth(gate, case)[1]
    open_tokens = (actual != expected).any(dim=1)
    for step in range(24):
        if not open_tokens.any():
            return
        sign = 1 if step % 2 else -1
        scale, shift = 1 + sign * 2e-7 * (step // 4), (step % 3 - 1) * 3e-7 * (step // 3)
        logits = case.logits.double() * scale + shift
        other = truth(topk_gate, logits, case.k, **case.options)[1]
        open_tokens &= (actual != other).any(dim=1)
    assert not open_tokens.any(), f"{int(open_tokens.sum())} tokens differ without a near tie"


@given(case=gate_cases(styles=["normal", "grid", "constant", "masked"]))
def test_weights_against_float64(device: torch.device, case: GateCase) -> None:
    case = case.to(device)
    weights, indices = gate(case)
    exact, exact_indices = truth(topk_gate, case.logits.double(), case.k, **case.options)
    same = (indices == exact_indices).all(dim=1)
    assert exact.dtype == torch.float64
    finite = case.logits[case.logits.isfinite()].double()
    spread = (finite.max() - finite.min()).item() if finite.numel() else 0.0
    assert_scores(weights[same], exact[same], spread=spread)


@given(case=gate_cases(styles=["normal", "grid"]))
def test_sigmoid_keys_are_scores_plus_bias(device: torch.device, case: GateCase) -> None:
    case = case.to(device)
    options = {"score_function": "sigmoid", "expert_bias": case.options.get("expert_bias")}
    k = min(case.k, case.num_experts)
    weights, indices = topk_gate(case.logits, k, renormalize=False, **options)
    scores = case.logits.double().sigmoid()
    keys = scores if options["expert_bias"] is None else scores + options["expert_bias"]
    chosen = keys.gather(1, indices.long())
    rest = keys.scatter(1, indices.long(), -1e9)
    assert (chosen[:, -1:] - rest > -4 * unit_roundoff(torch.float32)).all()
    assert_scores(weights, scores.gather(1, indices.long()), spread=8.0)


# --- worked examples -----------------------------------------------------------------------------
def test_softmax_example(device: torch.device) -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64, device=device)
    weights, indices = topk_gate(probs.log().float(), 2, scale=2.0)
    assert indices.tolist() == [[1, 3]]
    assert weights.tolist()[0] == pytest.approx([2 * 4 / 7, 2 * 3 / 7])
    raw = topk_gate(probs.log().float(), 2, renormalize=False)[0]
    assert raw.tolist()[0] == pytest.approx([0.4, 0.3])


def test_one_expert_per_token_is_not_renormalised(device: torch.device) -> None:
    probs = torch.tensor([[0.1, 0.6, 0.3]], device=device)
    weights, indices = topk_gate(probs.log(), 1)
    assert indices.tolist() == [[1]] and weights.item() == pytest.approx(0.6)


def test_bias_moves_the_choice_but_not_the_weights(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], device=device)
    bias = torch.tensor([10.0, 0.0, 0.0, 0.0], device=device)
    weights, indices = topk_gate(
        logits, 2, score_function="sigmoid", expert_bias=bias, renormalize=False
    )
    assert indices.tolist() == [[0, 3]]
    assert weights.tolist()[0] == pytest.approx([0.5, logits[0, 3].sigmoid().item()])


def test_group_limit_example(device: torch.device) -> None:
    """Groups score by their two best: the best single expert sits in a group that loses."""
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.55, 0.54, 0.2, 0.3]], dtype=torch.float64)
    logits = scores.logit().float().to(device)
    options = {"score_function": "sigmoid", "num_groups": 4, "topk_groups": 2}
    weights, indices = topk_gate(logits, 3, renormalize=False, **options)
    assert indices.tolist() == [[2, 4, 5]]  # groups 1 (1.1) and 2 (1.09) beat group 0 (1.0)
    assert weights.tolist()[0] == pytest.approx([0.6, 0.55, 0.54])


def test_a_masked_group_never_beats_negative_keys(device: torch.device) -> None:
    bias = torch.full((8,), -5.0, device=device)
    bias[:2] = -4.0
    logits = torch.zeros(3, 8, device=device)
    _, indices = topk_gate(
        logits, 2, score_function="sigmoid", expert_bias=bias, num_groups=4, topk_groups=1
    )
    assert indices.tolist() == [[0, 1]] * 3


def test_ties_go_to_the_lower_id(device: torch.device) -> None:
    logits = torch.tensor([[0.0, -0.0, 0.0, -0.0, 1.0, 1.0]], device=device)
    assert topk_gate(logits, 6)[1].tolist() == [[4, 5, 0, 1, 2, 3]]
    _, indices = topk_gate(logits * 0, 4, score_function="sigmoid", num_groups=3, topk_groups=2)
    assert indices.tolist() == [[0, 1, 2, 3]]


def test_saturated_probabilities_cannot_create_ties(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 200.0, 400.0, 600.0]], device=device)
    assert topk_gate(logits, 3)[1].tolist() == [[3, 2, 1]]


def test_nan_comes_after_minus_infinity(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan, -inf, 1.0, nan], [0.0, 1.0, 2.0, 3.0]], device=device)
    weights, indices = topk_gate(logits, 4)
    assert indices.tolist() == [[2, 1, 0, 3], [3, 2, 1, 0]]
    assert weights[0].isnan().all() and weights[1].isfinite().all()


def test_underflow_does_not_divide_by_zero(device: torch.device) -> None:
    logits = torch.full((2, 4), -200.0, device=device)
    weights, _ = topk_gate(logits, 2, score_function="sigmoid")
    assert weights.tolist() == [[0.0, 0.0]] * 2


def test_zero_tokens(device: torch.device) -> None:
    weights, indices = topk_gate(torch.empty(0, 8, device=device), 2)
    assert weights.shape == indices.shape == (0, 2)


# --- gradients -----------------------------------------------------------------------------------
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(device: torch.device, score_function: str, renormalize: bool, k: int) -> None:
    logits = torch.randn(4, 8, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.linspace(-0.2, 0.2, 8, device=device)

    def weights(z: torch.Tensor) -> torch.Tensor:
        return topk_gate(
            z,
            k,
            score_function=score_function,
            expert_bias=bias,
            num_groups=4,
            topk_groups=2,
            renormalize=renormalize,
            scale=2.5,
        )[0]

    assert truth(torch.autograd.gradcheck, weights, logits)


@given(case=gate_cases(styles=["normal", "grid"]))
def test_gradient_against_float64(device: torch.device, case: GateCase) -> None:
    case = case.to(device)
    logits = case.logits.requires_grad_()
    weights, indices = gate(case)
    upstream = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, logits, upstream)

    exact_logits = case.logits.detach().double().requires_grad_()
    exact_weights, exact_indices = truth(topk_gate, exact_logits, case.k, **case.options)
    (exact,) = torch.autograd.grad(exact_weights, exact_logits, upstream.double())
    (naive,) = torch.autograd.grad(truth(gate, case)[0], logits, upstream)
    same = (indices == exact_indices).all(dim=1)
    assert grad.dtype == logits.dtype
    # A gradient is a difference of sums over E of terms as large as the upstream gradient.
    magnitude = upstream.double().abs().sum(1, keepdim=True)[same] * case.options["scale"]
    assert_within(
        grad[same],
        exact[same],
        naive=naive[same],
        magnitude=magnitude,
        length=case.num_experts + 16,
        name="grad_logits",
    )


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_backward_operator_folds_the_losses_in(
    device: torch.device, score_function: str, renormalize: bool, masked: bool
) -> None:
    """Equal to autograd through the gate, the balancing loss and the z-loss as written."""
    tokens, experts, k, length = 12, 16, 3, 4
    z = torch.randn(tokens, experts, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.arange(tokens, device=device) % 5 != 0 if masked else None
    upstream = torch.randn(tokens, k, dtype=torch.float64, device=device)
    balance = torch.rand(tokens // length, experts, device=device)
    z_scale = torch.tensor(0.3, device=device)
    options = {"score_function": score_function, "renormalize": renormalize, "scale": 2.5}
    weights, indices = truth(topk_gate, z, k, **options)

    scores = z.softmax(1) if score_function == "softmax" else z.sigmoid()
    p = scores / scores.sum(1, keepdim=True)
    terms = (p * balance.double().repeat_interleave(length, 0)).sum(1)
    terms = terms + z_scale.double() / 2 * z.logsumexp(1).square()
    terms = terms if mask is None else terms[mask]
    (expected,) = torch.autograd.grad((weights * upstream).sum() + terms.sum(), z)
    actual = torch.ops.ling_ops.topk_gate_backward(
        upstream.float(), z.detach().float(), weights.detach().float(), indices, balance, length,
        z_scale, mask, score_function == "sigmoid", renormalize, 2.5,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)


def test_dtype_float64_stays_float64(device: torch.device) -> None:
    logits = torch.randn(3, 8, dtype=torch.float64, device=device)
    weights, indices = truth64(topk_gate, logits, 2)
    assert weights.dtype == torch.float64 and indices.dtype == torch.int32
