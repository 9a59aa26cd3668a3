"""The configuration of a Ling model: one flat dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "silu", "relu2")
_CAPACITIES = ("dropless", "fixed", "dynamic")


@dataclass
class LingConfig:
    """Sizes and options of ``LingForCausalLM``. ``LingConfig.preset(name)`` has named ones.

    Which layers are MoE: ``layer_pattern`` "2-4-2-4" counts layers by turns, dense first, and is
    repeated until ``num_layers`` ("0-1" is all MoE, "1-0" all dense); None means the first
    ``first_k_dense_replace`` layers are dense and all others MoE.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  #: width of a dense layer's feed-forward
    moe_intermediate_size: int  #: width of one expert
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int = 0
    first_k_dense_replace: int = 0
    layer_pattern: str | None = None
    # router
    score_function: str = "softmax"
    use_expert_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    router_jitter: float = 0.0
    balance_coefficient: float = 0.0
    sequence_balance_coefficient: float = 0.0
    z_loss_coefficient: float = 0.0
    bias_update_rate: float = 1e-3
    # capacity
    capacity: str = "dropless"  #: dropless, fixed or dynamic
    capacity_factor: float = 1.25  #: of capacity="fixed"
    target_drop_rate: float = 0.02  #: of capacity="dynamic"
    capacity_mode: str = "batch"  #: of capacity="dynamic": batch or running
    capacity_priority: str = "position"
    reroute_rounds: int = 0
    # the rest of a layer
    activation: str = "swiglu"  #: of dense layers, experts and shared experts
    swiglu_limit: float | None = None
    mlp_bias: bool = False
    use_qk_norm: bool = True
    rope_theta: float = 600_000.0
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1e-6
    norm_head: bool = False  #: each column of lm_head's weight is divided by its norm (Ling V1)
    init_std: float | None = 0.02  #: None: 1/sqrt(fan_in), and 1 for the embedding
    family: str = "custom"  #: whose numbers these are: article, ling1, ling2 or custom

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LingConfig:
        """A named configuration (see ``ling_ops.models.presets``), with some fields changed."""
        from .presets import PRESETS

        if name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, need one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LingConfig:
        """The inverse of ``to_dict``; unknown and missing keys are errors that name the key."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"{unknown[0]}: no such field; LingConfig has {', '.join(fields)}")
        for name, field in fields.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise ValueError(f"{name}: missing, need {field.type}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    @property
    def rotary_dim(self) -> int:
        """How many leading elements of a head are rotated (an even number)."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Which kind every layer is: dense or moe."""
        if self.layer_pattern is None:
            dense = self.first_k_dense_replace
            return ("dense",) * dense + ("moe",) * (self.num_layers - dense)
        runs = parse_layer_pattern(self.layer_pattern)
        cycle = [kind for i, n in enumerate(runs) for kind in n * (("dense", "moe")[i % 2],)]
        return tuple(cycle[i % len(cycle)] for i in range(self.num_layers))

    def validate(self) -> None:
        """Raises a ValueError naming the first field that does not fit, what it is and must be."""
        self._validate_types()
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_token",
            "num_groups", "topk_groups",
        ):  # fmt: skip
            self._need(name, _is_int(getattr(self, name), 1), "a positive int")
        for name in ("num_shared_experts", "first_k_dense_replace", "reroute_rounds"):
            self._need(name, _is_int(getattr(self, name), 0), "an int >= 0")
        self._validate_layers()
        self._validate_router()
        self._validate_capacity()

    def _validate_types(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if value is None and kind.endswith("| None"):
                continue
            if kind.startswith("bool"):
                self._need(field.name, isinstance(value, bool), "a bool")
            elif kind.startswith("float"):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                self._need(field.name, number and math.isfinite(value), "a finite number")
            elif kind.startswith("str"):
                self._need(field.name, isinstance(value, str), "a string")

    def _validate_layers(self) -> None:
        heads = self.num_heads
        self._need(
            "num_kv_heads", heads % self.num_kv_heads == 0, f"a divisor of num_heads={heads}"
        )
        factor = self.partial_rotary_factor
        self._need("partial_rotary_factor", 0 <= factor <= 1, "a number from 0 to 1")
        even = self.rotary_dim % 2 == 0
        self._need(
            "partial_rotary_factor", even, f"an even head_dim * factor, not {self.rotary_dim}"
        )
        self._need(
            "first_k_dense_replace",
            self.first_k_dense_replace <= self.num_layers,
            f"at most num_layers={self.num_layers}",
        )
        if self.layer_pattern is not None:
            parse_layer_pattern(self.layer_pattern)
            self._need(
                "first_k_dense_replace", self.first_k_dense_replace == 0, "0 with a layer_pattern"
            )
        self._need("activation", self.activation in _ACTIVATIONS, f"one of {_ACTIVATIONS}")
        limit = self.swiglu_limit
        fits = limit is None or (limit > 0 and self.activation == "swiglu")
        self._need("swiglu_limit", fits, "None, or a positive number with activation='swiglu'")
        for name in ("rope_theta", "rms_norm_eps"):
            self._need(name, getattr(self, name) > 0, "a positive number")
        self._need("init_std", self.init_std is None or self.init_std > 0, "positive, or None")

    def _validate_router(self) -> None:
        experts, groups, kept = self.num_experts, self.num_groups, self.topk_groups
        known = ("softmax", "sigmoid")
        self._need("score_function", self.score_function in known, f"one of {known}")
        self._need("num_groups", experts % groups == 0, f"a divisor of num_experts={experts}")
        self._need("topk_groups", kept <= groups, f"at most num_groups={groups}")
        reachable = experts // groups * kept
        what = (
            f"at most {reachable} (num_experts={experts}, num_groups={groups}, topk_groups={kept})"
        )
        self._need("num_experts_per_token", self.num_experts_per_token <= reachable, what)
        self._need("router_jitter", 0 <= self.router_jitter < 1, "a number >= 0 and < 1")
        for name in (
            "balance_coefficient", "sequence_balance_coefficient", "z_loss_coefficient",
            "bias_update_rate",
        ):  # fmt: skip
            self._need(name, getattr(self, name) >= 0, "a number >= 0")

    def _validate_capacity(self) -> None:
        self._need("capacity", self.capacity in _CAPACITIES, f"one of {_CAPACITIES}")
        self._need("capacity_factor", self.capacity_factor > 0, "a positive number")
        self._need("target_drop_rate", 0 <= self.target_drop_rate < 1, "a number >= 0 and < 1")
        modes, priorities = ("batch", "running"), ("position", "probability")
        self._need("capacity_mode", self.capacity_mode in modes, f"one of {modes}")
        self._need(
            "capacity_priority", self.capacity_priority in priorities, f"one of {priorities}"
        )

    def _need(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, need {what}")


def parse_layer_pattern(pattern: str) -> list[int]:
    """Turns "2-4-2-4" into [2, 4, 2, 4]: layer counts by turns, dense layers first."""
    runs = pattern.split("-") if isinstance(pattern, str) else []
    if not runs or not all(run.isdecimal() for run in runs) or not any(int(run) for run in runs):
        raise ValueError(
            f"layer_pattern: got {pattern!r}, need layer counts by turns, dense first, "
            "such as '2-4-2-4'"
        )
    return [int(run) for run in runs]


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
