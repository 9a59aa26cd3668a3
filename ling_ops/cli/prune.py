"""`ling-ops prune`: a smaller checkpoint without the experts that do least on your text."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from ling_ops.cli.errors import CommandError, require_extra
from ling_ops.cli.text import TOKENIZER

CRITERIA = ("usage", "gate-mass", "output-norm")


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
        help="tokens that chose the expert, their gate weights, or the norm of what it added",
    )  # fmt: skip
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH",
        help="text files or folders; default: the sources of Python's standard library",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="tokens to measure")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--sequence-length", type=int, default=256, metavar="N")
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
    from ling_ops.models.pruning import expert_importance, prune_experts

    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {arguments.output!r} is a file", code=2)
    if output.exists() and any(output.iterdir()):
        raise CommandError(f"--output {arguments.output!r} is not empty", code=2)
    model, codec = load(arguments)
    batches = measuring_batches(arguments, codec, model.config.vocab_size)
    print(f"measuring {sum(b.numel() for b in batches):,} tokens by {arguments.by}", flush=True)
    try:
        importance = expert_importance(model, batches, by=arguments.by)
        smaller = prune_experts(model, importance, keep=arguments.keep)
    except ValueError as error:
        raise CommandError(str(error), code=2) from error
    smaller.save_pretrained(output)
    tokenizer = Path(arguments.checkpoint) / TOKENIZER
    if tokenizer.is_file():
        shutil.copy(tokenizer, output / TOKENIZER)
    _conclude(model, smaller, importance, output)
    return 0


def measuring_batches(arguments: argparse.Namespace, codec: Any, vocab_size: int) -> list[Any]:
    """Token ids [B, S] of windows spread evenly over the data."""
    from ling_ops.cli.data import validation_windows
    from ling_ops.cli.tokens import load_tokens

    length = arguments.sequence_length
    text = load_tokens(arguments.data, codec, sequence_length=length, vocab_size=vocab_size)
    windows = validation_windows(text.train, sequence_length=length, limit=arguments.tokens)
    return list(windows[:, :-1].split(arguments.batch_size))


def _conclude(model: Any, smaller: Any, importance: dict[int, Any], output: Path) -> None:
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


def _check(arguments: argparse.Namespace) -> None:
    for bad, message in (
        (not 0 < arguments.keep <= 1, "--keep must be above 0 and at most 1"),
        (arguments.tokens < 1, "--tokens must be at least 1"),
        (arguments.batch_size < 1, "--batch-size must be at least 1"),
        (arguments.sequence_length < 2, "--sequence-length must be at least 2"),
    ):
        if bad:
            raise CommandError(message, code=2)
