"""The gate's kernels on a GPU: few and many tokens, ties, losses, graphs."""

from __future__ import annotations

import pytest
import torch
from strategies import make_logits
from test_ops_cuda_graphs import capture
from test_ops_gate_losses import arguments
from tolerances import assert_bitwise, truth

import ling_ops as lo
from ling_ops.ops.gate_losses import LossCoefficients, topk_gate_with_losses

pytestmark = pytest.mark.cuda

GROUPED = {"score_function": "sigmoid", "num_groups": 8, "topk_groups": 4, "scale": 2.5}
OPTIONS = {
    "softmax": {},
    "softmax raw": {"renormalize": False},
    "sigmoid": {"score_function": "sigmoid"},
    "sigmoid groups": GROUPED,
    "softmax groups": {"num_groups": 8, "topk_groups": 3},
}
MANY = 40_000  # beyond every limit at which another kernel takes over


def biased(options: dict, experts: int, device: torch.device) -> dict:
    """Sigmoid also with an expert bias, as models use it."""
    if "score_function" not in options:
        return options
    return options | {"expert_bias": torch.linspace(-0.1, 0.1, experts, device=device)}


@pytest.mark.parametrize("experts,k", [(256, 8), (8, 2), (384, 8), (520, 10), (1024, 32), (40, 5)])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_token_weighs_the_same_among_few_and_many(
    device: torch.device, name: str, experts: int, k: int
) -> None:
    """Bitwise, though the kernels differ by the number of tokens."""
    options = biased(OPTIONS[name], experts, device)
    k = min(k, experts // 8 * 3) if "groups" in name else k
    styles = ["normal", "grid", "special", "saturated", "masked", "bad_rows"]
    rows = torch.cat([make_logits(200, experts, style, 3) for style in styles]).to(device)
    many = rows.repeat(MANY // len(rows) + 1, 1)
    weights, indices = lo.topk_gate(many, k, **options)
    first = 0
    for count in (1, 7, 16, 33, 64, 79, 1000):
        part = [t[first : first + count] for t in (many, weights, indices)]
        got_weights, got = lo.topk_gate(part[0], k, **options)
        assert torch.equal(got, part[2]), f"{count} tokens: other experts"
        assert_bitwise(got_weights.nan_to_num(nan=-1.0), part[1].nan_to_num(nan=-1.0))
        first += count


@pytest.mark.parametrize("tokens", [5, 300, 20_000])
@pytest.mark.parametrize("experts,k", [(256, 8), (48, 16), (1024, 32), (37, 3)])
def test_rows_of_ties_go_by_id(device: torch.device, tokens: int, experts: int, k: int) -> None:
    """All equal, two values, ties only at the last place, all -inf, and rows between such rows."""
    generator = torch.Generator().manual_seed(1)
    few = torch.rand(tokens, experts, generator=generator) < 0.5 * k / experts
    logits = torch.where(few, torch.rand(few.shape, generator=generator) + 1, 0.25)
    logits[1::5] = 0.25
    logits[2::5] = torch.where(few[2::5], 1.0, -0.0)
    logits[3::5] = -float("inf")
    logits[4::5] = torch.randn(logits[4::5].shape, generator=generator)
    logits = logits.to(device)
    assert torch.equal(lo.topk_gate(logits, k)[1], truth(lo.topk_gate, logits, k)[1])
    if experts % 8 == 0 and k <= experts // 2:
        # the selection key is the bias alone where the scores are equal
        level = torch.full_like(logits, 0.5)
        bias = torch.where(few[0], 0.125, 0.0).to(device)
        got = lo.topk_gate(level, k, expert_bias=bias, **GROUPED)[1]
        assert torch.equal(got, truth(lo.topk_gate, level, k, expert_bias=bias, **GROUPED)[1])


@pytest.mark.parametrize("tokens", [1, 9, 64, 500, 3000, 20_000])
def test_counts_are_those_of_the_ids(device: torch.device, tokens: int) -> None:
    logits = make_logits(tokens, 256, "normal", tokens).to(device)
    for sigmoid in (False, True):
        for _ in range(3):  # new memory holds the counts of the call before
            _, indices, counts = torch.ops.ling_ops.topk_gate(
                logits, None, 8, sigmoid, 1, 1, True, 1.0
            )
            expected = torch.bincount(indices.reshape(-1).long(), minlength=256)
            assert torch.equal(counts.long(), expected)


@pytest.mark.parametrize("tokens", [60, 4000, 33_000])
def test_loss_sums_are_reproducible(device: torch.device, tokens: int) -> None:
    logits = make_logits(tokens, 256, "normal", 5).to(device)
    case = arguments(logits, 5, sequences=4, masked=True, sigmoid=False)
    first = torch.ops.ling_ops.gate_losses(*case)
    for _ in range(200):
        assert_bitwise(torch.ops.ling_ops.gate_losses(*case), first)


def test_losses_in_a_graph(device: torch.device) -> None:
    """Captured once, replayed on other logits and another mask."""
    logits = torch.zeros(96, 64, device=device, requires_grad=True)
    mask = torch.ones(96, dtype=torch.bool, device=device)

    def step() -> tuple[torch.Tensor, ...]:
        weights, indices, losses = topk_gate_with_losses(
            logits, 4, LossCoefficients(0.1, 0.2, 0.3), sequence_length=24, token_mask=mask
        )
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        return indices, grad, *losses.values()

    graph, outputs = capture(step)
    for seed in range(4):
        with torch.no_grad():
            logits.copy_(make_logits(96, 64, "normal", seed))
            mask.copy_(torch.arange(96) % (seed + 2) != 0)
        graph.replay()
        replayed = [t.clone() for t in outputs]
        for got, expected in zip(replayed, step(), strict=True):
            assert_bitwise(got, expected)


def test_losses_make_no_pass_of_their_own(device: torch.device) -> None:
    """No temporary as large as the logits: the forward allocates weights, ids and small things."""
    tokens, experts = 20_000, 256
    logits = torch.randn(tokens, experts, device=device, requires_grad=True)
    arguments = (logits, 8, LossCoefficients(0.1, 0.2, 0.3))
    topk_gate_with_losses(*arguments, sequence_length=1000)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = topk_gate_with_losses(*arguments, sequence_length=1000)
    peak = torch.cuda.max_memory_allocated() - before
    assert kept and peak < tokens * experts * 4
