"""The measured tables of README and docs are the record's, and a page that differs is found."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module("tables")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def record(tables: ModuleType):
    data = (ROOT / "bench/results/h100.json").read_text(encoding="utf-8")
    return tables.Record(json.loads(data))


def test_pages_hold_what_the_record_holds(tables, record):
    for name in tables.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert tables.MARK.search(text), f"{name} marks no table"
        assert tables.filled(text, record) == text, f"{name}: run python bench/tables.py"


@pytest.mark.parametrize(
    "name", ["facts", "train", "routing", "infer", "products", "lora", "generate"]
)
def test_a_changed_figure_is_written_anew(tables, record, name):
    page = f"before\n<!-- table {name} -->\n| 1 | 2 |\n<!-- end -->\nafter\n"
    new = tables.filled(page, record)
    assert "| 1 | 2 |" not in new
    assert new.startswith("before\n") and new.endswith("<!-- end -->\nafter\n")
    assert tables.filled(new, record) == new


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0234, "0.02"), (9.994, "9.99"), (9.996, "10.0"), (99.94, "99.9"), (99.96, "100")],
)
def test_digits(tables, value, text):
    assert tables.digits(value) == text
