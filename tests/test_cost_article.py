"""The article's figures beside what its own inputs give."""

from __future__ import annotations

import pytest

from ling_ops import cost


def _claims(figure: str) -> list[cost.Claim]:
    found = [claim for claim in cost.article_claims() if claim.figure == figure]
    assert found, figure
    return found


@pytest.mark.parametrize(
    ("figure", "computed"),
    [("electricity", 6.451), ("Ling-1T: training FLOP, share of peak", 121.9),
     ("parameters active", 20.0), ("gain over dense", 4.878), ("one-time cost", 1840.0),
     ("memory of MoE 10T parameters", 20000.0), ("memory of MoE 10T parameters", 5000.0),
     ("total parameters", 18.63), ("total parameters", 12.49), ("active parameters", 1.669),
     ("Ling-1T: training text", 166.7), ("hidden gains", 2900.0), ("mean use of an expert, "
      "unbalanced", 12.5), ("$ per million tokens, MoE 10T", 1.08),
     ("Ling-1T over GPT-4: cost of inference", 2.556), ("NPV against API, summary", 0.7),
     ("first token, dense 10T", 8013.0), ("first token, MoE 10T", 1011.0),
     ("MoE 10T: hardware", 149.6), ("gain per 10T, 10T to 100T", 0.2)],
)  # fmt: skip
def test_what_does_not_follow_is_marked(figure, computed):
    claim = next(c for c in _claims(figure) if c.computed == pytest.approx(computed, rel=1e-3))
    assert claim.verdict == "does not follow" and not claim.follows


@pytest.mark.parametrize(
    "figure",
    ["GPU depreciation", "experts active", "staff years", "customer service", "law", "code",
     "finance", "API, a year", "Llama: return", "time saved", "dense 10T over MoE", "sum, rounded",
     "PaLM: relative cost of inference", "mean use of an expert, balanced"],
)  # fmt: skip
def test_what_follows_is_not(figure):
    assert all(claim.verdict == "follows" for claim in _claims(figure))


def test_the_first_token_comes_from_the_columns_own_gpus():
    for figure, gpus in (("dense 10T", "8 A100"), ("MoE 10T", "4 H100")):
        (claim,) = _claims(f"first token, {figure}")
        assert claim.floor and gpus in claim.how


def test_what_has_no_inputs_is_called_given():
    for figure in ("data", "MMLU, 1.8T", "network and storage", "dropped tokens, fixed capacity"):
        assert {claim.verdict for claim in _claims(figure)} == {"given"}


def test_every_table_is_there():
    assert {claim.table for claim in cost.article_claims()} == {
        "key figures", "models by size", "architecture", "training cost",
        "from scratch against fine-tuning", "training, dense against MoE", "scaling law",
        "inference of 1e8 queries", "a company's own model", "fine-tuning scenarios",
        "open source and investment",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({"computed": 4.84}, "does not follow"), ({"computed": 4.77}, "follows"),
     ({"computed": 4.9, "stated_to": 5.0}, "follows"), ({"computed": None}, "given"),
     ({"computed": 1.0, "at_most": True}, "follows"), ({"computed": 1.0, "floor": True}, "follows"),
     ({"computed": 5.0, "floor": True}, "does not follow"), ({"computed": 1.0}, "does not follow"),
     ({"computed": 5.1, "rounding": 1.0}, "follows")],
)  # fmt: skip
def test_a_verdict_knows_ranges_limits_and_rounding(changes, verdict):
    arguments = {"table": "", "figure": "", "stated": 4.7, "unit": "", "how": ""} | changes
    assert cost.Claim(**arguments).verdict == verdict
