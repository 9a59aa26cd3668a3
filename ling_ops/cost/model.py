"""Parameters, FLOPs and layer floors of a configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ling_ops.models import LingConfig
from ling_ops.nn._common import is_gated

from .gpu import GPU, CostError, need_integer, short


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part; `active` counts K of the E routed experts."""

    embedding: int
    head: int
    attention: int
    norms: int
    dense_mlp: int
    routers: int
    routed_experts: int
    shared_experts: int
    idle_experts: int  #: of `routed_experts`, those that a token does not visit

    @property
    def total(self) -> int:
        fields = dataclasses.asdict(self)
        return sum(fields.values()) - self.idle_experts

    @property
    def active(self) -> int:
        return self.total - self.idle_experts


#: Beyond these no model is meant: a search over layouts would not end, or a product overflow.
MOST_LAYERS, MOST_EXPERTS, MOST_SIZE = 1000, 10**4, 10**8


def check_size(config: LingConfig) -> None:
    """CostError where a size is far beyond that of any model."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        most = {"num_layers": MOST_LAYERS, "num_experts": MOST_EXPERTS}.get(field.name, MOST_SIZE)
        if isinstance(value, int) and value > most:
            raise CostError(f"{field.name}: got {short(value)}, need at most {most:,}")


def mlp_parameters(config: LingConfig, width: int) -> int:
    """Parameters of one feed-forward of inner width `width`."""
    matrices = 3 if is_gated(config.activation) else 2
    biases = (matrices - 1) * width + config.hidden_size if config.mlp_bias else 0
    return matrices * width * config.hidden_size + biases


def parameters(config: LingConfig) -> Parameters:
    """Counts what `LingForCausalLM.count_parameters` counts, part by part, without a model."""
    check_size(config)
    hidden, layers, moe = config.hidden_size, config.num_layers, config.layer_types.count("moe")
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    expert = mlp_parameters(config, config.moe_intermediate_size)
    shared = 0
    if config.num_shared_experts:
        shared = mlp_parameters(config, config.num_shared_experts * config.moe_intermediate_size)
    norms = 2 * hidden + (2 * config.head_dim if config.use_qk_norm else 0)
    router = config.num_experts * (hidden + config.router_bias)
    return Parameters(
        embedding=config.vocab_size * hidden,
        head=config.vocab_size * hidden,
        attention=layers * heads * hidden,
        norms=layers * norms + hidden,
        dense_mlp=(layers - moe) * mlp_parameters(config, config.intermediate_size),
        routers=moe * router,
        routed_experts=moe * config.num_experts * expert,
        shared_experts=moe * shared,
        idle_experts=moe * (config.num_experts - config.num_experts_per_token) * expert,
    )


@dataclass(frozen=True)
class TokenFlop:
    """FLOP of one token; a multiplication and an addition count as two."""

    train_flop: float  #: forward and backward (3 x forward), mean over a sequence
    prefill_flop: float  #: mean over a prompt; the head for its last token only
    decode_flop: float  #: one more token behind `context` cached ones


def flop_per_token(config: LingConfig, sequence_length: int, context: int) -> TokenFlop:
    """2 x active matrix parameters, and 4 x heads x head_dim x attended tokens per layer.

    The embedding is a look-up; norms, biases and the softmax are left out.
    """
    count = parameters(config)
    need_integer("sequence_length", sequence_length)
    need_integer("context", context)
    body = 2.0 * (count.active - count.embedding - count.head - count.norms)
    head = 2.0 * count.head
    attended = 4.0 * config.num_heads * config.head_dim * config.num_layers
    mean = attended * (sequence_length + 1) / 2
    return TokenFlop(
        train_flop=3 * (body + head + mean),
        prefill_flop=body + head / sequence_length + mean,
        decode_flop=body + head + attended * (context + 1),
    )


def _seconds(gpu: GPU, *stages: tuple[float, float]) -> float:
    return sum(max(f / gpu.flop_per_s, b / gpu.bytes_per_s) for f, b in stages)


def moe_layer_train_ms(
    tokens: int, hidden: int, intermediate: int, experts: int, choices: int, gpu: GPU
) -> float:
    """Floor of forward and backward of one SwiGLU MoE layer in bf16, without router, in ms.

    Per stage the larger of FLOP and bytes: up (h and a are written), down, combine, dact, dW down,
    dx rows, dW up, combine. Raises CostError for sizes without sense and for choices > experts.
    """
    sizes = {"tokens": tokens, "hidden": hidden, "intermediate": intermediate,
             "experts": experts, "choices": choices}  # fmt: skip
    for name, size in sizes.items():
        need_integer(name, size)
    if choices > experts:
        raise CostError(f"choices: got {choices}, need at most experts={experts}")
    rows, h, i = tokens * choices, hidden, intermediate
    flop, x, down = 2 * rows * h * i, tokens * h, experts * h * i
    return 1e3 * _seconds(
        gpu,
        (2 * flop, 2 * (x + 2 * down + 3 * rows * i)),
        (flop, 2 * (rows * i + down + rows * h)),
        (0, 2 * (rows * h + x)),
        (flop, 2 * (x + down + 5 * rows * i)),
        (flop, 2 * (rows * i + x + down)),
        (2 * flop, 2 * (2 * rows * i + 2 * down + rows * h)),
        (2 * flop, 2 * (2 * rows * i + x + 2 * down)),
        (0, 2 * (rows * h + x)),
    )


def experts_read(config: LingConfig, tokens: int) -> float:
    """Expected number of a layer's experts that `tokens` tokens visit, routing uniform."""
    share = config.num_experts_per_token / config.num_experts
    return config.num_experts * (1 - (1 - share) ** tokens)
