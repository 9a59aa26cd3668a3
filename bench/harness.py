"""One small harness for all benches: interleaved providers, medians, CUDA graphs, floors.

A bench builds ``Case`` objects (one per shape) with a callable per provider and hands them to
``run``.  Providers of a case are timed in turn within every round, so that a drifting clock
hits them alike; a round's order starts at another provider each time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

#: Constants of every floor, so that records of different cards and days compare.
FLOP_RATE = 790e12
BYTE_RATE = 3.0e12
#: A provider whose single call takes longer is left out of a case.
SLOWEST_CALL_MS = 1000.0
#: Inputs of graph replays are rotated through at least this much memory (several L2 caches).
ROTATED_BYTES = 192 * 2**20

#: Where benches put their tensors; the tests of the benches themselves use the CPU.
DEVICE = "cuda"

Provider = Callable[[int], Any]  # takes the number of the input set


@dataclass
class Case:
    """One shape of one bench, and who computes it.

    ``floor_ms`` comes from ``floor``; ``rotations`` is the number of input sets that a provider
    accepts; ``graph`` asks for CUDA-graph replays.
    """

    bench: str
    what: str
    shape: dict[str, int]  # T, H, I, E, K as far as they apply
    dtype: str
    floor_ms: float
    providers: dict[str, Provider]
    graph: bool = False
    rotations: int = 1
    reset: Callable[[], None] = lambda: None  # before every call, e.g. dropping old gradients


@dataclass
class Row:
    """A line of the record; field names are the record's."""

    bench: str
    provider: str
    what: str
    graph: bool
    T: int | None
    H: int | None
    I: int | None
    E: int | None
    K: int | None
    dtype: str
    ms: float
    ms_min: float
    ms_max: float
    floor_ms: float
    peak_gib: float


@dataclass
class Contender:
    name: str
    call: Callable[[int], None]
    calls_per_round: int
    graph: bool
    first_ms: float
    peak_gib: float
    times: list[float] = field(default_factory=list)


def floor(*stages: tuple[float, float]) -> float:
    """Milliseconds: for each stage (FLOP, bytes) the larger of its two times, added up."""
    return 1e3 * sum(max(flop / FLOP_RATE, size / BYTE_RATE) for flop, size in stages)


def rotations_for(input_bytes: int, most: int = 32) -> int:
    """How many input sets it takes to leave the cache behind, between 4 and ``most``."""
    return max(4, min(most, -(-ROTATED_BYTES // max(1, input_bytes))))


def has_kernel(op: str) -> bool:
    """Whether the operator ``ling_ops::op`` is compiled for CUDA in this install."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ling_ops::{op}", "CUDA")


def uniform_ids(tokens: int, k: int, experts: int) -> torch.Tensor:
    """k distinct experts per token, [T,K] int32, in blocks to save memory."""
    blocks = torch.arange(tokens).split(32768)
    picks = [torch.rand(len(b), experts, device=DEVICE).topk(k).indices for b in blocks]
    return torch.cat(picks).int()


def zipf_ids(tokens: int, k: int, experts: int, exponent: float = 1.0) -> torch.Tensor:
    """k distinct experts per token, [T,K] int32, drawn with weights 1 / rank^exponent.

    Which expert has which rank is random; a token's draws are without replacement.
    """
    rank = 1 + torch.randperm(experts, device=DEVICE)
    odds = -exponent * rank.float().log()
    picks = []
    for block in torch.arange(tokens).split(32768):
        noise = torch.rand(len(block), experts, device=DEVICE).clamp(1e-20, 1 - 1e-7)
        picks.append((odds - (-noise.log()).log()).topk(k).indices)
    return torch.cat(picks).int()


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device=DEVICE, dtype=dtype).normal_(std=scale)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE)


# --- measuring -----------------------------------------------------------------------------------
def _first_call(case: Case, provider: Provider) -> tuple[float, float]:
    """(ms, peak GiB above what was there before) of one warmed-up eager call."""
    case.reset()
    provider(0)
    case.reset()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    provider(0)
    torch.cuda.synchronize()
    took = 1e3 * (time.perf_counter() - start)
    return took, (torch.cuda.max_memory_allocated() - before) / 2**30


def _capture(case: Case, provider: Provider) -> Callable[[int], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        provider(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(case.rotations):
            provider(turn)
    return lambda _: graph.replay()


def _contender(case: Case, name: str, provider: Provider) -> Contender | None:
    took, peak = _first_call(case, provider)
    if took > SLOWEST_CALL_MS:
        print(f"  {name}: left out, one call takes {took:.0f} ms")
        return None
    if case.graph:
        try:
            return Contender(name, _capture(case, provider), case.rotations, True, took, peak)
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"  {name}: no CUDA graph ({str(error).splitlines()[0]}), timed eagerly")
    return Contender(name, provider, 1, False, took, peak)


def _time_once(case: Case, contender: Contender, turn: int) -> tuple[Any, Any]:
    case.reset()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    contender.call(turn % case.rotations)
    end.record()
    return start, end


def measure(case: Case, seconds: float) -> list[Row]:
    """Time all providers of a case in turn for about ``seconds``."""
    contenders = []
    for name, provider in case.providers.items():
        try:
            contender = _contender(case, name, provider)
        except (torch.OutOfMemoryError, NotImplementedError, ImportError) as error:
            print(f"  {name}: left out ({str(error).splitlines()[0]})")
            contender = None
        if contender is not None:
            contenders.append(contender)
    case.reset()
    round_ms = sum(c.first_ms * c.calls_per_round for c in contenders)
    burst = max(1, min(8, int(200 / max(round_ms, 1e-3))))  # rounds queued without a sync
    deadline, turn = time.perf_counter() + seconds, 0
    while contenders and turn < 200 and (turn < 6 or time.perf_counter() < deadline):
        pending = []
        for _ in range(burst):
            first = turn % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                pending.append((contender, *_time_once(case, contender, turn)))
            turn += 1
        torch.cuda.synchronize()
        for contender, start, end in pending:
            contender.times.append(start.elapsed_time(end) / contender.calls_per_round)
    return [_row(case, contender) for contender in contenders]


def _row(case: Case, contender: Contender) -> Row:
    times = contender.times[1:] or contender.times  # the first round is a warm-up
    sizes = {name: case.shape.get(name) for name in ("T", "H", "I", "E", "K")}
    return Row(
        case.bench,
        contender.name,
        case.what,
        contender.graph,
        dtype=case.dtype,
        ms=round(statistics.median(times), 6),
        ms_min=round(min(times), 6),
        ms_max=round(max(times), 6),
        floor_ms=round(case.floor_ms, 6),
        peak_gib=round(contender.peak_gib, 4),
        **sizes,
    )


# --- printing and running ------------------------------------------------------------------------
def shape_name(row: Row) -> str:
    sizes = ",".join(str(v) for v in (row.T, row.H, row.I, row.E, row.K) if v is not None)
    return f"{row.bench} {row.what} {sizes}"


def table(rows: Iterable[Row]) -> str:
    """Provider x shape: milliseconds, and how many times the floor that is."""
    rows = list(rows)
    providers = list(dict.fromkeys(row.provider for row in rows))
    shapes: dict[str, dict[str, Row]] = {}
    for row in rows:
        shapes.setdefault(shape_name(row), {})[row.provider] = row
    width = max((len(name) for name in shapes), default=5)
    lines = [f"{'shape':{width}}  {'floor':>9}" + "".join(f"  {p:>19}" for p in providers)]
    for name, by_provider in shapes.items():
        floor_ms = next(iter(by_provider.values())).floor_ms
        line = f"{name:{width}}  {floor_ms:9.4f}"
        for provider in providers:
            row = by_provider.get(provider)
            ratio = f"({row.ms / row.floor_ms:5.2f}x)" if row and row.floor_ms else ""
            line += f"  {row.ms:10.4f} {ratio:>8}" if row else f"  {'-':>19}"
        lines.append(line)
    return "\n".join(lines)


def run(cases: Iterator[Case], seconds: float) -> list[Row]:
    """Measure cases one after the other; a case's inputs are freed before the next is built."""
    rows: list[Row] = []
    for case in cases:
        rows += measure(case, seconds)
        case.providers.clear()
        del case
        torch.cuda.empty_cache()
    return rows


def main(
    description: str,
    cases: Callable[[], Iterator[Case]],
    seconds: float,
    benches: tuple[str, ...],
    summary: Callable[[list[Row]], str] | None = None,
) -> None:
    """Command line of a bench file.  ``benches`` are the names of rows that it writes, ``summary``
    is printed below the table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--seconds", type=float, default=seconds, help="time per shape")
    parser.add_argument("--only", nargs="+", choices=benches, default=benches, help="kinds of rows")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "a bench needs a CUDA device\n")
    torch.manual_seed(0)
    warnings.simplefilter("once")
    picked = (c for c in cases() if c.bench in options.only)
    rows = run(picked, options.seconds)
    print(table(rows))
    if summary is not None:
        print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows]))
