"""Bad input: the error names the argument, what it got and what it needs.

What only the data shows (ids out of range, NaN, decreasing offsets, a capacity above T) is
defined behaviour instead, tested with each op.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import ling_ops as lo

T, H, N, E, K = 6, 16, 8, 4, 2


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def n(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def gate(logits=None, k=K, **options):
    return lo.topk_gate(f(T, E) if logits is None else logits, k, **options)


def route(indices=None, num_experts=E, **options):
    return lo.route(n(T, K) if indices is None else indices, num_experts, **options)


def reroute(scores=None, weights=None, indices=None, **options):
    return lo.reroute(
        f(T, E) if scores is None else scores,
        f(T, K) if weights is None else weights,
        n(T, K) if indices is None else indices,
        **({"capacity": 2} | options),
    )


def gemm(a=None, b=None, offsets=None):
    return lo.grouped_gemm(
        f(T, H) if a is None else a,
        f(E, N, H) if b is None else b,
        n(E + 1) if offsets is None else offsets,
    )


def mlp(x=None, up=None, down=None, weights=None, indices=None, **options):
    return lo.moe_mlp(
        f(T, H) if x is None else x,
        f(E, 2 * N, H) if up is None else up,
        f(E, H, N) if down is None else down,
        f(T, K) if weights is None else weights,
        n(T, K) if indices is None else indices,
        **options,
    )


def fused(ids=None, **options):
    return lo.fused_experts(
        f(T, H), f(E, 2 * N, H), f(E, H, N), f(T, K), n(T, K) if ids is None else ids, **options
    )


# name of the case: (call, argument named, what it got, what it needs)
CASES: dict[str, tuple[Callable[[], object], str, str, str]] = {
    # topk_gate
    "logits 1d": (lambda: gate(f(E)), "logits", "[4]", "[T, E]"),
    "logits int": (lambda: gate(n(T, E)), "logits", "int32", "float32"),
    "logits list": (lambda: gate([[0.0]]), "logits", "list", "Tensor"),
    "K > E": (lambda: gate(k=E + 1), "k", "5", "4"),
    "k 0": (lambda: gate(k=0), "k", "0", "at least 1"),
    "k float": (lambda: gate(k=2.0), "k", "float", "int"),
    "scale None": (lambda: gate(scale=None), "scale", "NoneType", "number"),
    "k bool": (lambda: gate(k=True), "k", "bool", "int"),
    "score name": (lambda: gate(score_function="relu"), "score_function", "'relu'", "'sigmoid'"),
    "E not in groups": (lambda: gate(num_groups=3), "num_groups", "3", "divide"),
    "groups 0": (lambda: gate(num_groups=0), "num_groups", "0", "at least 1"),
    "topk_groups": (lambda: gate(num_groups=2, topk_groups=3), "topk_groups", "3", "2"),
    "k > kept": (lambda: gate(f(T, 8), 3, num_groups=4, topk_groups=1), "k", "3", "2"),
    "bias shape": (lambda: gate(expert_bias=f(E + 1)), "expert_bias", "[5]", "[4]"),
    "bias dtype": (lambda: gate(expert_bias=f(E, dtype=torch.float16)), "expert_bias", "float16",
                   "float32"),
    "bias device": (lambda: gate(expert_bias=f(E).to("meta")), "expert_bias", "meta", "cpu"),
    "scale nan": (lambda: gate(scale=float("nan")), "scale", "nan", "finite"),
    # route
    "indices float": (lambda: route(f(T, K)), "indices", "float32", "int32"),
    "indices 1d": (lambda: route(n(T)), "indices", "[6]", "[T, K]"),
    "K = 0": (lambda: route(n(T, 0)), "indices", "K = 0", "at least one"),
    "num_experts 0": (lambda: route(num_experts=0), "num_experts", "0", "at least 1"),
    "num_experts float": (lambda: route(num_experts=4.0), "num_experts", "float", "int"),
    "capacity < 0": (lambda: route(capacity=-1), "capacity", "-1", "at least 0"),
    "capacity float": (lambda: route(capacity=1.5), "capacity", "float", "int"),
    "capacity shape": (lambda: route(capacity=n(E + 1)), "capacity", "[5]", "[4]"),
    "capacity dtype": (lambda: route(capacity=f(E)), "capacity", "float32", "int32"),
    "capacity device": (lambda: route(capacity=n(E).to("meta")), "capacity", "meta", "cpu"),
    "priority name": (lambda: route(priority="size"), "priority", "'size'", "'probability'"),
    "no weights": (lambda: route(capacity=1, priority="probability"), "weights", "None",
                   "probability"),
    "route weights": (lambda: route(weights=f(T, K + 1)), "weights", "[6, 3]", "[6, 2]"),
    "mask shape": (lambda: route(token_mask=n(T - 1, dtype=torch.bool)), "token_mask", "[5]",
                   "[6]"),
    "mask dtype": (lambda: route(token_mask=n(T)), "token_mask", "int32", "bool"),
    # reroute
    "scores shape": (lambda: reroute(scores=f(E)), "scores", "[4]", "[T, E]"),
    "reroute T": (lambda: reroute(indices=n(T + 1, K)), "indices", "[7, 2]", "6"),
    "reroute weights": (lambda: reroute(weights=f(T, K + 1)), "weights", "[6, 3]", "[6, 2]"),
    "rounds": (lambda: reroute(rounds=-1), "rounds", "-1", "at least 0"),
    "reroute capacity": (lambda: reroute(capacity=-2), "capacity", "-2", "at least 0"),
    # permute, unpermute
    "permute T": (lambda: lo.permute(f(T + 1, H), route()), "x", "[7, 16]", "6"),
    "permute routing": (lambda: lo.permute(f(T, H), tuple(route())), "routing", "tuple",
                        "Routing"),
    "permute device": (lambda: lo.permute(f(T, H).to("meta"), route()), "routing", "cpu", "meta"),
    "rows": (lambda: lo.unpermute(f(T, H), route()), "rows", "[6, 16]", "12"),
    "row weights": (lambda: lo.unpermute(f(T * K, H), route(), f(T, K + 1)), "weights", "[6, 3]",
                    "[6, 2]"),
    # grouped_gemm
    "a 1d": (lambda: gemm(a=f(H)), "a", "[16]", "[M, Kd]"),
    "b 2d": (lambda: gemm(b=f(N, H)), "b", "[8, 16]", "[E, N, Kd]"),
    "b layout": (lambda: gemm(b=f(E, H, N)), "b", "[4, 16, 8]", "16"),
    "gemm dtypes": (lambda: gemm(b=f(E, N, H, dtype=torch.bfloat16)), "b", "bfloat16", "float32"),
    "gemm int": (lambda: gemm(a=n(T, H), b=n(E, N, H)), "a", "int32", "float32"),
    "gemm device": (lambda: gemm(b=f(E, N, H).to("meta")), "b", "meta", "cpu"),
    "offsets size": (lambda: gemm(offsets=n(E)), "offsets", "[4]", "[5]"),
    "offsets dtype": (lambda: gemm(offsets=f(E + 1)), "offsets", "float32", "int32"),
    # grouped_mm
    "mm inner": (lambda: lo.grouped_mm(f(T, H), f(E, N, H), offs=n(E)), "mat_b", "8", "16"),
    "mm dims": (lambda: lo.grouped_mm(f(H), f(E, H, N), offs=n(E)), "mat_a", "1", "2 or 3"),
    "mm no offs": (lambda: lo.grouped_mm(f(T, H), f(E, H, N)), "offs", "None", "given"),
    "mm offs": (lambda: lo.grouped_mm(f(T, H), f(E, H, N), offs=n(E + 1)), "offs", "[5]", "[4]"),
    "mm 3d offs": (lambda: lo.grouped_mm(f(E, T, H), f(E, H, N), offs=n(E)), "offs", "tensor",
                   "None"),
    "mm groups": (lambda: lo.grouped_mm(f(E, T, H), f(E + 1, H, N)), "mat_b", "5", "4"),
    # moe_mlp
    "x 3d": (lambda: mlp(x=f(1, T, H)), "x", "[1, 6, 16]", "[T, H]"),
    "up layout": (lambda: mlp(up=f(E, N, H)), "gate_up_proj", "[4, 8, 16]", "[E, 2I, H]"),
    "down layout": (lambda: mlp(down=f(E, N, H)), "down_proj", "[4, 8, 16]", "[E, H, I]"),
    "ungated up": (lambda: mlp(activation="gelu"), "up_proj", "[4, 16, 16]", "[E, I, H]"),
    "experts": (lambda: mlp(up=f(E + 1, 2 * N, H)), "gate_up_proj", "[5, 16, 16]", "4"),
    "mlp dtypes": (lambda: mlp(x=f(T, H, dtype=torch.float16)), "gate_up_proj", "float32",
                   "float16"),
    "mlp weights": (lambda: mlp(weights=f(T, K + 1)), "weights", "[6, 3]", "[6, 2]"),
    "mlp ids": (lambda: mlp(indices=n(T + 1, K)), "indices", "[7, 2]", "6"),
    "mlp ids float": (lambda: mlp(indices=f(T, K)), "indices", "float32", "int32"),
    "mlp device": (lambda: mlp(down=f(E, H, N).to("meta")), "down_proj", "meta", "cpu"),
    "activation": (lambda: mlp(activation="mish"), "activation", "'mish'", "'swiglu'"),
    "limit": (lambda: mlp(swiglu_limit=-1.0), "swiglu_limit", "-1", "greater than 0"),
    "limit ungated": (lambda: mlp(up=f(E, N, H), activation="silu", swiglu_limit=1.0),
                      "swiglu_limit", "1.0", "None"),
    "up bias": (lambda: mlp(gate_up_bias=f(E, N)), "gate_up_bias", "[4, 8]", "[4, 16]"),
    "down bias": (lambda: mlp(down_bias=f(E, N)), "down_bias", "[4, 8]", "[4, 16]"),
    "other routing": (lambda: mlp(routing=lo.route(n(T + 1, K), E)), "routing", "[7, 2]",
                      "[6, 2]"),
    "routing E": (lambda: mlp(routing=route(num_experts=E + 1)), "routing", "[5]", "[4]"),
    "main_grads pair": (lambda: mlp(main_grads=f(E)), "main_grads", "Tensor", "pair"),
    "main_grads shape": (lambda: mlp(main_grads=(f(E, 2 * N, H), f(E, N, H))), "main_grads[1]",
                         "[4, 8, 16]", "[4, 16, 8]"),
    "main_grads dtype": (lambda: mlp(main_grads=(f(E, 2 * N, H, dtype=torch.bfloat16),
                                                 f(E, H, N))), "main_grads[0]", "bfloat16",
                         "float32"),
    # fused_experts
    "vllm name": (lambda: fused(activation="swiglu"), "activation", "'swiglu'", "'silu'"),
    "weight on input": (lambda: fused(apply_router_weight_on_input=True),
                        "apply_router_weight_on_input", "2", "K = 1"),
    "expert_map": (lambda: fused(expert_map=n(8), global_num_experts=9), "global_num_experts", "9",
                   "8"),
    "vllm weights": (lambda: lo.fused_experts(f(T, H), f(E, 2 * N, H), f(E, H, N), f(T), n(T, K)),
                     "topk_weights", "[6]", "[6, 2]"),
    "expert_map list": (lambda: fused(expert_map=[0], global_num_experts=1), "expert_map", "list",
                        "Tensor"),
    "expert_map empty": (lambda: fused(expert_map=n(0)), "expert_map", "[0]", "at least one"),
    # losses
    "probs": (lambda: lo.load_balancing_loss(f(E), n(T, K)), "probs", "[4]", "[T, E]"),
    "loss ids": (lambda: lo.load_balancing_loss(f(T, E), n(T + 1, K)), "indices", "[7, 2]", "6"),
    "loss mask": (lambda: lo.load_balancing_loss(f(T, E), n(T, K), token_mask=n(T)),
                  "token_mask", "int32", "bool"),
    "sequence": (lambda: lo.sequence_balancing_loss(f(T, E), n(T, K), sequence_length=4),
                 "sequence_length", "4", "6"),
    "z logits": (lambda: lo.router_z_loss(n(T, E)), "logits", "int32", "float32"),
    "bias counts": (lambda: lo.update_expert_bias(f(E), n(E + 1)), "expert_counts", "[5]", "[4]"),
    "bias low": (lambda: lo.update_expert_bias(f(E, dtype=torch.bfloat16), n(E)), "bias",
                 "bfloat16", "float32"),
    "injected": (lambda: lo.inject_loss(f(T), f(T)), "loss", "[6]", "[]"),
    # stats, capacity, backend
    "stats routing": (lambda: lo.routing_stats(None), "routing", "NoneType", "Routing"),
    "stats weights": (lambda: lo.routing_stats(route(), weights=f(T, K + 1)), "weights",
                      "[6, 3]", "[6, 2]"),
    "stats mask": (lambda: lo.routing_stats(route(), token_mask=f(1).bool()), "token_mask", "[1]",
                   "[6]"),
    "stats ids": (lambda: lo.routing_stats(route(), indices=f(T, K)), "indices", "float32",
                  "int32"),
    "counts": (lambda: lo.CapacityPolicy.dynamic().capacity(None, T * K, E), "expert_counts",
               "NoneType", "Tensor"),
    "counts 2d": (lambda: lo.CapacityPolicy.dynamic().capacity(n(2, E), T * K, E),
                  "expert_counts", "[2, 4]", "[R*E]"),
    "factor None": (lambda: lo.CapacityPolicy.fixed(None), "factor", "NoneType", "number"),
    "factor": (lambda: lo.CapacityPolicy.fixed(0.0), "factor", "0.0", "greater than 0"),
    "target": (lambda: lo.CapacityPolicy.dynamic(1.5), "target_drop_rate", "1.5",
               "between 0 and 1"),
    "mode": (lambda: lo.CapacityPolicy.dynamic(mode="past"), "mode", "'past'", "'running'"),
    "backend": (lambda: lo.use_backend("cpu").__enter__(), "backend", "'cpu'", "'reference'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_the_argument_its_value_and_its_need(name: str) -> None:
    call, argument, got, needs = CASES[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert re.search(rf"(?<![A-Za-z_]){re.escape(argument)}", message), message
    assert got in message and needs in message, message


def test_valid_calls_pass() -> None:
    """The helpers above are valid until one argument is spoilt."""
    gate(), route(), reroute(), gemm(), mlp(), fused()


@pytest.mark.cuda
def test_mixed_devices_are_refused(device: torch.device) -> None:
    for call, argument in (
        (lambda: gate(f(T, E).to(device), expert_bias=f(E)), "expert_bias"),
        (lambda: route(n(T, K).to(device), capacity=n(E)), "capacity"),
        (lambda: gemm(a=f(T, H).to(device)), "b"),
        (lambda: mlp(x=f(T, H).to(device)), "gate_up_proj"),
        (lambda: lo.permute(f(T, H).to(device), route()), "routing"),
    ):
        with pytest.raises(ValueError, match=rf"{argument} must be on .*cpu"):
            call()
