"""The figures of `ling-ops cost` as tables: rich ones on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from ling_ops.cli.info import render

_COLUMNS = ("figure", "stated", "computed", "unit", "verdict", "how")


def show(facts: dict[str, Any]) -> None:
    """Print the facts; without rich, or into a file, as plain text."""
    tables = _tables(facts)
    if sys.stdout.isatty():
        try:
            _show_rich(tables)
            return
        except ImportError:
            pass
    print("\n\n".join(render({title: rows}).strip() for title, rows in tables.items()))


def _tables(facts: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Title -> rows; the article's claims by its tables, everything else a pair per row."""
    if "article" not in facts:
        return {title: _rows(values) for title, values in facts.items()}
    tables: dict[str, list[dict[str, str]]] = {}
    for claim in facts["article"]:
        row = {column: _word(claim[column]) for column in _COLUMNS}
        if claim["stated_to"] is not None:
            row["stated"] += f" to {_word(claim['stated_to'])}"
        if claim["at_most"]:
            row["stated"] = "at most " + row["stated"]
        if claim["floor"]:
            row["computed"] = "at least " + row["computed"]
        tables.setdefault(claim["table"], []).append(row)
    return tables


def _rows(values: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row of words per figure, or per dict of a list; a figure that a dict lacks is a dash."""
    if isinstance(values, dict):
        return [{"figure": name, "value": _word(value)} for name, value in values.items()]
    columns = list(dict.fromkeys(name for row in values for name in row))
    return [{name: _word(row.get(name)) for name in columns} for row in values]


def _show_rich(tables: dict[str, list[dict[str, str]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, rows in tables.items():
        table = Table(title=title.replace("_", " "), title_justify="left")
        for column in rows[0]:
            numeric = column in ("stated", "computed", "value")
            table.add_column(column, justify="right" if numeric else "left")
        for row in rows:
            wrong = row.get("verdict") == "does not follow"
            table.add_row(*map(Text, row.values()), style="bold red" if wrong else "")
        console.print(table)


def _word(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)
