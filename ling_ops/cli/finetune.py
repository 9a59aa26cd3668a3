"""`ling-ops finetune`: a checkpoint trained further, by LoRA or in full."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from ling_ops.cli.checkpoint import Checkpoint, find_checkpoint
from ling_ops.cli.errors import CommandError, require_extra
from ling_ops.cli.finetune_options import FINETUNE_FIELDS, FinetuneOptions
from ling_ops.cli.generate import load
from ling_ops.cli.modeling import check_memory, pick_device, pick_dtype
from ling_ops.cli.options import given_settings, merge
from ling_ops.cli.ranks import one_process
from ling_ops.cli.runs import (
    check_steps,
    checkpoint_to_resume,
    draw,
    from_anywhere,
    introduce_resumed,
    introduce_text,
    is_published,
    output_folder,
    run_and_record,
    say_stopped,
    writing,
)
from ling_ops.cli.text import TOKENIZER
from ling_ops.cli.tokens import load_tokens
from ling_ops.cli.trainer import StopRequest, Trainer
from ling_ops.models import LingForCausalLM
from ling_ops.models.safetensors_files import WeightFiles
from ling_ops.nn import add_lora, merge_lora, remove_lora, save_lora

_SAMPLED = 1024  # values of each tensor that tell one base from another


class FinetuneTrainer(Trainer):
    """A run that starts from weights; with LoRA only adapters train and are kept."""

    command = "finetune"

    def __init__(self, *arguments: Any, base: str, merging: bool) -> None:
        super().__init__(*arguments)
        self.base, self.merging, self.first_validation = base, merging, None
        # Asked now: a base that cannot tell must not end a run whose training is done.
        adds = merging and self.options.method == "lora"
        self.base_dtypes = stored_dtypes(Path(self.options.checkpoint)) if adds else {}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "base": self.base, "merge": self.merging}

    def model_tensors(self) -> dict[str, torch.Tensor]:
        tensors = self.model.state_dict()
        if self.options.method == "full":
            return tensors
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in tensors.items() if name not in frozen}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the checkpoint's model tensors, then go on as any run."""
        if checkpoint.state.get("base") != self.base:
            raise CommandError(
                f"{self.options.checkpoint!r} is not what this run started from: its weights differ"
            )
        tensors = checkpoint.tensors["model"]
        wanted = {name: tensor.shape for name, tensor in self.model_tensors().items()}
        if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
            raise CommandError("the checkpoint's tensors do not fit the model and its adapters")
        self.model.load_state_dict(tensors, strict=False)
        super().restore(checkpoint)

    def run(self, metrics: Any, progress: Any, stop: StopRequest) -> None:
        if self.step == 0:
            self.first_validation = self._validate(metrics)
            progress.validation(self.first_validation)
        super().run(metrics, progress, stop)

    def update_expert_biases(self) -> None:
        # Beside frozen weights the biases are frozen too: the adapters must fit the same base.
        rate = 0.0 if self.options.method == "lora" else None
        self.model.update_expert_biases(rate=rate)


def run(arguments: argparse.Namespace) -> int:
    """Run `ling-ops finetune`; returns the exit status."""
    require_extra("finetune")
    one_process("finetune")
    with StopRequest() as stop:
        return _run(arguments, stop)


def _run(arguments: argparse.Namespace, stop: StopRequest) -> int:
    started = time.monotonic()
    given = given_settings(arguments, FINETUNE_FIELDS)
    found = checkpoint_to_resume(arguments, "finetune")
    options = merge(
        found.state["settings"] if found else {}, given, resuming=found is not None,
        kind=FinetuneOptions,
    )  # fmt: skip
    options.checkpoint = from_anywhere(options.checkpoint)
    options.data = [from_anywhere(path) for path in options.data]
    check_steps(options, found)
    device = pick_device(options.device)
    output = output_folder(arguments, "finetune", found)
    model, codec = load(options)
    base = fingerprint(model)
    text = load_tokens(
        options.data, codec, sequence_length=options.sequence_length,
        vocab_size=model.config.vocab_size,
    )  # fmt: skip
    torch.manual_seed(options.seed)
    _prepare(model, options, device)
    merging = "merge" in arguments or (found is not None and found.state.get("merge", False))
    trainer = FinetuneTrainer(model, options, text, output, device, base=base, merging=merging)
    if found:
        trainer.restore(found)
    _introduce(trainer, found)
    run_and_record(trainer, stop)
    return _conclude(trainer, stop, time.monotonic() - started)


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of each of a checkpoint's tensors, without reading their values."""
    if is_published(folder):
        state = LingForCausalLM.from_pretrained(folder, device="meta").state_dict()
        return {name: tensor.dtype for name, tensor in state.items()}
    files = WeightFiles(find_checkpoint(folder))
    return {name: files.dtype(name) for name in files}


def fingerprint(model: Any) -> str:
    """Tells one base from another: a hash of the configuration and the first values of tensors."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        # In bf16, so that it stays the same where the run goes on in another dtype.
        first = tensor.detach().flatten()[:_SAMPLED].bfloat16().float().cpu()
        digest.update(name.encode() + first.numpy().tobytes())
    return digest.hexdigest()


def _prepare(model: Any, options: FinetuneOptions, device: torch.device) -> None:
    model.activation_checkpointing = options.recompute == "layers"
    if options.method == "full":
        check_memory(model.config, device, pick_dtype(options.dtype, device))
        model.requires_grad_(True)
        return
    try:
        add_lora(
            model, r=options.lora_rank, alpha=options.lora_alpha, dropout=options.lora_dropout,
            targets=options.lora_targets or None,
        )  # fmt: skip
    except ValueError as error:
        raise CommandError(f"lora_{error}", code=2) from error


def _introduce(trainer: FinetuneTrainer, found: Checkpoint | None) -> None:
    options, model = trainer.options, trainer.model
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    print(f"model: {options.checkpoint}, {total:,} parameters, of which {trained:,} train")
    introduce_text(trainer.text, trainer.baseline)
    print(
        f"run: {options.steps} steps of {options.method} on {trainer.device} in {dtype}, into "
        f"{trainer.output}",
        flush=True,
    )
    if found:
        introduce_resumed(trainer, found)


def _conclude(trainer: FinetuneTrainer, stop: StopRequest, seconds: float) -> int:
    from ling_ops.cli.progress import clock

    draw(trainer, "fine-tuning")
    if trainer.stopped:
        say_stopped(trainer, stop)
        return 0
    with writing(trainer.output):
        _write_results(trainer)
    before, final = trainer.first_validation, trainer.last_validation["bits_per_byte"]
    start = "" if before is None else f"{before['bits_per_byte']:.3f} -> "
    print(f"final validation: {start}{final:.3f} bits/byte; wall time {clock(seconds)}")
    return 0


def _write_results(trainer: FinetuneTrainer) -> None:
    options, model, output = trainer.options, trainer.model, trainer.output
    if options.method == "lora":
        save_lora(model, output / "adapter", base_model=options.checkpoint)
        print(
            f"wrote {output / 'adapter'}: try ling-ops generate --checkpoint {options.checkpoint} "
            f"--adapter {output / 'adapter'}"
        )
        if not trainer.merging:
            return
        merge_lora(model)
        remove_lora(model)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(trainer.base_dtypes[name])
    _write_model(model, output / "model", Path(options.checkpoint) / TOKENIZER)
    print(f"wrote {output / 'model'}: try ling-ops generate --checkpoint {output / 'model'}")


def _write_model(model: Any, folder: Path, tokenizer: Path) -> None:
    """Write the published format beside `folder` first: it is whole, or absent."""
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    if tokenizer.is_file():
        shutil.copy(tokenizer, temporary / TOKENIZER)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
