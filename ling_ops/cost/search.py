"""The least number of GPUs on which something fits, over all layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ling_ops.models import LingConfig

from .gpu import GPU, CostError, FitError, need_integer
from .layout import Layout

#: What may help a model that does not fit.
TRAINING_HINT = "use activation checkpointing, shard=full, fewer or shorter sequences"
SERVING_HINT = "use fp8, fewer sequences or a shorter context"
#: Tensor parallel stays inside of a host; data parallel ends somewhere.
MOST_TENSOR, MOST_DATA = 8, 2**20


def _degrees(config: LingConfig, tensor: int | None, expert: int | None) -> Iterator[Layout]:
    """The smallest layout of every (tensor, expert) that divides the model."""
    tensors = [tensor] if tensor is not None else [2**i for i in range(MOST_TENSOR.bit_length())]
    experts = [n for n in range(1, config.num_experts + 1) if config.num_experts % n == 0]
    experts = experts if expert is None else [expert]
    refused, divides = None, False
    for t in tensors:
        for e in experts:
            layout = Layout(data=e, tensor=t, expert=e)
            try:
                layout.check(config)
            except CostError as error:
                refused = error
                continue
            divides = True
            yield layout
    if not divides:
        raise refused


def _least_data(layout: Layout, shard: str, fits: Callable[[Layout], bool]) -> Layout | None:
    """The layout with the fewest data-parallel ranks that fits; more of them never take more."""

    def of(copies: int) -> Layout:
        return Layout(copies * layout.expert, layout.tensor, layout.expert, shard)

    low, high = 0, 1
    while not fits(of(high)):
        low, high = high, 2 * high
        if high * layout.expert > MOST_DATA:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(of(middle)) else (middle, high)
    return of(high)


def least_layout(
    config: LingConfig,
    peak_bytes: Callable[[Layout], int],
    gpu: GPU,
    *,
    tensor_parallel: int | None = None,
    expert_parallel: int | None = None,
    shard: str = "none",
    hint: str = TRAINING_HINT,
) -> Layout:
    """The layout of the fewest GPUs whose `peak_bytes` are at most the memory of one.

    Degrees that are None are searched: tensor over powers of two up to 8, expert over the divisors
    of the number of experts. Among equals the one with the least tensor, then expert parallel.
    Raises FitError where nothing fits, CostError where a given degree does not divide the model.
    """
    for name, degree in (
        ("tensor_parallel", tensor_parallel),
        ("expert_parallel", expert_parallel),
    ):
        if degree is not None:
            need_integer(name, degree)
    Layout(shard=shard)
    best = smallest = None
    for start in _degrees(config, tensor_parallel, expert_parallel):
        found = _least_data(start, shard, lambda layout: peak_bytes(layout) <= gpu.memory_bytes)
        if found is not None and (best is None or found.gpus < best.gpus):
            best = found
        if found is None:
            wide = Layout(
                MOST_DATA // start.expert * start.expert, start.tensor, start.expert, shard
            )
            need = peak_bytes(wide)
            smallest = need if smallest is None else min(smallest, need)
    if best is None:
        raise FitError(
            f"model: does not fit {gpu.name} in any number: one would hold at least "
            f"{smallest / 1e9:.4g} GB in {gpu.memory_gb:g} GB; {hint}, or more tensor or expert "
            "parallel"
        )
    return best


def layouts_over(
    config: LingConfig,
    gpus: int,
    *,
    tensor_parallel: int | None = None,
    expert_parallel: int | None = None,
    shard: str = "none",
) -> list[Layout]:
    """All layouts over exactly `gpus` GPUs, by tensor, then expert parallel; CostError if none."""
    need_integer("gpus", gpus)
    layouts = [
        Layout(gpus // start.tensor, start.tensor, start.expert, shard)
        for start in _degrees(config, tensor_parallel, expert_parallel)
        if gpus % start.gpus == 0
    ]
    if not layouts:
        product = (tensor_parallel or 1) * (expert_parallel or 1)
        raise CostError(
            f"gpus: got {gpus}, need a multiple of tensor_parallel x expert_parallel = {product}"
        )
    return layouts


def layout_of(
    config: LingConfig,
    gpus: int,
    peak_bytes: Callable[[Layout], int],
    gpu: GPU,
    *,
    tensor_parallel: int | None = None,
    expert_parallel: int | None = None,
    shard: str = "none",
    hint: str = TRAINING_HINT,
) -> Layout:
    """The layout over exactly `gpus` GPUs that fits, with the least tensor, then expert parallel.

    Raises FitError where none does.
    """
    layouts = layouts_over(
        config, gpus, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel, shard=shard
    )
    for layout in layouts:
        if peak_bytes(layout) <= gpu.memory_bytes:
            return layout
    least = least_layout(
        config, peak_bytes, gpu, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel,
        shard=shard, hint=hint,
    )  # fmt: skip
    what = f"need at least {least.gpus}"
    if gpus > least.gpus:
        what = f"over which no layout fits; it fits {least.gpus}"
    raise FitError(
        f"gpus: got {gpus}, {what} of {gpu.name} (tensor parallel {least.tensor}, expert parallel "
        f"{least.expert}, shard {shard})"
    )
