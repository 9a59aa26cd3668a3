"""`ling-ops cost`."""

from __future__ import annotations

import json

import pytest

from ling_ops.cli import main


def test_json_has_the_published_parameters(capsys):
    assert main(["cost", "ling-mini-2.0", "--json", "--gpus", "8"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == pytest.approx(16.256e9, rel=1e-4)
    assert facts["training"]["gpus"] == 8 and facts["training"]["gpu_usd"] == 0


def test_article_table_marks_the_electricity(capsys):
    assert main(["cost", "--article"]) == 0
    rows = capsys.readouterr().out.splitlines()
    row = next(line for line in rows if "electricity" in line)
    assert "6.451" in row and row.endswith("no")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--usd-per-gpu-hour", "-1"], "usd_per_gpu_hour"), (["--gpu", "x"], "gpu"),
     (["--gpus", "1"], "at least"), (["--gpus", "-2"], "gpus"), (["--gpus", "0"], "gpus"),
     (["--context", "0"], "context"),
     (["--model", "num_experts_per_token=300"], "num_experts_per_token"),
     (["--memory-gb", "-1"], "memory_gb")],
)  # fmt: skip
def test_nonsense_is_one_line(capsys, arguments, word):
    assert main(["cost", "ling-mini-2.0", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and word in shown.err and shown.err.count("\n") == 1
