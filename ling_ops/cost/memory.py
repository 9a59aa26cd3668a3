"""Peak memory of a training step on one GPU: states, activations, and what a backward adds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ling_ops.models import LingConfig
from ling_ops.nn._common import is_gated

from .activations import (
    FP32,
    Batch,
    routing_record_bytes,
    runs_fused,
    saved_attention_bytes,
    saved_dense_bytes,
    saved_experts_bytes,
    saved_head_bytes,
    saved_moe_bytes,
    saved_shared_bytes,
)
from .gpu import need_integer
from .layout import Layout
from .model import mlp_parameters

#: cuBLAS keeps 32 MiB for each of the two threads that call it: forward's and backward's (H100).
WORKSPACE_BYTES = 64 * 2**20
#: Columns past which dW reads a copy of gathered rows (`ling_ops.ops._fused_mlp`).
GATHERED_COLUMNS = 2048


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU. The peak is the largest of the three moments below; each holds weights
    and optimizer states, and what else is alive then."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int  #: two moments, and fp32 weights beside 16-bit ones
    gathered_bytes: int  #: two layers' weights and one's gradients in whole, if sharded in full
    activation_bytes: int  #: kept at the end of a forward
    workspace_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    optimizer_peak_bytes: int

    @property
    def peak_bytes(self) -> int:
        return max(self.forward_peak_bytes, self.backward_peak_bytes, self.optimizer_peak_bytes)


@dataclass(frozen=True)
class _Layer:
    """What one layer keeps, its gradients, and what its passes have on top of that, in bytes."""

    attention_saved: int
    mlp_saved: int
    gradients: int
    inner: int  #: of the saved tensors those inside of the feed-forward
    forward_extra: int
    mlp_extra: int
    attention_extra: int

    @property
    def saved(self) -> int:
        return self.attention_saved + self.mlp_saved


def _attention_extra(config: LingConfig, batch: Batch) -> int:
    """dout, dq, dk, dv of attention, and its fp32 sums of dq (or dP where PyTorch keeps all P)."""
    heads, per_head = config.num_heads, batch.tokens * config.head_dim
    extra = batch.element_bytes * per_head * (2 * heads + 2 * config.num_kv_heads)
    if batch.element_bytes == FP32 and heads != config.num_kv_heads:
        return extra + 2 * FP32 * batch.tokens * heads * batch.sequence_length
    return extra + FP32 * per_head * heads


def _experts_extra(config: LingConfig, batch: Batch, experts: int) -> int:
    """Backward of the routed experts, of which `experts` lie here, beyond their saved tensors."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    wide = (2 if is_gated(config.activation) else 1) * inner
    rows = batch.row_bytes(config, hidden)
    if not runs_fused(config, batch):
        return max(2 * rows, rows + 3 * FP32 * batch.row_bytes(config, wide) // batch.element_bytes)
    a, h = batch.row_bytes(config, inner), batch.row_bytes(config, wide)
    matrix = batch.element_bytes * experts * hidden * inner
    grad_up = matrix * wide // inner
    dact = h + a  # dh and w a; h is still there, and goes next
    dw_down = a + matrix + (rows if inner > GATHERED_COLUMNS else 0)
    dx = rows + batch.hidden_bytes(config) + matrix
    dw_up = batch.hidden_bytes(config) + matrix + grad_up
    dw_up += rows if wide > GATHERED_COLUMNS else 0
    return max(dact, dw_down, dx, dw_up)


def _layer(config: LingConfig, batch: Batch, kind: str, layout: Layout) -> _Layer:
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * config.hidden_size
    attention = {
        "attention_saved": saved_attention_bytes(config, batch),
        "attention_extra": _attention_extra(config, batch),
    }
    if kind == "dense":
        return _dense_layer(config, batch, heads, attention)
    return _moe_layer(config, batch, heads, attention, layout.expert)


def _dense_layer(config: LingConfig, batch: Batch, heads: int, attention: dict) -> _Layer:
    inner, hidden = config.intermediate_size, batch.hidden_bytes(config)
    saved = saved_dense_bytes(config, batch)
    return _Layer(
        **attention,
        mlp_saved=saved,
        gradients=batch.element_bytes * (heads + mlp_parameters(config, inner)),
        inner=saved - 2 * hidden,
        forward_extra=hidden,
        mlp_extra=batch.element_bytes * inner * (2 * batch.tokens + config.hidden_size),
    )


def _moe_layer(config: LingConfig, batch: Batch, heads: int, attention: dict, ranks: int) -> _Layer:
    """A layer whose experts are divided over `ranks`."""
    inner, w, hidden = config.moe_intermediate_size, batch.element_bytes, batch.hidden_bytes(config)
    rows, experts = batch.row_bytes(config, config.hidden_size), config.num_experts // ranks
    count = experts * mlp_parameters(config, inner) + config.num_experts * config.hidden_size
    saved, extra = saved_moe_bytes(config, batch), _experts_extra(config, batch, experts)
    if ranks > 1:
        # rows as they arrived, and the results that came back; ids of the arrived rows
        saved += 2 * rows + routing_record_bytes(config, batch)
    if config.num_shared_experts:
        width = config.num_shared_experts * inner
        count += mlp_parameters(config, width)
        # Their backward comes first: its dx stays, what they saved is gone.
        extra += hidden - saved_shared_bytes(config, batch)
        extra = max(extra, 2 * w * batch.tokens * width)
    fused = runs_fused(config, batch)
    return _Layer(
        **attention,
        mlp_saved=saved,
        gradients=w * (heads + count),
        inner=saved_experts_bytes(config, batch),
        forward_extra=hidden + rows + (batch.row_bytes(config, inner) if fused else rows),
        mlp_extra=extra,
    )


@dataclass(frozen=True)
class _States:
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    step_copies: int  #: fp32 gradients while the optimizer steps


def _states(config: LingConfig, dtype_bytes: int, layout: Layout) -> _States:
    count = layout.local_parameters(config)
    routed, rest = count.routed_experts, count.total - count.routed_experts
    wide = 8 if dtype_bytes == FP32 else 12
    copies = 0 if dtype_bytes == FP32 else FP32

    def divided(size: int, by_shards: bool) -> int:
        if not by_shards:
            return size * (routed + rest)
        return -(-size * rest // layout.data) + -(-size * routed // layout.expert_copies)

    full, any_shard = layout.shard == "full", layout.shard != "none"
    gathered = 0
    if full and layout.data > 1:
        unit = _largest_unit(config, layout)
        gathered = 3 * dtype_bytes * unit
    return _States(
        divided(dtype_bytes, full), divided(dtype_bytes, full), divided(wide, any_shard),
        gathered, divided(copies, any_shard),
    )  # fmt: skip


def _largest_unit(config: LingConfig, layout: Layout) -> int:
    """Parameters of the largest layer that is gathered in one piece."""
    count, local = layout.local_parameters(config), layout.local(config)
    moe = max(1, config.layer_types.count("moe"))
    layer = count.attention // config.num_layers
    mlp = mlp_parameters(local, local.intermediate_size) if "dense" in config.layer_types else 0
    routed = count.routed_experts // moe if layout.expert_copies > 1 else 0
    experts = routed + (count.shared_experts + count.routers) // moe
    return max(layer + max(mlp, experts), count.head)


def _forward_peak(config, batch, layers, kept, checkpointing) -> int:
    """The most that is alive in the forward: in a layer's experts, or in the loss."""
    hidden, vocabulary = batch.hidden_bytes(config), FP32 * batch.tokens * config.vocab_size
    live = peak = 0
    for layer in layers:
        inside = 3 * hidden + layer.inner if checkpointing else layer.saved
        peak = max(peak, live + inside + layer.forward_extra)
        live += hidden if checkpointing else layer.saved
    return max(peak, kept + vocabulary)


def _backward_peak(config, batch, layers, kept, checkpointing, fresh) -> int:
    """The most that is alive in the backward, from the loss down to the first layer.

    fresh: the share of a layer's gradients that comes to lie here once its backward is done.
    """
    hidden, w = batch.hidden_bytes(config), batch.element_bytes
    vocabulary = FP32 * batch.tokens * config.vocab_size
    live = kept
    peak = live + 2 * vocabulary  # gradients of log-probabilities and of logits
    live += hidden - saved_head_bytes(config, batch)
    live += math.ceil(w * config.vocab_size * config.hidden_size * fresh)
    for layer in reversed(layers):
        if checkpointing:
            live += layer.saved - hidden
        peak = max(peak, live + layer.mlp_extra)
        live += math.ceil(layer.gradients * fresh) - layer.mlp_saved
        peak = max(peak, live + layer.attention_extra)
        live -= layer.attention_saved
    return peak


def training_memory(
    config: LingConfig,
    batch_size: int,
    sequence_length: int,
    *,
    dtype: str = "bf16",
    activation_checkpointing: bool = False,
    micro_batches: int = 1,
    layout: Layout | None = None,
) -> TrainingMemory:
    """Peak bytes of one step of `ling-ops train` on one GPU.

    Args:
        config: the model.
        batch_size: sequences in one forward of one data-parallel rank.
        sequence_length: tokens of each.
        dtype: "bf16", "fp16" (fp32 weights and moments beside them) or "fp32".
        activation_checkpointing: keep each layer's input alone and compute the layer again.
        micro_batches: forwards per optimizer step; above 1 all gradients are there throughout.
        layout: how it is divided; None is one GPU.

    Raises CostError for sizes, dtypes and degrees that do not fit. The CUDA context and what the
    allocator leaves unused are not in it: `torch.cuda.max_memory_allocated` is what it predicts.
    """
    layout = Layout() if layout is None else layout
    need_integer("micro_batches", micro_batches)
    batch, local = Batch(batch_size, sequence_length, dtype), layout.local(config)
    kinds = {kind: _layer(local, batch, kind, layout) for kind in set(config.layer_types)}
    layers = [kinds[kind] for kind in config.layer_types]
    states = _states(config, batch.element_bytes, layout)
    records = config.layer_types.count("moe") * routing_record_bytes(config, batch)
    if activation_checkpointing:
        saved = len(layers) * batch.hidden_bytes(config)
    else:
        saved = sum(layer.saved for layer in layers)
    saved += saved_head_bytes(local, batch)
    always = states.weights + states.optimizer + states.gathered + records + WORKSPACE_BYTES
    whole = batch.element_bytes * layout.local_parameters(config).total
    kept, fresh = (states.gradients, 0.0) if micro_batches > 1 else (0, states.gradients / whole)
    fixed = (local, batch, layers, saved, activation_checkpointing)
    forward, backward = kept + _forward_peak(*fixed), kept + _backward_peak(*fixed, fresh)
    return TrainingMemory(
        weight_bytes=states.weights,
        gradient_bytes=states.gradients,
        optimizer_bytes=states.optimizer,
        gathered_bytes=states.gathered,
        activation_bytes=saved + records,
        workspace_bytes=WORKSPACE_BYTES,
        forward_peak_bytes=always + forward,
        backward_peak_bytes=always + backward,
        optimizer_peak_bytes=always - states.gathered + states.gradients + states.step_copies,
    )
