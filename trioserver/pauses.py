"""Growing pauses: how long to wait before something is tried once more. Pure.

Doubled each time up to a cap, so that nobody is asked more than he can bear, and each of them at
random around that, so that those who failed together do not come back together.
"""

import random
from typing import Final

SPREAD: Final = 0.5
"""A pause is what it should be ± this part of it."""


class Pauses:
    """The pauses of one task.

    Args:
        first: Seconds, about, of the first one.
        cap: Seconds, about, of the longest.
        rng: Source of chance; one of its own without.
    """

    __slots__ = ("_cap", "_first", "_next", "_rng")

    def __init__(self, first: float, cap: float, rng: random.Random | None = None) -> None:
        self._first = self._next = first
        self._cap = cap
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing

    def reset(self) -> None:
        """Begin anew: it has worked."""
        self._next = self._first

    def take(self) -> float:
        """Return the seconds to wait now; the next ones are more."""
        pause, self._next = self._next, min(self._cap, self._next * 2)
        return pause * self._rng.uniform(1 - SPREAD, 1 + SPREAD)
