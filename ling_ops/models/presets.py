"""Named configurations. Each says whose numbers it holds.

``ling2``: the published Ling 2.0 models. Parameters (total / active per token, the count of
``LingForCausalLM.count_parameters``):

- ``ling-mini-2.0``   16.256B / 1.433B
- ``ling-flash-2.0``  102.89B / 6.152B
- ``ling-1t``         999.7B / 51.05B

``article``: the system of the article. Experts and dense layers are Linear(d, 4d) → GELU →
Linear(4d, d) with biases, the router is a linear map with a bias, gate weights are the chosen
softmax probabilities as they are, layers follow 2-4-2-4. The article gives no vocabulary, head
size, number of KV heads or rotary setting: 65536, 128, plain multi-head attention and rotation of
half of each head are filled in here, without QK-norm.

- ``article-example``: the example layer (64 experts, 8 active, d = 4096) in the shortest model
  that has the whole pattern, 6 layers. These sizes give 35.57B / 5.505B.
- ``article-1t``: 120 layers, hidden 12288, 96 heads, 128 experts, 16 active. The article states
  10T parameters in total and 2T active; these sizes give 12.49T / 1.669T (all layers MoE: 18.6T /
  2.4T). The sizes are kept and the article's totals are not.

``custom``: ``tiny`` and ``small`` belong to neither; they read bytes and have the hierarchical
pattern. ``tiny`` is sized for two CPU cores, ``small`` for one GPU.
"""

from __future__ import annotations

from typing import Any

_LING2: dict[str, Any] = {
    "vocab_size": 157184,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "score_function": "sigmoid",
    "use_expert_bias": True,
    "num_groups": 8,
    "topk_groups": 4,
    "renormalize": True,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600_000.0,
    "z_loss_coefficient": 3.5e-6,
    "family": "ling2",
}

_ARTICLE: dict[str, Any] = {
    "vocab_size": 65536,
    "head_dim": 128,
    "layer_pattern": "2-4-2-4",
    "score_function": "softmax",
    "renormalize": False,
    "router_bias": True,
    "balance_coefficient": 0.01,
    "activation": "gelu",
    "mlp_bias": True,
    "use_qk_norm": False,
    "family": "article",
}

_BYTES: dict[str, Any] = {
    "vocab_size": 256,
    "score_function": "sigmoid",
    "use_expert_bias": True,
    "renormalize": True,
    "num_shared_experts": 1,
    "rope_theta": 10_000.0,
    "z_loss_coefficient": 1e-5,
    "init_std": None,
    "family": "custom",
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_BYTES,
        "hidden_size": 128,
        "num_layers": 6,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "intermediate_size": 320,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "layer_pattern": "1-2-1-2",
        "bias_update_rate": 1e-2,  # a run has hundreds of steps, not hundreds of thousands
    },
    "small": {
        **_BYTES,
        "hidden_size": 512,
        "num_layers": 12,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1408,
        "moe_intermediate_size": 256,
        "num_experts": 64,
        "num_experts_per_token": 6,
        "num_groups": 8,
        "topk_groups": 4,
        "routed_scaling_factor": 2.5,
        "layer_pattern": "2-4-2-4",
    },
    "article-example": {
        **_ARTICLE,
        "hidden_size": 4096,
        "num_layers": 6,
        "num_heads": 32,
        "num_kv_heads": 32,
        "intermediate_size": 4 * 4096,
        "moe_intermediate_size": 4 * 4096,
        "num_experts": 64,
        "num_experts_per_token": 8,
    },
    "article-1t": {
        **_ARTICLE,
        "hidden_size": 12288,
        "num_layers": 120,
        "num_heads": 96,
        "num_kv_heads": 96,
        "intermediate_size": 4 * 12288,
        "moe_intermediate_size": 4 * 12288,
        "num_experts": 128,
        "num_experts_per_token": 16,
    },
    "ling-mini-2.0": {
        **_LING2,
        "hidden_size": 2048,
        "num_layers": 20,
        "num_heads": 16,
        "num_kv_heads": 4,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "first_k_dense_replace": 1,
    },
    "ling-flash-2.0": {
        **_LING2,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 4,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
        "first_k_dense_replace": 1,
    },
    "ling-1t": {
        **_LING2,
        "hidden_size": 8192,
        "num_layers": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 4,
    },
}
