"""``config.json`` of the published Ling models, and ``LingConfig``: each from the other.

Version 2 (Ling 2.0, architecture BailingMoeV2ForCausalLM) and version 1 (Ling-lite, Ling-plus,
BailingMoeForCausalLM) share their key names; what a file leaves out has another meaning in each.
Fields of ``LingConfig`` that no published key can say stand in an object of their own, under
``ling_ops``. Where one of them changes what the model computes, the file names an architecture of
its own too, so that no other program takes the weights for a published model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from .config import LingConfig

CONFIG = "config.json"
_OWN = "ling_ops"
_ARCHITECTURES = {1: "BailingMoeForCausalLM", 2: "BailingMoeV2ForCausalLM"}
_MODEL_TYPES = ("bailing_moe", "bailing_moe_v2", _OWN)

#: LingConfig field -> published key, for all that have the same value in both.
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_experts": "num_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "first_k_dense_replace",
    "score_function": "score_function",
    "use_expert_bias": "moe_router_enable_expert_bias",
    "num_groups": "n_group",
    "topk_groups": "topk_group",
    "renormalize": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
    "use_qk_norm": "use_qk_norm",
    "rope_theta": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rms_norm_eps": "rms_norm_eps",
    "norm_head": "norm_head",
}
#: What a key that a version's file leaves out means.
_DEFAULTS = {
    1: {
        "num_shared_experts": 0, "first_k_dense_replace": 0, "score_function": "softmax",
        "use_expert_bias": False, "num_groups": 1, "topk_groups": 1, "renormalize": True,
        "routed_scaling_factor": 1.0, "use_qk_norm": False, "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5, "norm_head": False,
    },
    2: {
        "num_shared_experts": 0, "first_k_dense_replace": 0, "score_function": "sigmoid",
        "use_expert_bias": True, "num_groups": 8, "topk_groups": 4, "renormalize": True,
        "routed_scaling_factor": 1.0, "use_qk_norm": True, "rope_theta": 600000.0,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "norm_head": False,
    },
}  # fmt: skip
#: Fields without influence on the logits of a dropless model in evaluation.
_NEUTRAL = {
    "router_jitter", "balance_coefficient", "sequence_balance_coefficient", "z_loss_coefficient",
    "bias_update_rate", "init_std", "family", "capacity_factor", "target_drop_rate",
    "capacity_mode", "capacity_priority",
}  # fmt: skip
#: Keys whose other values ask for a computation that LingForCausalLM does not have.
_ONLY = {
    "hidden_act": ("silu", None),
    "use_bias": (False, None),
    "use_qkv_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "use_sliding_window": (False, None),
    "use_rmsnorm": (True, None),
}


class CheckpointError(ValueError):
    """A folder that is no readable Ling checkpoint; the text says which part, and why."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, need an object")
    return value


def _version(values: dict[str, Any]) -> int:
    """1 or 2, by architecture; the published files do not agree on their model_type."""
    named = values.get("architectures") or []
    for version, architecture in _ARCHITECTURES.items():
        if architecture in named:
            return version
    kind = values.get("model_type")
    if kind not in _MODEL_TYPES:
        raise CheckpointError(
            f"architectures: got {named or kind!r}, need {' or '.join(_ARCHITECTURES.values())}"
        )
    return 2 if kind == "bailing_moe_v2" or values.get("score_function") == "sigmoid" else 1


def _rotary(values: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and partial_rotary_factor from whichever of their spellings is there."""
    scaling = values.get("rope_scaling") or {}
    rope = {**scaling, **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"rope_scaling: got {kind!r}, need none")
    found = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if values.get("rotary_dim") and "partial_rotary_factor" not in values:
        found["partial_rotary_factor"] = values["rotary_dim"] / _head_dim(values)
    return found


def _head_dim(values: dict[str, Any]) -> int:
    if values.get("head_dim"):
        return values["head_dim"]
    width, heads = values["hidden_size"], values["num_attention_heads"]
    for key, value in (("hidden_size", width), ("num_attention_heads", heads)):
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{key}: got {value!r}, need a positive int")
    if width < heads:
        raise CheckpointError(f"hidden_size: got {width}, need at least one for each of {heads}")
    return width // heads


def _check_supported(values: dict[str, Any]) -> None:
    for key, allowed in _ONLY.items():
        if values.get(key) not in allowed:
            raise CheckpointError(f"{key}: got {values[key]!r}, need {allowed[0]!r}")
    for key in ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list"):
        if any(values.get(key) or ()):
            raise CheckpointError(f"{key}: got {values[key]!r}, need none")


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """LingConfig's fields from a published file's values; ``ling_ops`` is left aside."""
    version = _version(values)
    _check_supported(values)
    fields = dict(_DEFAULTS[version])
    try:
        merged = {**values, **_rotary(values)}
        fields.update({f: merged[k] for f, k in _SAME.items() if merged.get(k) is not None})
        fields["head_dim"] = _head_dim(values)
    except KeyError as error:
        raise CheckpointError(f"{error.args[0]}: missing") from error
    fields["num_kv_heads"] = fields.get("num_kv_heads") or fields.get("num_heads")
    for name in ("rope_theta", "routed_scaling_factor"):
        fields[name] = float(fields[name])
    return {**fields, "family": f"ling{version}"}


def read_config(values: dict[str, Any]) -> LingConfig:
    """The configuration that a ``config.json`` describes.

    Raises CheckpointError, naming the key, where the file asks for what LingForCausalLM has not.
    """
    own = values.get(_OWN) or {}
    try:
        return LingConfig.from_dict({**_fields(values), **own})
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{CONFIG}: {error}") from error


def write_config(config: LingConfig, dtype: torch.dtype, foreign: dict[str, Any]) -> dict[str, Any]:
    """The values of a ``config.json`` for ``config``; ``foreign`` keys are carried along."""
    version = 2 if config.score_function == "sigmoid" else 1
    fields = config.to_dict()
    values = {
        **foreign,
        "architectures": [_ARCHITECTURES[version]],
        "model_type": "bailing_moe_v2" if version == 2 else "bailing_moe",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "use_bias": False,
        "use_qkv_bias": False,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
        **{key: fields[field] for field, key in _SAME.items()},
    }
    implied = {f.name: f.default for f in dataclasses.fields(LingConfig)} | _fields(values)
    own = {name: value for name, value in fields.items() if implied[name] != value}
    if own:
        values[_OWN] = own
    if set(own) - _NEUTRAL:
        values |= {"architectures": ["LingForCausalLM"], "model_type": _OWN}
    return values


def foreign_keys(values: dict[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says beyond LingConfig: token ids, limits, whatever else."""
    known = {*_SAME.values(), _OWN, "rope_parameters", "rotary_dim", "rope_scaling", "dtype"}
    known |= {"quantization_config", "auto_map", "transformers_version"}
    return {key: value for key, value in values.items() if key not in known}
