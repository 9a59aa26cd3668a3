"""What only a GPU can show: graphs, streams, threads, determinism, poisoned memory, huge sizes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from strategies import generator, make_indices, make_logits, make_mlp, make_offsets
from tolerances import assert_bitwise, truth

import ling_ops as lo

pytestmark = pytest.mark.cuda

E, K, H, INNER = 32, 4, 64, 48
Step = Callable[[], tuple[torch.Tensor, ...]]


def needs(op: str) -> None:
    state = lo.backend_info()["ops"][op]
    if state["backend"] != "cuda":
        pytest.skip(f"{op} has no kernel here: {state['reason']}")


def flat(result: object) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def steps(tokens: int, device: torch.device, seed: int = 0) -> dict[str, Step]:
    """Every op as a function of tensors that a test may overwrite: name -> call."""
    case = make_mlp(tokens, H, INNER, E, K, dtype=torch.bfloat16, style="skewed", seed=seed).to(
        device
    )
    logits = make_logits(tokens, E, "grid", seed).to(device)
    bias = torch.linspace(-0.1, 0.1, E, device=device)
    capacity = torch.tensor(tokens * K // E, dtype=torch.int32, device=device)
    rows = torch.randn(tokens * K, H, generator=generator(seed)).bfloat16().to(device)
    offsets = make_offsets(E, tokens * K, "tail", seed).to(device)
    routing = lo.route(case.indices, E, capacity=capacity)
    x, up, down, weights = (t.detach().clone().requires_grad_() for t in case.tensors[:4])
    leaf = logits.clone().requires_grad_()
    grouped = {"score_function": "sigmoid", "expert_bias": bias, "num_groups": 8, "topk_groups": 4}

    def train() -> tuple[torch.Tensor, ...]:
        out = lo.moe_mlp(x, up, down, weights, case.indices)
        return out.detach(), *torch.autograd.grad(out, (x, up, down, weights), case.x)

    def gate_backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(lo.topk_gate(leaf, K)[0], leaf, weights.detach())

    def move_backward() -> tuple[torch.Tensor, ...]:
        moved = lo.unpermute(lo.permute(x, routing), routing, weights)
        return torch.autograd.grad(moved, (x, weights), case.x)

    return {
        "topk_gate": lambda: lo.topk_gate(logits, K),
        "topk_gate grouped": lambda: lo.topk_gate(logits, K, **grouped),
        "topk_gate backward": gate_backward,
        "route": lambda: flat(lo.route(case.indices, E)),
        "route capacity": lambda: flat(lo.route(case.indices, E, capacity=capacity)),
        "route probability": lambda: flat(
            lo.route(case.indices, E, capacity=capacity, priority="probability",
                     weights=case.weights)),
        "permute": lambda: flat(lo.permute(case.x, routing)),
        "unpermute": lambda: flat(lo.unpermute(rows, routing, case.weights)),
        "unpermute backward": move_backward,
        "grouped_gemm": lambda: flat(lo.grouped_gemm(rows, case.gate_up, offsets)),
        "moe_mlp": lambda: flat(lo.moe_mlp(*case.tensors)),
        "moe_mlp dropped": lambda: flat(lo.moe_mlp(*case.tensors, routing=routing)),
        "moe_mlp training": train,
    }  # fmt: skip


NAMES = list(steps(8, torch.device("cpu")))


def kernel_of(name: str) -> str:
    return name.split()[0]


@pytest.mark.parametrize("name", NAMES)
def test_no_host_sync(device: torch.device, name: str) -> None:
    needs(kernel_of(name))
    step = steps(200, device)[name]
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_reruns_are_bitwise_equal(device: torch.device, name: str) -> None:
    needs(kernel_of(name))
    step = steps(1000, device)[name]
    first = step()
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(250 if "training" in name else 1000):
        for a, b in zip(step(), first, strict=True):
            differing += (a != b).sum()
    assert int(differing) == 0


@pytest.mark.parametrize("name", NAMES)
def test_side_stream(device: torch.device, name: str) -> None:
    """While the default stream sleeps: a kernel that went there would not have run yet."""
    step = steps(300, device)[name]
    expected = step()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for stale, right in zip(step(), expected, strict=True):
            int((stale != right).sum())  # a kernel's first use loads it, which waits for the GPU
            stale.fill_(-7)  # memory for this stream, without the right answer in it
    torch.cuda.synchronize()
    # seconds: other processes of a parallel run share the GPU, and take their turns meanwhile
    torch.cuda._sleep(3_000_000_000)
    woken = torch.cuda.Event()
    woken.record()
    with torch.cuda.stream(stream):
        wrong = [int((a != b).sum()) for a, b in zip(step(), expected, strict=True)]
    assert not woken.query(), "the op waited for the default stream"
    assert not any(wrong)


def test_two_threads(device: torch.device) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                mine = steps(150 + 37 * seed, device, seed)
                first = {name: step() for name, step in mine.items()}
                for _ in range(20):
                    for name, step in mine.items():
                        for a, b in zip(step(), first[name], strict=True):
                            assert_bitwise(a, b, name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# --- CUDA graphs ---------------------------------------------------------------------------------
def capture(step: Step) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@pytest.mark.parametrize("training", [False, True])
def test_graph_replays_with_new_routing(device: torch.device, training: bool) -> None:
    """Gate, route with a device capacity, experts: captured once, replayed on other routings."""
    for op in ("topk_gate", "route", "moe_mlp"):
        needs(op)
    tokens = 256
    case = make_mlp(tokens, H, INNER, E, K, dtype=torch.bfloat16).to(device)
    x, up, down = (t.detach().clone().requires_grad_(training) for t in case.tensors[:3])
    logits = torch.zeros(tokens, E, device=device, requires_grad=training)
    capacity = torch.zeros((), dtype=torch.int32, device=device)
    upstream = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        weights, indices = lo.topk_gate(logits, K)
        routing = lo.route(indices, E, capacity=capacity)
        out = lo.moe_mlp(x, up, down, weights, indices, routing=routing)
        if not training:
            return out, indices
        return out.detach(), indices, *torch.autograd.grad(out, (x, up, down, logits), upstream)

    graph, outputs = capture(step)
    for seed, style, limit in (
        (1, "normal", 8),
        (2, "constant", 256),
        (3, "grid", 0),
        (4, "normal", 1000),
    ):
        with torch.no_grad():
            logits.copy_(make_logits(tokens, E, style, seed))
            x.copy_(torch.randn_like(x))
            capacity.fill_(limit)
        graph.replay()
        replayed = [t.clone() for t in outputs]
        for got, expected in zip(replayed, step(), strict=True):
            assert_bitwise(got, expected)


# --- independence of the batch -------------------------------------------------------------------
@pytest.mark.parametrize("cut", [65, 128, 201])
def test_a_token_does_not_depend_on_the_batch(device: torch.device, cut: int) -> None:
    """Bitwise, for splits and permutations of the tokens."""
    needs("moe_mlp")
    tokens = 300
    case = make_mlp(tokens, H, INNER, E, K, dtype=torch.bfloat16, style="skewed").to(device)
    logits = make_logits(tokens, E, "normal", 1).to(device)

    def layer(order: torch.Tensor) -> torch.Tensor:
        weights, indices = lo.topk_gate(logits[order], K)
        return lo.moe_mlp(case.x[order], case.gate_up, case.down, weights, indices)

    everyone = torch.arange(tokens, device=device)
    whole = layer(everyone)
    assert_bitwise(torch.cat([layer(everyone[:cut]), layer(everyone[cut:])]), whole)
    shuffled = torch.randperm(tokens, device=device)
    assert_bitwise(layer(shuffled), whole[shuffled])
    assert_bitwise(layer(everyone.repeat(3))[tokens : 2 * tokens], whole)


# --- memory --------------------------------------------------------------------------------------
@pytest.fixture
def poisoned(device: torch.device) -> Iterator[None]:
    """Free blocks of the caching allocator hold NaN (as integers: far out of range)."""
    torch.cuda.empty_cache()
    blocks = [
        torch.full((size // 4,), float("nan"), device=device)
        for size in [512 * 2**i for i in range(18)]
        for _ in range(4)
    ]
    torch.cuda.synchronize()
    del blocks
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [3, 200])
def test_nothing_uninitialised_is_read(
    device: torch.device, poisoned: None, name: str, tokens: int
) -> None:
    """With few tokens most experts are empty; their weight gradients must be written too."""
    step = steps(tokens, device)[name]
    actual = [t.clone() for t in step()]
    torch.cuda.empty_cache()
    for a, b in zip(actual, truth(step), strict=True):
        assert a.isnan().sum() == b.isnan().sum()
        # bf16 results of sums whose terms cancel: what counts is the error beside the largest
        scale = float(b.abs().max()) if b.is_floating_point() else 0.0
        torch.testing.assert_close(a, b, rtol=5e-2, atol=max(5e-2, 2e-2 * scale))


def take_all_memory() -> list[torch.Tensor]:
    taken = []
    for power in range(30, 8, -1):
        try:
            while True:
                taken.append(torch.empty(2**power, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            continue
    return taken


@pytest.mark.parametrize("name", ["topk_gate", "route", "moe_mlp", "moe_mlp training"])
def test_recovers_from_running_out_of_memory(device: torch.device, name: str) -> None:
    step = steps(3000, device)[name]
    expected = [t.clone() for t in step()]
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, held + 1e-3))
    try:
        taken = take_all_memory()
        with pytest.raises(RuntimeError):  # OutOfMemoryError where PyTorch itself allocates
            step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del taken
    for a, b in zip(step(), expected, strict=True):
        assert_bitwise(a, b)


def free_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.1f} are free")


def sample(rows: int, device: torch.device) -> torch.Tensor:
    """The first, the last and some random rows."""
    ends = torch.tensor([0, 1, rows - 2, rows - 1])
    return torch.cat([ends, torch.randint(rows, (60,))]).to(device)


@pytest.mark.xdist_group("large")
def test_gate_past_2_31_elements(device: torch.device) -> None:
    free_memory(8)
    tokens, experts = 2**21 + 77, 1024
    logits = torch.empty(tokens, experts, dtype=torch.bfloat16, device=device).normal_()
    weights, indices = lo.topk_gate(logits, 8)
    rows = sample(tokens, device)
    expected_weights, expected = truth(lo.topk_gate, logits[rows], 8)
    assert torch.equal(indices[rows], expected)
    torch.testing.assert_close(weights[rows], expected_weights)


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("tokens", [2**26 + 5, 2**28 - 1])
def test_route_of_very_many_pairs(device: torch.device, tokens: int) -> None:
    """The larger has 2^31 - 8 pairs.  Counting and the inverse map are checked in full."""
    needs("route")
    pairs, experts = tokens * 8, 64
    free_memory(pairs * 4 * 6 / 2**30)
    indices = torch.randint(experts, (tokens, 8), dtype=torch.int32, device=device)
    routing = lo.route(indices, experts)
    assert int(routing.expert_offsets[-1]) == pairs == int(routing.expert_counts.long().sum())
    rows = sample(pairs, device)
    pair = routing.row_pair[rows].long()
    assert torch.equal(routing.token_row.view(-1)[pair].long(), rows)
    expert = torch.searchsorted(routing.expert_offsets[1:].long(), rows, right=True)
    assert torch.equal(indices.view(-1)[pair].long(), expert)
    assert torch.equal(routing.row_token[rows].long(), pair // 8)
    for first in range(0, pairs - 1, 2**27):
        part = routing.row_pair[first : first + 2**27 + 1]
        falls = int((part[1:] < part[:-1]).sum())
        assert falls <= experts, "rows of an expert are not in pair order"


@pytest.mark.xdist_group("large")
def test_permute_past_2_31_elements(device: torch.device) -> None:
    free_memory(12)
    tokens, k, hidden = 2**17 + 3, 8, 2056
    indices = torch.randint(64, (tokens, k), dtype=torch.int32, device=device)
    routing = lo.route(indices, 64)
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device).normal_()
    rows = lo.permute(x, routing)
    chosen = sample(tokens * k, device)
    assert torch.equal(rows[chosen], x[routing.row_token[chosen].long()])
    out = lo.unpermute(rows, routing)
    chosen = sample(tokens, device)
    torch.testing.assert_close(out[chosen], (x[chosen].float() * k).bfloat16())


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("rows,experts,n,kd", [(2**21 + 9, 4, 64, 1032), (4096, 257, 2056, 4096)])
def test_gemm_past_2_31_elements(
    device: torch.device, rows: int, experts: int, n: int, kd: int
) -> None:
    """Once in the rows, once in the weights."""
    free_memory(10)
    a = torch.empty(rows, kd, dtype=torch.bfloat16, device=device).normal_()
    b = torch.empty(experts, n, kd, dtype=torch.bfloat16, device=device).normal_()
    offsets = torch.linspace(0, rows, experts + 1).to(torch.int32).to(device)
    out = lo.grouped_gemm(a, b, offsets)
    chosen = sample(rows, device)
    group = torch.searchsorted(offsets[1:], chosen.int(), right=True)
    for row, expert in zip(chosen.tolist(), group.tolist(), strict=True):
        exact = b[expert].double() @ a[row].double()
        torch.testing.assert_close(out[row].double(), exact, rtol=8e-3, atol=0.3)


# --- processes and devices -----------------------------------------------------------------------
def test_fork_after_import(device: torch.device) -> None:
    code = (
        "import os, torch, ling_ops\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    w, i = ling_ops.topk_gate(torch.randn(4, 8, device='cuda'), 2)\n"
        "    torch.cuda.synchronize()\n"
        "    os._exit(0 if i.shape == (4, 2) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_device_that_is_not_current(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    other = torch.device("cuda:1")
    expected = {name: step() for name, step in steps(100, torch.device("cuda:0")).items()}
    for name, step in steps(100, other).items():
        for a, b in zip(step(), expected[name], strict=True):
            assert a.device == other
            torch.testing.assert_close(a.cpu(), b.cpu())


def test_many_experts_and_grid_limits(device: torch.device) -> None:
    """T*K beyond 65535 blocks of any tile, E beyond one tile of shared memory."""
    for tokens, experts in ((70_000, 512), (300, 1024)):
        indices = make_indices(tokens, 8, experts, "skewed", 1).int().to(device)
        for a, b in zip(lo.route(indices, experts), truth(lo.route, indices, experts), strict=True):
            assert torch.equal(a, b)
