"""Rate limits per key: how many per minute, how many at once, and when the next may come. Pure.

The algorithm is GCRA (the "virtual scheduling" of ITU-T I.371, Annex A): a token bucket without
tokens. Of each key one number is kept, the moment at which its bucket would be full again; taking
one moves it on by the time that one costs, and is refused if it would lie more than a whole bucket
ahead. So nothing has to be refilled, and the wait is known exactly.

    any span of ``t`` seconds: at most ``burst + t * count / period`` are taken

Who is refused has taken nothing: pressing on does not make it worse, waiting as told is enough.

Keys are forgotten when their bucket is full again, because a new key starts with a full one. For
that there are two halves, a young and an old one. Every time a whole bucket takes to fill, the old
half is dropped and the young becomes the old; a key that is used comes back into the young half.
When more keys come than there is room for, the halves turn early, and who was longest away starts
anew: memory is bounded, and being wrong means being generous.

One process counts for itself: a user whose connections are spread over several workers has a
bucket in each.
"""

import math
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

import attrs

KeyT = TypeVar("KeyT", bound=Hashable)

MAX_KEYS: Final = 65_536
"""Keys in one table, both halves. With a user's id of the greatest length, 128 bytes, a key costs
about 300 bytes: 20 MB, if so many users send within the time it takes to fill a bucket."""

_GRACE: Final = 1e-6
"""Seconds by which one may come too early: clocks are floating point, so is the wait."""


@attrs.frozen(kw_only=True)
class Rate:
    """How much is allowed."""

    count: float
    """In one period, in the long run; 0 is no limit."""
    period: float = 1.0
    """Seconds."""
    burst: int = 1
    """At once, after a long enough quiet."""


class Buckets(Generic[KeyT]):
    """One bucket per key, all with the same rate.

    Args:
        rate: What each key is allowed.
        max_keys: Keys that are remembered at most.
    """

    __slots__ = ("_cost", "_depth", "_half", "_old", "_since", "_until", "_young")

    def __init__(self, rate: Rate, *, max_keys: int = MAX_KEYS) -> None:
        self._cost = rate.period / rate.count if rate.count > 0 else 0.0
        """Seconds that one takes to be made up for."""
        self._depth = self._cost * rate.burst
        """Seconds that an empty bucket takes to fill."""
        self._half = max_keys // 2 - 1
        self._young: dict[KeyT, float] = {}
        self._old: dict[KeyT, float] = {}
        self._since = self._until = -math.inf

    def take(self, key: KeyT, now: float, count: float = 1) -> float:
        """Take ``count`` out of a bucket if they are in it.

        Args:
            key: Whose bucket.
            now: Seconds of any clock. One that jumps back costs the keys that were just used
                their burst, nothing worse.
            count: How many at once, all or none; a fraction for what weighs less.

        Returns:
            0.0 if they are taken, else after how many seconds they could be; infinity if the
            bucket never holds so many.
        """
        cost = self._cost * count
        if cost == 0.0:
            return 0.0
        if not self._since <= now < self._until:
            self._turn(now)
        full = now + self._depth
        young = self._young
        at = young.get(key)
        if at is None:
            at = self._old.get(key, now)
        if at < now:
            at = now
        elif at > full + _GRACE:
            # The clock went back: this is as empty as a bucket can be.
            (young if key in young else self._old)[key] = at = full
        at += cost
        if at <= full + _GRACE:
            young[key] = at
            if len(young) > self._half:
                self._turn(now)
            return 0.0
        return at - full if cost <= self._depth else math.inf

    def owe(self, key: KeyT, now: float, count: float) -> float:
        """Take ``count`` in any case; for what has happened already.

        Args:
            key: Whose bucket.
            now: See `take`.
            count: How much.

        Returns:
            After how many seconds the bucket would have allowed it; 0.0 if it did. What it did not
            is forgotten, so that whoever pays by waiting pays once.
        """
        wait = self.take(key, now, count)
        if not wait:
            return 0.0
        full = now + self._depth
        at = max(now, self._young.get(key, self._old.get(key, now)))
        self._young[key] = full
        if len(self._young) > self._half:
            self._turn(now)
        return at + self._cost * count - full

    def _turn(self, now: float) -> None:
        """Drop the old half. Whoever is in it has a full bucket, unless there are too many."""
        self._old = self._young
        self._young = {}
        self._since = now
        self._until = now + self._depth

    def __len__(self) -> int:
        return len(self._young) + len(self._old)
