"""`ling-ops generate`: continue a text, showing bytes as they come."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from typing import Any

from ling_ops.cli.errors import CommandError, require_extra

END_OF_TEXT = 0  # the byte that ends each file in training


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `generate` to the command's subparsers."""
    parser = commands.add_parser("generate", help="continue a text with a trained model")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run folder or one of its checkpoints"
    )
    parser.add_argument("--prompt", default="", help="text to continue (default: a new text)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: 0.95")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16"),
        help="auto is bf16 on a GPU and fp32 on a CPU",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops generate`; returns the exit status."""
    _check(arguments)
    require_extra("generate")
    import torch

    from ling_ops.cli.checkpoint import find_checkpoint, load_checkpoint
    from ling_ops.cli.modeling import build_model, pick_device, pick_dtype, saved_config

    found = load_checkpoint(find_checkpoint(arguments.checkpoint), groups=("model",))
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    model = build_model(saved_config(found.state), device, dtype, found.tensors["model"]).eval()
    prompt = arguments.prompt.encode("utf-8", "surrogateescape") or bytes([END_OF_TEXT])
    printer = BytePrinter(sys.stdout)
    printer.text(arguments.prompt)
    started = time.monotonic()
    model.generate(
        torch.tensor([list(prompt)], device=device),
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
        top_p=arguments.top_p, eos_token_id=END_OF_TEXT,
        generator=torch.Generator(device).manual_seed(arguments.seed), streamer=printer,
    )  # fmt: skip
    seconds = time.monotonic() - started
    printer.end()
    pace = printer.count / max(seconds, 1e-9)
    print(f"{printer.count} tokens in {seconds:.2f} s, {pace:.1f} tokens/s", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for bad, message in (
        (arguments.max_new_tokens < 1, "--max-new-tokens must be at least 1"),
        (not 0 <= arguments.temperature < float("inf"), "--temperature must be 0 or more"),
        (not 0 < arguments.top_p <= 1, "--top-p must be above 0 and at most 1"),
        (not 0 <= arguments.seed < 2**63, "--seed must be 0 or more"),
    ):
        if bad:
            raise CommandError(message, code=2)


class BytePrinter:
    """Writes bytes as text as soon as they complete a character; a broken one shows as U+FFFD."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.count = stream, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def text(self, text: str) -> None:
        """Write text as it is."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.encode(encoding, "replace").decode(encoding))
        self.stream.flush()

    def __call__(self, token: Any) -> None:
        """Take the next token: an int, or a tensor that holds one."""
        self.count += 1
        token = int(token)
        if token != END_OF_TEXT:
            # A vocabulary larger than the bytes has ids that no byte stands for.
            self.text(self._decoder.decode(bytes([token if token < 256 else 0xFF])))

    def end(self) -> None:
        """Write what is left of a cut character, and a last newline."""
        self.text(self._decoder.decode(b"", final=True) + "\n")
