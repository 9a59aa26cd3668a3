"""Signatures of other libraries' functions: the installed one's, and the one written down here."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

_UNKNOWN = object()  # a default that only its library can compute


def real(path: str) -> Callable[..., Any] | None:
    """The function ``module:qualified.name``, or None where the library is not installed."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception:  # a library that lacks a GPU, or half of itself, may raise anything
        return None
    return inspect.unwrap(found)


def _definition(file: Path, name: str) -> ast.FunctionDef:
    """The function of that qualified name; AssertionError where the file has none."""
    node: Any = ast.parse(file.read_text(encoding="utf-8"))
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        assert found, f"{file} has no {name}"
        node = found[-1]
    return node


def _without_names(arguments: ast.arguments) -> str:
    """The parameter list without annotations; `unknown` for defaults that are no literals."""
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    for defaults in (arguments.defaults, arguments.kw_defaults):
        for at, value in enumerate(defaults):
            try:
                ast.literal_eval(value or ast.Constant(None))
            except ValueError:
                defaults[at] = ast.Name("unknown")
    return ast.unparse(arguments)


def defined(written: str) -> Callable[..., Any]:
    """A function with that parameter list."""
    scope: dict[str, Any] = {"unknown": _UNKNOWN}
    exec(f"def original({written}): pass", scope)
    return scope["original"]


def in_source(path: str) -> Callable[..., Any] | None:
    """As ``real``, but read: many a library that is installed cannot be imported without a GPU."""
    module, _, name = path.partition(":")
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for root in (spec and spec.submodule_search_locations) or ():
        stem = Path(root, *rest)
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return defined(_without_names(_definition(file, name).args))
    return None


def parameters(function: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    """(name, kind, default) of each parameter."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, p.default) for p in found]


def assert_takes(ours: Callable[..., Any], written: str, path: str, since: str) -> None:
    """Every call that the original allows must mean the same to ours.

    ``written`` is the original's parameter list as its release ``since`` has it; where the
    library is installed, importable or not, its own signature is used too.
    """
    originals = {
        f"{path} of {since}": defined(written), f"the installed {path}": real(path),
        f"the source of the installed {path}": in_source(path),
    }  # fmt: skip
    for where, original in originals.items():
        if original is None:
            continue
        theirs, mine = parameters(original), parameters(ours)
        assert [p[:2] for p in mine] == [p[:2] for p in theirs], where
        for (name, _, default), (_, _, given) in zip(theirs, mine, strict=True):
            value = getattr(default, "value", default)  # an enum's member, or a plain default
            if value not in (inspect.Parameter.empty, _UNKNOWN):
                assert value == given, f"{where}: {name} is {value!r} by default, ours {given!r}"
