"""`ling-ops generate`: continue a text, showing it as it comes."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ling_ops.cli.errors import CommandError, require_extra
from ling_ops.cli.text import TOKENIZER, ByteText, TokenizerText


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `generate` to the command's subparsers."""
    parser = commands.add_parser("generate", help="continue a text with a trained model")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR",
        help="a run folder, one of its checkpoints, or a folder in the published Ling format",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", metavar="DIR", help="LoRA adapters in PEFT's format to add to the weights"
    )
    parser.add_argument("--prompt", default="", help="text to continue (default: a new text)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: 0.95")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
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

    model, text = load(arguments)
    if arguments.adapter is not None:
        _add_adapter(model, Path(arguments.adapter))
    device = model.lm_head.weight.device
    prompt = text.encode(arguments.prompt)
    if max(prompt) >= model.config.vocab_size:
        raise CommandError(
            f"the prompt has token {max(prompt)}; the model knows {model.config.vocab_size}"
        )
    printer = text.printer(sys.stdout)
    printer.text(arguments.prompt)
    started = time.monotonic()
    model.generate(
        torch.tensor([prompt], device=device),
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
        top_p=arguments.top_p, eos_token_id=text.end_of_text,
        generator=torch.Generator(device).manual_seed(arguments.seed), streamer=printer,
    )  # fmt: skip
    seconds = time.monotonic() - started
    printer.end()
    pace = printer.count / max(seconds, 1e-9)
    print(f"{printer.count} tokens in {seconds:.2f} s, {pace:.1f} tokens/s", file=sys.stderr)
    return 0


def load(arguments: Any):
    """The model that `arguments.checkpoint` names (of a run, or published), and its text codec.

    `device` and `dtype` of the arguments say where and as what; "checkpoint" keeps its dtype.
    """
    from ling_ops.cli.checkpoint import find_checkpoint, load_checkpoint
    from ling_ops.cli.modeling import build_model, pick_device, pick_dtype, saved_config
    from ling_ops.cli.runs import command_of, is_published

    folder = Path(arguments.checkpoint)
    device = pick_device(arguments.device)
    dtype = None if arguments.dtype == "checkpoint" else pick_dtype(arguments.dtype, device)
    if is_published(folder):
        return _load_published(folder, device, dtype)
    found = load_checkpoint(find_checkpoint(folder), groups=("model",))
    if command_of(found.state) == "finetune":
        raise CommandError(_results_of(found.state, folder), code=2)
    tensors = found.tensors["model"]
    dtype = dtype or tensors["lm_head.weight"].dtype
    model = build_model(saved_config(found.state), device, dtype, tensors)
    return model.eval(), ByteText()


def _results_of(state: dict[str, Any], run: Path) -> str:
    """What to name instead of a fine-tuning run."""
    settings = state["settings"]
    if settings["method"] == "full":
        return f"{str(run)!r} is a fine-tuning run: its checkpoint is {str(run / 'model')!r}"
    return (
        f"{str(run)!r} is a fine-tuning run: name its base ({settings['checkpoint']}) as "
        f"--checkpoint and {str(run / 'adapter')!r} as --adapter"
    )


def _add_adapter(model: Any, folder: Path) -> None:
    from ling_ops.nn import load_lora, merge_lora, remove_lora

    try:
        load_lora(model, folder)
    except ValueError as error:
        raise CommandError(str(error)) from error
    merge_lora(model)
    remove_lora(model)


def _load_published(folder: Path, device, dtype):
    from ling_ops.models import CheckpointError, LingForCausalLM

    try:
        model = LingForCausalLM.from_pretrained(folder, dtype=dtype, device=device)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    if (folder / TOKENIZER).is_file():
        return model, TokenizerText(folder, model.foreign_config)
    if model.config.vocab_size != 256:
        raise CommandError(
            f"{str(folder)!r} has no {TOKENIZER}, and its {model.config.vocab_size} tokens are "
            "not bytes"
        )
    return model, ByteText()


def _check(arguments: argparse.Namespace) -> None:
    for bad, message in (
        (arguments.max_new_tokens < 1, "--max-new-tokens must be at least 1"),
        (not 0 <= arguments.temperature < float("inf"), "--temperature must be 0 or more"),
        (not 0 < arguments.top_p <= 1, "--top-p must be above 0 and at most 1"),
        (not 0 <= arguments.seed < 2**63, "--seed must be 0 or more"),
    ):
        if bad:
            raise CommandError(message, code=2)
