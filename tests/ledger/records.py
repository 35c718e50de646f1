"""What a run of the harness writes down: every publish, every receipt, and nothing else.

A publish is known by its *number*, which travels in the payload: so it is recognised wherever it
turns up, even if nobody ever heard whether it was accepted, and under which id.
"""

import itertools
import secrets
import threading
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Final

import attrs
import msgspec

EVERYONE: Final = ""
"""The user of a broadcast."""

OWN: Final = "own"
ALL: Final = "all"
"""The two streams a connection is served from."""

_UPDATES_PER_SEQ: Final = 4096


class Outcome(Enum):
    """What a publisher was told."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    """It certainly had no effect."""
    UNKNOWN = "unknown"
    """No answer came: it may have happened."""


@attrs.frozen
class Place:
    """Where something is in a stream. Empty epoch: nobody knows."""

    epoch: str
    seq: int


NOWHERE: Final = Place("", 0)


def places(position: str) -> Mapping[str, Place]:
    """Return what a position says about each stream.

    Clients must not look into it; a harness that judges the server may.

    Args:
        position: ``1.<epoch>.<ms>-<n>``, and the same once more for broadcasts; or empty.
    """
    _, *parts = position.split(".")
    found = {}
    for stream, epoch, entry in zip((OWN, ALL), parts[::2], parts[1::2], strict=False):
        seq = int(entry.partition("-")[2]) // _UPDATES_PER_SEQ
        found[stream] = Place("" if epoch == "0" else epoch, seq)
    return found


@attrs.frozen(kw_only=True)
class Publish:
    """One publish and what became of it, as far as its publisher knows."""

    number: int
    user: str
    """`EVERYONE` for a broadcast."""
    outcome: Outcome
    by: str
    """Which publisher."""
    id: str = ""
    place: Place = NOWHERE
    note: str = ""
    """Why it was not accepted."""
    began: float = 0.0
    ended: float = 0.0

    def __str__(self) -> str:
        to = self.user or "everyone"
        what = f"{self.id} seq {self.place.seq}" if self.id else self.note
        return f"#{self.number} to {to} {self.outcome.value} {what} at {self.ended:.3f}"


@attrs.frozen(kw_only=True)
class Established:
    """The first message on a connection."""

    position: str
    resumed: bool = False
    reason: str = ""
    at: float = 0.0


@attrs.frozen(kw_only=True)
class Receipt:
    """A durable notification has arrived."""

    number: int
    id: str
    place: Place
    stream: str = OWN
    attempt: int = 1
    at: float = 0.0

    def __str__(self) -> str:
        which = f"{self.id} {self.place.epoch} seq {self.place.seq}"
        return f"#{self.number} {which} attempt {self.attempt} at {self.at:.3f}"


@attrs.frozen(kw_only=True)
class Gap:
    """The server has said that something cannot come."""

    first: int
    last: int
    missing: int
    reason: str
    stream: str = OWN
    at: float = 0.0


@attrs.frozen(kw_only=True)
class Ended:
    """A connection is over."""

    why: str
    at: float = 0.0


Event = Established | Receipt | Gap | Ended
Connection = list[Event]


@attrs.define(eq=False, kw_only=True)
class Life:
    """Everything one client has seen: its connections one after the other, each resuming."""

    name: str
    user: str
    acks: bool = False
    """Whether it asked for redelivery until it acknowledges."""
    connections: list[Connection] = attrs.Factory(list)

    @property
    def events(self) -> list[Event]:
        """All of it, in order."""
        return list(itertools.chain.from_iterable(self.connections))


class Journal:
    """The logs of one run. Publishers on any thread may write to it."""

    def __init__(self) -> None:
        self.publishes: list[Publish] = []
        self.lives: list[Life] = []
        self.name = secrets.token_hex(4)
        """Tells this run's idempotency keys from those of another on the same Redis."""
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def number(self) -> int:
        """Return the number of the next publish."""
        with self._lock:
            return next(self._numbers)

    def dump(self, path: Path) -> None:
        """Write everything down, one JSON object per line, for whoever looks for a cause."""
        encode = msgspec.json.Encoder(enc_hook=str).encode
        with path.open("wb") as file:
            for publish in self.publishes:
                file.write(encode({"published": publish}) + b"\n")
            for life in self.lives:
                for index, connection in enumerate(life.connections):
                    for event in connection:
                        kind = type(event).__name__.lower()
                        line = {"client": life.name, "connection": index, kind: event}
                        file.write(encode(line) + b"\n")


now = time.monotonic
"""The clock of all records, in seconds."""
