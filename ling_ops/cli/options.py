"""What a run can be told: flags, a config file, and their checks."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling_ops.cli.errors import CommandError


def option(default: Any, help: str, **extra: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass
class RunOptions:
    """The settings that every training run has.

    The field names are the keys of a config file; a flag is the same name with dashes.
    """

    # the run
    data: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "text files or folders; default: the sources of Python's standard library",
            "group": "run", "nargs": "+", "metavar": "PATH",
        },
    )  # fmt: skip
    steps: int = option(400, "optimizer steps in all", group="run", minimum=1)
    batch_size: int = option(8, "sequences per micro-batch", group="run", minimum=1)
    sequence_length: int = option(256, "bytes per sequence", group="run", minimum=2)
    accumulate: int = option(1, "micro-batches per optimizer step", group="run", minimum=1)
    learning_rate: float = option(3e-3, "peak learning rate", group="run", minimum=0.0)
    final_learning_rate: float = option(
        0.1, "learning rate at the end, as a fraction of the peak", group="run", minimum=0.0
    )
    warmup_steps: int | None = option(
        None, "steps of linear warm-up; default: a tenth of the steps, at most 1000",
        group="run", minimum=0,
    )  # fmt: skip
    weight_decay: float = option(0.1, "AdamW weight decay of matrices", group="run", minimum=0.0)
    clip: float = option(1.0, "largest gradient norm (0: no clipping)", group="run", minimum=0.0)
    dtype: str = option(
        "auto", "parameter dtype; auto is bf16 on a GPU and fp32 on a CPU",
        choices=("auto", "fp32", "bf16"), group="run",
    )  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="run")
    seed: int = option(0, "seed of weights and data order", group="run", minimum=0, maximum=2**32)
    # what it writes
    checkpoint_every: int = option(
        100, "steps between checkpoints (0: only the last)", group="output", minimum=0
    )
    keep: int = option(2, "how many checkpoints to keep", group="output", minimum=1)
    validate_every: int = option(
        100, "steps between validations (0: only at the end)", group="output", minimum=0
    )
    validation_bytes: int = option(
        65536, "held-out bytes that a validation reads", group="output", minimum=1
    )
    log_every: int = option(5, "steps between lines of metrics", group="output", minimum=1)

    def check(self) -> None:
        """Raise CommandError for the first value that makes no sense."""
        for field in dataclasses.fields(self):
            _check_value(field, getattr(self, field.name))
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise CommandError(
                f"warmup_steps ({self.warmup_steps}) is larger than steps ({self.steps})", code=2
            )

    @property
    def warmup(self) -> int:
        """Steps of warm-up, with the default filled in."""
        return min(1000, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate


@dataclass
class TrainOptions(RunOptions):
    """Every setting of `ling-ops train`. `None` means: what the preset says."""

    preset: str = option("tiny", "model preset, such as tiny or small", group="model")
    pattern: str | None = option(
        None, "layer counts by turns, dense first, such as 2-4-2-4", group="model"
    )
    layers: int | None = option(
        None, "layers in all; default: the sum of the pattern", group="model", minimum=1
    )
    gate: str | None = option(
        None, "router score function", choices=("softmax", "sigmoid"), group="model"
    )
    experts: int | None = option(None, "experts per MoE layer", group="model", minimum=1)
    experts_per_token: int | None = option(
        None, "experts that a token is sent to", group="model", minimum=1
    )
    capacity: str | None = option(
        None,
        "dropless, fixed:FACTOR (fixed:1.25) or dynamic:DROP_RATE[:batch|:running] (dynamic:0.02)",
        group="model",
    )
    reroute_rounds: int | None = option(
        None, "rounds in which overflow may go to the next-best expert", group="model", minimum=0
    )
    balance_loss: float | None = option(
        None, "coefficient of the load-balancing loss", group="losses", minimum=0.0
    )
    sequence_loss: float | None = option(
        None, "coefficient of the sequence-wise balancing loss", group="losses", minimum=0.0
    )
    z_loss: float | None = option(
        None, "coefficient of the router z-loss", group="losses", minimum=0.0
    )
    bias_rate: float | None = option(
        None, "update rate of the loss-free expert bias (0: no bias)", group="losses", minimum=0.0
    )
    model: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata={
            "help": "any other field of LingConfig", "group": "model", "nargs": "+",
            "metavar": "NAME=VALUE",
        },
    )  # fmt: skip
    expert_parallel: int = dataclasses.field(
        default=1,
        metadata={
            "help": "processes of torchrun that share each layer's experts; without N: all",
            "group": "run", "nargs": "?", "const": 0, "minimum": 0,
        },
    )  # fmt: skip
    rank_timeout: int = option(
        120, "seconds after which a process gives up waiting for another", group="run", minimum=1,
        maximum=10_000_000,
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.capacity is not None:
            parse_capacity(self.capacity)


def settings_of(kind: type[RunOptions]) -> dict[str, dataclasses.Field]:
    """The settings by name, those of the command's own first."""
    own = kind.__annotations__
    found = sorted(dataclasses.fields(kind), key=lambda field: field.name not in own)
    return {field.name: field for field in found}


FIELDS = settings_of(TrainOptions)
# What may change when a run goes on; anything else would make it another run.
CHANGEABLE = {
    "data", "steps", "device", "checkpoint_every", "keep", "validate_every",
    "validation_bytes", "log_every", "warmup_steps", "expert_parallel", "rank_timeout",
    "checkpoint",
}  # fmt: skip


# What argparse takes of an option's metadata.
_PARSED = ("choices", "nargs", "metavar", "const")


def _check_value(field: dataclasses.Field, value: Any) -> None:
    name, kind, meta = field.name, str(field.type), field.metadata
    if value is None and "None" in kind:
        return
    if "dict" in kind:
        if not isinstance(value, dict):
            raise CommandError(f"{name} must be a table", code=2)
        return
    if "list" in kind:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CommandError(f"{name} must be a list of {meta['metavar'].lower()}s", code=2)
        return
    wanted = kind.split(" ")[0]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = number and isinstance(value, int)
    if not {"int": whole, "float": number, "str": isinstance(value, str)}[wanted]:
        raise CommandError(f"{name} must be {wanted}, not {value!r}", code=2)
    if isinstance(value, float) and not math.isfinite(value):
        raise CommandError(f"{name} must be finite, not {value}", code=2)
    if "minimum" in meta and value < meta["minimum"]:
        raise CommandError(f"{name} must be at least {meta['minimum']}, not {value}", code=2)
    if "maximum" in meta and value > meta["maximum"]:
        raise CommandError(f"{name} must be at most {meta['maximum']}, not {value}", code=2)
    if "choices" in meta and value not in meta["choices"]:
        choices = ", ".join(meta["choices"])
        raise CommandError(f"{name} must be one of {choices}, not {value!r}", code=2)


def parse_capacity(text: str) -> dict[str, Any]:
    """LingConfig's capacity fields of dropless | fixed:FACTOR | dynamic[:DROP_RATE[:MODE]]."""
    kind, *rest = text.split(":")
    try:
        if kind == "dropless" and not rest:
            return {"capacity": kind}
        if kind == "fixed" and len(rest) == 1:
            return {"capacity": kind, "capacity_factor": float(rest[0])}
        if kind == "dynamic" and len(rest) <= 2:
            rate, mode = [*rest, *("0.02", "batch")[len(rest) :]]
            return {"capacity": kind, "target_drop_rate": float(rate), "capacity_mode": mode}
    except ValueError as error:
        raise CommandError(f"capacity {text!r}: {error}", code=2) from error
    raise CommandError(
        "capacity must be dropless, fixed:FACTOR or dynamic:DROP_RATE[:batch|:running], "
        f"not {text!r}",
        code=2,
    )


def parse_model_fields(items: list[str]) -> dict[str, Any]:
    """["hidden_size=64", "mlp_bias=true"] as a dict; values are JSON, or else text."""
    fields = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise CommandError(f"--model takes NAME=VALUE, not {item!r}", code=2)
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def read_config_file(path: str, fields: Iterable[str] = FIELDS) -> dict[str, Any]:
    """The settings of a JSON or TOML file, each key checked against `fields`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot read config {path!r}: {reason}", code=2) from error
    try:
        values = _parse_toml(text) if path.endswith(".toml") else json.loads(text)
    except ValueError as error:
        raise CommandError(f"config {path!r} is not valid: {error}", code=2) from error
    if not isinstance(values, dict):
        raise CommandError(f"config {path!r} must hold a table of settings", code=2)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CommandError(f"config {path!r} has an unknown setting {key!r}{hint}", code=2)
    if isinstance(values.get("data"), str):
        values["data"] = [values["data"]]
    return values


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise CommandError("a TOML config needs Python 3.11; use JSON", code=2) from error
    return tomllib.loads(text)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `train` to the command's subparsers."""
    parser = commands.add_parser(
        "train",
        help="train a small hierarchical MoE on text, bytes as tokens",
        description="Train a Ling model on text, bytes as tokens. Without arguments: the `tiny` "
        "preset on the sources of Python's standard library, a few minutes on two CPU cores.",
        epilog="On a CPU that other work shares, set OMP_WAIT_POLICY=passive: waiting threads "
        "then leave their core to others, which is several times as fast.",
        argument_default=argparse.SUPPRESS,
    )
    add_run_flags(add_settings(parser, FIELDS)["output"], folder="runs/<preset>")


def add_run_flags(output: argparse._ArgumentGroup, *, folder: str) -> None:
    """Add the flags that name a run's folder, its checkpoint and its config file."""
    output.add_argument("--output", metavar="DIR", help=f"run folder (default: {folder})")
    output.add_argument(
        "--resume", nargs="?", const="", metavar="CHECKPOINT",
        help="go on from a checkpoint (default: the latest of --output)",
    )  # fmt: skip
    output.add_argument("--config", metavar="FILE", help="JSON or TOML file with these settings")


def add_settings(
    parser: argparse.ArgumentParser, fields: dict[str, dataclasses.Field]
) -> dict[str, argparse._ArgumentGroup]:
    """Add a flag for each of `fields`; returns the groups of flags by title."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    kinds = {"int": int, "float": float, "str": str}
    for name, field in fields.items():
        title = field.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        known = field.default not in (None, dataclasses.MISSING)
        default = f" (default: {field.default})" if known else ""
        kind = kinds.get(str(field.type).split(" ")[0], str)
        extra = {k: v for k, v in field.metadata.items() if k in _PARSED}
        if kind is not str:
            extra["metavar"] = "N" if kind is int else "X"
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, help=field.metadata["help"] + default, **extra)
    return groups


def given_settings(arguments: argparse.Namespace, fields: Iterable[str] = FIELDS) -> dict[str, Any]:
    """The settings that were stated: the config file's, then the flags' on top."""
    values = read_config_file(arguments.config, fields) if "config" in arguments else {}
    flags = {k: v for k, v in vars(arguments).items() if k in fields}
    if "model" in flags:
        flags["model"] = {**values.get("model", {}), **parse_model_fields(flags["model"])}
    return {**values, **flags}


def merge(
    base: dict[str, Any], given: dict[str, Any], *, resuming: bool,
    kind: type[RunOptions] = TrainOptions,
) -> RunOptions:  # fmt: skip
    """Options from `base` (a checkpoint's, or empty) with `given` on top, checked."""
    if resuming:
        for key, value in given.items():
            if key not in CHANGEABLE and value != base.get(key):
                raise CommandError(
                    f"{key} is {base.get(key)!r} in the checkpoint and cannot become {value!r} "
                    "on --resume",
                    code=2,
                )
    try:
        options = kind(**{**base, **given})
    except TypeError as error:
        raise CommandError(f"the checkpoint's settings do not fit this version: {error}") from error
    options.check()
    return options
