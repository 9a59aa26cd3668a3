"""The article's figures, computed again from its own inputs."""

from __future__ import annotations

from . import architecture, business, overview, training
from .claim import Claim

__all__ = ["Claim", "article_claims"]


def article_claims() -> list[Claim]:
    """Every figure of the article's tables that has arithmetic, in the article's order of topics.

    Its time lines, road map, salaries and lists of indicators are forecasts without inputs.
    """
    return [
        *overview.claims(), *architecture.claims(), *training.claims(), *business.claims(),
    ]  # fmt: skip
