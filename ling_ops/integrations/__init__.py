"""ling_ops inside other people's models. Each module here needs its own extra."""

from __future__ import annotations
