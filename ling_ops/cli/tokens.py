"""The text of a run as ids of a tokenizer."""

from __future__ import annotations

import dataclasses

import torch

from ling_ops.cli.data import HELD_OUT_PARTS, SEPARATOR, TextData, load_text
from ling_ops.cli.errors import CommandError
from ling_ops.cli.text import ByteText, TokenizerText

_AT_ONCE = 256  # texts that the tokenizer gets together


def load_tokens(
    paths: list[str], codec: ByteText | TokenizerText, *, sequence_length: int, vocab_size: int
) -> TextData:
    """`load_text` in the tokens of `codec`. CommandError for a token that a model cannot know."""
    text = load_text(paths, sequence_length=sequence_length)
    if not isinstance(codec, ByteText):
        text = tokenize(text, codec, sequence_length=sequence_length)
    largest = int(max(text.train.max(), text.validation.max()))
    if largest >= vocab_size:
        raise CommandError(f"the text has token {largest}; the model knows {vocab_size}")
    return text


def tokenize(text: TextData, codec: TokenizerText, *, sequence_length: int) -> TextData:
    """`text`, whose tokens are bytes, in the tokens of `codec`; each file ends in its end token.

    Files stay on the side that they are on. Where a side is then shorter than a sequence, the last
    twentieth of the whole is held out instead. Raises CommandError if there is too little.
    """
    sizes = text.train.numel() + text.validation.numel()
    train, validation = (_ids(side, codec) for side in (text.train, text.validation))
    split, need = text.split, sequence_length + 1
    if min(train.numel(), validation.numel()) < need:
        whole = torch.cat([train, validation])
        cut = whole.numel() - max(need, whole.numel() // HELD_OUT_PARTS)
        if cut < need:
            raise CommandError(
                f"too little data: {whole.numel()} tokens, but a sequence length of "
                f"{sequence_length} needs at least {2 * need}"
            )
        train, validation, split = whole[:cut], whole[cut:], "the end of the text"
    return dataclasses.replace(
        text, train=train, validation=validation, split=split,
        bytes_per_token=sizes / (train.numel() + validation.numel()),
    )  # fmt: skip


def _ids(side: torch.Tensor, codec: TokenizerText) -> torch.Tensor:
    """The ids, int32, of texts that each end in SEPARATOR."""
    texts = [part.decode("utf-8", "replace") for part in side.numpy().tobytes().split(SEPARATOR)]
    end = [] if codec.end_of_text is None else [codec.end_of_text]
    ids = []
    for first in range(0, len(texts), _AT_ONCE):
        group = [text for text in texts[first : first + _AT_ONCE] if text]
        for encoding in codec.tokenizer.encode_batch(group, add_special_tokens=False):
            ids.append(torch.tensor(encoding.ids + end, dtype=torch.int32))
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32)
