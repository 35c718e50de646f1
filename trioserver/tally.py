"""What one process counts: plain integers, so that counting costs the hot path next to nothing.

Hot code does ``tally.messages_out += 1`` and nothing else. What the numbers are called outside is
`metric_families`' business, how they get there that of `metrics`.
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

import attrs

from trioserver.errors import CloseReason

OTHER: Final = "other"
"""The member of a label set that stands for whatever is not in it."""

ERROR_CODES: Final = (
    "bad_json",
    "bad_message",
    "unknown_type",
    "unauthenticated",
    "already_authenticated",
    "rate_limited",
    "invalid_token",
    "unavailable",
    "forbidden",
    "too_many_topics",
    OTHER,
)
"""Values of ``code`` in the ``error`` message, as labels."""

REFUSAL_STATUSES: Final = (
    *("400", "401", "403", "404", "405", "408", "426", "429", "431", "503"),
    OTHER,
)
"""HTTP statuses of handshakes that were refused before the upgrade."""

AUTH_OUTCOMES: Final = ("ok", "missing", "invalid", "expired", "revoked", "unknown_key")
"""How the check of a client's credentials ended; ``missing``: it left without showing any."""

PUBLISHED_OUTCOMES: Final = (
    *("accepted", "scheduled", "duplicate", "limited", "refused", "unavailable"),
    *("delivered", "nobody", "malformed"),
)
"""What the API answered to a publisher, once per recipient; and what became of a publication in one
worker, where ``nobody`` is: no connection here took it."""

DELIVERY_SOURCES: Final = ("ephemeral", "live", "backlog")
"""Where a delivered notification came from: not kept at all, just published, or read later."""

GAP_REASONS: Final = ("trimmed", "expired", "epoch", "failover", OTHER)
"""Why something was lost to a client."""

SLOW_OUTCOMES: Final = ("disconnect", "drop_oldest", "conflate", "spill")
"""What becomes of clients that do not keep up: connections ended, notifications dropped or replaced
by a newer one, times a stream was left in the ledger for a while."""

HTTP_PATHS: Final = (
    *("/", "/healthz", "/readyz", "/health", "/metrics"),
    *("/api/v1/notifications", "/api/v1/notifications/{id}"),
    OTHER,
)
HTTP_STATUSES: Final = (
    *("200", "202", "400", "401", "403", "404", "405", "408", "409", "413", "415"),
    *("417", "422", "429", "431"),
    *("500", "503"),
    OTHER,
)

# From the few microseconds of one message to the stall of a whole loop.
_LATENCY_BOUNDS: Final = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)

# From the millisecond of a live connection to the week that the ledger keeps.
_AGE_BOUNDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0),
    *(600.0, 3600.0, 86400.0, 604800.0),
)

# From a page that was reloaded at once to a tab that stayed open all day.
_DURATION_BOUNDS: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)


def _zeros(labels: Iterable[str]) -> dict[str, int]:
    return dict.fromkeys(labels, 0)


@attrs.define(eq=False)
class Buckets:
    """A histogram in plain integers. ``counts[i]`` is what was at most ``bounds[i]``, not more."""

    bounds: tuple[float, ...]
    counts: list[int] = attrs.field(init=False)
    total: float = 0.0

    def __attrs_post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, amount: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.total += amount


@attrs.define(eq=False)
class Tally:
    """The counts of one process since it started. Written from one thread.

    Dictionaries are closed label sets: a key that is not there is a bug of ours. Where a label may
    come from outside the table, the methods put it under `OTHER`.
    """

    connections: int = 0
    """WebSocket connections that are open now."""

    users: int = 0
    """Distinct users who have a connection to this process now."""

    opened: int = 0
    """WebSocket connections ever opened."""

    closes: dict[str, int] = attrs.field(factory=lambda: _zeros(CloseReason.labels()))
    """Connections ended, by `CloseReason.label`."""

    durations: Buckets = attrs.field(factory=lambda: Buckets(_DURATION_BOUNDS))
    """How long ended connections had lasted, in seconds."""

    shutdown_seconds: float = 0.0
    """How long the drain of this process has taken until now; 0 while it serves."""

    refusals: dict[str, int] = attrs.field(factory=lambda: _zeros(REFUSAL_STATUSES))
    """Handshakes refused before the upgrade, by HTTP status."""

    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    """On WebSocket connections, after and before the upgrade, frames included."""

    message_latency: Buckets = attrs.field(factory=lambda: Buckets(_LATENCY_BOUNDS))
    """Seconds from a client's message to the answer in its outbox, once per answering write."""

    errors: dict[str, int] = attrs.field(factory=lambda: _zeros(ERROR_CODES))
    """``error`` messages sent, by code."""

    auth: dict[str, int] = attrs.field(factory=lambda: _zeros(AUTH_OUTCOMES))
    """Credentials checked, by outcome."""

    published: dict[str, int] = attrs.field(factory=lambda: _zeros(PUBLISHED_OUTCOMES))
    """Publications on a user's or the broadcast channel, by what became of them here."""

    delivery: Buckets = attrs.field(factory=lambda: Buckets(_LATENCY_BOUNDS))
    """Seconds from a notification's arrival to the last socket here that it was written to."""

    notifications_delivered: dict[str, int] = attrs.field(factory=lambda: _zeros(DELIVERY_SOURCES))
    """Notifications accepted by an outbox, once per connection."""

    failed: int = 0
    """Notifications refused by an outbox (full, or closed), once per connection."""

    notification_age: Buckets = attrs.field(factory=lambda: Buckets(_AGE_BOUNDS))
    """Seconds from a notification's acceptance to the proof that a client has received it."""

    gaps: dict[str, int] = attrs.field(factory=lambda: _zeros(GAP_REASONS))
    """Gaps announced to clients, by reason."""

    redeliveries: int = 0
    """Times a client was sent again what it had not acknowledged in time."""

    resumed: int = 0
    """Connections that went on where their device or their position had stopped."""

    schedule_settled: int = 0
    """What the scheduler has delivered, expired or reported as undelivered."""

    schedule_failures: int = 0
    """Rounds of the scheduler in which not every partition was served."""

    chat_sessions: int = 0
    """Connections on chat paths that are open now."""

    chat_messages: int = 0
    """Messages counted on chat sessions, and answered."""

    topic_subscriptions: int = 0
    """Topics that connections are subscribed to now, each once per connection."""

    topic_publishes: int = 0
    """What clients have asked to be published to topics."""

    slow_consumers: dict[str, int] = attrs.field(factory=lambda: _zeros(SLOW_OUTCOMES))
    """What clients did without that did not keep up, by policy."""

    receipts_dropped: int = 0
    """Reports to the ledger that were given up because too many waited."""

    notifications_malformed: int = 0
    """Publications on a user's or the broadcast channel that are no notifications."""

    redis_messages: int = 0
    """Publications received from Redis."""

    redis_reconnects: int = 0
    """Times the subscription's connection to Redis was made anew."""

    redis_latency: Buckets = attrs.field(factory=lambda: Buckets(_LATENCY_BOUNDS))
    """Seconds that requests to Redis took, if they were answered."""

    canary_age: float = 0.0
    """Seconds since a message of our own last came back through Redis."""

    outbox_bytes: int = 0
    """Bytes accepted for clients and not yet in the kernel."""

    loop_lag: float = 0.0
    """Seconds by which the event loop was late at the last tick."""

    log_lines_dropped: int = 0
    """Log lines that could not be written."""

    http: dict[tuple[str, str], int] = attrs.field(
        factory=lambda: dict.fromkeys(itertools.product(HTTP_PATHS, HTTP_STATUSES), 0)
    )
    """HTTP requests answered, by path and status."""

    bad_metric_files: int = 0
    """Metric files that are none and were set aside."""

    unread_metric_files: int = 0
    """Times a metric file could not be read for the moment."""

    def closed(self, reason: CloseReason, seconds: float) -> None:
        """Count the end of a connection that lasted so many seconds."""
        self.closes[reason.label] += 1
        self.durations.observe(seconds)

    def gap(self, reason: str) -> None:
        """Count a gap that was announced."""
        self.gaps[reason if reason in self.gaps else OTHER] += 1

    def refused(self, status: int) -> None:
        """Count a handshake refused before the upgrade."""
        label = str(status)
        self.refusals[label if label in self.refusals else OTHER] += 1

    def error(self, code: str) -> None:
        """Count an ``error`` message."""
        self.errors[code if code in self.errors else OTHER] += 1

    def answered(self, path: str, status: int) -> None:
        """Count an HTTP request that was answered."""
        label = str(status)
        key = (
            path if path in HTTP_PATHS else OTHER,
            label if label in HTTP_STATUSES else OTHER,
        )
        self.http[key] += 1
