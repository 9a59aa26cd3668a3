"""`ling-ops info`, the parser, and the views of a run."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from cli_runner import environment, run_command

import ling_ops
from ling_ops.cli import build_parser, main
from ling_ops.cli.info import render
from ling_ops.cli.optimizer import learning_rate_at
from ling_ops.cli.progress import Eta, LiveProgress, clock, load_bars, open_progress, relative_load


def test_info_names_every_op_and_its_reason():
    done = run_command("info")
    assert done.returncode == 0 and done.stderr == ""
    for op, facts in ling_ops.backend_info()["ops"].items():
        row = next(line for line in done.stdout.splitlines() if line.split()[:1] == [op])
        assert row.split()[1] == facts["backend"]
    assert ling_ops.__version__ in done.stdout


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ops"] == json.loads(json.dumps(ling_ops.backend_info()["ops"]))
    assert facts["devices"][0]["index"] == "cpu"


def test_info_needs_the_core_install_alone():
    code = (
        "import sys\n"
        "for name in ('rich', 'safetensors', 'matplotlib', 'tensorboard', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "from ling_ops.cli import main\n"
        "sys.exit(main(['info']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
        env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_table_lines_up():
    facts = {
        "a": 1,
        "rows": [{"x": None, "long": True}, {"x": "wide", "y": [1, 2]}],
        "d": {"k": 2.5},
    }
    assert render(facts).splitlines() == [
        "a  1", "rows", "  x     long  y", "  none  yes", "  wide        1, 2", "d", "  k  2.5",
    ]  # fmt: skip


@pytest.mark.parametrize("module", ["ling_ops", "ling_ops.cli"])
def test_runs_as_a_module(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True,
        env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("info", "train", "generate"))


def test_every_help_prints(capsys):
    for command in ("info", "train", "generate"):
        with pytest.raises(SystemExit) as stopped:
            build_parser().parse_args([command, "--help"])
        assert stopped.value.code == 0 and f"ling-ops {command}" in capsys.readouterr().out


def test_learning_rate_schedule():
    def rate(step):
        return learning_rate_at(step, steps=100, warmup=10, peak=1.0, final=0.1)

    rates = [rate(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert learning_rate_at(1, steps=1, warmup=0, peak=2.0, final=1.0) == pytest.approx(2.0)


def test_small_views():
    assert [clock(s) for s in (0, 61, 3599.6, float("inf"))] == ["0:00", "1:01", "1:00:00", "-:--"]
    assert relative_load([0.5, 0.25, 0.25, 0.0]) == [2.0, 1.0, 1.0, 0.0]
    assert relative_load([0.0, 0.0]) == [0.0, 0.0]
    assert load_bars([0.0, 1.0, 1.0, 2.0]) == " ▄▄█"
    assert Eta(3, 10).left(3) == float("inf")


TRAIN = {
    "event": "train", "step": 5, "loss": 2.0, "bits_per_byte": 2.885, "learning_rate": 1e-3,
    "gradient_norm": 1.0, "tokens_per_s": 1234.5, "elapsed_s": 3.0,
    "layers": [
        {"layer": 2, "utilization": [0.25, 0.75], "max_vio": 0.5, "drop_rate": 0.125},
    ],
}  # fmt: skip
VALID = {"event": "validation", "step": 5, "bits_per_byte": 3.1, "order0_bits_per_byte": 4.7}


def test_the_live_panel_shows_what_a_run_is_asked_to_show():
    rich_console = pytest.importorskip("rich.console")
    live = LiveProgress(10)
    live._console = rich_console.Console(width=100, record=True, file=io.StringIO())
    live.train(TRAIN, 65.0)
    live.validation(VALID)
    live._console.print(live._render())
    shown = live._console.export_text()
    for piece in ("loss 2.000", "1,234 tokens/s", "ETA 1:05", "5/10", "validation 3.100",
                  "baseline 4.700", "0.50", "0.50-1.50", "12.5%", "MaxVio"):  # fmt: skip
        assert piece in shown, piece


def test_plain_lines_when_not_a_terminal(capsys):
    with open_progress(10) as progress:
        progress.train(TRAIN, 65.0)
        progress.validation(VALID)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 5/10  loss 2.000 (2.885 bits/byte)  1,234 tokens/s  MaxVio 0.50")
    assert first.endswith("dropped 12.5%  eta 1:05")
    assert second.startswith("step 5/10  validation 3.100 bits/byte")
