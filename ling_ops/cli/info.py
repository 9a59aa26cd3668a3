"""`ling-ops info`: what runs where, and why."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `info` to the command's subparsers."""
    parser = commands.add_parser("info", help="show which op runs where, and why")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops info`; returns the exit status."""
    facts = collect()
    if arguments.json:
        json.dump(facts, sys.stdout, indent=2, default=str)
        print()
    else:
        print(render(facts))
    return 0


def collect() -> dict[str, Any]:
    """`ling_ops.backend_info()`, with Python's version and the CPU beside it."""
    import torch

    import ling_ops

    facts = dict(ling_ops.backend_info())
    cpu = {"index": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}
    return {
        "ling_ops": facts.pop("version"),
        "python": platform.python_version(),
        **facts,
        "devices": [cpu, *facts["devices"]],
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as text: plain ones first, then a block per dict, tables for rows of facts."""
    plain = {key: value for key, value in facts.items() if not isinstance(value, (dict, list))}
    blocks = [_pairs(plain)]
    for key, value in facts.items():
        if key in plain:
            continue
        if isinstance(value, list):
            lines = _table(value)
        elif value and all(isinstance(row, dict) for row in value.values()):
            lines = _table([{"": name, **row} for name, row in value.items()])
        else:
            lines = _pairs(value)
        blocks.append([key] + ["  " + line for line in lines])
    return "\n".join("\n".join(block) for block in blocks)


def _pairs(values: dict[str, Any]) -> list[str]:
    width = max((len(key) for key in values), default=0)
    return [f"{key:<{width}}  {_word(value)}" for key, value in values.items()]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_word(row[c]) if c in row else "" for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_word(part) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={_word(part)}" for key, part in value.items())
    return str(value)
