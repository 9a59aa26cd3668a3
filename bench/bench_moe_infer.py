"""Inference of one layer given weights and ids: graph replays over rotated tokens and routings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, Provider, main, normal, uniform, uniform_ids
from peers import torch_experts, transformers_experts
from shapes import INFERENCE, Layer, forward_floor

import ling_ops
from ling_ops.ops._decode import decode_limit

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192, 32768)


def one_path(provider: Provider) -> Provider:
    """The same call as for many tokens."""

    def call(turn: int) -> torch.Tensor:
        with ling_ops.batch_invariant():
            return provider(turn)

    return call


def token_cases(layer: Layer, gate_up: torch.Tensor, down: torch.Tensor) -> Iterator[Case]:
    theirs = transformers_experts(gate_up, down)
    for tokens in TOKENS:
        sized = layer._replace(T=tokens)
        turns = 8 if tokens <= 256 else 2  # from there on every call reads all experts
        x = [normal(tokens, layer.H) for _ in range(turns)]
        ids = [uniform_ids(tokens, layer.K, layer.E) for _ in range(turns)]
        weights = uniform(tokens, layer.K)
        used = sum(len(i.unique()) for i in ids) / turns
        providers = {
            "ling_ops": lambda i, x=x, w=weights, ids=ids: ling_ops.moe_mlp(
                x[i], gate_up, down, w, ids[i]
            ),
            "torch": lambda i, x=x, w=weights, ids=ids: torch_experts(
                x[i], gate_up, down, w, ids[i]
            ),
        }
        if tokens <= decode_limit(layer.K, layer.E):
            providers["ling_ops, one path"] = one_path(providers["ling_ops"])
        if theirs is not None:
            providers["transformers"] = lambda i, x=x, w=weights, ids=ids: theirs(
                x[i], w.to(x[i].dtype), ids[i].long()
            )
        floor_ms = forward_floor(sized, used, training=False)
        shape = sized._asdict()
        yield Case("moe_infer", "fwd", shape, "bfloat16", floor_ms, providers, True, turns)


def cases() -> Iterator[Case]:
    for layer in INFERENCE:
        gate_up = normal(layer.E, 2 * layer.I, layer.H, scale=layer.H**-0.5)
        down = normal(layer.E, layer.H, layer.I, scale=layer.I**-0.5)
        yield from token_cases(layer, gate_up, down)
        del gate_up, down
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(__doc__, cases, 0.35, ("moe_infer",))
