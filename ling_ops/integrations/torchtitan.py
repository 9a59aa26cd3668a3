"""The grouped product of torchtitan's experts on ling_ops.

torchtitan's ``GroupedExperts`` (and its variants) call ``self._grouped_mm(A=, B_t=, offs=)`` for
every product; ``install()`` puts ling_ops's behind that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

import ling_ops

__all__ = ["grouped_mm", "install"]


def grouped_mm(A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
    """A ``[R, K]`` times B_t ``[E, K, N]``, group by group, in A's dtype → ``[R, N]``.

    Rows of expert e end at ``offs[e]`` (int32, on the device); rows past the last end are exactly
    zero. Differentiable in A and B_t, whose gradients are zero for experts without rows.
    B_t is read in place as the transpose of a contiguous ``[E, N, K]``.
    """
    return ling_ops.grouped_mm(A, B_t, offs=offs)


def _grouped_mm(self: nn.Module, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
    return grouped_mm(A, B_t, offs)


def install(*classes: type[nn.Module]) -> Callable[[], None]:
    """Makes experts classes compute with ling_ops; without arguments torchtitan's GroupedExperts.

    Subclasses with a ``_grouped_mm`` of their own (quantised ones) keep it. Returns a function
    that undoes it. Raises ImportError without torchtitan 0.3, and TypeError for a class
    without ``_grouped_mm`` or whose ``_grouped_mm`` takes other arguments.
    """
    if not classes:
        try:
            from torchtitan.models.common.moe import GroupedExperts
        except ImportError as error:
            raise ImportError(
                "ling_ops.integrations.torchtitan.install needs torchtitan 0.3: "
                'run `pip install "torchtitan==0.3.*"`'
            ) from error
        classes = (GroupedExperts,)
    for experts in classes:
        if not hasattr(experts, "_grouped_mm"):
            raise TypeError(f"classes must have a method _grouped_mm, got {experts.__name__}")
        taken = inspect.signature(experts._grouped_mm).parameters
        if not {"A", "B_t", "offs"} <= set(taken):
            raise TypeError(
                f"{experts.__name__}._grouped_mm must take A, B_t and offs, as torchtitan 0.3's "
                f"does, got {', '.join(taken)}"
            )
    before = [(experts, vars(experts).get("_grouped_mm")) for experts in classes]
    for experts in classes:
        experts._grouped_mm = _grouped_mm

    def undo() -> None:
        for experts, method in before:
            if method is None:
                del experts._grouped_mm
            else:
                experts._grouped_mm = method

    return undo
