"""The `ling-ops` command: info, cost, train, finetune, generate, prune, study.

This package sits on top of `ling_ops.models`. Each command imports what it needs when it runs,
so that `ling-ops info` works with the core install.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from typing import NoReturn

from ling_ops.cli.errors import CommandError, describe_os_error

#: What a command can be told that takes less of it.
LESS_MEMORY = {
    "train": "--batch-size or --sequence-length",
    "finetune": "--batch-size or --sequence-length",
    "prune": "--batch-size or --sequence-length",
    "generate": "--max-new-tokens",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other failure."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ling-ops: error: {message} (see `{self.prog} --help`)\n")


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of the `ling-ops` command, with all its subcommands."""
    from ling_ops.cli import cost, finetune_options, generate, info, options, prune, study

    parser = Parser(
        prog="ling-ops",
        description="Mixture-of-Experts operators and a small Ling model to train with them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info.add_parser(commands)
    cost.add_parser(commands)
    options.add_parser(commands)
    finetune_options.add_parser(commands)
    generate.add_parser(commands)
    prune.add_parser(commands)
    study.add_parser(commands)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    return importlib.import_module(f"ling_ops.cli.{arguments.command}").run(arguments)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; failures are one line on stderr."""
    arguments = build_parser().parse_args(argv)
    try:
        return _run(arguments)
    except CommandError as error:
        return _fail(str(error), error.code)
    except BrokenPipeError:
        # The reader of stdout went away; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _fail(str(describe_os_error(error, f"`ling-ops {arguments.command}`")), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except (MemoryError, ModuleNotFoundError) as error:
        return _fail(f"{type(error).__name__}: {error}", 1)
    except RuntimeError as error:
        # The last is the CPU's: "DefaultCPUAllocator: can't allocate memory".
        if not any(words in str(error) for words in ("out of memory", "allocate memory")):
            raise
        advice = LESS_MEMORY.get(arguments.command)
        return _fail("the device ran out of memory" + (f": lower {advice}" if advice else ""), 1)


def _fail(message: str, code: int) -> int:
    print(f"ling-ops: error: {message}", file=sys.stderr)
    return code
