"""Tiny models of transformers' families, and every class of experts that uses its interface."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import use_experts_implementation

_COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_MOE = {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
_LOCAL = {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}
_GROUPED = {**_MOE, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}

#: family -> (transformers' prefix, configuration)
FAMILIES: dict[str, tuple[str, dict]] = {
    "mixtral": ("Mixtral", _LOCAL),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "num_experts": 6, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_GROUPED, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        },
    ),
    "glm4_moe": ("Glm4Moe", {**_GROUPED, "first_k_dense_replace": 1, "head_dim": 8}),
    "gpt_oss": (
        "GptOss",
        {**_LOCAL, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}),
    "minimax": (
        "MiniMax",
        {
            **_LOCAL, "head_dim": 8, "block_size": 8,
            "layer_types": ["full_attention", "linear_attention"],
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **_GROUPED, "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "moe_shared_expert_intermediate_size": 24, "head_dim": 8, "mamba_num_heads": 4,
            "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
        },
    ),
}  # fmt: skip


@torch.no_grad()
def redraw(module: nn.Module) -> None:
    """Weights of size 1/sqrt(fan_in) and biases that count: initial ones hide the experts."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if "bias" in name:
            nn.init.normal_(parameter, std=0.3)


def build(family: str, implementation: str, **changes) -> nn.Module:
    """A tiny model of ``family`` in eval mode, the same weights each time.

    Parameters are fp32 unless the changes of its configuration name a ``dtype``.
    """
    prefix, sizes = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_COMMON, **sizes, **changes})
    torch.manual_seed(1)
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    model = model_class._from_config(config, experts_implementation=implementation)
    redraw(model)
    return model.eval()


def all_experts(family: str) -> dict[str, int]:
    """Changes of a family's configuration with which every token takes all experts."""
    sizes = FAMILIES[family][1]
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next(sizes[name] for name in names if name in sizes)
    groups = {"topk_group": sizes["n_group"]} if "n_group" in sizes else {}
    return {"num_experts_per_tok": count, **groups}


def experts_of(model: nn.Module) -> nn.Module:
    """The first experts module of a model."""
    return next(module for module in model.modules() if hasattr(module, "is_concatenated"))


_DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\s*\nclass (\w+)", re.MULTILINE)


@cache
def experts_classes() -> dict[str, str]:
    """Class name -> module name of every class that transformers decorates with its interface."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in _DECORATED.findall(path.read_text(encoding="utf-8")):
            found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


class AnyConfig:
    """Answers to any name that an experts class asks of its configuration."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if "latent" in name or name == "dtype":
            return None
        for part, value in (
            ("per_tok", 2), ("expert", 5), ("intermediate", 24), ("hidden_size", 16),
            ("act", "silu"), ("alpha", 1.7), ("eps", 1e-6), ("limit", 1.5), ("softcap", 2.0),
            ("beta", 0.5),
        ):  # fmt: skip
            if part in name and not (part == "expert" and "intermediate" in name):
                return value
        raise AttributeError(name)


def make_experts(name: str) -> nn.Module:
    """An experts module of the class ``name``; skips where transformers has no such class."""
    if name not in experts_classes():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    experts_class = getattr(importlib.import_module(experts_classes()[name]), name)
    torch.manual_seed(2)
    experts = experts_class(AnyConfig())
    redraw(experts)
    return experts


@cache
def layout_class(concatenated: bool, transposed: bool, bias: bool, gate: bool) -> type[nn.Module]:
    """An experts class with these choices of transformers' interface, and an eager loop."""

    class LayoutExperts(nn.Module):
        def __init__(self, config) -> None:
            super().__init__()
            self.num_experts, width = 5, 48 if gate else 24
            name, shapes = "gate_up" if gate else "up", {"down": (16, 24)}
            shapes[name] = (width, 16)
            for part, (rows, columns) in shapes.items():
                shape = (columns, rows) if transposed else (rows, columns)
                setattr(self, f"{part}_proj", nn.Parameter(torch.empty(5, *shape)))
                if bias:
                    setattr(self, f"{part}_proj_bias", nn.Parameter(torch.empty(5, rows)))
            self.act_fn = nn.SiLU()

        def _product(self, part: str, x: torch.Tensor, expert: int) -> torch.Tensor:
            weight = getattr(self, f"{part}_proj")[expert]
            out = x @ (weight if transposed else weight.t())
            return out + getattr(self, f"{part}_proj_bias")[expert] if bias else out

        def _apply_gate(self, h: torch.Tensor) -> torch.Tensor:
            g, u = h.chunk(2, -1) if concatenated else (h[..., ::2], h[..., 1::2])
            return F.silu(g) * u

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for expert in range(self.num_experts):
                token, k = torch.where(top_k_index == expert)
                h = self._product("gate_up" if gate else "up", hidden_states[token], expert)
                a = self._apply_gate(h) if gate else self.act_fn(h)
                y = self._product("down", a, expert) * top_k_weights[token, k, None]
                out = out.index_add(0, token, y.to(out.dtype))
            return out

    return use_experts_implementation(
        LayoutExperts, is_concatenated=concatenated, is_transposed=transposed, has_bias=bias,
        has_gate=gate,
    )  # fmt: skip
