"""The processes of a training run: one, or those that torchrun started."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ling_ops.cli.errors import CommandError
from ling_ops.cli.options import TrainOptions

#: What a launcher such as torchrun tells each process, beside WORLD_SIZE.
LAUNCHER = ("RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """What a run does in every process; this class is a run of one process."""

    rank, size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def of_main(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns in the main process, in every process.

        Its CommandError ends all of them; the main process alone says it.
        """
        return make()

    def main_saves(self, save: Callable[[], Any]) -> None:
        """`save` in the main process, however long it takes, before any process goes on."""
        save()

    def spread(self, model: nn.Module) -> nn.Module:
        """The model with its experts spread over the ranks, in place."""
        return model

    def part(self, batch: Tensor) -> Tensor:
        """This rank's sequences of a batch, which may be none."""
        return batch

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks of a small tensor."""
        return value

    def average_gradients(self, model: nn.Module) -> None:
        """Every gradient becomes that of the mean loss of all ranks."""

    def clipper(self, model: nn.Module) -> Callable[[dict[str, Tensor], float], Tensor] | None:
        """Clips gradients by the norm of all ranks' and returns it; None: of this rank's."""
        return None

    def gather(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors in the main process of those that every rank has a part of."""
        return tensors

    def shard(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of whole tensors."""
        return tensors

    def every(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, which has the same shape everywhere."""
        return [tensor]


class TorchrunRanks(Ranks):
    """A run of several processes, each of which has a part of every batch and of the experts."""

    def __init__(self, expert_parallel: int, device: torch.device, timeout: timedelta) -> None:
        from ling_ops import parallel

        self.parallel, self.device = parallel, device
        self.pulse_s = min(1.0, timeout.total_seconds() / 4)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        experts = self.size if expert_parallel == 0 else expert_parallel
        if self.size % experts:
            raise CommandError(
                f"expert_parallel must divide the {self.size} processes, not {experts}", code=2
            )
        self.mesh = parallel.expert_mesh(experts, device_type=device.type, timeout=timeout)

    def describe(self) -> str:
        """One line for the reader of a run."""
        experts = self.mesh["expert"].size()
        return f"{self.size} processes, each layer's experts spread over {experts}"

    def of_main(self, make: Callable[[], Any]) -> Any:
        made, error = None, None
        if self.is_main:
            try:
                made = make()
            except CommandError as refusal:
                error = refusal
        box = [made, error]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        made, error = box
        if error is not None:
            _close()
            raise error if self.is_main else SystemExit(error.code)
        return made

    def main_saves(self, save: Callable[[], Any]) -> None:
        # In a thread: the others would take a main process that says nothing for a lost one.
        refusals: list[BaseException] = []

        def work() -> None:
            try:
                save()
            except BaseException as refusal:
                refusals.append(refusal)

        def outcome() -> None:
            if refusals:
                raise refusals[0]

        thread = threading.Thread(target=work)
        if self.is_main:
            thread.start()
        busy = True
        while busy:
            if self.is_main:
                thread.join(self.pulse_s)
            busy = bool(self.total(torch.tensor(float(self.is_main and thread.is_alive()))))
        self.of_main(outcome)

    def spread(self, model: nn.Module) -> nn.Module:
        try:
            return self.parallel.parallelize(model, self.mesh)
        except ValueError as error:
            raise CommandError(f"no such run: {error}", code=2) from error

    def part(self, batch: Tensor) -> Tensor:
        return batch.tensor_split(self.size)[self.rank]

    def total(self, value: Tensor) -> Tensor:
        value = value.to(self.device, copy=True)
        distributed.all_reduce(value)
        return value

    def average_gradients(self, model: nn.Module) -> None:
        self.parallel.average_gradients(model, self.mesh)

    def clipper(self, model: nn.Module) -> Callable[[dict[str, Tensor], float], Tensor]:
        def clip(grads: dict[str, Tensor], max_norm: float) -> Tensor:
            return self.parallel.clip_gradients(model, max_norm, gradients=grads)

        return clip

    def gather(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.parallel.gather_tensors(model, tensors, to_rank=0)

    def shard(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.parallel.shard_tensors(model, tensors)

    def every(self, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.to(self.device)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor)
        return [part.cpu() for part in parts]


def seed_of(options: TrainOptions, step: int, rank: int) -> int:
    """A seed of a process for what it draws from a step on."""
    return (options.seed * 1_000_003 + step) * 1_009 + rank


def world_size() -> int:
    """How many processes the launcher says it started."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise CommandError(f"WORLD_SIZE must be a positive int, not {given!r}", code=2)
    return int(given)


def one_process(command: str) -> None:
    """Raise CommandError where a launcher started several processes of a command for one."""
    if world_size() > 1:
        raise CommandError(f"{command} runs in one process; torchrun started several", code=2)


def local_device(name: str) -> str:
    """The device that `name` means to this process: with torchrun each has its own GPU."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{local}"


@contextlib.contextmanager
def open_ranks(options: TrainOptions, device: torch.device) -> Iterator[Ranks]:
    """The run's processes. CommandError where the settings do not fit them, or one is lost."""
    size = world_size()
    if size == 1:
        if options.expert_parallel > 1:
            raise CommandError(
                f"expert_parallel {options.expert_parallel} needs as many processes: start with "
                f"torchrun --nproc-per-node {options.expert_parallel} -m ling_ops.cli train",
                code=2,
            )
        yield Ranks()
        return
    if options.batch_size % size:
        raise CommandError(
            f"batch_size must be a multiple of the {size} processes, not {options.batch_size}",
            code=2,
        )
    missing = [name for name in LAUNCHER if name not in os.environ]
    if missing:
        raise CommandError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: start with torchrun, or "
            "unset WORLD_SIZE",
            code=2,
        )
    # Imported first: torch.distributed.nn keeps the group that is there when it is imported.
    from ling_ops import parallel  # noqa: F401

    timeout = timedelta(seconds=options.rank_timeout)
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timeout)
        yield TorchrunRanks(options.expert_parallel, device, timeout)
        _close()
    except distributed.DistError as error:
        raise _lost(error) from error
    except RuntimeError as error:
        # Gloo says so in words only.
        if not any(word in str(error) for word in ("gloo", "NCCL", "Timed out")):
            raise
        raise _lost(error) from error


def _close() -> None:
    """End the exchanges of processes that are all here."""
    distributed.barrier()
    distributed.destroy_process_group()
    # Gloo's threads let go of an exchange's tensors after it returned; one that does so while the
    # interpreter ends aborts the process. They end with the last reference to their group, which
    # may be in a cycle: of a model, or of an error and its traceback.
    atexit.register(gc.collect)


def _lost(error: Exception) -> CommandError:
    first = str(error).strip().splitlines()[0][:200]
    return CommandError(
        f"another process of this run was lost ({first}); the last checkpoint is kept: go on "
        "with --resume, on any number of processes"
    )
