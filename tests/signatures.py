"""Signatures of other libraries' functions: the installed one's, and the one written down here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any


def real(path: str) -> Callable[..., Any] | None:
    """The function ``module:qualified.name``, or None where the library is not installed."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError):
        return None
    return inspect.unwrap(found)


def parameters(function: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    """(name, kind, default) of each parameter."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, p.default) for p in found]


def assert_takes(ours: Callable[..., Any], written: str, path: str, since: str) -> None:
    """Every call that the original allows must mean the same to ours.

    ``written`` is the original's parameter list as its release ``since`` has it; where the
    library is installed, its own signature is used too.
    """
    scope: dict[str, Any] = {}
    exec(f"def original({written}): pass", scope)
    originals = [scope["original"]]
    installed = real(path)
    if installed is not None:
        originals.append(installed)
    for original in originals:
        theirs, mine = parameters(original), parameters(ours)
        where = f"{path} of {since}" if original is scope["original"] else f"the installed {path}"
        assert [p[:2] for p in mine] == [p[:2] for p in theirs], where
        for (name, _, default), (_, _, given) in zip(theirs, mine, strict=True):
            value = getattr(default, "value", default)  # an enum's member, or a plain default
            if value is not inspect.Parameter.empty:
                assert value == given, f"{where}: {name} is {value!r} by default, ours {given!r}"
