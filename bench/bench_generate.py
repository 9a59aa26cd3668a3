"""A model of Ling-mini-2.0's size, random weights: decode steps with greedy choice, and prefill.

A decode row's T is the number of sequences, each behind ``CONTEXT`` tokens: tokens/s are
1000 T / ms. A prefill row's T is the prompt's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import BYTE_RATE, DEVICE, FLOP_RATE, Case, Provider, main

import ling_ops
from ling_ops.models import LingConfig, LingForCausalLM
from ling_ops.models._attention_backend import load
from ling_ops.models.packed import PackedModel

CONFIG = LingConfig.preset("ling-mini-2.0")
BATCHES = (1, 8, 64)
CONTEXT, ROOM, PROMPT = 256, 256, 8192


def decode_floor(config: LingConfig, active: int, batch: int) -> float:
    """Milliseconds to read the weights that a step uses, and the cache, once.

    Routing is taken as uniform: E (1 - (1 - K/E)^B) experts of a layer.
    """
    experts, k = config.num_experts, config.num_experts_per_token
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    layers = config.layer_types.count("moe")
    used = experts * (1 - (1 - k / experts) ** batch)
    weights = active - config.vocab_size * config.hidden_size + layers * expert * (used - k)
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * batch * CONTEXT
    return 1e3 * 2 * (weights + cache) / BYTE_RATE


def prefill_floor(config: LingConfig, active: int, tokens: int) -> float:
    """Milliseconds for the products of all tokens, causal attention, and one token's logits."""
    embeddings = 2 * config.vocab_size * config.hidden_size
    attention = 2 * tokens * tokens * config.num_heads * config.head_dim * config.num_layers
    flops = 2 * tokens * (active - embeddings) + attention
    return 1e3 * flops / FLOP_RATE


def glm4_moe(config: LingConfig) -> torch.nn.Module | None:
    """transformers' model of the same sizes and layers, or None where it can't be imported."""
    try:
        from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
    except ImportError:
        return None
    sizes = Glm4MoeConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size, n_routed_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_token,
        n_shared_experts=config.num_shared_experts, n_group=config.num_groups,
        topk_group=config.topk_groups, first_k_dense_replace=config.first_k_dense_replace,
        use_qk_norm=config.use_qk_norm, attention_bias=False, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(DEVICE):
        return Glm4MoeForCausalLM._from_config(sizes, dtype=torch.bfloat16).eval()


def our_step(model: LingForCausalLM, batch: int) -> tuple[Provider, Callable[[], None]]:
    """(one step, back to the context) of greedy decoding by graph replays."""
    engine = PackedModel(model, batch, CONTEXT + ROOM)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(vocabulary, (batch * CONTEXT,), device=DEVICE)
    chosen = engine.prefill(prompts, [CONTEXT] * batch).argmax(-1)

    @torch.no_grad()
    def step(_: int) -> torch.Tensor:
        return engine.step(chosen, more=True).argmax(-1)

    return step, lambda: engine.rewind(CONTEXT)


def our_prefill(engine: PackedModel, tokens: torch.Tensor) -> dict[str, Provider]:
    """By PyTorch's attention, and where it is installed by that of the extra `attention`."""

    @torch.no_grad()
    def prefill(_: int) -> torch.Tensor:
        return engine.prefill(tokens, [len(tokens)])

    def plain(turn: int) -> torch.Tensor:
        with ling_ops.batch_invariant():
            return prefill(turn)

    providers: dict[str, Provider] = {"ling_ops": plain}
    if tokens.is_cuda and load() is not None:
        providers["ling_ops[attention]"] = prefill
    return providers


def their_step(model: torch.nn.Module, batch: int) -> tuple[Provider, Callable[[], None]]:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + ROOM)
    tokens = torch.randint(model.config.vocab_size, (batch, CONTEXT), device=DEVICE)
    model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
    where = torch.tensor([[CONTEXT]], device=DEVICE).expand(batch, 1)

    @torch.no_grad()
    def step(_: int) -> torch.Tensor:
        out = model(
            input_ids=tokens[:, :1], past_key_values=cache, position_ids=where,
            cache_position=where[0],
        )  # fmt: skip
        return out.logits[:, -1].argmax(-1)

    def reset() -> None:
        for layer in cache.layers:  # versions whose layers count what they hold
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(CONTEXT)

    return step, reset


def in_turn(calls: list[Callable[[], None]]) -> Callable[[], None]:
    def call() -> None:
        for each in calls:
            each()

    return call


@torch.no_grad()
def cases() -> Iterator[Case]:
    model = LingForCausalLM(CONFIG, device=DEVICE, dtype=torch.bfloat16).eval()
    peer, active = glm4_moe(CONFIG), model.count_parameters().active
    sizes = {
        "H": CONFIG.hidden_size, "I": CONFIG.moe_intermediate_size, "E": CONFIG.num_experts,
        "K": CONFIG.num_experts_per_token,
    }  # fmt: skip
    for batch in BATCHES:
        step, reset = our_step(model, batch)
        providers, resets = {"ling_ops": step}, [reset]
        if peer is not None:
            providers["transformers"], reset = their_step(peer, batch)
            resets.append(reset)
        least = decode_floor(CONFIG, active, batch)
        shape = {"T": batch, **sizes}
        yield Case("generate", "decode", shape, "bfloat16", least, providers, reset=in_turn(resets))
    tokens = torch.randint(CONFIG.vocab_size, (PROMPT,), device=DEVICE)
    engine = PackedModel(model, 1, PROMPT)
    providers = our_prefill(engine, tokens)
    if peer is not None:
        providers["transformers"] = torch.no_grad()(
            lambda _: peer(input_ids=tokens[None], logits_to_keep=1).logits
        )
    least = prefill_floor(CONFIG, active, PROMPT)
    yield Case("generate", "prefill", {"T": PROMPT, **sizes}, "bfloat16", least, providers)


if __name__ == "__main__":
    main(__doc__, cases, 1.5, ("generate",))
