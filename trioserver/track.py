"""Where one connection stands in one stream of the ledger: in order, nothing twice, no hole.

Pure. A connection has two tracks: its user's own stream and that of everyone. What is published
arrives as an `Entry` that names its own point and that of the entry before it. An entry whose
predecessor is where the track stands goes out at once; anything else is a question to the ledger,
which holds the truth:

    unknown     no point yet: what comes is held until a read has said where we stand
    reading     the stream is being read from the point on; what comes meanwhile is held
    live        what comes is compared with the point

    live    entry follows the point        it is next: deliver, the point moves
            entry is not beyond the point  seen: skip
            anything else                  a hole, or another epoch: read
    reading page has come, more to come    deliver it, read again
            page has come, the last one    deliver it, then what was held, as if it came now

An entry is in the stream before it is published, so a read that begins after the entry came has it:
whatever does not fit may be dropped as long as a read follows. That also bounds what is held.
"""

from enum import Enum, auto
from typing import Final, Generic, Protocol, TypeVar

from trioserver import position

MAX_HELD: Final = 32
"""Entries held during a read. More means that reading once more is cheaper than remembering."""


class Entry(Protocol):
    """What a track has to know about a published entry."""

    @property
    def previous(self) -> str:
        """The point of the entry before it."""

    @property
    def point(self) -> str:
        """Its own."""


EntryT = TypeVar("EntryT", bound=Entry)


class Verdict(Enum):
    """What to do with an entry that has come."""

    DELIVER = auto()
    SKIP = auto()
    """It has been delivered, or is held, or a read that is due anyway will bring it."""
    READ = auto()
    """Something is missing: read the stream from the point on."""


class Track(Generic[EntryT]):
    """One connection's place in one stream.

    Attributes:
        point: The newest entry that was handed on; empty while unknown.
    """

    __slots__ = ("_again", "_held", "point")

    def __init__(self) -> None:
        self.point = ""
        self._held: list[EntryT] | None = []
        """What came during a read; None while live. One more than `MAX_HELD`: too much came."""
        self._again = False
        """Whether something has happened during a read that its page may be too old for."""

    @property
    def live(self) -> bool:
        """Whether entries are delivered as they come."""
        return self._held is None

    def take(self, entry: EntryT) -> Verdict:
        """Say what becomes of ``entry``; the point moves if it is to be delivered."""
        if self._held is not None:
            if len(self._held) <= MAX_HELD:
                self._held.append(entry)
            return Verdict.SKIP
        if entry.previous == self.point:
            self.point = entry.point
            return Verdict.DELIVER
        return Verdict.SKIP if self._seen(entry) else Verdict.READ

    def forget(self) -> None:
        """Return to the beginning: where it stands is not known any more."""
        self.point = ""
        self._held = []
        self._again = False

    def begin(self) -> bool:
        """Start a read; return whether one was not under way already.

        If one was, another one follows it: its page may have been made before the reason was.
        """
        if self._held is not None:
            self._again = True
            return False
        self._held = []
        return True

    def reached(self, point: str, *, more: bool) -> tuple[list[EntryT], bool]:
        """Take note that the stream has been read up to ``point``.

        Args:
            point: Of the newest entry that the page covered.
            more: Whether the page was not the last.

        Returns:
            What was held and is next now, in order, and whether to read once more.
        """
        self.point = point
        held = self._held or []
        again, self._again = self._again or len(held) > MAX_HELD, False
        if more:
            return [], True
        self._held = None
        following: list[EntryT] = []
        for entry in held:
            verdict = self.take(entry)
            if verdict is Verdict.DELIVER:
                following.append(entry)
            elif verdict is Verdict.READ:
                again = True
        if again:
            self._held = []
        return following, again

    def _seen(self, entry: EntryT) -> bool:
        """Return whether ``entry`` is at or before the point, in the same epoch."""
        return position.epoch_of(entry.point) == position.epoch_of(self.point) and position.order(
            entry.point
        ) <= position.order(self.point)
