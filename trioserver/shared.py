"""What all connections of a worker share: its machinery, its limits, its counts."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from trioserver.auth import Verifier
from trioserver.clock import Stamp
from trioserver.deflate import Compressor
from trioserver.envelope import Entry
from trioserver.errors import CloseReason
from trioserver.hub import Hub
from trioserver.ledger import Command, Page, Rules
from trioserver.outbox import OutboxLimits
from trioserver.pump import Pump
from trioserver.receipts import Receipts
from trioserver.tally import Tally
from trioserver.track import Track

if TYPE_CHECKING:
    from trioserver.connection import Connection

JITTER: Final = 0.1
"""Pings and heartbeats come at their interval ± this share, so that they spread out."""

PAGE_BYTES: Final = 256 << 10
"""Of the ledger in one go, if outboxes are large enough."""


class Followed(Protocol):
    """Who waits for a topic."""

    def followed(self) -> None:
        """Take note that Redis has confirmed it."""


class Pending(Protocol):
    """Topics asked for and not confirmed yet."""

    def notify(self, waiter: Followed) -> None:
        """Call ``waiter.followed()`` when they are confirmed."""

    def forget(self, waiter: Followed) -> None:
        """Do not call it any more; idempotent."""


class Follower(Protocol):
    """Who asks Redis for topics; both synchronous and idempotent."""

    def follow(self, channel: bytes) -> Pending | None:
        """Ask for a topic; None if it is confirmed already."""

    def release(self, channel: bytes) -> None:
        """Let go of a topic, lazily."""


class Waiting(Protocol):
    """Who waits for a page of the ledger."""

    def question(self, *, everyone: bool) -> Command | None:
        """Return what to ask now; None if it is not wanted any more."""

    def answered(self, page: Page, *, everyone: bool) -> None:
        """Take the page."""


class Asked(Protocol):
    """Who reads the ledger's streams."""

    def want(self, waiter: Waiting, *, everyone: bool) -> None:
        """Ask ``waiter.question``, and give the page to ``waiter.answered``; synchronous."""


@attrs.frozen(kw_only=True)
class Pace:
    """The intervals and deadlines of a connection, in seconds; 0 turns each off."""

    ping_interval: float
    pong_wait: float
    heartbeat_interval: float
    idle_timeout: float
    """Ends silent connections, but only when there are no pings: their answers are enough."""
    write_wait: float
    """How long a client may take nothing of what waits for it."""
    auth_timeout: float
    ack_wait: float = 0.0
    """How long a client may take to acknowledge before it is sent again what it has not."""
    max_redeliveries: int = 0
    """How often in a row that happens; the rest is for its next connection."""


@attrs.define(eq=False, kw_only=True)
class Shared:
    """What all connections of a worker share."""

    pump: Pump
    hub: Hub
    follower: Follower
    reader: Asked
    receipts: Receipts
    rules: Rules
    verifier: Verifier
    tally: Tally
    pace: Pace
    outbox_limits: OutboxLimits
    max_message: int
    user_topic: Callable[[str], bytes]
    broadcast_topic: bytes
    wall: Callable[[], float]
    """Seconds since 1970."""
    log_bug: Callable[[str, BaseException], None]
    """Called with what was being done and the bug."""
    log_end: Callable[["Connection", CloseReason], None]
    connections: "set[Connection]" = attrs.field(factory=set)
    """Those that have begun and are not released."""
    blocked: "set[Connection]" = attrs.field(factory=set)
    """Connections whose outbox waits for the socket: usually few or none."""
    compressor: Compressor | None = None
    """Compresses notifications for those who negotiated it; None if nobody may."""
    stamp: Stamp = attrs.field(factory=Stamp)
    rng: random.Random = attrs.field(factory=random.Random)
    head: Track[Entry] = attrs.field(factory=Track)
    """Where everyone's stream stands for those who are up to date."""

    @property
    def page_bytes(self) -> int:
        """Return how many bytes of the ledger a client may be sent in one go."""
        return min(PAGE_BYTES, self.outbox_limits.largest // 4)

    def jittered(self, interval: float) -> float:
        """Return ``interval`` ± `JITTER`."""
        return interval * (1 + JITTER * (2 * self.rng.random() - 1))
