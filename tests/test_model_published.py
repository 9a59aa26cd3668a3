"""``config.json`` of the published models: what it says, and what it may not ask for."""

from __future__ import annotations

import pytest

from ling_ops.models import CheckpointError, LingConfig
from ling_ops.models.published import read_config

PUBLISHED = {
    "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe",
    "vocab_size": 157184, "hidden_size": 2048, "num_hidden_layers": 20,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 256,
    "num_experts_per_tok": 8, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "use_qk_norm": True,
    "rope_theta": 600000, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "hidden_act": "silu", "use_bias": False, "use_qkv_bias": False,
    "tie_word_embeddings": False, "eos_token_id": 156892, "max_position_embeddings": 32768,
}  # fmt: skip


def read(**changes) -> LingConfig:
    return read_config({**PUBLISHED, **changes})


def test_a_published_file_gives_the_preset():
    assert read() == LingConfig.preset("ling-mini-2.0", z_loss_coefficient=0.0)


def test_spellings_of_the_rotary_width():
    absent = {"partial_rotary_factor": None}
    left_out = {k: v for k, v in PUBLISHED.items() if k != "partial_rotary_factor"}
    assert read_config({**left_out, "rotary_dim": 64}).rotary_dim == 64
    assert read_config(left_out).rotary_dim == 64
    parameters = {"rope_theta": 5e5, "partial_rotary_factor": 0.25, "rope_type": "default"}
    config = read(**absent, rope_parameters=parameters)
    assert (config.rotary_dim, config.rope_theta) == (32, 5e5)


def test_version_1_has_other_defaults():
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "intermediate_size", "moe_intermediate_size",
             "num_experts")  # fmt: skip
    values = {name: PUBLISHED[name] for name in names}
    config = read_config(
        {**values, "architectures": ["BailingMoeForCausalLM"], "num_experts_per_tok": 6,
         "norm_head": True}
    )  # fmt: skip
    assert config.score_function == "softmax" and not config.use_expert_bias
    assert (config.num_groups, config.rotary_dim, config.head_dim) == (1, 128, 128)
    assert config.norm_head and not config.use_qk_norm


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_qkv_bias": True}, "use_qkv_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"expert_swiglu_limit_list": [0, 7.0]}, "expert_swiglu_limit_list"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads: got 0, need a posit"),
        ({"hidden_size": 8, "head_dim": None}, "hidden_size: got 8, need at least one for each"),
        ({"n_group": 7}, "num_groups"),
        ({"ling_ops": {"no_such": 1}}, "no_such"),
    ],
)
def test_what_is_not_supported_is_named(changes, named):
    with pytest.raises(CheckpointError, match=named):
        read(**changes)
