"""`ling-ops study`: the article's claims, each put to the test by short training runs."""

from __future__ import annotations

import argparse

NAMES = ("balance", "hierarchy", "capacity", "sparsity", "prune")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `study` to the command's subparsers."""
    parser = commands.add_parser(
        "study",
        help="put a claim of the article to the test",
        description="Train small models in several variants and seeds, and say whether a claim of "
        "the article held. Writes DIR/NAME.json and DIR/NAME.png.",
    )
    parser.add_argument("name", choices=NAMES, help="which claim")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per variant (3)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps per run (default: 300; more than 3)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), auto, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16"),
        help="auto is bf16 on a GPU and fp32 on a CPU",
    )  # fmt: skip
    parser.add_argument("--output", default="studies", metavar="DIR", help="default: studies")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH",
        help="text files or folders; default: the sources of Python's standard library",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops study`; returns the exit status."""
    import importlib

    from ling_ops.cli.errors import require_extra
    from ling_ops.cli.study.report import conclude
    from ling_ops.cli.study.trial import make_setup

    require_extra("study")
    setup = make_setup(arguments)
    print(f"{setup.command}: a line follows each run, tables at the end", flush=True)
    study = importlib.import_module(f"ling_ops.cli.study.{arguments.name}")
    conclude(study.run(setup), setup)
    return 0
