"""What only a GPU can show: streams, threads, determinism, poisoned memory.

Graphs and huge sizes have files of their own.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from compiled import needs
from strategies import generator, make_indices, make_logits, make_mlp, make_offsets
from tolerances import assert_bitwise, truth

import ling_ops as lo

pytestmark = pytest.mark.cuda

E, K, H, INNER = 32, 4, 64, 48
Step = Callable[[], tuple[torch.Tensor, ...]]


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
    scores = logits.softmax(1)
    batch = lo.CapacityPolicy.dynamic(0.02)
    running = lo.CapacityPolicy.dynamic(0.02, mode="running").to(device)
    running.update(routing.expert_counts)
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
        "reroute": lambda: lo.reroute(scores, case.weights, case.indices, capacity=capacity),
        "routing_stats": lambda: flat(tuple(
            lo.routing_stats(routing, indices=case.indices, weights=case.weights).values())),
        "capacity batch": lambda: flat(batch.capacity(routing.expert_counts, tokens * K, E)),
        "capacity running": lambda: flat(running.capacity(routing.expert_counts, tokens * K, E)),
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


def test_two_threads_whose_sizes_differ(device: torch.device) -> None:
    """More than 48 KiB of shared memory each, of the same kernels, but not equally much."""
    needs("moe_decode")

    def decode(tokens: int) -> Callable[[], object]:
        case = make_mlp(tokens, 64, 64, 256, 8, dtype=torch.bfloat16, seed=tokens).to(device)
        return lambda: lo.moe_mlp(*case.tensors, **case.options)

    def sort(experts: int) -> Callable[[], object]:
        ids = torch.randint(experts, (64, 8), device=device)
        return lambda: lo.route(ids, experts)

    works = [(decode(64), sort(2000)), (decode(40), sort(1500))]
    failures: list[BaseException] = []

    def repeat(steps: tuple[Callable[[], object], ...]) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(2000):
                    for step in steps:
                        step()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not failures, failures


@pytest.mark.parametrize("name", ["grouped_gemm", "grouped_gemm_dw"])
def test_first_call_of_a_thread(device: torch.device, name: str) -> None:
    """A thread that never used CUDA, as autograd's are at their first node, has no context yet."""
    needs("grouped_gemm")
    offsets = torch.tensor([0, 30, 30, 64], dtype=torch.int32, device=device)
    a, b = (torch.randn(64, 64, device=device).bfloat16() for _ in range(2))
    args = (
        (a, b, offsets) if name.endswith("dw") else (a, b.expand(3, 64, 64).contiguous(), offsets)
    )
    op, got = getattr(torch.ops.ling_ops, name), []
    expected = op(*args)
    op(*args)  # whose memory is free for the thread
    thread = threading.Thread(target=lambda: got.append(op(*args)))
    thread.start()
    thread.join()
    assert_bitwise(got[0], expected)


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


def token_results(
    logits: torch.Tensor, x: torch.Tensor, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What gate, permute, combine and their backwards give each token: name -> [T,...]."""
    z, x = logits.detach().requires_grad_(), x.detach().requires_grad_()
    weights, indices = lo.topk_gate(z, K, score_function="sigmoid", num_groups=8, topk_groups=4)
    routing = lo.route(indices, E)
    out = lo.unpermute(torch.tanh(lo.permute(x, routing)), routing, weights)
    grad_x, grad_z = torch.autograd.grad(out, (x, z), upstream)
    return {
        "weights": weights.detach(),
        "indices": indices,
        "out": out.detach(),
        "grad_x": grad_x,
        "grad_logits": grad_z,
    }


@pytest.mark.parametrize("hidden", [72, 2048, 4104])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routing_of_a_token_does_not_depend_on_the_batch(
    device: torch.device, hidden: int, dtype: torch.dtype
) -> None:
    """Bitwise, forward and backward; the first of them alone, too."""
    tokens = 500
    logits = make_logits(tokens, E, "normal", 1).to(device)
    x, up = (torch.randn(2, tokens, hidden, generator=generator(2)).to(dtype)).to(device)
    whole = token_results(logits, x, up)
    shuffled = torch.randperm(tokens, generator=generator(3)).to(device)
    parts = [slice(0, 1), slice(131, 500), shuffled, torch.arange(tokens).repeat(2).to(device)]
    for part in parts:
        for name, got in token_results(logits[part], x[part], up[part]).items():
            assert_bitwise(got, whole[name][part], name)


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
    """T*K beyond 65535 blocks of any tile, E beyond one tile of shared memory, no spread at all."""
    for tokens, experts, style in (
        (70_000, 512, "skewed"),
        (300, 1024, "skewed"),
        (70_000, 64, "one_expert"),
        (70_000, 64, "empty_experts"),
    ):
        indices = make_indices(tokens, 8, experts, style, 1).int().to(device)
        for a, b in zip(lo.route(indices, experts), truth(lo.route, indices, experts), strict=True):
            assert torch.equal(a, b)
