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
    """Versions, devices, and what `ling_ops.backend_info()` says."""
    import torch

    import ling_ops

    return {
        "versions": {
            "ling_ops": getattr(ling_ops, "__version__", "unknown"),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "devices": [f"cpu ({torch.get_num_threads()} threads)"] + _gpus(),
        "backend": ling_ops.backend_info(),
    }


def _gpus() -> list[str]:
    import torch

    names = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        names.append(
            f"cuda:{index} {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        )
    return names


def render(facts: dict[str, Any]) -> str:
    """The facts as lines of text; a dict of dicts becomes a table."""
    lines: list[str] = []
    _render_into(lines, facts, "")
    return "\n".join(lines)


def _render_into(lines: list[str], value: dict[str, Any], indent: str) -> None:
    plain = {k: v for k, v in value.items() if not isinstance(v, (dict, list, tuple))}
    width = max((len(str(key)) for key in plain), default=0)
    for key, item in plain.items():
        lines.append(f"{indent}{key:<{width}}  {_word(item)}")
    for key, item in value.items():
        if key in plain:
            continue
        lines.append(f"{indent}{key}")
        if isinstance(item, (list, tuple)):
            lines += [f"{indent}  {_word(part)}" for part in item] or [f"{indent}  none"]
        elif item and all(isinstance(row, dict) for row in item.values()):
            lines += [f"{indent}  {row}" for row in _table(item)]
        else:
            _render_into(lines, item, indent + "  ")


def _table(rows: dict[str, dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [["", *columns]]
    cells += [[name, *(_word(row.get(c, "")) for c in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
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
    return str(value)
