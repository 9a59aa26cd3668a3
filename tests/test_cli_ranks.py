"""`torchrun -m ling_ops.cli train --expert-parallel`: the run of one process, on several."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_runner import MODEL, environment, run_command, step_files, train_arguments, write_text
from torch import distributed

for needed in ("safetensors", "matplotlib", "tensorboard", "rich"):
    pytest.importorskip(needed)
if not distributed.is_available() or sys.platform != "linux":
    pytest.skip("needs torch.distributed and /proc", allow_module_level=True)

STEPS = 6
RUN = ["--batch-size", 4, "--steps", STEPS, "--log-every", 1, "--keep", 9]
#: Nothing that depends on which tokens share a process: no jitter, capacity or balancing losses.
SAME = [
    "--model", *MODEL[:-1], "router_jitter=0.0", "--capacity", "dropless", "--balance-loss", 0,
    "--sequence-loss", 0, "--z-loss", 0,
]  # fmt: skip
#: A lost process ends the job within this time; torchrun itself gives the others 30 s.
ENDS_WITHIN_S = 60
#: So does one that hangs, after these seconds more; both start within them on a slow machine.
RANK_TIMEOUT_S = 10


COMMAND = ("-m", "ling_ops.cli")


def torchrun(ranks: int, *arguments: object, command: tuple[str, ...] = COMMAND) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    return [sys.executable, *map(str, [*launch, *command, *arguments])]


#: The command, which says at its very end how many threads of gloo are left.
COUNT_THREADS = """
import atexit, os, pathlib, sys

def count():
    names = [task.read_text() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
    line = f"threads left: {sum('gloo' in name for name in names)}\\n"
    os.write(1, line.encode())  # at once: the other process prints at the same moment

atexit.register(count)
from ling_ops.cli import main
sys.exit(main())
"""


def run_ranks(
    ranks: int, *arguments: object, command: tuple[str, ...] = COMMAND
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(ranks, *arguments, command=command), capture_output=True, text=True,
        env=environment(), timeout=240, check=False,
    )  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return {e["step"]: e["loss"] for e in events if e["event"] == "train"}


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(step_files(run, step)["model.safetensors"])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The run of one process that the others must equal."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = run_command(*train_arguments(text, run, *RUN, *SAME, "--checkpoint-every", 3))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def pair(text, tmp_path_factory):
    run = tmp_path_factory.mktemp("pair") / "run"
    extra = [*RUN, *SAME, "--checkpoint-every", 3, "--expert-parallel"]
    done = run_ranks(2, *train_arguments(text, run, *extra))
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def same_training(run: Path, alone: Path, first: int = 1) -> None:
    found, exact = losses(run), losses(alone)
    assert set(found) == set(range(first, STEPS + 1))
    for step, loss in found.items():
        assert loss == pytest.approx(exact[step], rel=1e-4), step
    theirs = tensors(alone, STEPS)
    mine = tensors(run, STEPS)
    assert set(mine) == set(theirs)
    for name, tensor in theirs.items():
        assert mine[name].shape == tensor.shape and mine[name].dtype == tensor.dtype
    error = max(
        float((mine[n] - t).abs().max()) for n, t in theirs.items() if t.is_floating_point()
    )
    # AdamW turns a gradient near zero into a step of either sign, of at most the learning rate.
    assert error < 5e-3


def test_two_processes_train_as_one(pair, alone) -> None:
    run, out = pair
    assert "2 processes, each layer's experts spread over 2" in out
    assert out.count("final validation") == 1
    same_training(run, alone)
    files = [folder / "metrics.jsonl" for folder in (run, alone)]
    ends = [json.loads(file.read_text().splitlines()[-1]) for file in files]
    assert ends[0]["bits_per_byte"] == pytest.approx(ends[1]["bits_per_byte"], rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_checkpoint_goes_on_with_another_number_of_processes(
    ranks, pair, alone, tmp_path
) -> None:
    folder = pair[0] / "checkpoints" / "step-00000003"
    arguments = ["train", "--resume", folder, "--output", tmp_path / "run"]
    if ranks == 1:
        done = run_command(*arguments)
    else:
        done = run_ranks(ranks, *arguments, "--expert-parallel", 2)
    assert done.returncode == 0, done.stderr
    same_training(tmp_path / "run", alone, first=4)


def test_resume_on_as_many_processes_is_bit_for_bit(text, tmp_path) -> None:
    """With all that draws random numbers and keeps a state of its own."""
    run = tmp_path / "run"
    arguments = train_arguments(text, run, *RUN, "--checkpoint-every", 2, "--expert-parallel", 2)
    done = run_ranks(2, *arguments)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again"
    folder = run / "checkpoints" / "step-00000002"
    done = run_ranks(2, "train", "--resume", folder, "--output", again)
    assert done.returncode == 0, done.stderr
    assert step_files(again, STEPS) == step_files(run, STEPS)
    # One process alone asks for no other number of processes that share the experts.
    done = run_command("train", "--resume", folder, "--output", tmp_path / "alone", "--steps", 3)
    assert done.returncode == 0, done.stderr


def workers_of(launcher: int) -> list[int]:
    """The processes that torchrun started, by age."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == launcher:
                found.append(int(entry.name))
    return sorted(found)


def kill_workers(pids: list[int]) -> None:
    """End what is left of a job, which a stopped process would never do by itself."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if b"ling_ops.cli" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def disturb(text: Path, run: Path, disturbance, *extra: object) -> tuple[int, str, str, float]:
    """(status, stdout, stderr, seconds to the end) of an endless run that is disturbed.

    ``disturbance`` gets the launcher's process id once there is a checkpoint.
    """
    endless = [*RUN, "--steps", 100_000, "--checkpoint-every", 1, "--expert-parallel", *extra]
    launcher = subprocess.Popen(
        torchrun(2, *train_arguments(text, run, *endless)), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    latest, limit = run / "checkpoints" / "latest", time.monotonic() + 120
    workers = []
    try:
        while not latest.exists():
            assert launcher.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        workers = workers_of(launcher.pid)
        disturbance(launcher.pid)
        since = time.monotonic()
        out, errors = launcher.communicate(timeout=2 * ENDS_WITHIN_S)
        return launcher.returncode, out, errors, time.monotonic() - since
    finally:
        workers += workers_of(launcher.pid)
        launcher.kill()
        kill_workers(workers)


def goes_on_alone(run: Path) -> None:
    """What is saved is resumed by one process."""
    reached = int((run / "checkpoints" / "latest").read_text().strip()[5:])
    done = run_command("train", "--resume", "--output", run, "--steps", reached + 2)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_job_with_an_error(lost, text, tmp_path) -> None:
    run = tmp_path / "run"
    status, _, errors, took = disturb(
        text, run, lambda launcher: os.kill(workers_of(launcher)[lost], signal.SIGKILL)
    )
    assert status != 0 and took < ENDS_WITHIN_S
    assert "Signal 9 (SIGKILL)" in errors or "another process of this run was lost" in errors
    goes_on_alone(run)


def test_a_process_that_hangs_ends_the_job_with_an_error(text, tmp_path) -> None:
    """After --rank-timeout seconds, and the 30 that torchrun leaves the one that hangs."""
    run, workers = tmp_path / "run", []

    def hang(launcher: int) -> None:
        workers.extend(workers_of(launcher))
        os.kill(workers[1], signal.SIGSTOP)

    status, _, errors, took = disturb(text, run, hang, "--rank-timeout", RANK_TIMEOUT_S)
    assert status != 0 and RANK_TIMEOUT_S - 1 < took < RANK_TIMEOUT_S + ENDS_WITHIN_S
    assert errors.count("another process of this run was lost") == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    goes_on_alone(run)


def test_a_folder_that_holds_a_run_is_refused_once(pair, text) -> None:
    """The main process says so; the others add nothing."""
    done = run_ranks(2, *train_arguments(text, pair[0], *RUN, "--expert-parallel"))
    assert done.returncode != 0
    assert done.stderr.count("ling-ops: error") == 1 and "already holds a run" in done.stderr
    assert "was lost" not in done.stderr and "SIGABRT" not in done.stderr


#: The command, whose checkpoints take longer to write than a process waits for another.
SLOW_SAVES = """
import sys, time
from ling_ops.cli import main, trainer

save = trainer.save_checkpoint
trainer.save_checkpoint = lambda *a, **k: (time.sleep(8), save(*a, **k))
sys.exit(main())
"""


def test_a_checkpoint_may_take_longer_than_the_timeout(text, tmp_path) -> None:
    script, run = tmp_path / "slow.py", tmp_path / "run"
    script.write_text(SLOW_SAVES)
    arguments = ["--batch-size", 4, "--steps", 1, "--expert-parallel", "--rank-timeout", 5]
    done = run_ranks(2, *train_arguments(text, run, *arguments), command=(str(script),))
    assert done.returncode == 0, done.stderr
    assert step_files(run, 1)


def test_no_thread_outlives_the_exchanges(pair, text, tmp_path) -> None:
    """One that lets go of a tensor while the interpreter ends would abort the process."""
    script = tmp_path / "counted.py"
    script.write_text(COUNT_THREADS)
    arguments = ["--batch-size", 4, "--steps", 1, "--expert-parallel"]
    for output, refused in ((tmp_path / "run", False), (pair[0], True)):
        done = run_ranks(2, *train_arguments(text, output, *arguments), command=(str(script),))
        assert (done.returncode != 0) == refused, done.stderr
        counts = re.findall(r"threads left: (\d+)", done.stdout)
        assert counts and set(counts) == {"0"}


def test_sigterm_saves_and_ends_all_processes(text, tmp_path) -> None:
    run = tmp_path / "run"
    _, out, errors, took = disturb(text, run, lambda launcher: os.kill(launcher, signal.SIGTERM))
    assert took < ENDS_WITHIN_S and "ling-ops: error" not in errors
    assert "stopped by SIGTERM after step" in out
    goes_on_alone(run)


def test_settings_that_do_not_fit_the_processes(text, tmp_path) -> None:
    arguments = train_arguments(text, tmp_path / "run", "--steps", 1)
    done = run_command(*arguments, "--expert-parallel", 2)
    assert done.returncode == 2 and "torchrun --nproc-per-node 2" in done.stderr
    env = {**environment(), "WORLD_SIZE": "3", "RANK": "0"}
    command = [sys.executable, "-m", "ling_ops", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 2
    assert "batch_size must be a multiple of the 3 processes, not 2" in done.stderr
