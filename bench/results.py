"""What a run has measured: its values, their medians and ratios, as JSON."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench.client import BenchError, Kind
from bench.machine import Machine

FORMAT: Final = 1


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What must not happen. Exact: every message has a number, and the client ticks it off."""

    lost: int
    doubled: int
    reordered: int
    failed: int
    """Refused or ended connections, and messages that nobody asked for."""

    @property
    def clean(self) -> bool:
        """Whether nothing happened that must not."""
        return not (self.lost or self.doubled or self.reordered or self.failed)


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """Processor time as a share of the time it took, 1.0 being one core."""

    worker: float
    redis: float
    client: float
    others: float
    """What else ran on the worker's core: it disturbs. In steps of 10 ms."""


class Repetition(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one server."""

    figures: dict[str, float]
    """The scenario says what they are; the unit is the end of the name."""
    units: int
    """How many deliveries, handshakes or whatever it was."""
    wall_seconds: float
    shares: Shares
    bottleneck: str
    counts: Counts
    greeted: int
    """How many ``connection_established`` came."""
    healthy: bool
    """Whether it was the same worker all the time."""
    trouble: str
    """The first failure, in words."""

    @property
    def valid(self) -> bool:
        """Whether its figures mean anything."""
        return self.counts.clean and self.healthy and self.units > 0


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Several values of one thing."""

    median: float
    low: float
    high: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario at one number of connections."""

    scenario: str
    connections: tuple[int, ...]
    headline: str
    """The figure that the scenario is about."""
    goal: float
    """What the ratio of the headline may be at most, or itself if that is `absolute`."""
    absolute: bool = False
    """Whether the goal is for the headline itself."""
    against: str = ""
    """The scenario that the ratios are to; empty if they are to the other server's figures."""
    repetitions: dict[str, list[Repetition]]
    """By server."""
    figures: dict[str, dict[str, Spread]]
    """By server and name: medians over the repetitions, smallest and largest."""
    ratios: dict[str, Spread]
    """By name: the product's median by the other's; smallest and largest of the pairs."""
    valid: bool


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    format: int = FORMAT
    commit: str
    """Ends in + if files were changed."""
    date: str
    """RFC 3339, when the run began."""
    machine: Machine
    load: tuple[float, float, float]
    """Load averages when the run began: what else the machine had to do."""
    client: Kind
    redis: str
    against: str | None
    """The other server's name and the beginning of its file's SHA-256."""
    settings: dict[str, object]
    """Of the product, as ``trioserver config --json`` printed them."""
    plan: dict[str, float]
    rows: list[Row]


def row(
    *,
    scenario: str,
    connections: tuple[int, ...],
    headline: str,
    goal: float,
    repetitions: dict[str, list[Repetition]],
    absolute: bool = False,
    against: str = "",
    yardstick: Row | None = None,
) -> Row:
    """Return the row for these repetitions: the first server is the product.

    Args:
        scenario: Its name.
        connections: How many.
        headline: Name of its most important figure.
        goal: For the ratio of that.
        repetitions: By server.
        absolute: Whether the goal is for the headline itself.
        against: The scenario that it is compared with, if not with the other server.
        yardstick: The row of that scenario, played in turns with this one; None if it was not.
    """
    figures = {
        server: {name: _spread([one.figures[name] for one in of_one]) for name in of_one[0].figures}
        for server, of_one in repetitions.items()
    }
    product, *others = repetitions
    valid = all(one.valid for of_one in repetitions.values() for one in of_one)
    ratios = {}
    if yardstick is not None and yardstick.valid:
        ratios = _ratios(repetitions[product], yardstick.repetitions[product])
    elif others and not against:
        ratios = _ratios(repetitions[product], repetitions[others[0]])
    return Row(
        scenario=scenario,
        connections=connections,
        headline=headline,
        goal=goal,
        absolute=absolute,
        against=against,
        repetitions=repetitions,
        figures=figures,
        ratios=ratios,
        valid=valid,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def _ratios(ours: Sequence[Repetition], theirs: Sequence[Repetition]) -> dict[str, Spread]:
    ratios = {}
    for name in ours[0].figures.keys() & theirs[0].figures.keys():
        above, below = ([one.figures[name] for one in every] for every in (ours, theirs))
        if min(below) <= 0:
            continue
        pairs = [one / beside for one, beside in zip(above, below, strict=True)]
        ratio = statistics.median(above) / statistics.median(below)
        ratios[name] = Spread(median=ratio, low=min(pairs), high=max(pairs))
    return ratios


def save(results: Results, path: Path) -> None:
    """Write the results as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


def load(path: Path) -> Results:
    """Read what `save` has written.

    Raises:
        BenchError: It is not there, or no results.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except (OSError, msgspec.MsgspecError) as error:
        raise BenchError(f"{path}: {error}") from None
