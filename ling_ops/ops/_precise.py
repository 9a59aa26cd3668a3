"""Buffers that keep their dtype."""

from __future__ import annotations

from torch import nn


class PreciseBuffers(nn.Module):
    """A module whose buffers named in `precise` stay as they are where ``Module.to(dtype)`` or
    ``bfloat16()`` would round them; they move between devices with the rest."""

    precise: tuple[str, ...] = ()

    def _apply(self, fn, recurse: bool = True):
        before = {name: self._buffers.get(name) for name in self.precise}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if old is not None and self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(device=self._buffers[name].device)
        return self
