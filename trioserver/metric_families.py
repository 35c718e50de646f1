"""The one table of metrics that processes count: names, types, label sets, meaning.

Label sets are closed and every member is there from the start, because an untouched series would
be absent and no alert on it could ever fire. Never a user, a path of a client, an origin or an
address. What is not counted but looked up when somebody asks is in `gateway.pool_metrics`.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal

import attrs

from trioserver.tally import HTTP_PATHS, HTTP_STATUSES, Buckets, Tally

Kind = Literal["counter", "histogram", "gauge_livesum", "gauge_livemax", "gauge_mostrecent"]
"""Type of a family, and the beginning of its file's name.

``livesum`` adds up the gauges of living processes, ``livemax`` takes the worst of them;
``mostrecent`` is what was set last, by whomever, dead or alive.
"""


@attrs.frozen(kw_only=True)
class Family:
    """One metric: its name, what it means, its closed label set, and where its values are."""

    name: str
    """As scraped."""

    kind: Kind

    help: str
    """One sentence."""

    labels: tuple[str, ...] = ()
    """Label names."""

    members: tuple[tuple[str, ...], ...] = ((),)
    """Every combination of label values, in the order of `read`."""

    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, in seconds, without the last, which is infinite."""

    read: Callable[[Tally], Iterable[float]]
    """The values now. A histogram gives its buckets and then its sum."""

    @property
    def type(self) -> str:
        """``counter``, ``gauge`` or ``histogram``."""
        return self.kind.partition("_")[0]

    def keys(self) -> list[str]:
        """Return the key of each value in a metric file."""
        if self.kind == "histogram":
            edges = (*(str(bound) for bound in self.bounds), "+Inf")
            buckets = [self._key(f"{self.name}_bucket", {"le": edge}) for edge in edges]
            return [*buckets, self._key(f"{self.name}_sum", {})]
        return [
            self._key(self.name, dict(zip(self.labels, member, strict=True)))
            for member in self.members
        ]

    def _key(self, sample: str, labels: Mapping[str, str]) -> str:
        # A counter's family goes without _total in this format, a gauge's name is what it is.
        family = self.name.removesuffix("_total") if self.kind == "counter" else self.name
        return json.dumps([family, sample, labels, self.help], sort_keys=True)


def _counter(name: str, text: str, read: Callable[[Tally], float]) -> Family:
    return Family(name=name, kind="counter", help=text, read=lambda tally: (read(tally),))


def _counters(
    name: str, text: str, label: str, read: Callable[[Tally], Mapping[str, int]]
) -> Family:
    return Family(
        name=name,
        kind="counter",
        help=text,
        labels=(label,),
        members=tuple((member,) for member in read(Tally())),
        read=lambda tally: read(tally).values(),
    )


def _sum(name: str, text: str, read: Callable[[Tally], float]) -> Family:
    return Family(name=name, kind="gauge_livesum", help=text, read=lambda tally: (read(tally),))


def _worst(name: str, text: str, read: Callable[[Tally], float]) -> Family:
    return Family(name=name, kind="gauge_livemax", help=text, read=lambda tally: (read(tally),))


def _latest(name: str, text: str, read: Callable[[Tally], float]) -> Family:
    return Family(name=name, kind="gauge_mostrecent", help=text, read=lambda tally: (read(tally),))


def _buckets(name: str, text: str, read: Callable[[Tally], Buckets]) -> Family:
    return Family(
        name=name,
        kind="histogram",
        help=text,
        bounds=read(Tally()).bounds,
        read=lambda tally: (*read(tally).counts, read(tally).total),
    )


FAMILIES: Final = (
    _sum("websocket_connections", "Open WebSocket connections.", lambda t: t.connections),
    _sum(
        "websocket_connections_total",
        "Open WebSocket connections: an older name, a gauge in spite of it.",
        lambda t: t.connections,
    ),
    _sum(
        "active_connections", "Open WebSocket connections: an older name.", lambda t: t.connections
    ),
    _sum(
        "websocket_users",
        "Users with an open connection; one who is connected to two workers counts twice.",
        lambda t: t.users,
    ),
    _counter(
        "websocket_connections_opened_total",
        "WebSocket connections ever opened.",
        lambda t: t.opened,
    ),
    _counters(
        "websocket_closes_total", "Connections ended, by reason.", "reason", lambda t: t.closes
    ),
    _buckets(
        "websocket_connection_duration_seconds",
        "How long connections lasted that have ended.",
        lambda t: t.durations,
    ),
    _latest(
        "websocket_shutdown_time_seconds",
        "How long the latest drain of a worker took, or takes by now.",
        lambda t: t.shutdown_seconds,
    ),
    _counters(
        "websocket_refusals_total",
        "Handshakes refused before the upgrade, by HTTP status.",
        "status",
        lambda t: t.refusals,
    ),
    _counters(
        "websocket_messages_total",
        "Messages received from (in) and sent to (out) clients.",
        "direction",
        lambda t: {"in": t.messages_in, "out": t.messages_out},
    ),
    _counter(
        "messages_total", "Messages received from clients: an older name.", lambda t: t.messages_in
    ),
    _counters(
        "websocket_bytes_total",
        "Bytes received from (in) and sent to (out) clients.",
        "direction",
        lambda t: {"in": t.bytes_in, "out": t.bytes_out},
    ),
    _buckets(
        "websocket_message_latency_seconds",
        "From a client's message in the worker to its answer offered to the socket; one in eight.",
        lambda t: t.message_latency,
    ),
    _counters(
        "websocket_errors_total", "Error messages sent to clients.", "code", lambda t: t.errors
    ),
    _counters(
        "auth_total",
        "Credentials checked, by outcome; missing: the client left without showing any.",
        "outcome",
        lambda t: t.auth,
    ),
    _counters(
        "notifications_published_total",
        "Publications by outcome: what workers received (each that follows counts its own), and"
        " what the API answered.",
        "outcome",
        lambda t: t.published,
    ),
    _buckets(
        "notification_delivery_seconds",
        "From a notification's arrival in a worker to its offer to the last socket there.",
        lambda t: t.delivery,
    ),
    _counters(
        "notifications_delivered_total",
        "Notifications accepted for a connection, by where they came from.",
        "source",
        lambda t: t.notifications_delivered,
    ),
    _buckets(
        "notification_age_seconds",
        "From a notification's acceptance to the proof that a client has received it.",
        lambda t: t.notification_age,
    ),
    _counters(
        "notification_gaps_total",
        "Gaps announced to clients: something was lost to them, and why.",
        "reason",
        lambda t: t.gaps,
    ),
    _counter(
        "notifications_redelivered_total",
        "Times a client was sent again what it had not acknowledged in time.",
        lambda t: t.redeliveries,
    ),
    _counter(
        "reconnects_total",
        "Connections that went on where their position or their device had stopped.",
        lambda t: t.resumed,
    ),
    _counters(
        "slow_consumers_total",
        "What clients did without that did not keep up, by policy: connections ended, "
        "notifications dropped or replaced by newer ones, streams left in the ledger for a while.",
        "policy",
        lambda t: t.slow_consumers,
    ),
    _sum("chat_sessions", "Open connections on chat sessions.", lambda t: t.chat_sessions),
    _counter(
        "chat_messages_total",
        "Messages counted on chat sessions, and answered.",
        lambda t: t.chat_messages,
    ),
    _sum(
        "topic_subscriptions",
        "Topics that connections are subscribed to, each once per connection.",
        lambda t: t.topic_subscriptions,
    ),
    _counter(
        "topic_publishes_total",
        "What clients have asked to be published to topics.",
        lambda t: t.topic_publishes,
    ),
    _counter(
        "receipts_dropped_total",
        "Receipts that were given up because too many waited for Redis; they cost duplicates.",
        lambda t: t.receipts_dropped,
    ),
    _counter(
        "scheduler_settled_total",
        "What the scheduler has delivered, expired or reported as undelivered.",
        lambda t: t.schedule_settled,
    ),
    _counter(
        "scheduler_failed_rounds_total",
        "Rounds of the scheduler in which not every partition was served.",
        lambda t: t.schedule_failures,
    ),
    _counter(
        "notifications_failed_total",
        "Notifications that a connection's outbox refused.",
        lambda t: t.failed,
    ),
    _counter(
        "notifications_malformed_total",
        "Publications that are no notifications.",
        lambda t: t.notifications_malformed,
    ),
    _counter(
        "redis_messages_received_total",
        "Publications received from Redis.",
        lambda t: t.redis_messages,
    ),
    _counter(
        "redis_reconnects_total",
        "Times a subscription's connection to Redis was made anew.",
        lambda t: t.redis_reconnects,
    ),
    _buckets(
        "redis_latency_seconds",
        "How long requests to Redis took that were answered, the wait for a connection included.",
        lambda t: t.redis_latency,
    ),
    _worst(
        "canary_age_seconds",
        "Age of the last message a worker sent itself through Redis; the worst worker.",
        lambda t: t.canary_age,
    ),
    _sum("outbox_bytes", "Bytes accepted for clients and not yet sent.", lambda t: t.outbox_bytes),
    _worst(
        "event_loop_lag_seconds",
        "How late an event loop was at its last tick; the worst process.",
        lambda t: t.loop_lag,
    ),
    _counter(
        "log_lines_dropped_total",
        "Log lines that could not be written.",
        lambda t: t.log_lines_dropped,
    ),
    Family(
        name="http_requests_total",
        kind="counter",
        help="HTTP requests answered, by path and status.",
        labels=("path", "status"),
        members=tuple(itertools.product(HTTP_PATHS, HTTP_STATUSES)),
        read=lambda tally: tally.http.values(),
    ),
    _counter(
        "metrics_bad_files_total",
        "Metric files that are none and were set aside.",
        lambda t: t.bad_metric_files,
    ),
    _counter(
        "metrics_unread_files_total",
        "Times a metric file could not be read for the moment; its last known counts were used.",
        lambda t: t.unread_metric_files,
    ),
)
"""Every metric that processes write to files. The gateway adds what only it can know."""
