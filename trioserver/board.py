"""The board: limits of the whole server, counted in memory that all workers share.

SO_REUSEPORT scatters the connections of one address over all workers, so none of them knows how
many there are. Each writes its own counts where the others can see them (`board_map`), and whoever
admits a client adds them up.

What is limited
    connections        of the server, and of one address (`peers.address_key`)
    handshakes         of the server in a second, and of one address in four seconds

How exact that is
    `Board.admit` looks and `Board.opened` counts, and nothing may be awaited between the two. So
    one worker alone is exact to the last connection, and several exceed a limit by no more than one
    for each other worker: the handshake that it was in the middle of. (A rate by two: another one
    where a second begins.) Nobody is refused because of somebody who was refused. When a worker
    dies, its counts go as soon as it is reaped.

Why a sliding window and not GCRA as in `buckets`
    Counts of several workers can be added up, the moments that GCRA keeps cannot: a bucket that is
    emptied in several places is refilled in each. So handshakes are counted per window, and those
    of the window before count as far as it overlaps the last four seconds, or the last one. Like a
    token bucket this admits fewer than ``limit + 1 + t * rate`` in any span of ``t`` seconds; after
    a burst the next may have to wait a little longer than there, until the window turns.

The clock must be the same in all processes: ``time.monotonic()``, not Trio's, which starts
somewhere else in each of them. One thread per process; not to be used after a fork.
"""

import math
import os
import struct
from typing import Final, NamedTuple

import attrs

from trioserver.board_map import USED, BoardMap, create
from trioserver.board_table import MOST, AddressTable

ADDRESS_WINDOW: Final = 4
"""Seconds in which handshakes of one address are counted: so four seconds' worth may come at once,
20 of them with the default of 5 per second."""

RETRY_FULL: Final = 2
"""Seconds after which to come again if nobody knows when there will be room."""

_COUNT: Final = 0xFFFF_FFFF


@attrs.frozen(kw_only=True)
class Limits:
    """What is allowed; 0 is no limit."""

    connections: int = 10_000
    """Of the whole server."""
    address_connections: int = 256
    """Of one address."""
    handshakes: int = 500
    """Of the whole server, per second."""
    address_handshakes: float = 5
    """Of one address, per second; those of `ADDRESS_WINDOW` may come at once. More than 16,000 are
    no limit."""


class Refused(NamedTuple):
    """Why a client is not admitted."""

    status: int
    """HTTP: 503 if the server is at a limit, 429 if its address is."""
    retry_after: int
    """Seconds."""
    why: str
    """The name of the limit in `Limits`: a closed set."""


class Statistics(NamedTuple):
    """What all workers together have counted."""

    connections: int
    unlisted: int
    """Those of them whose address found no room, and is not limited on their account."""
    lives: int
    """Workers that count here, the dead before a sweep included."""


_FULL: Final = Refused(503, RETRY_FULL, "connections")
_ADDRESS_FULL: Final = Refused(429, RETRY_FULL, "address_connections")


class Board:
    """One worker's own part of the board, and its view of the whole.

    Args:
        shared: The memory; it is closed with the board.
        limits: Of this worker's settings. Others may have other limits. What is counted is the
            same, but for this: who limits nothing by address keeps none. After a reload that brings
            such a limit, the connections of the old generation do not count against it; they end
            with its drain.

    Raises:
        BoardError: All segments are taken.
    """

    def __init__(self, shared: BoardMap, limits: Limits) -> None:
        self._shared = shared
        self._segment = segment = shared.claim()
        self._words = shared.words
        self._data = shared.data
        self._table = AddressTable(shared, segment)
        self._max = limits.connections
        self._address_max = limits.address_connections
        self._rate = limits.handshakes
        allowed = math.ceil(limits.address_handshakes * ADDRESS_WINDOW)
        self._address_rate = allowed if allowed <= MOST else 0
        self._by_address = bool(self._address_max or self._address_rate)
        self._connections = shared.connections + segment
        self._unlisted = shared.unlisted + segment
        self._all = shared.connections << 3
        """First byte of the column with everybody's connections."""
        # By the number of segments in use: how to read one column that far.
        self._columns = [struct.Struct(f"@{n}Q").unpack_from for n in range(shared.segments + 1)]
        # Of an even second, then of an odd one: its column, and that of the second before.
        self._seconds = ((shared.even, shared.odd), (shared.odd, shared.even))
        self._second = -1
        self._before = 0
        """Handshakes in the second before that one, which is over."""
        self._admitted: int | None = None
        """Whose entry `AddressTable.entry` is."""

    @classmethod
    def attach(cls, fd: int, limits: Limits) -> "Board":
        """Join the board that the supervisor has made.

        Args:
            fd: Of `board_map.create`, inherited; the caller's to close, at any time.
            limits: Of this worker's settings.

        Raises:
            BoardError: Another release made it, or all segments are taken: then take `alone`.
        """
        shared = BoardMap(fd)
        try:
            return cls(shared, limits)
        except BaseException:
            shared.close()
            raise

    @classmethod
    def alone(cls, limits: Limits) -> "Board":
        """Return a board that nobody shares: its limits are those of this worker alone."""
        fd = create(1, limits.connections)
        try:
            return cls.attach(fd, limits)
        finally:
            os.close(fd)

    def admit(self, key: int | None, now: float) -> Refused | None:
        """Decide about a handshake, and count it if it may go on.

        Args:
            key: Under which its address counts (`peers.Peers.key`); None if it is not limited.
            now: ``time.monotonic()``, or what that was a moment ago.

        Returns:
            None if it is admitted.
        """
        used = self._words[USED]
        if used <= self._segment:
            self._shared.show(self._segment)
            used = self._segment + 1
        if self._max:
            connections = self._columns[used](self._data, self._all)
            if sum(connections) >= self._max:
                return _FULL
        if key is None or not self._by_address:
            return self._hurry(now, used) if self._rate else None
        window = int(now) // ADDRESS_WINDOW
        refused = self._crowd(key, now, window)
        if refused is None and self._rate:
            refused = self._hurry(now, used)
        if refused is None:
            self._table.note(window)
        return refused

    def opened(self, key: int | None) -> None:
        """Count a connection that was admitted; nothing was awaited since."""
        words = self._words
        words[self._connections] += 1
        if key is not None and self._by_address:
            table = self._table
            entry = table.entry if key == self._admitted else table.find(key)
            words[entry or self._unlisted] += 1

    def closed(self, key: int | None) -> None:
        """Count a connection no more: once for each that was `opened`, with the same key."""
        words = self._words
        words[self._connections] -= 1
        if key is not None and self._by_address:
            entry = self._table.find(key)
            # Listed since, but this connection was counted when there was no room.
            listed = entry and words[entry] & _COUNT
            words[entry if listed else self._unlisted] -= 1

    @property
    def full(self) -> bool:
        """Whether the server has all the connections that it may have."""
        if not self._max:
            return False
        return self.statistics().connections >= self._max

    def statistics(self) -> Statistics:
        """Return what all workers together have counted."""
        shared = self._shared
        column = self._columns[shared.segments]
        return Statistics(
            connections=sum(column(self._data, self._all)),
            unlisted=sum(column(self._data, shared.unlisted << 3)),
            lives=shared.owners(),
        )

    def close(self) -> None:
        """Take our counts from the board. Nothing else can be done with it afterwards."""
        self._shared.release(self._segment)
        self._shared.close()

    def _crowd(self, key: int, now: float, window: int) -> Refused | None:
        """Refuse what is too much for one address. Counts nothing."""
        connections, current, before = self._table.look(key, window)
        self._admitted = key
        if self._address_max and connections >= self._address_max:
            return _ADDRESS_FULL
        share = now / ADDRESS_WINDOW - window
        rate = self._address_rate
        if rate and current + before * (1.0 - share) >= rate:
            wait = _wait(rate, current, before, share) * ADDRESS_WINDOW
            return Refused(429, int(wait) + 1, "address_handshakes")
        return None

    def _hurry(self, now: float, used: int) -> Refused | None:
        """Refuse what is too much for the server in this second, else count it."""
        second = int(now)
        this, other = self._seconds[second & 1]
        column = self._columns[used]
        base = second << 32
        if second != self._second:
            self._second = second
            last = second - 1
            words = column(self._data, other << 3)
            self._before = sum([word & _COUNT for word in words if word >> 32 == last])
        current = sum([word - base for word in column(self._data, this << 3) if word > base])
        share = now - second
        if current + self._before * (1.0 - share) >= self._rate:
            wait = _wait(self._rate, current, self._before, share)
            return Refused(503, int(wait) + 1, "handshakes")
        mine = this + self._segment
        word = self._words[mine]
        self._words[mine] = word + 1 if word > base else base + 1
        return None


def _wait(limit: int, current: int, before: int, share: float) -> float:
    """Return after how many windows there is room for one more, if nobody else comes.

    Args:
        limit: At least 1.
        current: Counted in this one.
        before: Counted in the one before.
        share: Of this window, how much is over: 0 to 1.
    """
    if current < limit:
        # What counts of the window before has to sink below the room that is left.
        return 1.0 - (limit - current) / before - share
    # In the next window this one is the window before.
    return 1.0 - share + 1.0 - limit / current
