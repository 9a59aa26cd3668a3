"""``LingConfig``: layer patterns, presets and their published sizes, errors that name the field."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ling_ops.models import PRESETS, LingConfig, LingForCausalLM

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 12, "num_experts": 8,
    "num_experts_per_token": 2,
}  # fmt: skip


def kinds(**changes) -> str:
    config = LingConfig(**{**SIZES, **changes})
    return "".join(kind[0] for kind in config.layer_types)


def test_layer_patterns():
    assert kinds() == "mmmmmm"
    assert kinds(first_k_dense_replace=2) == "ddmmmm"
    assert kinds(layer_pattern="2-4-2-4", num_layers=14) == "ddmmmmddmmmmdd"
    assert kinds(layer_pattern="2-4", num_layers=14) == "ddmmmmddmmmmdd"
    assert kinds(layer_pattern="0-1-2-1") == "mddmmd"
    assert kinds(layer_pattern="1-0") == "dddddd"
    assert kinds(layer_pattern="3") == "dddddd"


@pytest.mark.parametrize("pattern", ["", "a", "2-", "-2", "2--4", "0", "0-0", "1.5", "2,4"])
def test_bad_layer_patterns(pattern):
    with pytest.raises(ValueError, match=r"layer_pattern: got .* such as '2-4-2-4'"):
        LingConfig(**SIZES, layer_pattern=pattern)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: got 0, need a positive int"),
        ({"num_layers": 2.0}, "num_layers: got 2.0, need a positive int"),
        ({"num_heads": True}, "num_heads: got True, need a positive int"),
        ({"num_kv_heads": 3}, "num_kv_heads: got 3, need a divisor of num_heads=4"),
        ({"num_experts_per_token": 9}, "num_experts_per_token: got 9, need at most 8"),
        ({"num_groups": 3}, "num_groups: got 3, need a divisor of num_experts=8"),
        ({"num_groups": 2, "topk_groups": 4}, "topk_groups: got 4, need at most num_groups=2"),
        ({"num_groups": 8}, "num_experts_per_token: got 2, need at most 1"),
        ({"num_shared_experts": -1}, "num_shared_experts: got -1, need an int >= 0"),
        ({"first_k_dense_replace": 7}, "first_k_dense_replace: got 7, need at most num_layers=6"),
        (
            {"first_k_dense_replace": 1, "layer_pattern": "2-4"},
            "first_k_dense_replace: got 1, need 0 with a layer_pattern",
        ),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: got 1.5"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor: got 0.4, need an even"),
        ({"score_function": "relu"}, "score_function: got 'relu'"),
        ({"activation": "relu"}, "activation: got 'relu'"),
        ({"activation": "gelu", "swiglu_limit": 7.0}, "swiglu_limit: got 7.0"),
        ({"capacity": "unlimited"}, "capacity: got 'unlimited'"),
        ({"capacity_factor": 0}, "capacity_factor: got 0"),
        ({"target_drop_rate": 1.0}, "target_drop_rate: got 1.0"),
        ({"capacity_mode": "past"}, "capacity_mode: got 'past'"),
        ({"capacity_priority": "first"}, "capacity_priority: got 'first'"),
        ({"balance_coefficient": float("nan")}, "balance_coefficient: got nan"),
        ({"router_jitter": -0.1}, "router_jitter: got -0.1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: got 0.0"),
        ({"init_std": 0.0}, "init_std: got 0.0"),
        ({"rope_theta": "600000"}, "rope_theta: got '600000', need a finite number"),
        ({"use_expert_bias": 1}, "use_expert_bias: got 1, need a bool"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        LingConfig(**{**SIZES, **changes})


def test_a_config_changed_later_is_checked_by_the_model():
    config = LingConfig(**SIZES)
    config.num_experts_per_token = 9
    with pytest.raises(ValueError, match="num_experts_per_token: got 9"):
        LingForCausalLM(config, device="meta")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = LingConfig.preset(name)
    assert LingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.family in ("article", "ling2", "custom")


def test_preset_and_from_dict_errors():
    with pytest.raises(ValueError, match="preset: got 'ling-2t', need one of tiny, small"):
        LingConfig.preset("ling-2t")
    with pytest.raises(ValueError, match="num_expert: no such field"):
        LingConfig.preset("tiny", num_expert=4)
    with pytest.raises(ValueError, match="vocab_size: missing, need int"):
        LingConfig.from_dict({"hidden_size": 8})
    assert LingConfig.preset("tiny", num_experts=4).num_experts == 4


def count(name: str, **changes) -> tuple[int, int]:
    return LingForCausalLM(LingConfig.preset(name, **changes), device="meta").count_parameters()


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("ling-mini-2.0", "16.256B", "1.433B"),
        ("ling-flash-2.0", "102.89B", "6.152B"),
        ("ling-1t", "999.7B", "51.05B"),
    ],
)
def test_published_sizes(name, total, active):
    def printed(value: int, like: str) -> str:
        return f"{value / 1e9:.{len(like.split('.')[1]) - 1}f}B"

    counted = count(name)
    assert printed(counted[0], total) == total
    assert printed(counted[1], active) == active


def test_article_sizes_are_what_the_docstring_says():
    from ling_ops.models import presets

    total, active = count("article-1t")
    assert f"{total / 1e12:.2f}T / {active / 1e12:.3f}T" in presets.__doc__
    total, active = count("article-1t", layer_pattern="0-1")
    assert f"{total / 1e12:.1f}T /\n  {active / 1e12:.1f}T" in presets.__doc__
    total, active = count("article-example")
    assert f"{total / 1e9:.2f}B / {active / 1e9:.3f}B" in presets.__doc__


def test_article_presets_hold_the_stated_numbers():
    config = LingConfig.preset("article-1t")
    stated = {
        "num_layers": 120, "hidden_size": 12288, "num_heads": 96, "num_experts": 128,
        "num_experts_per_token": 16, "layer_pattern": "2-4-2-4",
    }  # fmt: skip
    assert stated.items() <= config.to_dict().items()
    example = LingConfig.preset("article-example")
    assert (example.num_experts, example.num_experts_per_token) == (64, 8)
    assert (example.hidden_size, example.moe_intermediate_size) == (4096, 4 * 4096)
    for preset in (config, example):
        assert preset.activation == "gelu" and preset.score_function == "softmax"
        assert not preset.renormalize and preset.mlp_bias and preset.router_bias


def test_published_parameter_names():
    model = LingForCausalLM(LingConfig.preset("ling-mini-2.0"), device="meta")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "model.word_embeddings.weight": (157184, 2048),
        "model.norm.weight": (2048,),
        "lm_head.weight": (157184, 2048),
    }
    layer = {
        "input_layernorm.weight": (2048,),
        "post_attention_layernorm.weight": (2048,),
        "attention.query_key_value.weight": ((16 + 2 * 4) * 128, 2048),
        "attention.dense.weight": (2048, 16 * 128),
        "attention.query_layernorm.weight": (128,),
        "attention.key_layernorm.weight": (128,),
    }
    moe = {
        "mlp.gate.weight": (256, 2048),
        "mlp.gate.expert_bias": (256,),
        "mlp.experts.gate_up_proj": (256, 2 * 512, 2048),
        "mlp.experts.down_proj": (256, 2048, 512),
        "mlp.shared_experts.gate_proj.weight": (512, 2048),
        "mlp.shared_experts.up_proj.weight": (512, 2048),
        "mlp.shared_experts.down_proj.weight": (2048, 512),
    }
    dense = {
        "mlp.gate_proj.weight": (5120, 2048),
        "mlp.up_proj.weight": (5120, 2048),
        "mlp.down_proj.weight": (2048, 5120),
    }
    for index in range(20):
        own = {**layer, **(dense if index == 0 else moe)}
        expected |= {f"model.layers.{index}.{name}": shape for name, shape in own.items()}
    assert shapes == expected
    assert model.model.layers[1].mlp.gate.expert_bias.dtype == torch.float32


def test_config_is_plain_data():
    assert dataclasses.is_dataclass(LingConfig)
    json.dumps(LingConfig(**SIZES).to_dict())
