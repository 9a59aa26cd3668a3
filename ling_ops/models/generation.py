"""Continuing a prompt token by token."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch

from .company import Company
from .packed import PackedModel
from .whole import WholeModel, runs_whole

#: Steps that are sure to come, from which on a capture is repaid.
WORTH_A_GRAPH = 8


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
    input_ids: torch.Tensor,
    token_mask: torch.Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_token_id: int | None = None,
) -> None:
    """Raises a ValueError or TypeError naming the first argument that makes no sense."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids: got shape {tuple(input_ids.shape)}, need [B, S] with at least one token"
        )
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids: got dtype {input_ids.dtype}, need int64 or int32")
    if token_mask is not None and (
        token_mask.shape != input_ids.shape or token_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"token_mask: got {token_mask.dtype} {tuple(token_mask.shape)}, "
            f"need torch.bool {tuple(input_ids.shape)}"
        )
    try:
        operator.index(0 if eos_token_id is None else eos_token_id)
    except TypeError as error:
        raise TypeError(f"eos_token_id: got {eos_token_id!r}, need an int or None") from error
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, need an int >= 0")
    if not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}, need a number >= 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, need a number > 0 and <= 1")


def pack(input_ids: torch.Tensor, token_mask: torch.Tensor | None) -> tuple[torch.Tensor, list]:
    """The real tokens of ids ``[B, S]``, one sequence behind the other ``[N]``; their numbers."""
    if token_mask is None:
        return input_ids.reshape(-1), [input_ids.shape[1]] * input_ids.shape[0]
    lengths = token_mask.sum(1).tolist()
    if 0 in lengths:
        row = lengths.index(0)
        raise ValueError(f"token_mask: got row {row} all padding, need a token in every row")
    return input_ids[token_mask], lengths


class _Reader:
    """Hands each step's tokens to the host: to the streamer, and to see whether all have ended.

    On a GPU a step's tokens are copied behind the step, and read once the next step is queued:
    reading never leaves the GPU without work.
    """

    def __init__(self, streamer, eos_token_id: int | None, batch: int, device) -> None:
        self.streamer, self.eos_token_id = streamer, eos_token_id
        self.wanted = streamer is not None or eos_token_id is not None
        self.lags = device.type == "cuda"
        self.ended = torch.zeros(batch, dtype=torch.bool)

    def put(self, tokens: torch.Tensor) -> None:
        if not self.wanted:
            return
        if not self.lags:
            self.host = tokens.to("cpu", copy=True)
            return
        self.host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self.host.copy_(tokens, non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record(torch.cuda.current_stream(tokens.device))

    def all_ended(self) -> bool:
        """Waits for the tokens put last, streams them, and says whether every sequence ended."""
        if not self.wanted:
            return False
        if self.lags:
            self.copied.synchronize()
        if self.streamer is not None:
            self.streamer(self.host)
        if self.eos_token_id is None:
            return False
        self.ended |= self.host == self.eos_token_id
        return bool(self.ended.all())


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
    check_generation(input_ids, token_mask, max_new_tokens, temperature, top_p, eos_token_id)
    input_ids = input_ids.long()
    prompts, lengths = pack(input_ids, token_mask)
    batch, new = len(lengths), []
    company, reader = Company(model), _Reader(streamer, eos_token_id, batch, input_ids.device)
    modes = [(module, module.training) for module in model.modules()]  # some may be frozen
    model.eval()
    try:
        if max_new_tokens == 0 or not lengths:
            company.join()
            return input_ids
        kind = WholeModel if runs_whole(model) else PackedModel
        engine = kind(model, batch, max(lengths) + max_new_tokens)

        def step(chosen: torch.Tensor) -> torch.Tensor:
            company.announce()
            return engine.step(chosen, more=left > WORTH_A_GRAPH)

        company.announce()
        logits = engine.prefill(prompts, lengths)
        for left in range(max_new_tokens - 1, -1, -1):
            chosen = sample(logits, temperature=temperature, top_p=top_p, generator=generator)
            if eos_token_id is not None:
                chosen = torch.where(engine.active, chosen, eos_token_id)
                engine.active.logical_and_(chosen != eos_token_id)
            new.append(chosen)
            reader.put(chosen)
            ahead = reader.lags and len(new) > 1
            if left and ahead:
                logits = step(chosen)
            if reader.all_ended():
                break
            if left and not ahead:  # also the first step on a GPU: nobody waits for a capture
                logits = step(chosen)
        company.join()
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat([input_ids, torch.stack(new, dim=1)], dim=1)
