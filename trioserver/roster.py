"""Which channels are wanted, and what Redis has been told and has confirmed: no I/O, no clock.

Theory
    Redis answers every channel of a SUBSCRIBE or UNSUBSCRIBE once, in the order of the commands.
    So counting is enough: the roster counts what was asked on the current link and what was
    confirmed, and a `Round` is confirmed when the second count has reached the first as it was
    when the round was taken. Per channel, only what is in motion is remembered; a channel that is
    wanted and confirmed costs one entry in one set, because a worker may have many thousands.

    A channel that is wanted is in one of three states on the current link:

        joining     not yet asked for                        in ``_joining``
        asked       SUBSCRIBE taken, replies outstanding     in ``_owed``
        confirmed                                            in neither

    A released channel stays wanted until it has lingered; following it again before that costs
    nothing. After that it is unwanted and UNSUBSCRIBE is on its way, perhaps with the reply to an
    earlier SUBSCRIBE still outstanding. If it is then followed again, a new SUBSCRIBE goes behind
    it; the number of outstanding replies tells which one is the last.

    When a link ends, everything wanted is joining again and nothing is owed.

Change together: `Roster.take` and `Roster.confirm` are the two ends of the same count.
"""

from typing import Final

import attrs

from trioserver.errors import RedisUnavailable
from trioserver.resp import Confirmation

SWEEP_SECONDS: Final = 0.25
"""Released channels are let go in sweeps at least this far apart, so that many share one
UNSUBSCRIBE when clients come and go all the time."""


@attrs.frozen
class Round:
    """What to send now."""

    subscribe: list[bytes]
    unsubscribe: list[bytes]
    mark: int
    """The round is confirmed when `Roster.confirmations` has reached this."""


class Roster:
    """Wanted channels and the state of each on the current link."""

    __slots__ = ("_asked", "_joining", "_leaving", "_linger", "_owed", "_wanted", "confirmations")

    def __init__(self, *, linger: float) -> None:
        self.confirmations = 0
        """Replies received on the current link."""
        self._linger = linger
        self._wanted: set[bytes] = set()
        self._joining: dict[bytes, None] = {}
        """A set that keeps its order: who came first is subscribed first."""
        self._owed: dict[bytes, int] = {}
        """Outstanding replies per channel, on the current link."""
        self._leaving: dict[bytes, float] = {}
        """When each was released; the oldest first. All of them are still wanted."""
        self._asked = 0
        """Replies that will have come when all is quiet, on the current link."""

    def follow(self, channel: bytes) -> bool:
        """Want ``channel``; return whether it is confirmed already. Idempotent."""
        if channel in self._wanted:
            self._leaving.pop(channel, None)
            return channel not in self._joining and channel not in self._owed
        self._wanted.add(channel)
        self._joining[channel] = None
        return False

    def release(self, channel: bytes, now: float) -> bool:
        """Let ``channel`` go after it has lingered. Idempotent; unknown channels are ignored.

        Returns:
            Whether `next_sweep` has changed.
        """
        if channel not in self._wanted or channel in self._leaving:
            return False
        self._leaving[channel] = now
        return len(self._leaving) == 1

    def is_joining(self, channel: bytes) -> bool:
        """Return whether ``channel`` waits for the next `take`."""
        return channel in self._joining

    def next_sweep(self) -> float:
        """Return when `take` has something to unsubscribe: infinity if nobody leaves."""
        for released in self._leaving.values():
            return released + self._linger + SWEEP_SECONDS
        return float("inf")

    def take(self, now: float) -> Round:
        """Return what must be sent now; all of it counts as sent."""
        subscribe: list[bytes] = []
        unsubscribe: list[bytes] = []
        owed = self._owed
        for channel in self._lingered(now):
            del self._leaving[channel]
            self._wanted.discard(channel)
            if channel in self._joining:
                del self._joining[channel]  # Redis never heard of it
            else:
                owed[channel] = owed.get(channel, 0) + 1
                unsubscribe.append(channel)
        subscribe.extend(self._joining)
        for channel in subscribe:
            owed[channel] = owed.get(channel, 0) + 1
        self._joining.clear()
        self._asked += len(subscribe) + len(unsubscribe)
        return Round(subscribe, unsubscribe, self._asked)

    def confirm(self, confirmation: Confirmation) -> None:
        """Count one reply of Redis.

        Raises:
            RedisUnavailable: Nobody asked for that: the link no longer is what we think it is.
        """
        channel = confirmation.channel
        outstanding = self._owed.get(channel, 0)
        self.confirmations += 1
        if outstanding > 1:
            self._owed[channel] = outstanding - 1
            return
        asked = channel in self._wanted and channel not in self._joining
        if outstanding == 0 or asked != confirmation.subscribed:
            verb = "subscribed" if confirmation.subscribed else "unsubscribed"
            raise RedisUnavailable(f"protocol error: {verb} unasked: {channel!r:.80}")
        del self._owed[channel]

    def lost(self) -> None:
        """Start over for a new link: what is wanted must be asked for again."""
        self._wanted.difference_update(self._leaving)
        self._leaving.clear()
        self._owed.clear()
        self._joining = dict.fromkeys(self._wanted)
        self._asked = self.confirmations = 0

    def __len__(self) -> int:
        return len(self._wanted)

    def _lingered(self, now: float) -> list[bytes]:
        """Return who was released long enough ago."""
        lingered: list[bytes] = []
        for channel, released in self._leaving.items():
            if released + self._linger > now:
                break
            lingered.append(channel)
        return lingered
