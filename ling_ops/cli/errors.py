"""The one kind of failure a user sees: a single line on stderr and a non-zero exit."""

from __future__ import annotations

import errno
import importlib.util

EXTRAS = {
    "train": ("rich", "safetensors", "matplotlib", "tensorboard"),
    "finetune": ("rich", "safetensors", "matplotlib", "tensorboard"),
    "study": ("rich", "safetensors", "matplotlib", "tensorboard"),
    "generate": ("safetensors",),
    "prune": ("safetensors",),
}


class CommandError(Exception):
    """A failure that the user can act on. Its text is one line; `code` is the exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(str(message).split()))
        self.code = code


def require_extra(command: str) -> None:
    """Raise CommandError if a package that `command` needs is missing.

    Asked before any work starts, so that a missing plotting library does not surface after
    five minutes of training.
    """
    missing = [name for name in EXTRAS[command] if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f'`ling-ops {command}` needs {", ".join(missing)}: run `pip install "ling-ops[train]"`',
            code=2,
        )


def describe_os_error(error: OSError, doing: str) -> CommandError:
    """Turn an OSError into one line that says what was being done and what to do about it."""
    where = f" {error.filename!r}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CommandError(f"the disk is full: could not finish {doing}{where}; free some space")
    reason = error.strerror or str(error) or type(error).__name__
    return CommandError(f"could not finish {doing}{where}: {reason}")
