"""Low-rank adaptation (LoRA, Hu et al. 2021) of experts and of linear layers, in place.

A weight W stays frozen; what trains is scale B A with B A of rank r. The experts' additions run as
two grouped products (``ling_ops.ops.lora_mlp``), so that nothing of the size of W is made.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ling_ops import ops
from ling_ops.ops.lora_mlp import LowRank, lora_mlp

from ._common import check_positive
from .experts import Experts

#: What weights can be in to be computed with.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: For errors: the way from a model that FSDP spread to one on one process.
WHOLE_STATE = (
    "Whole weights: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True))"
)
# Classes of engines go by name: a torch without torch.distributed does not have them.
_DDP = "DistributedDataParallel"
_SHARDING = ("FSDPModule", "FullyShardedDataParallel")


class Adapter(nn.Module):
    """scale B A beside one weight: ``a [r, in]``, ``b [out, r]``, both stacked ``[E, ...]`` beside
    the weights of experts. ``b`` starts at zero, so that a new adapter changes nothing."""

    def __init__(
        self, weight: torch.Tensor, r: int, scale: float, dropout: float, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        *experts, rows, columns = weight.shape
        dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
        options = {"device": weight.device, "dtype": dtype}
        self.scale, self.dropout, self.merged = scale, dropout, False
        self.a = nn.Parameter(torch.empty(*experts, r, columns, **options))
        self.b = nn.Parameter(torch.zeros(*experts, rows, r, **options))
        nn.init.uniform_(self.a, -(columns**-0.5), columns**-0.5)

    @property
    def r(self) -> int:
        return self.b.shape[-1]

    def low_rank(self) -> LowRank:
        """What ``ling_ops.ops.lora_mlp`` takes."""
        return LowRank(self.a, self.b, self.scale, self.dropout if self.training else 0.0)

    @torch.no_grad()
    def add_to(self, weight: torch.Tensor, sign: float) -> None:
        """weight += sign scale B A, rounded once, one expert's product at a time."""
        stacked = weight.dim() == 3
        for w, a, b in zip(
            *((t if stacked else [t]) for t in (weight, self.a, self.b)), strict=True
        ):
            wide = torch.promote_types(w.dtype, a.dtype)
            w.copy_(torch.addmm(w.to(wide), b.to(wide), a.to(wide), alpha=sign * self.scale))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # W + scale B A beside A and B: whoever loads it would add scale B A once more.
        if self.merged:
            raise ValueError(
                f"model: {prefix.rstrip('.') or 'it'} is merged, which a state dict does not say: "
                "unmerge_lora or remove_lora comes first"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, *lists) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        if self.merged:
            # the last list is that of the errors that load_state_dict raises together
            lists[-1].append(
                f"model: {prefix.rstrip('.') or 'it'} is merged, what is loaded is not: "
                "unmerge_lora comes first"
            )

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale}, dropout={self.dropout}, merged={self.merged}"


class LoRALinear(nn.Linear):
    """A linear layer with an ``Adapter`` named ``lora``; made by ``add_lora``."""

    lora: Adapter

    def adapted_weight(self) -> torch.Tensor:
        """What the forward applies, W + scale B A where it is not merged: made in full."""
        lora = self.lora
        if lora.merged:
            return self.weight
        dtype = torch.promote_types(self.weight.dtype, lora.a.dtype)
        weight, a, b = (tensor.to(dtype) for tensor in (self.weight, lora.a, lora.b))
        return torch.addmm(weight, b, a, alpha=lora.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, lora = super().forward(x), self.lora
        if lora.merged:
            return out
        inner = F.linear(F.dropout(x, lora.dropout, self.training), lora.a.to(x.dtype))
        return out + lora.scale * F.linear(inner, lora.b.to(x.dtype))


class LoRAExperts(Experts):
    """Experts with an ``Adapter`` for one or both weights in ``lora``; made by ``add_lora``."""

    lora: nn.ModuleDict

    def forward(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        *,
        routing: ops.Routing | None = None,
    ) -> torch.Tensor:
        """As ``Experts.forward``."""
        low = {name: lora.low_rank() for name, lora in self.lora.items() if not lora.merged}
        first = "gate_up_proj" if self.gated else "up_proj"
        return lora_mlp(
            x,
            self.first_weight,
            self.down_proj,
            weights,
            indices,
            gate_up_lora=low.get(first),
            down_lora=low.get("down_proj"),
            gate_up_bias=self.first_bias,
            down_bias=self.down_bias,
            activation=self.activation,
            swiglu_limit=self.swiglu_limit,
            routing=routing,
        )


class Site(NamedTuple):
    """A weight that can have an adapter: a linear layer's, or one of the experts' stacked ones."""

    module_name: str
    module: nn.Module
    parameter: str | None  # of experts; None for a linear layer

    @property
    def name(self) -> str:
        """The target's full name."""
        if self.parameter is None:
            return self.module_name
        return f"{self.module_name}.{self.parameter}" if self.module_name else self.parameter

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.parameter or "weight")

    @property
    def adapter(self) -> Adapter | None:
        found = getattr(self.module, "lora", None)
        if found is None or self.parameter is None:
            return found
        return dict(found.items()).get(self.parameter)

    def attach(self, adapter: Adapter) -> None:
        if self.parameter is None:
            self.module.__class__, self.module.lora = LoRALinear, adapter
            return
        if type(self.module) is Experts:
            self.module.__class__, self.module.lora = LoRAExperts, nn.ModuleDict()
        self.module.lora[self.parameter] = adapter
        adapter.train(self.module.training)


def sites(model: nn.Module) -> Iterator[Site]:
    """Every weight of ``model`` that can have an adapter, in module order."""
    for name, module in model.named_modules():
        # fully_shard gives a module that it wraps a class of its own, derived from what it was
        if type(module) is nn.Linear or isinstance(module, LoRALinear):
            yield Site(name, module, None)
        elif isinstance(module, Experts):
            for parameter, value in module.named_parameters(recurse=False):
                if value.dim() == 3:
                    yield Site(name, module, parameter)


def adapters(model: nn.Module) -> list[tuple[Site, Adapter]]:
    """All adapters of ``model`` with the weights they belong to."""
    found = ((site, site.adapter) for site in sites(model))
    return [(site, adapter) for site, adapter in found if adapter is not None]


def is_kind(module: nn.Module, names: Collection[str]) -> bool:
    """Whether ``names`` has the name of the module's class or of a base of it."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether ranks hold it together, told without an import that needs torch.distributed."""
    return hasattr(tensor, "full_tensor")


def _wrapped(model: nn.Module, names: Collection[str]) -> str | None:
    """Which of the modules is of a kind in ``names``, in words; None: none is."""
    for name, module in model.named_modules():
        if is_kind(module, names):
            kind = next(k.__name__ for k in type(module).__mro__ if k.__name__ in names)
            return f"{name or 'it'} is a {kind}"
    return None


def sharded(model: nn.Module) -> str | None:
    """What of ``model`` this rank holds only in part, in words; None: it has all of it."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    found = (f"{name} is a DTensor" for name, tensor in tensors if is_dtensor(tensor))
    # A forward can leave weights gathered for a while: then only the module tells.
    return _wrapped(model, _SHARDING) or next(found, None)


def check_not_wrapped(model: nn.Module) -> None:
    """An engine that holds the model already would not know of new adapters: their gradients
    would stay each rank's own."""
    if found := _wrapped(model, (_DDP, *_SHARDING)):
        raise ValueError(
            f"model: {found}: add_lora and load_lora come before what spreads or wraps the model"
        )


def _check_local(site: Site) -> None:
    if is_dtensor(site.weight):
        raise ValueError(
            f"model: the weight of {site.name} is a DTensor: add_lora and load_lora come before "
            "what spreads or wraps the model"
        )


def check_options(dropout: float, dtype: torch.dtype | None) -> None:
    """What ``add_lora`` and ``load_lora`` both take."""
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise ValueError(f"dropout: got {dropout!r}, need a number >= 0 and < 1")
    check_dtype(dtype)


def check_dtype(dtype: torch.dtype | None) -> None:
    """TypeError for all but None and what weights can be computed with in."""
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise TypeError(f"dtype: got {dtype!r}, need None or one of {known}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_kind(site: Site) -> None:
    """Other experts, such as those that are spread over ranks, run without ``lora_mlp``."""
    if site.parameter is not None and type(site.module) is not Experts:
        raise ValueError(
            f"model: {site.module_name or 'it'} is a {type(site.module).__name__}, need Experts: "
            "add_lora comes before what spreads or wraps them"
        )


def _chosen(model: nn.Module, targets: Sequence[str] | None) -> list[Site]:
    found = list(sites(model))
    if targets is None:
        chosen = [site for site in found if site.parameter is not None]
        if not chosen:
            raise ValueError("targets: got None, need names of linear layers: there are no experts")
        return chosen
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets: got {targets!r}, need a list of names")
    for target in targets:
        if not any(_matches(site.name, target) for site in found):
            known = sorted({site.name.rpartition(".")[2] for site in found})
            raise ValueError(f"targets: {target!r} names none of {', '.join(known)}")
    return [site for site in found if any(_matches(site.name, target) for target in targets)]


def add_lora(
    model: nn.Module,
    *,
    r: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Freezes ``model`` and gives the weights that ``targets`` names a trainable scale B A.

    ``targets``: ends of dotted names, such as ``"experts.gate_up_proj"``, ``"experts.down_proj"``
    (``"down_proj"`` alone also names that of dense and shared MLPs), ``"query_key_value"``,
    ``"attention.dense"``; None is both weights of all routed experts. scale = alpha / r.
    ``dropout`` is of what enters A, in training; with it, experts take separate steps instead of
    the fused ones. ``dtype`` of A and B: None is fp32 for 16-bit weights, else the weight's; they
    compute in the input's. Returns the names. The modules stay the same objects; their names and
    those of their weights do not change.

    It comes before what wraps the model or spreads it over ranks (DDP, ``fully_shard``): adapters
    that are added later would train on each rank's gradients alone.

    Raises ValueError for a target that names nothing, a model that has adapters already or is
    wrapped or spread, or a value out of range, and TypeError for a ``dtype`` that is not fp64,
    fp32, bf16 or fp16.
    """
    check_positive(r=r)
    if not (_is_number(alpha) and alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha: got {alpha!r}, need a positive number")
    check_options(dropout, dtype)
    return attach(model, _chosen(model, targets), r, alpha / r, dropout, dtype)


def attach(
    model: nn.Module,
    chosen: Sequence[Site],
    r: int,
    scale: float,
    dropout: float,
    dtype: torch.dtype | None,
) -> list[str]:
    """Freezes ``model`` and gives ``chosen`` new adapters; returns their names."""
    check_not_wrapped(model)
    if adapters(model):
        raise ValueError("model: has LoRA already; merge_lora and remove_lora come first")
    for site in chosen:
        _check_kind(site)
        _check_local(site)
    model.requires_grad_(False)
    for site in chosen:
        site.attach(Adapter(site.weight, r, scale, dropout, dtype).train(site.module.training))
    return [site.name for site in chosen]


def merge_lora(model: nn.Module) -> None:
    """Adds scale B A to every adapted weight, so that a forward costs what it costs without LoRA.

    One expert's product at a time, rounded to the weight's dtype. Merged adapters do nothing until
    ``unmerge_lora``. What is merged already stays as it is. A merged model has no state dict, since
    that would not say what the weights hold: ``unmerge_lora`` or ``remove_lora`` comes first.

    Raises ValueError where FSDP or tensor parallelism leaves each rank a part of the weights.
    """
    _set_merged(model, True)


def unmerge_lora(model: nn.Module) -> None:
    """Takes what ``merge_lora`` added away again.

    Exact up to two roundings to the weight's dtype of each element: of the merged value and of the
    result. Where they matter (16-bit weights, a large scale B A), keep the checkpoint. Raises
    ValueError as ``merge_lora``.
    """
    _set_merged(model, False)


def _check_whole(model: nn.Module) -> None:
    if adapters(model) and (part := sharded(model)):
        raise ValueError(
            f"model: {part}, of which a rank has only a part: call save_lora here and merge on one "
            f"process, with load_lora. {WHOLE_STATE}"
        )


def _set_merged(model: nn.Module, merged: bool) -> None:
    _check_whole(model)
    for site, adapter in adapters(model):
        if adapter.merged != merged:
            adapter.add_to(site.weight, 1.0 if merged else -1.0)
            adapter.merged = merged


def remove_lora(model: nn.Module) -> None:
    """Drops all adapters (what is merged stays in the weights); the weights can train again.

    Raises ValueError as ``merge_lora``.
    """
    _check_whole(model)
    for module in model.modules():
        for changed, plain in ((LoRALinear, nn.Linear), (LoRAExperts, Experts)):
            if type(module) is changed:
                del module.lora
                module.__class__ = plain
    model.requires_grad_(True)
