"""Which of ling_ops's activations another library's function computes, if any."""

from __future__ import annotations

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ling_ops.reference.activation import GATED, PLAIN, activate

#: Names under which an experts module may hold the L of a clamped gate.
LIMITS = ("limit", "swiglu_limit")
#: Where activation classes are known to compute the same in every instance made without arguments.
_KNOWN_MODULES = ("transformers.activations", "torch.nn.modules.activation")


class Recognized(NamedTuple):
    """An activation of ``ling_ops.moe_mlp``; name None: none of them, and why."""

    name: str | None
    limit: float | None = None
    reason: str = ""


class _Bare(SimpleNamespace):
    """A module with nothing but what it was given. Not an AttributeError, which ``getattr`` with a
    default would swallow: the gate would be compared by the default."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError(f"it reads {name} of its module")


def _probe_values(gated: bool) -> Tensor:
    """A grid of arguments: small and large, of both signs, on both sides of any likely limit."""
    steps = [0.0, 1e-3, 0.3, 0.77, 1.0, 1.5, 2.9, 5.5, 8.0, 21.0, 150.0, 1e4]
    line = [-step for step in steps] + steps
    with _disable_current_modes():
        line = torch.tensor(line, dtype=torch.float64, device="cpu")
        if not gated:
            return line.unsqueeze(0)
        gate, up = torch.meshgrid(line, line, indexing="ij")
        return torch.cat([gate.reshape(1, -1), up.reshape(1, -1)], dim=-1)


def _instance(act: Any, approximate: str | None) -> Any:
    """What ``self.act_fn`` is, made anew from its class."""
    if act is nn.GELU:
        return nn.GELU(approximate)
    if not isinstance(act, type):
        return act
    if act.__module__ not in _KNOWN_MODULES:
        raise TypeError(f"{act.__qualname__} may depend on its instance")
    made = act()
    if any(True for _ in made.parameters()) or any(True for _ in made.buffers()):
        raise TypeError(f"{act.__qualname__} has parameters")
    return made


def recognize(
    gate: Any, act: Any, approximate: str | None, limits: tuple[float | None, ...]
) -> Recognized:
    """Compares a module's activation with ours on a grid of float64 arguments.

    ``gate`` is the function ``_apply_gate(self, gate_up)``, or None for experts without a gate;
    ``act`` the class of ``self.act_fn`` (or the function that it is, or None), ``limits`` the
    values of LIMITS. The module itself is no argument, so that torch.compile can take the result
    as a constant; a gate that reads anything else of its module is not recognized.
    """
    return _compare(gate, act, approximate, limits)


# torch.compile runs it while tracing and takes its result (see ling_ops.ops._backend).
recognize._dynamo_marked_constant = True


@cache
def _compare(gate, act, approximate, limits) -> Recognized:
    what = act if gate is None else gate
    called = getattr(what, "__qualname__", str(what))
    x = _probe_values(gate is not None)
    try:
        # Tracing and the meta device leave no values to compare.
        with _disable_current_modes(), torch.no_grad():
            made = _instance(act, approximate)
            if gate is None:
                found = made(x)
            else:
                given = {k: v for k, v in zip(LIMITS, limits, strict=True) if v is not None}
                found = gate(_Bare(act_fn=made, **given), x)
            for name, limit in _candidates(gate is not None, limits):
                if _same(found, activate(x, name, limit)):
                    return Recognized(name, limit)
    except Exception as error:  # anything that foreign code raises means that it is not ours
        return Recognized(None, None, f"{called} cannot be told by its class: {error}")
    return Recognized(None, None, f"{called} is none of ling_ops's activations")


def _same(found: Any, exact: Tensor) -> bool:
    # A tanh whose constants are rounded to ten digits is the same function.
    return found.shape == exact.shape and torch.allclose(
        found.double(), exact, rtol=1e-6, atol=1e-7
    )


def _candidates(gated: bool, limits: tuple[float | None, ...]):
    """(name, limit) of each of our activations that a module of this kind may have."""
    if not gated:
        return [(name, None) for name in PLAIN]
    bounds = (None, *dict.fromkeys(v for v in limits if v is not None and v > 0))
    return [(name, bound) for name in GATED for bound in bounds]


def limits_of(module: nn.Module) -> tuple[float | None, ...]:
    """The values of LIMITS on a module, as numbers."""
    values = (getattr(module, name, None) for name in LIMITS)
    return tuple(float(v) if isinstance(v, (int, float)) else None for v in values)


def key_of(act: Any) -> tuple[Any, str | None]:
    """(class or function, GELU's variant) of an ``act_fn``."""
    if isinstance(act, nn.Module):
        return type(act), getattr(act, "approximate", None)
    # What a method returns depends on its object, as with any other callable.
    is_function = inspect.isroutine(act) and not inspect.ismethod(act)
    return (act if act is None or is_function else type(act)), None
