"""What a training step of `LingForCausalLM` saves for its backward, module by module, in bytes.

Every term names a tensor that an autograd node keeps: `docs/cost.md` derives them. T tokens in
sequences of S, w bytes of an element of the model's dtype, M = T K rows of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from ling_ops.models import LingConfig
from ling_ops.nn._common import is_gated

from .gpu import CostError, need_integer
from .model import check_size

#: Bytes of an element of a dtype that trains.
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Batch:
    """One forward: `batch_size` sequences of `sequence_length` tokens in `dtype`."""

    batch_size: int
    sequence_length: int
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        need_integer("batch_size", self.batch_size)
        need_integer("sequence_length", self.sequence_length)
        if self.dtype not in ELEMENT_BYTES:
            raise CostError(f"dtype: got {self.dtype!r}, need one of {', '.join(ELEMENT_BYTES)}")

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    def hidden_bytes(self, config: LingConfig) -> int:
        """One [T,H] tensor."""
        return self.element_bytes * self.tokens * config.hidden_size

    def row_bytes(self, config: LingConfig, width: int) -> int:
        """One [M,width] tensor of the experts' rows."""
        return self.element_bytes * self.tokens * config.num_experts_per_token * width


def runs_fused(config: LingConfig, batch: Batch) -> bool:
    """Whether `moe_mlp` runs as its two fused nodes, which keep h alone."""
    rows_fit = config.hidden_size % 8 == 0 and config.moe_intermediate_size % 8 == 0
    return batch.element_bytes == 2 and rows_fit and not config.mlp_bias


def _norm(config: LingConfig, batch: Batch) -> int:
    """x, 1/rms per token, and the result, which the next product keeps."""
    return 2 * batch.hidden_bytes(config) + FP32 * batch.tokens


def saved_attention_bytes(config: LingConfig, batch: Batch) -> int:
    """A layer's first half: norm, projection, QK-norm, rotation, attention, output product."""
    w, tokens, length = batch.element_bytes, batch.tokens, batch.sequence_length
    heads, kv_heads = config.num_heads, config.num_kv_heads
    queries = w * tokens * heads * config.head_dim
    keys = w * tokens * kv_heads * config.head_dim
    saved = _norm(config, batch) + queries + 2 * keys  # the projection; values are a view of it
    if config.use_qk_norm:
        saved += FP32 * tokens * (heads + kv_heads)
    if w == 2:
        saved += 4 * w * length * config.rotary_dim  # cos and sin, rounded once for q, once for k
    if w == FP32 and heads != kv_heads:
        # No fused fp32 kernel shares keys: PyTorch repeats k and v and keeps all probabilities.
        return saved + 4 * queries + w * tokens * heads * length
    # rotated q and k, the output as the kernel left it and as the product reads it, logsumexp
    return saved + 3 * queries + keys + FP32 * tokens * heads


def _mlp(config: LingConfig, batch: Batch, width: int) -> int:
    """Inner tensors [T,width]: gate, act(gate), up and their product; up and act(up) if plain."""
    kept = 2
    if is_gated(config.activation):
        kept = 4 if config.swiglu_limit is None else 6
    return kept * batch.element_bytes * batch.tokens * width


def saved_dense_bytes(config: LingConfig, batch: Batch) -> int:
    """A dense layer's second half: norm and feed-forward."""
    return _norm(config, batch) + _mlp(config, batch, config.intermediate_size)


def saved_shared_bytes(config: LingConfig, batch: Batch) -> int:
    """The shared experts of a MoE layer; their input is the experts' own."""
    return _mlp(config, batch, config.num_shared_experts * config.moe_intermediate_size)


def saved_router_bytes(config: LingConfig, batch: Batch) -> int:
    """Logits in fp32 and the slopes of the losses; with jitter also noise and input in fp32."""
    saved = FP32 * batch.tokens * config.num_experts
    slopes = bool(config.balance_coefficient)
    if config.sequence_balance_coefficient:
        slopes = batch.batch_size
    saved += FP32 * config.num_experts * slopes + FP32 * bool(config.z_loss_coefficient)
    if config.router_jitter:
        saved += 2 * FP32 * batch.tokens * config.hidden_size
        if batch.element_bytes == 2:
            saved += FP32 * config.num_experts * config.hidden_size  # the weight's fp32 copy
    return saved


def routing_record_bytes(config: LingConfig, batch: Batch) -> int:
    """Gate weights, ids, `row_token`, `row_pair`, `token_row`, counts and offsets of a layer.

    `MoE` keeps them after its forward (`stats`, replay), so they stay from step to step.
    """
    pairs = batch.tokens * config.num_experts_per_token
    return 5 * FP32 * pairs + FP32 * (2 * config.num_experts + 1)


def saved_experts_bytes(config: LingConfig, batch: Batch) -> int:
    """The routed experts: h [M,2I] (or [M,I]) where they are fused, else what PyTorch keeps."""
    inner, gated = config.moe_intermediate_size, is_gated(config.activation)
    h = batch.row_bytes(config, (2 if gated else 1) * inner)
    if runs_fused(config, batch):
        return h
    rows, pairs = batch.row_bytes(config, config.hidden_size), batch.row_bytes(config, 1)
    pairs //= batch.element_bytes
    wide = FP32 * pairs * inner  # activations are computed in fp32
    saved = 2 * rows + batch.row_bytes(config, inner) + wide * (2 if gated else 1)
    if gated:
        saved += wide * (1 if config.swiglu_limit is None else 3)
    if config.mlp_bias:
        saved += 2 * INT64 * pairs  # each row's expert, for both biases
    if batch.element_bytes == FP32:
        saved += pairs * (2 * INT64 + 2 + FP32)  # ids, masks and weights of both gathers
    return saved


def saved_moe_bytes(config: LingConfig, batch: Batch) -> int:
    """A MoE layer's second half, without what `routing_record_bytes` counts."""
    return (
        _norm(config, batch)
        + saved_router_bytes(config, batch)
        + saved_experts_bytes(config, batch)
        + saved_shared_bytes(config, batch)
    )


def saved_head_bytes(config: LingConfig, batch: Batch) -> int:
    """Last norm, log-probabilities in fp32, ids and labels, and fp32 rotary tables."""
    tables = 2 * FP32 * batch.sequence_length * config.rotary_dim
    saved = _norm(config, batch) + FP32 * batch.tokens * config.vocab_size
    if config.norm_head:
        saved += batch.hidden_bytes(config)
    ids = INT64 * batch.batch_size * (batch.sequence_length + 1)
    kept_tables = tables if batch.element_bytes == FP32 else 0
    return saved + ids + INT64 * batch.tokens + kept_tables


@dataclass(frozen=True)
class Activations:
    """Bytes that are kept at the end of a forward, by part; `total` is their sum."""

    attention_bytes: int
    dense_mlp_bytes: int
    moe_bytes: int
    routing_record_bytes: int
    head_bytes: int

    @property
    def total_bytes(self) -> int:
        parts = self.attention_bytes + self.dense_mlp_bytes + self.moe_bytes
        return parts + self.routing_record_bytes + self.head_bytes


def activation_bytes(
    config: LingConfig,
    batch_size: int,
    sequence_length: int,
    *,
    dtype: str = "bf16",
    activation_checkpointing: bool = False,
) -> Activations:
    """What a forward keeps for its backward on one GPU.

    With checkpointing a layer keeps its input alone, which is counted as attention's. A reroute's
    few [T,E] tensors are left out. Raises CostError for sizes below 1 and unknown dtypes.
    """
    batch = Batch(batch_size, sequence_length, dtype)
    check_size(config)
    moe = config.layer_types.count("moe")
    dense = config.num_layers - moe
    if activation_checkpointing:
        attention, dense_mlp, experts = batch.hidden_bytes(config), 0, 0
    else:
        attention = saved_attention_bytes(config, batch)
        dense_mlp, experts = saved_dense_bytes(config, batch), saved_moe_bytes(config, batch)
    return Activations(
        attention_bytes=config.num_layers * attention,
        dense_mlp_bytes=dense * dense_mlp,
        moe_bytes=moe * experts,
        routing_record_bytes=moe * routing_record_bytes(config, batch),
        head_bytes=saved_head_bytes(config, batch),
    )
