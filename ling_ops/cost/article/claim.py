"""One figure of the article beside what its own inputs give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE = 0.02
DAY_S, YEAR_DAYS, HOURS = 86400, 365, 24

FOLLOWS, WRONG, GIVEN = "follows", "does not follow", "given"


@dataclass(frozen=True)
class Claim:
    """One figure: as stated, as computed from the article's inputs, and whether they agree."""

    table: str
    figure: str
    stated: float  #: the lower end, if `stated_to` is the upper one of a range
    computed: float | None  #: None: the article has nothing to compute it from
    unit: str
    how: str
    stated_to: float | None = None
    rounding: float = 0.0  #: unit of the stated figure's last digit
    at_most: bool = False  #: `stated` is a limit for `computed`, not a value
    floor: bool = False  #: `computed` is the least that it can be, not a value

    @property
    def verdict(self) -> str:
        """ "follows", "does not follow", or "given": an input that nothing else gives.

        It follows within 2 %, or if it rounds to what is stated, or lies in the stated range.
        """
        if self.computed is None:
            return GIVEN
        high = self.stated if self.stated_to is None else self.stated_to
        slack = max(TOLERANCE * abs(high), self.rounding / 2)
        low = float("-inf") if self.at_most or self.floor else self.stated - slack
        return FOLLOWS if low <= self.computed <= high + slack else WRONG

    @property
    def follows(self) -> bool:
        """Whether nothing in the article contradicts it."""
        return self.verdict != WRONG


def of_table(table: str) -> Callable[..., Claim]:
    """A maker of claims: (figure, stated or (low, high), computed, unit, how, **options)."""

    def claim(figure, stated, computed, unit, how="", **options) -> Claim:
        low, high = stated if isinstance(stated, tuple) else (stated, None)
        return Claim(table, figure, low, computed, unit, how, stated_to=high, **options)

    return claim
