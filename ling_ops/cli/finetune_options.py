"""What `ling-ops finetune` can be told."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from ling_ops.cli.errors import CommandError
from ling_ops.cli.options import RunOptions, add_run_flags, add_settings, option, settings_of

# Without --learning-rate: adapters start from zero and bear a higher rate than trained weights.
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5}


@dataclass
class FinetuneOptions(RunOptions):
    """Every setting of `ling-ops finetune`."""

    checkpoint: str | None = option(
        None, "what to start from: a run folder, one of its checkpoints, or a folder in the "
        "published Ling format", group="model", metavar="DIR",
    )  # fmt: skip
    method: str = option(
        "lora", "train low-rank adapters beside frozen weights, or all weights",
        choices=("lora", "full"), group="model",
    )  # fmt: skip
    lora_rank: int = option(16, "rank r of the adapters", group="model", minimum=1)
    lora_alpha: float = option(32.0, "adapters count alpha / r", group="model")
    lora_dropout: float = option(
        0.0, "dropout of what enters the adapters", group="model", minimum=0.0
    )
    lora_targets: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "ends of weight names, such as experts.down_proj or query_key_value; default: "
            "both weights of all routed experts",
            "group": "model", "nargs": "+", "metavar": "NAME",
        },
    )  # fmt: skip
    recompute: str = option(
        "none", "layers: keep only each layer's input for the backward",
        choices=("none", "layers"), group="model",
    )  # fmt: skip
    steps: int = option(200, "optimizer steps in all", group="run", minimum=1)
    batch_size: int = option(4, "sequences per micro-batch", group="run", minimum=1)
    sequence_length: int = option(512, "tokens per sequence", group="run", minimum=2)
    learning_rate: float | None = option(
        None, "peak learning rate; default: 2e-4 for adapters, 2e-5 for all weights",
        group="run", minimum=0.0,
    )  # fmt: skip
    weight_decay: float = option(0.0, "AdamW weight decay of matrices", group="run", minimum=0.0)

    def check(self) -> None:
        super().check()
        for bad, message in (
            (self.checkpoint is None, "--checkpoint is missing: what to start from"),
            (self.lora_alpha <= 0, f"lora_alpha must be above 0, not {self.lora_alpha}"),
            (self.lora_dropout >= 1, f"lora_dropout must be below 1, not {self.lora_dropout}"),
            (
                self.method == "full" and self._of_lora(),
                f"method full takes no {', '.join(self._of_lora())}",
            ),
        ):
            if bad:
                raise CommandError(message, code=2)

    def _of_lora(self) -> list[str]:
        """The settings of adapters that are not as they are by default."""
        fields = [field for field in dataclasses.fields(self) if field.name.startswith("lora_")]
        default = FinetuneOptions()
        return [f.name for f in fields if getattr(self, f.name) != getattr(default, f.name)]

    @property
    def peak_learning_rate(self) -> float:
        given = self.learning_rate
        return LEARNING_RATES[self.method] if given is None else given


FINETUNE_FIELDS = settings_of(FinetuneOptions)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `finetune` to the command's subparsers."""
    parser = commands.add_parser(
        "finetune",
        help="train a checkpoint further on your text, by LoRA or in full",
        description="Train a Ling checkpoint further on text, with its own tokenizer. LoRA (the "
        "default) keeps the weights as they are and writes adapters in PEFT's format to "
        "OUTPUT/adapter; --method full writes a whole checkpoint to OUTPUT/model.",
        argument_default=argparse.SUPPRESS,
    )
    output = add_settings(parser, FINETUNE_FIELDS)["output"]
    output.add_argument(
        "--merge", action="store_true",
        help="at the end also write OUTPUT/model, the checkpoint with the adapters added, in the "
        "checkpoint's dtype; holds on --resume too",
    )  # fmt: skip
    add_run_flags(output, folder="runs/finetune")
