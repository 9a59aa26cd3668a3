"""The measured tables of README and docs are the record's, and a page that differs is found."""

from __future__ import annotations

import dataclasses
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
    return tables.Record(json.loads(tables.RECORD.read_text(encoding="utf-8")))


def test_pages_hold_what_the_record_holds(tables, record):
    for name in tables.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert tables.MARK.search(text), f"{name} marks no table"
        assert tables.filled(text, record) == text, f"{name}: run python bench/tables.py"


@pytest.mark.parametrize(
    "name",
    [
        "facts",
        "train",
        "routing",
        "infer",
        "bandwidth",
        "products",
        "lora",
        "lora_peft",
        "generate",
    ],
)
def test_a_changed_figure_is_written_anew(tables, record, name):
    page = f"before\n<!-- table {name} -->\n| 1 | 2 |\n<!-- end -->\nafter\n"
    new = tables.filled(page, record)
    assert "| 1 | 2 |" not in new
    assert new.startswith("before\n") and new.endswith("<!-- end -->\nafter\n")
    assert tables.filled(new, record) == new


def test_lora_beside_peft_compares_rows_of_the_same_size(tables):
    """Ratios of hand-made rows, and none where a row of that size is missing."""
    same = dict.fromkeys((field.name for field in dataclasses.fields(tables.Row)), None)
    same |= {"bench": "lora", "what": "fwd_bwd"}
    found = {
        8: {"frozen": (1.0, 2.0), "peft": (6.0, 4.0), "ling_ops": (3.0, 2.5)},
        16: {"frozen": (1.0, 2.0), "peft": (10.0, 5.0)},
    }
    record = tables.Record({"rows": []})
    record.rows = [
        tables.Row(**(same | {"T": tokens, "provider": provider, "ms": ms, "peak_gib": gib}))
        for tokens, of in found.items()
        for provider, (ms, gib) in of.items()
    ]
    lines = tables.lora_peft(record).splitlines()[2:]
    assert lines == ["| 8 | 6.00 | **3.00** | 2.0 | 2.000 | **0.500** | 4 |"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0234, "0.02"), (9.994, "9.99"), (9.996, "10.0"), (99.94, "99.9"), (99.96, "100")],
)
def test_digits(tables, value, text):
    assert tables.digits(value) == text


def test_a_prompt_by_the_extra_has_a_line_of_its_own(tables):
    """Hand-made rows: 8192 tokens in 50 and in 40 ms."""
    same = dict.fromkeys((field.name for field in dataclasses.fields(tables.Row)), None)
    same |= {"bench": "generate", "what": "prefill", "T": 8192, "floor_ms": 20.0}
    record = tables.Record({"rows": []})
    record.rows = [
        tables.Row(**(same | {"provider": provider, "ms": ms}))
        for provider, ms in {"ling_ops": 50.0, "ling_ops[attention]": 40.0}.items()
    ]
    lines = tables.generate(record).splitlines()[2:]
    assert [line.split("|")[1:3] for line in lines] == [
        [" a prompt of 8192 tokens ", " **163,840** "],
        [" a prompt of 8192 tokens, extra `attention` ", " **204,800** "],
    ]
