"""What a scenario is."""

from collections.abc import Callable

import attrs

from bench.results import Repetition
from bench.stage import Plan, Stage

Measure = Callable[[Stage, Plan, tuple[int, ...]], Repetition]
"""Plays the scenario once, with so many connections."""


@attrs.frozen(kw_only=True)
class Scenario:
    """A question, and how it is put."""

    name: str
    about: str
    """What the headline is, for readers of the results."""
    headline: str
    """The most important of its figures."""
    goal: float
    """Largest acceptable ratio of the headline to that of a bare sketch of the hot path, which has
    no limits, deadlines, pings, metrics and logs: what all these may cost. Or to the headline of
    the scenario in `against`. If it is `absolute`, the largest acceptable value itself."""
    absolute: bool = False
    """Whether the goal is for the value of the headline; then only our server plays it."""
    joins: tuple[str, ...] = ()
    """Topics that the tokens of its users join."""
    against: str = ""
    """Another scenario of the same run and the same server, if the question is what this one costs
    beyond it; then only our server plays it, in turns with the other scenario."""
    connections: tuple[int, ...]
    """By default; a measurement each."""
    slope: bool = False
    """Whether it is one measurement from the first number of connections to the last."""
    measure: Measure

    @property
    def ours(self) -> bool:
        """Whether other servers are left out."""
        return self.absolute or bool(self.against)

    def rows(self, chosen: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the connections of each measurement.

        Args:
            chosen: Instead of the default, ascending; may be empty.
        """
        connections = chosen or self.connections
        if not self.slope:
            return [(one,) for one in connections]
        low, high = connections[0], connections[-1]
        return [(low if low < high else max(1, high // 5), high)]
