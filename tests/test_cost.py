"""`ling_ops.cost`: counts, floors, money, and what the article's figures come to."""

from __future__ import annotations

import pytest

from ling_ops import cost
from ling_ops.models import PRESETS, LingConfig, LingForCausalLM

FLOORS = [
    ((32768, 2048, 512, 256, 8), 7.07), ((32768, 4096, 1024, 256, 8), 26.66),
    ((32768, 2048, 768, 128, 8), 10.20), ((8192, 2048, 512, 256, 8), 2.35),
    ((8192, 4096, 1024, 256, 8), 7.92), ((24576, 1536, 256, 128, 8), 2.32),
    ((32768, 4096, 512, 128, 8), 14.14), ((32768, 4096, 14336, 8, 2), 88.2),
]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_model(preset):
    config = LingConfig.preset(preset)
    count = LingForCausalLM(config, device="meta").count_parameters()
    found = cost.parameters(config)
    assert (found.total, found.active) == tuple(count)


@pytest.mark.parametrize(("shape", "floor"), FLOORS)
def test_layer_times_are_the_recorded_floors(shape, floor):
    assert cost.moe_layer_train_ms(*shape, cost.get_gpu("h100-measured")) == pytest.approx(
        floor, rel=3e-3
    )


def test_the_article_contradicts_itself_where_it_does():
    wrong = {claim.figure for claim in cost.article_claims() if not claim.follows}
    right = {claim.figure for claim in cost.article_claims() if claim.follows}
    assert {"electricity", "training FLOP", "gain over dense",
            "parameters active", "total parameters",
            "memory of 10T parameters", "one-time cost"} <= wrong  # fmt: skip
    assert {"GPU depreciation", "experts active", "staff", "customer service"} <= right


def test_training_time_by_hand():
    config, gpu = LingConfig.preset("ling-mini-2.0"), cost.get_gpu("h100")
    run = cost.training_cost(
        config, 1e12, gpu, num_gpus=64, mfu=0.5, usd_per_gpu_hour=2.0, usd_per_kwh=0.1
    )
    flop = 1e12 * cost.flop_per_token(config, 4096, 4096).train_flop
    assert run.seconds == pytest.approx(flop / (64 * 989e12 * 0.5))
    assert run.gpu_usd == pytest.approx(2 * run.gpu_hours)
    assert run.energy_usd == pytest.approx(0.07 * run.gpu_hours)


def test_one_sequence_decodes_at_memory_speed():
    config, gpu = LingConfig.preset("ling-mini-2.0"), cost.get_gpu("h100-measured")
    count = cost.parameters(config)
    streamed = 2 * (count.active - count.embedding) + cost.kv_cache_bytes(config, 1)
    found = cost.decoding_cost(config, gpu, num_gpus=1, batch_size=1, context=1)
    assert found.step_ms == pytest.approx(1e3 * streamed / 3.0e12)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"usd_per_gpu_hour": -1}, "usd_per_gpu_hour"), ({"mfu": 1.5}, "mfu"), ({"mfu": 0}, "mfu"),
     ({"num_gpus": 1}, "need at least"), ({"usd_per_kwh": float("nan")}, "usd_per_kwh")],
)  # fmt: skip
def test_nonsense_is_an_error(changes, word):
    arguments = {"num_gpus": 64, "mfu": 0.4} | changes
    config, gpu = LingConfig.preset("ling-mini-2.0"), cost.get_gpu("h100")
    with pytest.raises(cost.CostError, match=word):
        cost.training_cost(config, 1e9, gpu, **arguments)


def test_a_gpu_of_ones_own():
    assert cost.get_gpu("h100", power_w=350.0).power_w == 350.0
    with pytest.raises(cost.CostError, match="power_w"):
        cost.get_gpu("h100", power_w=-1)
    with pytest.raises(cost.CostError, match="gpu: got 'x'"):
        cost.get_gpu("x")
