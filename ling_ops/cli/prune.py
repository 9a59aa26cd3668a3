"""`ling-ops prune`: a smaller checkpoint without the experts that do least on your text."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from ling_ops.cli.errors import CommandError, describe_os_error, require_extra
from ling_ops.cli.text import TOKENIZER

CRITERIA = ("usage", "gate-mass", "output-norm")
#: what stays true of a smaller model, and what other programs look for beside the weights
BESIDE = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `prune` to the command's subparsers."""
    parser = commands.add_parser(
        "prune",
        help="drop the experts that do least on your text",
        description="Measure every expert on your text, drop the least of each layer with their "
        "router rows and biases, and write a checkpoint in the published format.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR",
        help="a run folder, one of its checkpoints, or a folder in the published Ling format",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; new")
    parser.add_argument("--keep", type=float, required=True, metavar="X", help="share to keep")
    parser.add_argument(
        "--by", default="usage", choices=CRITERIA,
        help="tokens that chose the expert, their gate weights, or the norm of what it added; "
        "default: usage",
    )  # fmt: skip
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH",
        help="text files or folders; default: the sources of Python's standard library",
    )  # fmt: skip
    parser.add_argument(
        "--tokens",
        type=int,
        default=65536,
        metavar="N",
        help="tokens to measure, at most (default: 65536)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--sequence-length", type=int, default=256, metavar="N", help="default: 256"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="checkpoint", choices=("checkpoint", "fp32", "bf16"),
        help="to compute and write in; default: the checkpoint's own",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops prune`; returns the exit status."""
    _check(arguments)
    require_extra("prune")
    from ling_ops.cli.generate import load
    from ling_ops.cli.ranks import one_process
    from ling_ops.models.pruning import expert_importance, prune_experts

    one_process("prune")
    output = Path(arguments.output).absolute()
    _check_output(output)
    _check_count(_config(Path(arguments.checkpoint)), arguments.keep)
    model, codec = load(arguments)
    batches = measuring_batches(arguments, codec, model.config.vocab_size)
    print(
        f"measuring {sum(b.numel() for b in batches):,} tokens by {arguments.by}, in sequences of "
        f"{batches[0].shape[1]:,}",
        flush=True,
    )
    try:
        importance = expert_importance(model, batches, by=arguments.by)
        smaller = prune_experts(model, importance, keep=arguments.keep)
    except ValueError as error:
        raise CommandError(str(error), code=2) from error
    _write(smaller, output, Path(arguments.checkpoint))
    _conclude(model, smaller, importance, Path(arguments.output), arguments.keep)
    return 0


def _check_output(output: Path) -> None:
    """CommandError where the folder cannot be written: asked before the experts are measured."""
    if output.is_dir() and any(output.iterdir()):
        raise CommandError(f"--output {str(output)!r} is not empty", code=2)
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise CommandError(f"--output {str(output)!r}: {str(there)!r} is a file", code=2)
    if not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(f"--output {str(output)!r}: no permission to write in {str(there)!r}")


def _config(folder: Path) -> Any:
    """The configuration of the checkpoint that `load` will read, without its weights."""
    from ling_ops.cli.checkpoint import find_checkpoint, load_checkpoint
    from ling_ops.cli.modeling import saved_config
    from ling_ops.cli.runs import is_published
    from ling_ops.models.published import CONFIG, CheckpointError, read_config, read_json

    if not is_published(folder):
        return saved_config(load_checkpoint(find_checkpoint(folder), groups=()).state)
    try:
        return read_config(read_json(folder / CONFIG))
    except CheckpointError as error:
        raise CommandError(f"{folder}: {error}") from error


def _check_count(config: Any, keep: float) -> None:
    """CommandError where too few experts would stay: asked before the weights are read."""
    from ling_ops.models.pruning import pruned_count

    count = pruned_count(config.num_experts, config.num_groups, keep)
    try:
        dataclasses.replace(config, num_experts=count)
    except ValueError as error:
        raise CommandError(
            f"--keep {keep:g} leaves {count} experts per layer; {error}", code=2
        ) from error


def _write(model: Any, output: Path, source: Path) -> None:
    """Write the checkpoint beside its place first: the folder is whole, or there is none."""
    temporary = output.with_name(f".writing-{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copy(source / name, temporary / name)
        if output.is_dir():
            output.rmdir()  # empty: was asked before
        temporary.rename(output)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise describe_os_error(error, f"writing {str(output)!r}") from error
        raise


def measuring_batches(arguments: argparse.Namespace, codec: Any, vocab_size: int) -> list[Any]:
    """Token ids [B, S] of windows spread evenly over the data, at most --tokens of them."""
    from ling_ops.cli.data import validation_windows
    from ling_ops.cli.tokens import load_tokens

    length = min(arguments.sequence_length, arguments.tokens)
    text = load_tokens(arguments.data, codec, sequence_length=length, vocab_size=vocab_size)
    windows = validation_windows(text.train, sequence_length=length, limit=arguments.tokens)
    return list(windows[:, :-1].split(arguments.batch_size))


def _conclude(
    model: Any, smaller: Any, importance: dict[int, Any], output: Path, keep: float
) -> None:
    from ling_ops.models.pruning import kept_experts

    before, after = model.count_parameters(), smaller.count_parameters()
    kept = smaller.config.num_experts
    for index, scores in importance.items():
        ids = kept_experts(scores, kept, smaller.config.num_groups)
        share = scores[ids].sum() / scores.sum().clamp_min(1e-300)
        print(f"layer {index}: {kept} of {scores.numel()} experts held {share:.1%}")
    print(
        f"wrote {output}: {kept} experts per layer, {after.total:,} of {before.total:,} parameters "
        f"({after.total / before.total:.1%})"
    )
    whole, groups = model.config.num_experts, smaller.config.num_groups
    share, asked = (f"{100 * x:.6g}%" for x in (kept / whole, keep))
    if share != asked:
        why = (
            f"each of the {groups} groups keeps as many" if groups > 1 else "rounded to whole ones"
        )
        print(f"kept {share} of the experts where {asked} were asked for: {why}")


def _check(arguments: argparse.Namespace) -> None:
    for bad, message in (
        (not 0 < arguments.keep <= 1, "--keep must be above 0 and at most 1"),
        (arguments.tokens < 1, "--tokens must be at least 1"),
        (arguments.batch_size < 1, "--batch-size must be at least 1"),
        (arguments.sequence_length < 2, "--sequence-length must be at least 2"),
    ):
        if bad:
            raise CommandError(message, code=2)
