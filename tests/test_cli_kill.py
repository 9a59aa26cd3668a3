"""A run that is killed loses nothing but the steps since its last checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from cli_runner import (
    environment,
    run_command,
    step_files,
    train_arguments,
    write_text,
)

for needed in ("safetensors", "matplotlib", "tensorboard", "rich"):
    pytest.importorskip(needed)

STEPS = 24
EXTRA = ["--steps", STEPS, "--checkpoint-every", 1, "--keep", 3]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The tensor files at the end of a run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = run_command(*train_arguments(text, run, *EXTRA))
    assert done.returncode == 0, done.stderr
    return step_files(run, STEPS)


#: `ling-ops` that waits for the signal one step after the one given: it cannot end before.
WAITING = """
import sys, time
from ling_ops.cli import main
from ling_ops.cli.trainer import Trainer

after_step, stops = int(sys.argv.pop(1)), Trainer._stops

def wait(self, stop):
    while self.step > after_step and stop.signal is None:
        time.sleep(0.01)
    return stops(self, stop)

Trainer._stops = wait
sys.exit(main())
"""


def start_and_signal(arguments, run, number, *, after_step):
    """Start a run, send it a signal once a checkpoint of `after_step` exists, wait for its end."""
    command = [sys.executable, "-c", WAITING, str(after_step), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    latest, limit = run / "checkpoints" / "latest", time.monotonic() + 60
    while time.monotonic() < limit and process.poll() is None:
        if latest.exists() and int(latest.read_text().strip()[5:]) >= after_step:
            break
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigkill_then_resume_is_the_undisturbed_run(whole, text, tmp_path):
    run = tmp_path / "run"
    arguments = train_arguments(text, run, *EXTRA)
    code, _, _ = start_and_signal(arguments, run, signal.SIGKILL, after_step=5)
    assert code == -signal.SIGKILL
    done = run_command("train", "--resume", "--output", run)
    assert done.returncode == 0, done.stderr
    assert step_files(run, STEPS) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_cleanly(number, whole, text, tmp_path):
    run = tmp_path / "run"
    extra = ["--steps", STEPS, "--checkpoint-every", 3, "--keep", 3]
    code, out, err = start_and_signal(train_arguments(text, run, *extra), run, number, after_step=3)
    assert code == 0 and err == "", err
    assert f"stopped by {number.name} after step" in out and "--resume" in out
    stopped = int((run / "checkpoints" / "latest").read_text().strip()[5:])
    assert f"after step {stopped}," in out and 3 <= stopped < STEPS
    assert (run / "training.png").exists()
    if number == signal.SIGTERM:
        done = run_command("train", "--resume", "--output", run)
        assert done.returncode == 0, done.stderr
        assert step_files(run, STEPS) == whole
