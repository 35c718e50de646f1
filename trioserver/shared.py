"""What all connections of a worker share: its machinery, its limits, its counts."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from trioserver.auth import Claims, Verifier
from trioserver.board import Board, Limits
from trioserver.buckets import Buckets
from trioserver.clock import Stamp
from trioserver.deflate import Compressor
from trioserver.envelope import Entry
from trioserver.errors import AuthError, CloseReason
from trioserver.hub import Hub
from trioserver.ledger import Command, Page, Rules
from trioserver.outbox import Outbox, OutboxLimits
from trioserver.pump import Pump
from trioserver.receipts import Receipts
from trioserver.revocation import Revoked
from trioserver.session import UNLIMITED
from trioserver.slow_policies import Policies
from trioserver.tally import Tally
from trioserver.track import Track

if TYPE_CHECKING:
    from trioserver.chats import Chats
    from trioserver.connection import Connection
    from trioserver.desk import Desk

JITTER: Final = 0.1
"""Pings and heartbeats come at their interval ± this share, so that they spread out."""

PAGE_BYTES: Final = 256 << 10
"""Of the ledger in one go, if outboxes are large enough."""

UNLIMITED_BOARD: Final = Limits(
    connections=0, address_connections=0, handshakes=0, address_handshakes=0
)

CUT_TO: Final = 0.875
"""Of the budget of all outboxes, what is left when the largest have been cut: a part at once,
because finding them costs a look at every connection."""


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


class Registered(Protocol):
    """Who tells the fleet who is connected here; both synchronous."""

    def enter(self, connection: "Connection") -> None:
        """Register a connection, which may be ended for being one too many."""

    def leave(self, connection: "Connection") -> None:
        """Take it from the register; it was entered."""


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
    revoked: Revoked = attrs.field(factory=Revoked)
    board: Board = attrs.field(factory=lambda: Board.alone(UNLIMITED_BOARD))
    registry: Registered
    chats: "Chats"
    """Counts messages on chat sessions."""
    chat_anonymous: bool = True
    """Whether chat sessions may have no user."""
    desk: "Desk"
    """What the topics of all connections share."""
    policies: Policies = attrs.field(factory=Policies)
    """What becomes of those who do not keep up."""
    rates: Buckets[str] = UNLIMITED
    """How many messages a user may send."""
    requests: Buckets[str] = UNLIMITED
    """How much else a user may ask for; beyond it his connection is not read for a while."""
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
    log_claim: Callable[[str], None] = lambda _: None
    """Called with what is wrong with the claim ``topics`` of a good token; limits its own rate."""
    connections: "set[Connection]" = attrs.field(factory=set)
    """Those that have begun and are not released."""
    excluding: dict[str, Outbox] = attrs.field(factory=dict)
    """Of connections that have published something which they do not want back, by their ids."""
    blocked: "set[Connection]" = attrs.field(factory=set)
    """Connections whose outbox waits for the socket: usually few or none."""
    compressor: Compressor | None = None
    """Compresses notifications for those who negotiated it; None if nobody may."""
    stamp: Stamp = attrs.field(factory=Stamp)
    rng: random.Random = attrs.field(factory=random.Random)
    head: Track[Entry] = attrs.field(factory=Track)
    """Where everyone's stream stands for those who are up to date."""

    def verify(self, token: str) -> Claims:
        """Return the claims of a token that is good and not revoked; counts what came of it.

        If its claim ``topics`` is not understood, the log is told: nobody else would notice.

        Raises:
            AuthError: It is not.
        """
        auth = self.tally.auth
        try:
            claims = self.verifier.verify(token, self.wall())
        except AuthError as error:
            auth[error.outcome] += 1
            raise
        if self.revoked.covers(claims):
            auth["revoked"] += 1
            raise AuthError("the token has been revoked", outcome="revoked")
        auth["ok"] += 1
        if claims.topics.problem:
            self.log_claim(claims.topics.problem)
        return claims

    def cut_largest(self) -> None:
        """Have those shed whose clients have most to take, until all is well within budget."""
        budget = self.outbox_limits.budget
        goal = budget.limit * CUT_TO
        largest = sorted(self.connections, key=lambda one: one.waiting_bytes, reverse=True)
        for connection in largest:
            if budget.used <= goal or not connection.waiting_bytes:
                return
            connection.shed()

    @property
    def page_bytes(self) -> int:
        """Return how many bytes of the ledger a client may be sent in one go."""
        return min(PAGE_BYTES, self.outbox_limits.largest // 4)

    def jittered(self, interval: float) -> float:
        """Return ``interval`` ± `JITTER`."""
        return interval * (1 + JITTER * (2 * self.rng.random() - 1))
