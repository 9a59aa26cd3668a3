"""Reading and writing models in the format in which the Ling models are published."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ling_ops.nn.lora import DTYPES, WHOLE_STATE, adapters, check_dtype, sharded

from .published import (
    CONFIG,
    CheckpointError,
    foreign_keys,
    read_config,
    read_json,
    write_config,
)
from .safetensors_files import INDEX, SINGLE, WeightFiles, write_json, write_weights

_STACKED = re.compile(r"(.*\.experts)\.(gate_up|up|down)_(proj|bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SCALE = "_scale_inv"
_FP8 = (torch.float8_e4m3fn,)
_NAMED = 20  # keys that an error lists of each kind


class Piece(NamedTuple):
    """One published tensor and where it lies in the model."""

    key: str
    name: str  # in the state dict
    expert: int | None = None
    part: int | None = None  # of the stacked rows: 0 gate, 1 up

    def of(self, tensor: Tensor) -> Tensor:
        """This piece as a view of the model's tensor."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.part is None else tensor.chunk(2)[self.part]


def pieces(state: dict[str, Tensor]) -> Iterator[Piece]:
    """The published tensors of a model. All names are the model's own but those of experts."""
    for name, tensor in state.items():
        match = _STACKED.fullmatch(name)
        if match is None:
            yield Piece(name, name)
            continue
        prefix, which, kind = match.groups()
        suffix = "weight" if kind == "proj" else "bias"
        for expert in range(tensor.shape[0]):
            stem = f"{prefix}.{expert}"
            if which == "gate_up":
                yield Piece(f"{stem}.gate_proj.{suffix}", name, expert, 0)
                yield Piece(f"{stem}.up_proj.{suffix}", name, expert, 1)
            else:
                yield Piece(f"{stem}.{which}_proj.{suffix}", name, expert)


def _ignored(key: str, values: dict[str, Any], num_layers: int) -> bool:
    """Keys that a checkpoint may have and a LingForCausalLM has not."""
    match = _LAYER.match(key)
    extra = values.get("num_nextn_predict_layers") or 0
    if match and num_layers <= int(match[1]) < num_layers + extra:
        return True  # the layers that predict the tokens after the next
    return key.endswith("rotary_emb.inv_freq")


def _block(values: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale in an FP8 export."""
    quantization = values.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"quantization_config: got {quantization!r}, need an object")
    method = quantization.get("quant_method", "fp8")
    if method != "fp8":
        raise CheckpointError(f"quantization_config.quant_method: got {method!r}, need 'fp8'")
    block = quantization.get("weight_block_size") or [128, 128]
    pair = isinstance(block, list) and len(block) == 2
    if not pair or not all(isinstance(n, int) and n > 0 for n in block):
        raise CheckpointError(
            f"quantization_config.weight_block_size: got {block!r}, need two positive ints"
        )
    return tuple(block)


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """fp32 ``[N, K]`` of an FP8 weight ``[N, K]`` and one scale per block, ``[⌈N/b⌉, ⌈K/b⌉]``."""
    rows, columns = weight.shape
    scale = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * scale[:rows, :columns]


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _listed(what: str, entries: list[str]) -> str:
    more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
    return f"{len(entries)} {what}: {', '.join(entries[:_NAMED])}{more}"


class _Loader:
    """One folder's files against one model's tensors."""

    def __init__(self, folder: Path, model, values: dict[str, Any], block, dtype, device) -> None:
        self.files, self.values, self.block = WeightFiles(folder), values, block
        self.dtype, self.device = dtype, torch.device(device)
        self.state = dict(model.state_dict())
        self.pieces = {piece.key: piece for piece in pieces(self.state)}
        self.keys_of: dict[str, list[str]] = {}
        for key, piece in self.pieces.items():
            self.keys_of.setdefault(piece.name, []).append(key)
        self._check(folder, model.config.num_layers)

    def _check(self, folder: Path, num_layers: int) -> None:
        files = self.files
        scaled = {key for key in self.pieces if key in files and files.dtype(key) in _FP8}
        wanted_keys = [*self.pieces, *(key + _SCALE for key in sorted(scaled))]
        missing = [key for key in wanted_keys if key not in files]
        known = set(wanted_keys)
        unexpected = [
            key for key in files if key not in known and not _ignored(key, self.values, num_layers)
        ]
        faults = [
            _listed(what, found)
            for what, found in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", self._misshaped(scaled)),
                ("of a dtype that cannot be read", self._unreadable()),
            )
            if found
        ]
        if faults:
            raise CheckpointError(f"{folder}: the weights do not fit {CONFIG}; {'; '.join(faults)}")

    def _misshaped(self, scaled: set[str]) -> list[str]:
        """Each tensor of another shape than the model's (or its scale of another than needed)."""
        found = []
        for key, piece in self.pieces.items():
            need = tuple(piece.of(self.state[piece.name]).shape)
            wanted = {key: need}
            if key in scaled:
                wanted[key + _SCALE] = tuple(map(_blocks, need, self.block))
            found += [
                f"{name} is {list(self.files.shape(name))}, need {list(shape)}"
                for name, shape in wanted.items()
                if name in self.files and self.files.shape(name) != shape
            ]
        return found

    def _unreadable(self) -> list[str]:
        """Each tensor in a dtype that would need more than a conversion to mean its values."""
        found = []
        for key in (key for key in self.pieces if key in self.files):
            piece, stored = self.pieces[key], self.files.dtype(key)
            like = self.state[piece.name]
            known = DTYPES if like.dtype.is_floating_point else (like.dtype,)
            if piece.of(like).dim() == 2:
                known += _FP8  # whose scales are those of blocks of a matrix
            if stored not in known:
                need = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
                found.append(f"{key} is {str(stored).removeprefix('torch.')}, need {need}")
        return found

    def _stored_dtype(self, key: str) -> torch.dtype:
        """The dtype in which ``key`` is stored, or that which its FP8 export stands for."""
        stored = self.files.dtype(key)
        if stored not in _FP8:
            return stored
        name = str(self.values.get("torch_dtype") or self.values.get("dtype") or "bfloat16")
        meant = getattr(torch, name, None)
        if meant not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise CheckpointError(f"torch_dtype: got {name!r}, need one of {known}")
        return meant

    def _new(self, name: str) -> Tensor:
        """Memory for one tensor of the model."""
        like = self.state[name]
        dtype = like.dtype
        if dtype.is_floating_point and not name.endswith("expert_bias"):
            stored = map(self._stored_dtype, self.keys_of[name])
            dtype = self.dtype or functools.reduce(torch.promote_types, stored)
        return torch.empty(like.shape, dtype=dtype, device=self.device)

    def _value(self, key: str) -> Tensor:
        # Moved before it is converted: a conversion on the host would be a copy there.
        value = self.files[key].to(self.device)
        if value.dtype in _FP8:
            value = dequantize(value, self.files[key + _SCALE].to(self.device), self.block)
        return value

    def tensors(self) -> dict[str, Tensor]:
        """The state dict, read file by file into its final place."""
        made: dict[str, Tensor] = {}
        for key in self.files:
            piece = self.pieces.get(key)
            if piece is None:
                continue
            if piece.name not in made:
                made[piece.name] = self._new(piece.name)
            piece.of(made[piece.name]).copy_(self._value(key))
        return made


def load(model_class, folder: str | Path, *, dtype: torch.dtype | None, device: torch.device | str):
    """See ``LingForCausalLM.from_pretrained``."""
    check_dtype(dtype)
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    values = read_json(folder / CONFIG)
    try:
        config, block = read_config(values), _block(values)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model = model_class(config, device="meta")
    tensors = _Loader(folder, model, values, block, dtype, device).tensors()
    model.load_state_dict(tensors, assign=True)
    model.foreign_config = foreign_keys(values)
    return model.eval()


def _check_whole(model) -> None:
    """Refuses a model of which this process holds only a part."""
    if part := sharded(model):
        raise ValueError(f"model: {part}, of which a rank has only a part. {WHOLE_STATE}")
    if absent := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"model: {absent[0]} is on the meta device (never filled, or offloaded)")
    count = model.config.num_experts
    for name, parameter in model.named_parameters():
        if _STACKED.fullmatch(name) and len(parameter) != count:
            raise ValueError(
                f"model: {name} has {len(parameter)} of {count} experts: "
                "ling_ops.parallel.gather_tensors brings those of all ranks together "
                "(docs/expert-parallel.md), for a model of one process to be saved"
            )


def save(model, folder: str | Path, *, max_shard_bytes: int) -> None:
    """See ``LingForCausalLM.save_pretrained``."""
    folder = Path(folder)
    if not isinstance(max_shard_bytes, int) or isinstance(max_shard_bytes, bool):
        raise TypeError(f"max_shard_bytes: got {max_shard_bytes!r}, need an int, a number of bytes")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, need at least 1")
    if (folder / CONFIG).exists() and any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder} holds a checkpoint already: name another folder")
    if found := adapters(model):
        raise ValueError(
            f"model: has LoRA at {found[0][0].name}: merge_lora and remove_lora come first, or "
            "save_lora writes the adapters alone"
        )
    _check_whole(model)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    found = {piece.key: piece for piece in pieces(state)}
    for old in [folder / INDEX, *folder.glob("model-*-of-*.safetensors"), folder / SINGLE]:
        old.unlink(missing_ok=True)  # what an interrupted save left

    def tensor(key: str) -> Tensor:
        piece = found[key]
        return piece.of(state[piece.name]).to("cpu", copy=True).contiguous()

    views = ((key, piece.of(state[piece.name])) for key, piece in found.items())
    sizes = [(key, view.numel() * view.element_size()) for key, view in views]
    write_weights(folder, sizes, tensor, max_shard_bytes)
    dtype = model.lm_head.weight.dtype
    write_json(folder / CONFIG, write_config(model.config, dtype, model.foreign_config))
