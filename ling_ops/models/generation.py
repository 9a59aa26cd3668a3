"""Continuing a prompt token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch


def sample(
    logits: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token per row of logits ``[B, V]`` → int64 ``[B]``.

    Temperature 0 is greedy (ties: the lower id). ``top_p`` keeps the fewest tokens whose
    probabilities sum to at least top_p, and always the likeliest one (Holtzman et al. 2019).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        ahead = ordered.cumsum(dim=-1) - ordered
        keep = torch.zeros_like(ahead, dtype=torch.bool).scatter_(1, order, ahead < top_p)
        keep.scatter_(1, order[:, :1], True)
        probs = torch.where(keep, probs, 0.0)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def check_generation(
    input_ids: torch.Tensor, max_new_tokens: int, temperature: float, top_p: float
) -> None:
    """Raises a ValueError naming the first argument that makes no sense."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids: got shape {tuple(input_ids.shape)}, need [B, S] with at least one token"
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, need an int >= 0")
    if not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}, need a number >= 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, need a number > 0 and <= 1")


@torch.no_grad()
def generate(
    model,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    token_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    streamer: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """See ``LingForCausalLM.generate``."""
    check_generation(input_ids, max_new_tokens, temperature, top_p)
    batch, prompt = input_ids.shape
    if token_mask is not None and not bool(token_mask[:, -1].all()):
        raise ValueError("token_mask: got padding at the end, need padding on the left")
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(batch, prompt + max_new_tokens)
        finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        tokens, step_input = [input_ids], input_ids
        for _ in range(max_new_tokens):
            output = model(step_input, cache=cache, token_mask=token_mask, last_logits_only=True)
            token_mask = None
            chosen = sample(
                output.logits[:, -1], temperature=temperature, top_p=top_p, generator=generator
            )
            if eos_token_id is not None:
                chosen = torch.where(finished, eos_token_id, chosen)
                finished = finished | (chosen == eos_token_id)
            step_input = chosen.unsqueeze(1)
            tokens.append(step_input)
            if streamer is not None:
                streamer(chosen)
            if eos_token_id is not None and bool(finished.all()):
                break
    finally:
        model.train(was_training)
    return torch.cat(tokens, dim=1)
