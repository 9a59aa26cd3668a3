"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT wraps a module once for each of its parameters that it adapts (``target_parameters``), in
the order of the module's parameters; the last one is outermost, and each one further in has one
more ``base_layer`` in its key. A of E experts is stored as ``[E r, in]``, B as ``[out, r E]`` whose
columns run over the experts fastest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .lora import (
    _DDP,
    Site,
    _matches,
    adapters,
    attach,
    check_not_wrapped,
    check_options,
    is_dtensor,
    is_kind,
    sites,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
#: Settings whose other values change what an adapter computes or leaves out of the file.
_ONLY: dict[str, tuple] = {
    "use_dora": (False, None), "bias": ("none", None), "lora_bias": (False, None),
    "fan_in_fan_out": (False, None), "modules_to_save": (None, []), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "layer_replication": (None,), "alora_invocation_tokens": (None,),
    "use_qalora": (False, None), "use_bdlora": (None,), "arrow_config": (None,),
    "kasa_config": (None,), "monteclora_config": (None,),
    # the others (PiSSA, OLoRA, LoftQ and so on) also change the weights beside the adapter
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}  # fmt: skip


def _library():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'LoRA files need safetensors: run `pip install "ling-ops[hf]"`'
        ) from error
    return safetensors


def _keys(chosen: list[Site]) -> Iterator[tuple[Site, str]]:
    """Each weight with the stem of its two keys."""
    for site in chosen:
        same = [other.parameter for other in chosen if other.module is site.module]
        depth = len(same) - 1 - same.index(site.parameter)
        parts = (_PREFIX.rstrip("."), site.module_name, *["base_layer"] * depth)
        yield site, ".".join(part for part in parts if part)


def _to_file(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(lora_A.weight, lora_B.weight) of an adapter's a and b."""
    if a.dim() == 2:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _from_file(a: Tensor, b: Tensor, weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    if weight.dim() == 2:
        return a, b
    experts = weight.shape[0]
    return a.unflatten(0, (experts, r)), b.unflatten(1, (r, experts)).permute(2, 0, 1)


def _unwrapped(model: nn.Module) -> nn.Module:
    """What is inside DDP and ``torch.compile``: both put a prefix before every name."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif is_kind(model, (_DDP,)):
            model = model.module
        else:
            return model


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if is_dtensor(tensor) else tensor.detach()


def _gathered(model: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file, and whether this rank is to write it."""
    for module in model.modules():
        if is_kind(module, ("FSDPModule",)):
            module.reshard()  # a forward can leave weights gathered, and those may be rounded
    found = adapters(model)
    spread = any(is_dtensor(t) for _, adapter in found for t in adapter.parameters())
    writes = not spread or distributed.get_rank() == 0
    tensors = {}
    for site, stem in _keys([site for site, _ in found]):
        pair = _to_file(_whole(site.adapter.a), _whole(site.adapter.b))
        for part, tensor in zip("AB", pair, strict=True):
            if writes:
                tensors[f"{stem}.lora_{part}.weight"] = tensor.cpu().contiguous()
    return tensors, writes


def _settings(model: nn.Module, base_model: str | None) -> dict[str, Any]:
    """What ``adapter_config.json`` says."""
    found = adapters(model)
    kinds = {(adapter.r, adapter.scale, adapter.dropout) for _, adapter in found}
    if len(kinds) != 1:
        raise ValueError(f"model: need adapters of one rank and scale, got {len(kinds)} kinds")
    ((r, scale, dropout),) = kinds
    experts = [site.name for site, _ in found if site.parameter is not None]
    alpha = scale * r
    return {
        # A named task makes PEFT ask the model for methods that transformers' own have.
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model,
        "r": r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if experts else dropout, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": [site.name for site, _ in found if site.parameter is None],
        "target_parameters": experts or None,
    }  # fmt: skip


def save_lora(model: nn.Module, folder: str | Path, *, base_model: str | None = None) -> None:
    """Writes the adapters of ``model`` to ``folder``, as PEFT reads them.

    ``base_model``: the name or path of the checkpoint below, for those who load it. The
    configuration comes last: a folder without it is unfinished. PEFT knows no dropout for
    parameters of experts, so with such targets the file says 0. Names are those without what DDP
    and ``torch.compile`` put before them. Where FSDP spread the adapters, every rank must call it,
    rank 0 of the default group writes, and the others do not wait for that. Raises ValueError
    without adapters, or where they differ in rank or scale.
    """
    model, library = _unwrapped(model), _library()
    values = _settings(model, base_model)
    tensors, writes = _gathered(model)
    if not writes:
        return
    # Before anything is touched; and not save_file, whose errors of a full disk are no OSError
    data = library.torch.save(tensors, metadata={"format": "pt"})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    temporary = folder / f".writing-{WEIGHTS}"
    temporary.write_bytes(data)
    os.replace(temporary, folder / WEIGHTS)
    text = json.dumps(values, indent=2) + "\n"
    temporary = folder / f".writing-{CONFIG}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / CONFIG)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: {CONFIG} is missing") from error
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: not valid JSON ({error})") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type: need 'LORA'")
    for key, allowed in _ONLY.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{folder / CONFIG}: {key}: got {values[key]!r}, need {allowed[0]!r}")
    if not isinstance(values.get("r"), int) or values["r"] < 1:
        raise ValueError(f"{folder / CONFIG}: r: got {values.get('r')!r}, need a positive int")
    alpha = values.setdefault("lora_alpha", 8)
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha)):
        raise ValueError(f"{folder / CONFIG}: lora_alpha: got {alpha!r}, need a number")
    return values


def _chosen(model: nn.Module, keys: list[str], targets: list[str]) -> list[Site]:
    """The weights that a file's keys and target_parameters name."""
    # the dot before a name stays, so that the model itself has one too: the empty one
    named = {key.removeprefix(_PREFIX.rstrip(".")).partition(".lora_")[0] for key in keys}
    modules = {name.replace(".base_layer", "").removeprefix(".") for name in named}
    return [
        site
        for site in sites(model)
        if site.module_name in modules
        and (site.parameter is None or any(_matches(site.name, target) for target in targets))
    ]


def load_lora(
    model: nn.Module, folder: str | Path, *, dropout: float = 0.0, dtype: torch.dtype | None = None
) -> list[str]:
    """Freezes ``model`` and gives it the adapters in ``folder``, written by ``save_lora`` or PEFT.

    ``dropout`` and ``dtype`` as in ``add_lora``. Returns the names of the adapted weights. Module
    names must be the model's own: those of experts are the same in transformers' GLM-4-MoE, those
    of attention are not. Only safetensors and JSON are read.

    As ``add_lora``, it comes before what wraps the model or spreads it over ranks.

    Raises ValueError that names every tensor which is missing, unexpected or of another shape, or
    the setting that is not supported, and as ``add_lora``; the model is then as before.
    """
    check_options(dropout, dtype)
    check_not_wrapped(model)
    model, folder = _unwrapped(model), Path(folder)
    values = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: {WEIGHTS} is missing")
    try:
        tensors = _library().torch.load_file(folder / WEIGHTS)
    except _library().SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not a safetensors file ({error})") from error
    r = values["r"]
    chosen = _chosen(model, list(tensors), values.get("target_parameters") or [])
    stems = dict(_keys(chosen))
    _check_tensors(folder, tensors, stems, r)
    scale = values["lora_alpha"] / (math.sqrt(r) if values.get("use_rslora") else r)
    names = attach(model, chosen, r, scale, dropout, dtype)
    with torch.no_grad():
        for site, stem in stems.items():
            pair = (tensors[f"{stem}.lora_{part}.weight"] for part in "AB")
            a, b = _from_file(*pair, site.weight, r)
            site.adapter.a.copy_(a)
            site.adapter.b.copy_(b)
    return names


def _check_tensors(folder: Path, tensors: dict, stems: dict[Site, str], r: int) -> None:
    faults, known = [], set()
    for site, stem in stems.items():
        *experts, rows, columns = site.weight.shape
        wide = r * (experts[0] if experts else 1)
        for part, shape in (("A", (wide, columns)), ("B", (rows, wide))):
            key = f"{stem}.lora_{part}.weight"
            known.add(key)
            if key not in tensors:
                faults.append(f"{key} is missing")
            elif tuple(tensors[key].shape) != shape:
                faults.append(f"{key} is {list(tensors[key].shape)}, need {list(shape)}")
    faults += [f"{key} is unexpected" for key in tensors if key not in known]
    if not tensors:
        faults.append("there are no tensors")
    if faults:
        raise ValueError(f"{folder}: the adapters do not fit the model; {'; '.join(faults)}")
