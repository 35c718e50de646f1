"""Frames that may be given up while they wait for a client that does not keep up. Pure.

A `Soft` is sent like any other frame while its client keeps up. Where something waits already it
waits in a `Line`, which knows where each one stands: of those that conflate and are about the same
only the newest waits, in the place of the first; and if there is no room, the oldest of the same
topic or type makes place. Where that stood now stands a `Marker`: a ``gap`` that says how many are
missing. It counts on, as long as it waits itself, for the next that makes place stood behind it.

    waiting         m  the marker of a group, before everything of that group that still waits
    s1 s2 p s3      s4 comes and there is no room for it
    m1 s2 p s3 s4   s5 comes
    m2    p s3 s4 s5

One that has no room although all of its group went is given up alone, and its marker stands behind
them. A group has more than one marker only where something of it stands between.

What may not be given up (p) makes others give up their places before it passes a bound itself.
Markers stand outside the bound of frames: they are no more than what stands between, and one.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final, Self

from trioserver import frames, messages
from trioserver.slow_policies import Policy

EVERYONE: Final = "*"
"""Subject of what goes to everyone; no topic has this name."""

_EVERYONES_STREAM: Final = "all"

COMPACT_AT: Final = 64
"""Empty places in a line that are worth a look at all of it, if they are half of it."""

Group = tuple[str, str]
"""A subject, or the type of what has none: of whom one makes place for another."""

Told = Callable[[Policy, int], None]
"""Hears how many were given up, and how: one after another by a newer one, or for want of room."""


class Soft(bytes):
    """A frame that may be given up while it waits; made once for all who get it.

    Args:
        data: The frame: one whole text frame.
        policy: `Policy.CONFLATE` or `Policy.DROP_OLDEST`.
        subject: The name of the topic; `EVERYONE`; empty for notifications to a user.
        of_type: The type of the notification.
        key: What it is about; those without one are all about the same.
    """

    policy: Policy
    subject: str
    of_type: str
    key: str | None
    group: Group
    identity: tuple[str, str, str | None]
    """What a newer one has as well if it makes this one needless."""
    _packed: "Soft | None"

    def __new__(
        cls, data: bytes, policy: Policy, subject: str, of_type: str, key: str | None = None
    ) -> Self:
        """See the class."""
        made = super().__new__(cls, data)
        made.policy = policy
        made.subject = subject
        made.of_type = of_type
        made.key = key
        made.group = (subject, "" if subject else of_type)
        made.identity = (subject, of_type, key)
        made._packed = None
        return made

    def packed(self, data: bytes) -> "Soft":
        """Return ``data``, this frame compressed, as what it is; made once, then remembered."""
        if self._packed is None:
            self._packed = Soft(data, self.policy, self.subject, self.of_type, self.key)
        return self._packed


class Marker(bytes):
    """Says to the client how many of a group are missing here: the frame of a ``gap``."""

    group: Group
    missing: int
    _around: tuple[bytes, bytes]
    """What is said before that number, and behind it."""

    def __new__(
        cls, group: Group, missing: int = 1, around: tuple[bytes, bytes] | None = None
    ) -> Self:
        """See the class."""
        before, behind = around = around or _around(group)
        made = super().__new__(cls, frames.encode_text(b"%b%d%b" % (before, missing, behind)))
        made.group = group
        made.missing = missing
        made._around = around
        return made

    def risen(self, count: int = 1) -> "Marker":
        """Return one that counts so many more; made often where much is given up."""
        return Marker(self.group, self.missing + count, self._around)

    def growth(self, count: int) -> int:
        """Return how many bytes larger one is that counts so many more."""
        return len(self.risen(count)) - len(self)


def _around(group: Group) -> tuple[bytes, bytes]:
    """Return a ``gap`` about a group: what is before the number of those missing, and behind it."""
    subject, of_type = group
    everyone = subject == EVERYONE
    gap = messages.Gap(
        missing=1,
        reason="slow",
        stream=_EVERYONES_STREAM if everyone else None,
        topic=None if everyone else subject or None,
        of_type=of_type or None,
    )
    before, missing, behind = messages.encode(gap).partition(b'"missing":')
    return before + missing, behind.removeprefix(b"1")


class _Blank(bytes):
    """Where a frame stood that is gone; nothing is sent of it."""


_BLANK: Final = _Blank()


class Line(deque[bytes]):
    """What waits in an outbox, when some of it may be given up.

    To be appended to and taken from like the deque that it is; `take` and `make_room` know what may
    be given up, and return how many bytes more wait than before.

    Args:
        waiting: What waits already, in order.
    """

    __slots__ = (
        "_apart",
        "_gone",
        "_groups",
        "_identities",
        "_markers",
        "_unfilled",
        "soft_bytes",
    )

    def __init__(self, waiting: Iterable[bytes] = ()) -> None:
        super().__init__()
        self._begin(waiting)

    def _begin(self, waiting: Iterable[bytes]) -> None:
        self._gone = 0
        """How many have left at the front. The seat of a frame is its index and this."""
        self._unfilled = 0
        """How many blanks there are."""
        self._apart = 0
        """How many markers there are."""
        self._groups: dict[Group, deque[int]] = {}
        """The seats of all that is soft, ascending."""
        self._identities: dict[tuple[str, str, str | None], int] = {}
        self._markers: dict[Group, deque[int]] = {}
        """Their seats, ascending."""
        self.soft_bytes = 0
        """What could be given up, but for the beginning of the first frame."""
        for frame in waiting:
            self.add(frame)

    @property
    def standing(self) -> int:
        """How many frames wait, without markers."""
        return len(self) - self._unfilled - self._apart

    @property
    def hard(self) -> int:
        """How many of them may not be given up."""
        return self.standing - sum(map(len, self._groups.values()))

    def add(self, frame: bytes) -> None:
        """Let ``frame`` wait behind all others; it may have waited in another line before."""
        if frame is _BLANK:
            return
        seat = self._gone + len(self)
        self.append(frame)
        if isinstance(frame, Soft):
            seats = self._groups.get(frame.group)
            if seats is None:
                seats = self._groups[frame.group] = deque()
            seats.append(seat)
            self.soft_bytes += len(frame)
            if frame.policy is Policy.CONFLATE:
                self._identities[frame.identity] = seat
        elif isinstance(frame, Marker):
            self._add_marker(frame.group, seat)

    def _add_marker(self, group: Group, seat: int) -> None:
        marks = self._markers.get(group)
        if marks is None:
            marks = self._markers[group] = deque()
        insort(marks, seat)
        self._apart += 1

    def popleft(self) -> bytes:
        """Take out the first frame, which has been sent."""
        frame = super().popleft()
        seat = self._gone
        self._gone = seat + 1
        if type(frame) is not bytes:
            self._left(frame, seat)
        return frame

    def _left(self, frame: bytes, seat: int) -> None:
        """Forget where ``frame`` stood."""
        if isinstance(frame, Soft):
            seats = self._groups[frame.group]
            seats.remove(seat)  # the first, or the one behind it
            if not seats:
                del self._groups[frame.group]
            self.soft_bytes -= len(frame)
            if self._identities.get(frame.identity) == seat:
                del self._identities[frame.identity]
        elif isinstance(frame, Marker):
            self._apart -= 1
            marks = self._markers[frame.group]
            marks.remove(seat)
            if not marks:
                del self._markers[frame.group]
        else:
            self._unfilled -= 1

    def take(
        self, frame: Soft, spare: int, most: int, told: Told, *, begun: bool
    ) -> tuple[int, bool]:
        """Let ``frame`` wait if there is room, or others of its group can make place.

        Args:
            frame: If it finds no room, it is given up itself.
            spare: Bytes that may wait beside those that do.
            most: Frames that may wait.
            told: Called with what was given up.
            begun: Whether the first frame is on the wire in part.

        Returns:
            How many bytes more wait now, and whether ``frame`` does.
        """
        change = 0
        if frame.policy is Policy.CONFLATE:
            replaced = self._replace(frame, spare, begun=begun)
            if replaced is not None:
                told(Policy.CONFLATE, 1)
                change, waits = replaced
                if waits:
                    return change, True
        count = self._in_the_way(frame, spare - change, most, begun=begun)
        if count is None:
            return change + self._decline(frame.group, spare - change, told, begun=begun), False
        for _ in range(count):
            change += self._give_up(frame.group, begun=begun) or 0
        if count:
            told(Policy.DROP_OLDEST, count)
        self.add(frame)
        self._compact()
        return change + len(frame), True

    def _in_the_way(self, frame: Soft, spare: int, most: int, *, begun: bool) -> int | None:
        """Return how many of its group must go before there is room for ``frame``.

        Returns:
            None if there were none without all of them either: then they stay.
        """
        room = spare - len(frame)
        places = most - self.standing
        if room >= 0 and places > 0:
            return 0
        group = frame.group
        seats = self._groups.get(group)
        if seats is None:
            return None
        first = int(begun and seats[0] == self._gone)
        # As much as the marker can grow: where it is about a byte, one more may go than has to.
        room -= self._growth(group, len(seats) - first, begun=begun)
        for count, seat in enumerate(islice(seats, first, None), 1):
            room += len(self[seat - self._gone])
            if room >= 0 and places + count > 0:
                return count
        return None

    def _growth(self, group: Group, missing: int, *, begun: bool) -> int:
        """Return how many bytes it costs to say that so many of the oldest are missing."""
        marker = self._marker_at(self._first_marker(group, begun=begun))
        return len(Marker(group, missing)) if marker is None else marker.growth(missing)

    def _decline(self, group: Group, spare: int, told: Told, *, begun: bool) -> int:
        """Give up one that would be the newest of ``group``; return how many bytes more wait.

        Others go with it only if there is no room to say that it is missing.
        """
        change, given_up = 0, 1
        while True:
            marker = self._marker_at(self._last_marker(group, begun=begun))
            more = len(Marker(group)) if marker is None else marker.growth(1)
            lost = None if change + more <= spare else self._give_up(group, begun=begun)
            if lost is None:
                break
            change += lost
            given_up += 1
        told(Policy.DROP_OLDEST, given_up)
        return change + self._mark(group, begun=begun)

    def make_room(
        self, size: int, spare: int, most: int, told: Told, *, begun: bool
    ) -> tuple[int, bool]:
        """Give up what may be, until a frame of ``size`` bytes has room.

        The group of which most wait is the first to make place. The arguments are those of `take`,
        and so is what it returns: how many bytes more wait, and whether there is room.
        """
        change = given_up = 0
        while change + size > spare or self.standing >= most:
            lost = None
            for group in sorted(self._groups, key=self._crowd, reverse=True):
                lost = self._give_up(group, begun=begun)
                if lost is not None:
                    break
            if lost is None:
                break
            change += lost
            given_up += 1
        if given_up:
            told(Policy.DROP_OLDEST, given_up)
            self._compact()
        return change, change + size <= spare and self.standing < most

    def _crowd(self, group: Group) -> int:
        return len(self._groups[group])

    def _replace(self, frame: Soft, spare: int, *, begun: bool) -> tuple[int, bool] | None:
        """Put ``frame`` where an older one of its identity waits.

        Returns:
            How many bytes more wait, and whether ``frame`` is among them: if it is so much larger
            that it has no room there, the older one is gone all the same. None if there is none.
        """
        seat = self._identities.get(frame.identity)
        if seat is None or (begun and seat == self._gone):
            return None
        index = seat - self._gone
        old = self[index]
        change = len(frame) - len(old)
        if change <= spare:
            self[index] = frame
            self.soft_bytes += change
            return change, True
        self._left(old, seat)
        self._blank(index)
        return self._fold(frame.group, seat, begun=begun) - len(old), False

    def _give_up(self, group: Group, *, begun: bool) -> int | None:
        """Let the oldest of ``group`` go; return how many bytes more wait, None without one."""
        seats = self._groups.get(group)
        if seats is None:
            return None
        oldest = int(begun and seats[0] == self._gone)
        if oldest == len(seats):
            return None
        seat = seats[oldest]
        index = seat - self._gone
        frame = self[index]
        first = self._first_marker(group, begun=begun)
        self._left(frame, seat)
        if first is None:
            self[index] = Marker(group)
            self._add_marker(group, seat)
            change = len(self[index])
        else:
            self._blank(index)
            change = self._rise(first)
        return change - len(frame) + self._fold(group, seat, begun=begun)

    def _mark(self, group: Group, *, begun: bool) -> int:
        """Note at the end that one more of ``group`` is missing; return the bytes of that."""
        last = self._last_marker(group, begun=begun)
        if last is not None:
            return self._rise(last)
        marker = Marker(group)
        self.add(marker)
        return len(marker)

    def _first_marker(self, group: Group, *, begun: bool) -> int | None:
        """Return the seat of the marker before the oldest of ``group`` that can be given up."""
        for seat in self._markers.get(group, ()):
            if begun and seat == self._gone:
                continue
            seats = self._groups.get(group, ())
            oldest = next((one for one in seats if not (begun and one == self._gone)), seat)
            return seat if seat <= oldest else None
        return None

    def _last_marker(self, group: Group, *, begun: bool) -> int | None:
        """Return the seat of the marker behind all of ``group``."""
        marks, seats = self._markers.get(group), self._groups.get(group)
        if marks is None or (seats is not None and seats[-1] > marks[-1]):
            return None
        return None if begun and marks[-1] == self._gone else marks[-1]

    def _marker_at(self, seat: int | None) -> Marker | None:
        if seat is None:
            return None
        marker = self[seat - self._gone]
        assert isinstance(marker, Marker)  # noqa: S101 - for the type checker: it is known as one
        return marker

    def _rise(self, seat: int, count: int = 1) -> int:
        """Count more with the marker at ``seat``; return by how many bytes it grew."""
        marker = self._marker_at(seat)
        assert marker is not None  # noqa: S101 - for the type checker
        risen = self[seat - self._gone] = marker.risen(count)
        return len(risen) - len(marker)

    def _fold(self, group: Group, seat: int, *, begun: bool) -> int:
        """Make one of the markers around ``seat`` if nothing of ``group`` is left between them.

        Returns:
            How many bytes more wait: fewer, if there were such.
        """
        marks, seats = self._markers.get(group, ()), self._groups.get(group, ())
        place = bisect_right(marks, seat)
        if not 0 < place < len(marks):
            return 0
        before, behind = marks[place - 1], marks[place]
        between = bisect_right(seats, before)
        if between < len(seats) and seats[between] < behind:
            return 0
        marker = self._marker_at(behind)
        if marker is None or (begun and before == self._gone):
            return 0
        self._left(marker, behind)
        self._blank(behind - self._gone)
        return self._rise(before, marker.missing) - len(marker)

    def _blank(self, index: int) -> None:
        self[index] = _BLANK
        self._unfilled += 1

    def _compact(self) -> None:
        """Close the ranks, if that is worth it."""
        if self._unfilled >= COMPACT_AT and self._unfilled * 2 > len(self):
            waiting = list(self)
            self.clear()
            self._begin(waiting)
