"""`ling_ops.cost`: counts, floors, and money."""

from __future__ import annotations

import pytest

from ling_ops import cost
from ling_ops.cost.model import experts_read
from ling_ops.models import PRESETS, LingConfig, LingForCausalLM

FLOORS = [
    ((32768, 2048, 512, 256, 8), 7.07), ((32768, 4096, 1024, 256, 8), 26.66),
    ((32768, 2048, 768, 128, 8), 10.20), ((8192, 2048, 512, 256, 8), 2.35),
    ((8192, 4096, 1024, 256, 8), 7.92), ((24576, 1536, 256, 128, 8), 2.32),
    ((32768, 4096, 512, 128, 8), 14.14), ((32768, 4096, 14336, 8, 2), 88.2),
]  # fmt: skip
MINI = LingConfig.preset("ling-mini-2.0")
H100 = cost.get_gpu("h100")
SHARDED = cost.Layout(data=64, shard="full")


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


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"tokens": 0}, "tokens"), ({"hidden": -1}, "hidden"), ({"choices": 9}, "choices")],
)  # fmt: skip
def test_a_layer_without_sense_is_an_error(changes, word):
    shape = {"tokens": 8, "hidden": 8, "intermediate": 8, "experts": 8, "choices": 2} | changes
    with pytest.raises(cost.CostError, match=word):
        cost.moe_layer_train_ms(**shape, gpu=H100)


#: E, K, H, I: bytes that the peers' decoding kernels read, as time (us) x bandwidth (TB/s).
READ = {
    (256, 8, 2048, 512): {1: 30.0 * 1.68, 4: 81.2 * 2.40, 16: 236 * 2.73, 64: 481 * 2.89},
    (256, 8, 4096, 1024): {1: 81.0 * 2.49, 4: 278 * 2.75, 16: 860 * 3.03, 64: 1834 * 3.05},
    (128, 8, 2048, 768): {1: 40.3 * 1.87, 4: 113 * 2.41, 16: 269 * 2.83, 64: 413 * 2.88},
    (8, 2, 4096, 14336): {1: 252 * 2.80, 4: 653 * 2.97, 16: 926 * 2.95, 64: 961 * 2.93},
}


@pytest.mark.parametrize("shape", READ)
def test_a_batch_reads_the_experts_that_it_visits(shape):
    experts, choices, hidden, inner = shape
    config = LingConfig.preset(
        "tiny", num_experts=experts, num_experts_per_token=choices, hidden_size=hidden,
        moe_intermediate_size=inner,
    )  # fmt: skip
    for tokens, megabytes in READ[shape].items():
        read = 2 * 3 * hidden * inner * experts_read(config, tokens)
        assert read == pytest.approx(megabytes * 1e6, rel=0.04)


def test_training_time_by_hand():
    run = cost.training_cost(
        MINI, 1e12, H100, layout=SHARDED, mfu=0.5, usd_per_gpu_hour=2.0, usd_per_kwh=0.1
    )
    flop = 1e12 * cost.flop_per_token(MINI, 4096, 4096).train_flop
    assert run.seconds == pytest.approx(flop / (64 * 989e12 * 0.5))
    assert run.gpu_usd == pytest.approx(2 * run.gpu_hours)
    assert run.energy_usd == pytest.approx(0.07 * run.gpu_hours)
    assert run.tokens_per_s == pytest.approx(1e12 / run.seconds)


def test_fp8_trains_at_its_own_peak():
    bf16, fp8 = (
        cost.training_cost(MINI, 1e12, H100, layout=SHARDED, mfu=0.4, dtype=dtype)
        for dtype in ("bf16", "fp8")
    )
    assert bf16.seconds / fp8.seconds == pytest.approx(1979 / 989)


def test_one_sequence_decodes_at_memory_speed():
    gpu = cost.get_gpu("h100-measured")
    count = cost.parameters(MINI)
    streamed = 2 * (count.active - count.embedding) + cost.kv_cache_bytes(MINI, 1)
    found = cost.decoding_cost(MINI, gpu, cost.Load(1, 1), usd_per_gpu_hour=3.0)
    assert found.step_ms == pytest.approx(1e3 * streamed / 3.0e12)
    assert found.bound == "bytes"
    assert found.usd_per_million_tokens == pytest.approx(3.0 / 3600 * found.step_ms * 1e3)


@pytest.mark.parametrize(("batch", "usd"), [(1, 0.40), (64, 0.10)])
def test_a_token_costs_what_the_page_says(batch, usd):
    found = cost.decoding_cost(MINI, H100, cost.Load(batch, 4096), usd_per_gpu_hour=2.0)
    assert found.usd_per_million_tokens == pytest.approx(usd, rel=0.01)


def test_a_long_prompt_is_read_at_the_rate_of_products():
    found = cost.prefill_cost(MINI, H100, cost.Load(4, 8192))
    flop = 4 * 8192 * cost.flop_per_token(MINI, 8192, 8192).prefill_flop
    assert found.step_ms == pytest.approx(1e3 * flop / 989e12)
    assert found.bound == "flop"


def test_one_token_of_a_prompt_is_read_at_memory_speed():
    assert cost.prefill_cost(MINI, H100, cost.Load(1, 1)).bound == "bytes"


def test_fp8_weights_are_a_byte_but_for_what_stays_bf16():
    count = cost.parameters(MINI)
    kept = count.embedding + count.head + count.norms + count.routers
    size = 2 * kept + (count.total - kept) * (1 + 4 / 128**2)
    assert cost.weight_bytes(MINI, "fp8") == pytest.approx(size, abs=1)
    slow, fast = (
        cost.decoding_cost(MINI, H100, cost.Load(8, 1024, dtype)) for dtype in ("bf16", "fp8")
    )
    assert 1.5 < slow.step_ms / fast.step_ms < 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"usd_per_gpu_hour": -1}, "usd_per_gpu_hour"), ({"mfu": 1.5}, "mfu"), ({"mfu": 0}, "mfu"),
     ({"layout": cost.Layout()}, "80 GB of"), ({"usd_per_kwh": float("nan")}, "usd_per_kwh"),
     ({"tokens": -1e9}, "tokens"), ({"tokens": 0}, "tokens"), ({"dtype": "fp32"}, "dtype"),
     ({"sequence_length": 0}, "sequence_length"), ({"micro_batches": 0}, "micro_batches"),
     ({"batch_size": 10**6}, "80 GB of")],
)  # fmt: skip
def test_nonsense_is_an_error(changes, word):
    arguments = {"tokens": 1e9, "layout": SHARDED, "mfu": 0.4} | changes
    with pytest.raises(cost.CostError, match=word):
        cost.training_cost(MINI, gpu=H100, **arguments)


@pytest.mark.parametrize(
    ("load", "word"),
    [((0, 1), "batch_size"), ((1, 0), "context"), ((1, 1, "int3"), "dtype"),
     ((1, 1, "bf16", "int3"), "kv_dtype")],
)  # fmt: skip
def test_a_load_without_sense_is_an_error(load, word):
    with pytest.raises(cost.CostError, match=word):
        cost.Load(*load)


def test_a_model_that_does_not_fit_has_no_price():
    big = LingConfig.preset("ling-1t")
    for price in (cost.decoding_cost, cost.prefill_cost):
        with pytest.raises(cost.CostError, match="need at most the 80 GB"):
            price(big, H100, cost.Load(1, 1))


def test_a_gpu_of_ones_own():
    own = cost.get_gpu("H100", power_w=350.0)
    assert own.power_w == 350.0 and own.bf16_tflops == H100.bf16_tflops
    assert own.name != H100.name and own.source == f"given: power_w; all else: {H100.source}"
    with pytest.raises(cost.CostError, match="power_w"):
        cost.get_gpu("h100", power_w=-1)
    with pytest.raises(cost.CostError, match="gpu: got 'x'"):
        cost.get_gpu("x")
    with pytest.raises(cost.CostError, match="no fp8"):
        cost.get_gpu("a100").rate_flop_per_s("fp8")


def test_every_gpu_has_a_source():
    assert all(gpu.source for gpu in cost.gpus().values())
