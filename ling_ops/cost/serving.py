"""Serving: memory, and the floors of prefill and decoding from the roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ling_ops.models import LingConfig

from .gpu import GPU, CostError, FitError, need, need_choice, need_integer
from .layout import Layout
from .model import Parameters, experts_read, flop_per_token, parameters
from .search import SERVING_HINT, layout_of, layouts_over, least_layout

#: Bytes of a weight; fp8 keeps embedding, head, norms and routers in bf16, as Ling 2.0 does.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
#: fp32 scale of a 128 x 128 block of fp8 weights.
SCALE_BYTES = 4 / 128**2
#: Prompt tokens that go through the layers at once.
PREFILL_CHUNK = 8192


def _element_bytes(name: str, dtype: str) -> int:
    return WEIGHT_BYTES[need_choice(name, dtype, WEIGHT_BYTES)]


def _weight_bytes(count: Parameters, dtype: str, routed_share: float = 1.0) -> int:
    """Bytes of parameters, of the routed experts only a share."""
    size = _element_bytes("dtype", dtype)
    kept = count.embedding + count.head + count.norms + count.routers
    products = count.attention + count.dense_mlp + count.shared_experts
    products += count.routed_experts * routed_share
    if dtype == "fp8":
        return math.ceil(2 * kept + products * (size + SCALE_BYTES))
    return math.ceil(size * (kept + products))


def weight_bytes(config: LingConfig, dtype: str = "bf16") -> int:
    """Bytes of all weights in "fp32", "bf16", "fp16" or "fp8"."""
    return _weight_bytes(parameters(config), dtype)


def kv_cache_bytes(config: LingConfig, tokens: int, dtype: str = "bf16") -> int:
    """Bytes of keys and values of `tokens` cached tokens in all layers."""
    need_integer("tokens", tokens, least=0)
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * tokens * _element_bytes("kv_dtype", dtype)


@dataclass(frozen=True)
class Load:
    """What is served at once: `batch_size` sequences, each behind `context` cached tokens."""

    batch_size: int
    context: int
    dtype: str = "bf16"  #: of weights and products
    kv_dtype: str = "bf16"

    def __post_init__(self) -> None:
        need_integer("batch_size", self.batch_size)
        need_integer("context", self.context)
        _element_bytes("dtype", self.dtype)
        _element_bytes("kv_dtype", self.kv_dtype)


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on one GPU."""

    weight_bytes: int
    kv_cache_bytes: int
    working_bytes: int  #: the largest layer's tensors of one chunk of a prompt, and its logits

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.kv_cache_bytes + self.working_bytes


def serving_memory(
    config: LingConfig, load: Load, *, layout: Layout | None = None
) -> ServingMemory:
    """Memory of serving on one GPU of a layout (None: one GPU); the sequences divide over `data`.

    Working memory is of bf16 activations: four [T,H] tensors, q, k and v, and the experts' a and
    y (or a dense layer's three inner tensors), T at most 8192.
    """
    layout = Layout() if layout is None else layout
    local = layout.local(config)
    own = math.ceil(load.batch_size / layout.data)
    tokens = min(PREFILL_CHUNK, own * load.context)
    experts = config.num_experts_per_token * (local.moe_intermediate_size + config.hidden_size)
    inner = experts if "moe" in config.layer_types else 0
    if "dense" in config.layer_types:
        inner = max(inner, 3 * local.intermediate_size)
    heads = (local.num_heads + 2 * local.num_kv_heads) * config.head_dim
    working = 2 * tokens * (4 * config.hidden_size + heads + inner) + 6 * own * local.vocab_size
    return ServingMemory(
        _weight_bytes(layout.local_parameters(config), load.dtype),
        kv_cache_bytes(local, own * load.context, load.kv_dtype),
        working,
    )


def serving_layout(
    config: LingConfig,
    gpu: GPU,
    load: Load,
    *,
    gpus: int | None = None,
    tensor_parallel: int | None = None,
    expert_parallel: int | None = None,
) -> Layout:
    """The layout of the fewest GPUs (or of exactly `gpus`) that hold weights, cache and work.

    Over exactly `gpus` each replica gets a sequence, unless a given `expert_parallel` or too little
    memory on fewer GPUs makes replicas share experts. Raises FitError where that cannot be.
    """

    def peak_bytes(layout: Layout) -> int:
        return serving_memory(config, load, layout=layout).peak_bytes

    degrees = {"tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel}
    if gpus is None:
        return least_layout(config, peak_bytes, gpu, **degrees, hint=SERVING_HINT)
    needed = {
        layout: layout.data if expert_parallel is None else layout.expert_copies
        for layout in layouts_over(config, gpus, **degrees)
        if peak_bytes(layout) <= gpu.memory_bytes
    }
    for layout, sequences in needed.items():
        if sequences <= load.batch_size:
            return layout
    layout_of(config, gpus, peak_bytes, gpu, **degrees, hint=SERVING_HINT)  # refuses if none fits
    least = least_layout(config, peak_bytes, gpu, **degrees)
    if least.gpus == gpus:
        return least
    raise FitError(
        f"batch_size: got {load.batch_size}, need at least {min(needed.values())} for {gpus} GPUs, "
        f"a sequence for each replica; it fits {least.gpus} of {gpu.name}"
    )


@dataclass(frozen=True)
class Serving:
    """A floor: no launch, no communication, perfect division."""

    step_ms: float  #: all sequences' next token, or all prompts
    tokens_per_s: float  #: of all GPUs together
    usd_per_million_tokens: float
    bound: str  #: "bytes" or "flop"


def _floor(gpu: GPU, load: Load, layout: Layout, size: float, flop: float, tokens: int,
           usd_per_gpu_hour: float) -> Serving:  # fmt: skip
    need("usd_per_gpu_hour", usd_per_gpu_hour, above=False)
    moved, computed = size / gpu.bytes_per_s, flop / gpu.rate_flop_per_s(load.dtype)
    seconds = max(moved, computed)
    usd = layout.gpus * usd_per_gpu_hour / 3600 * seconds / tokens * 1e6
    bound = "bytes" if moved >= computed else "flop"
    return Serving(1e3 * seconds, tokens / seconds, usd, bound)


def _check_fits(config: LingConfig, gpu: GPU, load: Load, layout: Layout) -> ServingMemory:
    if load.batch_size < layout.expert_copies:
        # Ranks that share experts work for each other; a whole copy without a sequence does not.
        raise CostError(
            f"batch_size: got {load.batch_size}, need at least {layout.expert_copies}, a sequence "
            "for each copy of the model"
        )
    memory = serving_memory(config, load, layout=layout)
    if memory.peak_bytes > gpu.memory_bytes:
        raise CostError(
            f"layout: got {layout.gpus} GPUs with {memory.peak_bytes / 1e9:,.1f} GB of weights, "
            f"KV cache and work on each, need at most the {gpu.memory_gb:g} GB of {gpu.name}"
        )
    return memory


def _streamed_weights(config: LingConfig, layout: Layout, dtype: str, tokens: int) -> int:
    """Bytes of the weights that one GPU reads for `tokens` tokens of all ranks together."""
    count = layout.local_parameters(config)
    of_copy = math.ceil(tokens / layout.expert_copies)
    share = experts_read(config, of_copy) / config.num_experts
    embedding = 2 * count.embedding if dtype == "fp8" else WEIGHT_BYTES[dtype] * count.embedding
    return _weight_bytes(count, dtype, share) - embedding


def decoding_cost(
    config: LingConfig,
    gpu: GPU,
    load: Load,
    *,
    layout: Layout | None = None,
    usd_per_gpu_hour: float = 0.0,
) -> Serving:
    """Roofline of one decoding step: it streams the weights that it visits, and the cache.

    Experts visited by the B tokens that share a copy of them: E (1 - (1 - K/E)^B) per layer,
    routing uniform. Raises CostError for input without sense, and where it does not fit.
    """
    layout = Layout() if layout is None else layout
    memory = _check_fits(config, gpu, load, layout)
    size = _streamed_weights(config, layout, load.dtype, load.batch_size) + memory.kv_cache_bytes
    own = math.ceil(load.batch_size / layout.data)
    flop = own * flop_per_token(config, load.context, load.context).decode_flop / layout.tensor
    return _floor(gpu, load, layout, size, flop, load.batch_size, usd_per_gpu_hour)


def prefill_cost(
    config: LingConfig,
    gpu: GPU,
    load: Load,
    *,
    layout: Layout | None = None,
    usd_per_gpu_hour: float = 0.0,
) -> Serving:
    """Roofline of reading `batch_size` prompts of `context` tokens: FLOP, or weights and cache.

    Weights are read once for each chunk of 8192 tokens of a rank. Raises as `decoding_cost`.
    """
    layout = Layout() if layout is None else layout
    memory = _check_fits(config, gpu, load, layout)
    own = math.ceil(load.batch_size / layout.data) * load.context
    chunks = math.ceil(own / PREFILL_CHUNK)
    tokens = load.batch_size * load.context
    weights = _streamed_weights(config, layout, load.dtype, math.ceil(tokens / chunks))
    size = chunks * weights + memory.kv_cache_bytes
    flop = own * flop_per_token(config, load.context, load.context).prefill_flop / layout.tensor
    return _floor(gpu, load, layout, size, flop, tokens, usd_per_gpu_hour)
