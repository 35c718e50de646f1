"""The canary: proof that what is published now arrives here, by publishing.

Theory
    "Connected" and "subscribed" are what two ends believe; connections have been seen that kept
    both beliefs and delivered nothing for hours. So every worker sends itself a message on the
    ordinary way: through the `RedisLink`, through Redis, through the `Subscription`, through the
    same ``deliver`` as everybody's. The worker is *fresh*, fit to be called ready, while the
    latest canary has come back.

        link down              unready at once, nobody needs to wait for a canary
        link up again          a canary at once; fresh when it is back
        Redis does not take it unready; tried again soon. The subscription is not to blame
        it does not come back  within `PATIENCE_SECONDS`: overdue, and unready. So a deaf
                               subscription is noticed within interval + patience

    An overdue canary may be lost, or sit in a queue behind a burst that this worker has not read
    yet. A new link cures the first and would, in the second case, throw away all of that burst. So
    the subscription is asked for a milestone: what Redis had said before it has been delivered
    when it is reached. The canary came back meanwhile: fresh again, however late. It did not: it
    is lost, and the subscription gets a new link. The milestone itself does not come: Redis is
    silent, which the subscription notices by itself, or the worker is still reading.

A canary is a nonce. What comes back and is not the one that is out, an older one or somebody
else's with the same worker id, is ignored.
"""

import os
from collections.abc import Callable
from typing import Final, NoReturn

import trio

from trioserver.errors import RedisError
from trioserver.logs import get_logger
from trioserver.rate_limit import RateLimited
from trioserver.redis_link import RedisLink
from trioserver.subscription import Subscription

INTERVAL_SECONDS: Final = 5.0
PATIENCE_SECONDS: Final = 2.0

RETRY_SECONDS: Final = 1.0
"""After Redis did not take a canary."""

REPORT_SECONDS: Final = 60.0
"""At most one log line per this time about canaries that Redis did not take."""

# Shown to everybody who asks for readiness: fixed words, no addresses and no errors.
LINK_DOWN: Final = "redis link is down"
NOT_YET: Final = "no canary has come back yet"
OVERDUE: Final = "canary is overdue"
REFUSED: Final = "redis does not take the canary"

_log = get_logger()


class Canary:
    """One worker's canary.

    Wire it up: give `channel`'s messages to `returned`, and call `link_changed` whenever the
    subscription says that it went up or down.

    Args:
        link: The way out.
        subscription: The way back.
        worker_id: Unique among the workers on this Redis; part of the channel's name.
        prefix: Put before the channel's name, as before every other.
        interval: Seconds between two canaries.
        patience: Seconds within which one must be back.
        on_change: Called whenever `fresh` has flipped.

    Attributes:
        channel: Where its messages arrive.
        fresh: Whether the latest one came back, and the one that is out is not overdue.
        why: Why not: one of the fixed phrases above; empty if fresh.
        round_trip: Seconds that the latest one took; None before the first.
    """

    def __init__(
        self,
        link: RedisLink,
        subscription: Subscription,
        worker_id: str,
        *,
        prefix: str = "",
        interval: float = INTERVAL_SECONDS,
        patience: float = PATIENCE_SECONDS,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.channel = f"{prefix}canary:{worker_id}".encode()
        self.fresh = False
        self.why = LINK_DOWN
        self.round_trip: float | None = None
        self._link = link
        self._subscription = subscription
        self._interval = interval
        self._patience = patience
        self._on_change = on_change
        self._nonce = b""
        """The one that is out; empty if none is."""
        self._sent = 0.0
        self._seen: float | None = None
        """When the latest one came back."""
        self._changed = trio.Event()
        """Set when the subscription went up or down."""
        self._news = trio.Event()
        """Set when that happened, or the one that is out came back, or cannot come any more."""
        self._quiet = RateLimited(REPORT_SECONDS)

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        """Send canaries until cancelled. Started at once, fresh or not.

        Cancellation:
            The channel is released.
        """
        task_status.started()
        try:
            while True:
                batch = self._subscription.follow(self.channel)
                if batch is not None:
                    await batch.wait()
                self._changed = trio.Event()
                pause = await self._send_one()
                # Cut short by a change: then the next one is due now.
                with trio.move_on_after(pause):
                    await self._changed.wait()
        finally:
            self._nonce = b""
            self._subscription.release(self.channel)

    def returned(self, payload: bytes, now: float) -> None:
        """Take a message from `channel`; ``now`` is Trio's clock."""
        if payload != self._nonce or not payload:
            return
        self._nonce = b""
        self.round_trip = now - self._sent
        self._seen = now
        self._news.set()
        if self._subscription.up:
            self._set("")

    def link_changed(self) -> None:
        """Notice that the subscription went up or down."""
        if not self._subscription.up:
            self._set(LINK_DOWN)
        elif not self.fresh:
            self._set(NOT_YET)
        self._news.set()
        self._changed.set()

    def age(self, now: float) -> float | None:
        """Return the seconds since one came back; None if none ever did."""
        return None if self._seen is None else now - self._seen

    async def _send_one(self) -> float:
        """Send a canary and see; return how long to wait before the next."""
        self._news = trio.Event()
        self._nonce = os.urandom(16).hex().encode()
        self._sent = trio.current_time()
        deadline = self._sent + self._patience
        try:
            await self._link.execute(b"PUBLISH", self.channel, self._nonce, timeout=self._patience)
        except RedisError as error:
            self._nonce = b""
            self._refused(error)
            return min(RETRY_SECONDS, self._interval)
        with trio.move_on_at(deadline):
            await self._news.wait()
        if not self._news.is_set():
            await self._overdue()
        if not self._nonce:
            return max(0.0, self._sent + self._interval - trio.current_time())
        # Lost together with a link that ended meanwhile, it says nothing about the new one.
        self._nonce = b""
        return 0.0

    async def _overdue(self) -> None:
        """Wait until it is clear whether it is lost or only late."""
        self._unfit(OVERDUE)
        lost = False

        def reached() -> None:
            nonlocal lost
            lost = True
            self._news.set()

        if not self._subscription.milestone(reached):
            return
        await self._news.wait()
        # Set by the milestone, it leaves no other reason for the canary to be still out.
        if lost and self._nonce and not self._changed.is_set():
            self._subscription.reconnect("canary lost")

    def _refused(self, error: RedisError) -> None:
        self._unfit(REFUSED)
        held_back = self._quiet.due(REFUSED, trio.current_time())
        if held_back is not None:
            _log.warning(REFUSED, problem=str(error), held_back=held_back)

    def _unfit(self, why: str) -> None:
        """Say why it is not fresh, unless a better reason is known."""
        if self._subscription.up:
            self._set(why)

    def _set(self, why: str) -> None:
        self.why = why
        fresh = not why
        if fresh != self.fresh:
            self.fresh = fresh
            self._on_change()
