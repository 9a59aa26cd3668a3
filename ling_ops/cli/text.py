"""Text to token ids and back, for the command: by bytes, or by a checkpoint's tokenizer.json."""

from __future__ import annotations

import codecs
import importlib.util
from pathlib import Path
from typing import Any

from ling_ops.cli.errors import CommandError

END_OF_TEXT = 0  # the byte that ends each file in training
TOKENIZER = "tokenizer.json"


class Printer:
    """Writes text to a stream as it comes."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.count = stream, 0

    def text(self, text: str) -> None:
        """Write text as it is."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.encode(encoding, "replace").decode(encoding))
        self.stream.flush()

    def end(self) -> None:
        """Write what is left of a cut character, and a last newline."""
        self.text("\n")


class BytePrinter(Printer):
    """Writes bytes as text as soon as they complete a character; a broken one shows as U+FFFD."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: Any) -> None:
        """Take the next token: an int, or a tensor that holds one."""
        self.count += 1
        token = int(token)
        if token != END_OF_TEXT:
            # A vocabulary larger than the bytes has ids that no byte stands for.
            self.text(self._decoder.decode(bytes([token if token < 256 else 0xFF])))

    def end(self) -> None:
        self.text(self._decoder.decode(b"", final=True) + "\n")


class TokenPrinter(Printer):
    """Writes a tokenizer's tokens as soon as they complete a character."""

    def __init__(self, stream: Any, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        super().__init__(stream)
        self._tokenizer, self._decoder = tokenizer, DecodeStream(skip_special_tokens=True)

    def __call__(self, token: Any) -> None:
        """Take the next token: an int, or a tensor that holds one."""
        self.count += 1
        if piece := self._decoder.step(self._tokenizer, int(token)):
            self.text(piece)


class ByteText:
    """Tokens are bytes, as `ling-ops train` makes them."""

    end_of_text = END_OF_TEXT

    def encode(self, prompt: str) -> list[int]:
        """The prompt's ids; an empty prompt begins a new text."""
        return list(prompt.encode("utf-8", "surrogateescape")) or [END_OF_TEXT]

    def printer(self, stream: Any) -> BytePrinter:
        return BytePrinter(stream)


class TokenizerText:
    """Tokens of a `tokenizer.json`. `keys` may say `eos_token_id` and `bos_token_id`."""

    def __init__(self, folder: Path, keys: dict[str, Any]) -> None:
        if importlib.util.find_spec("tokenizers") is None:
            raise CommandError(
                f'{str(folder / TOKENIZER)!r} needs tokenizers: run `pip install "ling-ops[hf]"`',
                code=2,
            )
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the library raises nothing more specific
            raise CommandError(f"cannot read {str(folder / TOKENIZER)!r}: {error}") from error
        end = keys.get("eos_token_id")
        self.end_of_text = end[0] if isinstance(end, list) and end else end
        self.begin_of_text = keys.get("bos_token_id", self.end_of_text)

    def encode(self, prompt: str) -> list[int]:
        """The prompt's ids; an empty prompt begins a new text."""
        ids = self.tokenizer.encode(prompt).ids
        if not ids and self.begin_of_text is None:
            raise CommandError("--prompt must be given: the checkpoint names no first token", 2)
        return ids or [self.begin_of_text]

    def printer(self, stream: Any) -> TokenPrinter:
        return TokenPrinter(stream, self.tokenizer)
