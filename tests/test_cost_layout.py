"""`ling_ops.cost`: how degrees divide a model, and the least number of GPUs."""

from __future__ import annotations

import pytest

from ling_ops import cost
from ling_ops.models import LingConfig

MINI = LingConfig.preset("ling-mini-2.0")
H100 = cost.get_gpu("h100")
LOAD = cost.Load(batch_size=32, context=4096)


@pytest.mark.parametrize(
    ("degrees", "word"),
    [({"data": 4, "expert": 3}, "divisor of data_parallel"), ({"tensor": 0}, "tensor_parallel"),
     ({"data": -1}, "data_parallel"), ({"data": 2, "expert": 4}, "expert_parallel"),
     ({"shard": "some"}, "shard"), ({"data": 1.5}, "data_parallel")],
)  # fmt: skip
def test_degrees_without_sense_are_errors(degrees, word):
    with pytest.raises(cost.CostError, match=word):
        cost.Layout(**degrees)


@pytest.mark.parametrize(
    ("layout", "word"),
    [(cost.Layout(data=6, expert=6), "num_experts=256"),
     (cost.Layout(tensor=3), "num_heads=16"),
     (cost.Layout(tensor=5), "num_heads=16")],
)  # fmt: skip
def test_degrees_that_do_not_divide_the_model_are_errors(layout, word):
    for use in (
        lambda: cost.training_memory(MINI, 1, 128, layout=layout),
        lambda: cost.serving_memory(MINI, LOAD, layout=layout),
    ):
        with pytest.raises(cost.CostError, match=word):
            use()


def test_kv_heads_bound_what_tensor_parallel_divides():
    whole, four, eight = (
        cost.serving_memory(MINI, LOAD, layout=cost.Layout(tensor=degree)).kv_cache_bytes
        for degree in (1, 4, 8)
    )
    assert four == whole / 4
    assert eight == four  # four KV heads: more ranks hold copies
    uneven = LingConfig.preset("tiny", num_heads=6, num_kv_heads=3, vocab_size=258,
                               intermediate_size=320, moe_intermediate_size=128)  # fmt: skip
    with pytest.raises(cost.CostError, match="num_kv_heads=3"):
        cost.serving_memory(uneven, LOAD, layout=cost.Layout(tensor=2))


def test_expert_parallel_divides_the_routed_experts_alone():
    count = cost.parameters(MINI)
    one, eight = (
        cost.serving_memory(MINI, LOAD, layout=cost.Layout(data=8, expert=degree)).weight_bytes
        for degree in (1, 8)
    )
    assert one - eight == 2 * count.routed_experts * 7 // 8


def test_shards_divide_states():
    none, optimizer, full = (
        cost.training_memory(MINI, 1, 512, layout=cost.Layout(data=8, shard=shard))
        for shard in ("none", "optimizer", "full")
    )
    total = cost.parameters(MINI).total
    assert none.optimizer_bytes == 12 * total and none.weight_bytes == 2 * total
    assert optimizer.optimizer_bytes == pytest.approx(none.optimizer_bytes / 8, abs=16)
    assert optimizer.weight_bytes == none.weight_bytes
    assert full.weight_bytes == pytest.approx(none.weight_bytes / 8, abs=16)
    assert full.gradient_bytes == full.weight_bytes
    assert none.gathered_bytes == 0 < full.gathered_bytes < none.weight_bytes


def test_one_gpu_has_nothing_to_shard():
    one = cost.training_memory(MINI, 1, 512)
    for shard in ("optimizer", "full"):
        assert cost.training_memory(MINI, 1, 512, layout=cost.Layout(shard=shard)) == one


def test_experts_that_are_spread_already_shard_over_their_copies_only():
    spread = cost.training_memory(MINI, 1, 512, layout=cost.Layout(8, expert=8, shard="full"))
    whole = cost.training_memory(MINI, 1, 512, layout=cost.Layout(8, shard="full"))
    assert spread.optimizer_bytes == pytest.approx(whole.optimizer_bytes, rel=1e-6)
    assert spread.gathered_bytes < whole.gathered_bytes


def test_tensor_parallel_divides_activations_between_the_products():
    one = cost.training_memory(MINI, 1, 4096)
    four = cost.training_memory(MINI, 1, 4096, layout=cost.Layout(tensor=4))
    assert one.activation_bytes / 4 < four.activation_bytes < one.activation_bytes


@pytest.mark.parametrize("shard", ["optimizer", "full"])
def test_the_least_layout_fits_and_a_smaller_one_does_not(shard):
    degrees = {"tensor_parallel": 1, "expert_parallel": 1, "shard": shard, "sequence_length": 1024}
    layout = cost.training_layout(MINI, H100, **degrees)
    fits = cost.training_memory(MINI, 1, 1024, layout=layout).peak_bytes
    assert fits <= H100.memory_bytes
    with pytest.raises(cost.CostError, match=f"need at least {layout.gpus} of"):
        cost.training_layout(MINI, H100, gpus=layout.gpus - 1, **degrees)


def test_published_models_need_what_their_weights_say():
    flash, big = (LingConfig.preset(name) for name in ("ling-flash-2.0", "ling-1t"))
    assert cost.serving_layout(MINI, H100, LOAD).gpus == 1
    assert cost.serving_layout(flash, H100, LOAD).gpus == 3 + 1  # 206 GB, in degrees that divide
    assert cost.serving_layout(big, H100, LOAD).gpus >= 2000 / 80
    fp8 = cost.Load(32, 4096, dtype="fp8")
    assert cost.serving_layout(big, H100, fp8).gpus < cost.serving_layout(big, H100, LOAD).gpus


def test_a_given_number_of_gpus_is_used_or_refused():
    layout = cost.serving_layout(MINI, H100, LOAD, gpus=8)
    assert layout.gpus == 8
    with pytest.raises(cost.CostError, match="multiple of tensor_parallel"):
        cost.serving_layout(MINI, H100, LOAD, gpus=6, tensor_parallel=4)
    with pytest.raises(cost.CostError, match="gpus"):
        cost.serving_layout(MINI, H100, LOAD, gpus=0)
    with pytest.raises(cost.CostError, match="got 18, over which no layout fits; it fits 16"):
        load = cost.Load(32, 4096, "fp8")
        cost.serving_layout(LingConfig.preset("ling-1t"), H100, load, gpus=18)
    with pytest.raises(cost.CostError, match="tensor_parallel: got 0"):
        cost.layouts_over(MINI, 8, tensor_parallel=0)
    with pytest.raises(cost.CostError, match="expert_parallel"):
        cost.serving_layout(MINI, H100, LOAD, expert_parallel=-1)


def test_serving_gives_each_replica_a_sequence():
    assert cost.serving_layout(MINI, H100, LOAD, gpus=32).data == 32
    wide = cost.serving_layout(MINI, H100, LOAD, gpus=64)
    assert (wide.data, wide.tensor, wide.expert) == (32, 2, 1)
    few = cost.Load(batch_size=3, context=4096)
    for degrees in ({"tensor_parallel": 1}, {"expert_parallel": 16, "tensor_parallel": 1}):
        with pytest.raises(cost.FitError, match=r"batch_size: got 3, need at least .* it fits 1"):
            cost.serving_layout(MINI, H100, few, gpus=64 * 16, **degrees)
    for price in (cost.decoding_cost, cost.prefill_cost):
        with pytest.raises(cost.CostError, match="batch_size: got 3, need at least 64"):
            price(MINI, H100, few, layout=cost.Layout(data=64))


def test_replicas_without_a_sequence_may_share_experts():
    few = cost.Load(batch_size=3, context=4096)
    told = cost.serving_layout(MINI, H100, few, gpus=64, tensor_parallel=1, expert_parallel=32)
    assert (told.data, told.expert) == (64, 32)
    big, one = LingConfig.preset("ling-1t"), cost.Load(1, 4096, "fp8")
    least = cost.serving_layout(big, H100, one)
    assert least.data > 1 == least.expert_copies
    assert cost.serving_layout(big, H100, one, gpus=least.gpus) == least
    assert cost.decoding_cost(big, H100, one, layout=least).step_ms > 0


def test_what_no_number_of_gpus_holds_is_said():
    with pytest.raises(cost.CostError, match="does not fit"):
        cost.training_layout(MINI, H100, sequence_length=10**6)
    with pytest.raises(cost.CostError, match="does not fit"):
        cost.training_layout(LingConfig.preset("ling-1t"), H100, shard="none", expert_parallel=1)


def test_a_small_model_with_few_heads_is_searched():
    assert cost.training_layout(LingConfig.preset("tiny"), H100).gpus == 1


def test_two_gpus_decode_no_faster_than_their_bandwidth():
    one = cost.decoding_cost(MINI, H100, LOAD)
    two = cost.decoding_cost(MINI, H100, LOAD, layout=cost.Layout(tensor=2))
    assert one.step_ms / 2 <= two.step_ms < one.step_ms
    spread = cost.decoding_cost(MINI, H100, LOAD, layout=cost.Layout(data=4, expert=4))
    apart = cost.decoding_cost(MINI, H100, LOAD, layout=cost.Layout(data=4))
    assert spread.step_ms < apart.step_ms
