"""The same logits as transformers' GLM-4-MoE, which computes the same function."""

from __future__ import annotations

import json

import pytest
import torch

from ling_ops.models import LingConfig, LingForCausalLM

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 16,
    "num_experts_per_token": 4, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "score_function": "sigmoid", "use_expert_bias": True, "num_groups": 4, "topk_groups": 2,
    "routed_scaling_factor": 2.5, "rope_theta": 600_000.0, "init_std": 0.1,
}  # fmt: skip
CONFIG_JSON = {  # SIZES in the published words
    "architectures": ["BailingMoeV2ForCausalLM"], "vocab_size": 96, "hidden_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 16,
    "num_experts_per_tok": 4, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "rope_theta": 600000,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
RENAMED = (
    ("word_embeddings", "embed_tokens"),
    (".attention.dense.", ".self_attn.o_proj."),
    (".attention.query_layernorm.", ".self_attn.q_norm."),
    (".attention.key_layernorm.", ".self_attn.k_norm."),
    ("gate.expert_bias", "gate.e_score_correction_bias"),
)


def theirs(config: LingConfig) -> torch.nn.Module:
    glm = transformers.Glm4MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_token,
        n_shared_experts=config.num_shared_experts,
        first_k_dense_replace=config.first_k_dense_replace,
        n_group=config.num_groups,
        topk_group=config.topk_groups,
        routed_scaling_factor=config.routed_scaling_factor,
        norm_topk_prob=config.renormalize,
        use_qk_norm=config.use_qk_norm,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=False,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.partial_rotary_factor,
        },
    )
    return transformers.Glm4MoeForCausalLM(glm).eval()


def mapped(model: LingForCausalLM) -> dict[str, torch.Tensor]:
    config, state = model.config, {}
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    for name, value in model.state_dict().items():
        if "query_key_value" in name:
            for part, rows in zip(
                "qkv", value.split([n * config.head_dim for n in heads]), strict=True
            ):
                state[name.replace("attention.query_key_value", f"self_attn.{part}_proj")] = rows
            continue
        for old, new in RENAMED:
            name = name.replace(old, new)
        state[name] = value
    return state


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_logits_agree(factor):
    model = LingForCausalLM(LingConfig(**SIZES, partial_rotary_factor=factor)).eval()
    for _, moe in model.moe_layers():
        moe.gate.expert_bias.normal_(std=0.05)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    peer = theirs(model.config)
    peer.load_state_dict(mapped(model))
    input_ids = torch.randint(0, 96, (3, 40))
    with torch.no_grad():
        mine, expected = model(input_ids).logits, peer(input_ids=input_ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-5)


def published(peer: torch.nn.Module, config: LingConfig) -> dict[str, torch.Tensor]:
    """The peer's weights under the published keys, without this package's help."""
    state, tensors = dict(peer.state_dict()), {}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn"
        parts = [state.pop(f"{prefix}.{part}_proj.weight") for part in "qkv"]
        tensors[f"model.layers.{layer}.attention.query_key_value.weight"] = torch.cat(parts)
    for name, value in state.items():
        for old, new in RENAMED:
            name = name.replace(new, old)
        prefix, _, which = name.rpartition(".experts.")
        if not prefix:
            tensors[name] = value
            continue
        for expert, matrix in enumerate(value):
            stem, width = f"{prefix}.experts.{expert}", config.moe_intermediate_size
            if which == "down_proj":
                tensors[f"{stem}.down_proj.weight"] = matrix
            else:
                tensors[f"{stem}.gate_proj.weight"] = matrix[:width]
                tensors[f"{stem}.up_proj.weight"] = matrix[width:]
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_published_checkpoint_gives_the_peers_logits(tmp_path, device):
    safetensors = pytest.importorskip("safetensors.torch")
    config = LingConfig(**SIZES)
    peer = theirs(config)
    for name, tensor in peer.state_dict().items():
        if "norm" in name:
            torch.nn.init.normal_(tensor, mean=1.0, std=0.2)
        else:
            torch.nn.init.normal_(tensor, std=0.05 if "bias" in name else 0.1)
    safetensors.save_file(published(peer, config), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    model = LingForCausalLM.from_pretrained(tmp_path, device=device)
    input_ids = torch.randint(0, 96, (3, 40))
    with torch.no_grad():
        expected = peer(input_ids=input_ids).logits
        mine = model(input_ids.to(device)).logits.cpu()
    assert expected.std() > 0.1
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-5)
