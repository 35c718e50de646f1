"""What is counted: plain integers in the hot path, written out once a second.

A `Tally` is the counts of one process. Hot code does ``tally.messages_out += 1`` and nothing else.
An `Exporter` copies the tally into the process's metric files, and the gateway adds up the files of
all processes when it is scraped. `FAMILIES` is the one table of names, types and label sets; label
sets are closed and every member is there from the start, because an untouched series would be
absent and no alert on it could ever fire. Never a user, path of a client, origin or address.

Counters in the files never go down: what the predecessor in the same slot and generation had
counted is added to the tally's own numbers. Gauges start anew, and are looked at only while their
process lives.
"""

import contextlib
import itertools
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

import attrs

from trioserver import metric_files
from trioserver.errors import CloseReason

OTHER: Final = "other"
"""The member of a label set that stands for whatever is not in it."""

ERROR_CODES: Final = (
    "bad_json",
    "bad_message",
    "unknown_type",
    "unauthenticated",
    "already_authenticated",
    "too_many",
    "unavailable",
    OTHER,
)
"""Values of ``code`` in the ``error`` message, as labels."""

REFUSAL_STATUSES: Final = (
    *("400", "401", "403", "404", "405", "408", "426", "429", "431", "503"),
    OTHER,
)
"""HTTP statuses of handshakes that were refused before the upgrade."""

AUTH_OUTCOMES: Final = ("ok", "missing", "invalid", "expired")
"""How the check of a client's credentials ended."""

DELIVERY_SOURCES: Final = ("ephemeral",)
"""Where a delivered notification came from."""

HTTP_PATHS: Final = ("/", "/healthz", "/readyz", "/health", "/metrics", OTHER)
HTTP_STATUSES: Final = ("200", "404", "405", "431", "500", "503", OTHER)

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

    refusals: dict[str, int] = attrs.field(factory=lambda: _zeros(REFUSAL_STATUSES))
    """Handshakes refused before the upgrade, by HTTP status."""

    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    """On WebSocket connections, after and before the upgrade, frames included."""

    errors: dict[str, int] = attrs.field(factory=lambda: _zeros(ERROR_CODES))
    """``error`` messages sent, by code."""

    auth: dict[str, int] = attrs.field(factory=lambda: _zeros(AUTH_OUTCOMES))
    """Credentials checked, by outcome."""

    notifications_delivered: dict[str, int] = attrs.field(factory=lambda: _zeros(DELIVERY_SOURCES))
    """Notifications accepted by an outbox, once per connection."""

    failed: int = 0
    """Notifications refused by an outbox (full, or closed), once per connection."""

    notifications_malformed: int = 0
    """Publications on a user's or the broadcast channel that are no notifications."""

    redis_messages: int = 0
    """Publications received from Redis."""

    redis_reconnects: int = 0
    """Times the subscription's connection to Redis was made anew."""

    redis_ping_seconds: float = 0.0
    """How long Redis took to answer the last ping."""

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
    """Metric files that could not be read and were set aside."""

    def closed(self, reason: CloseReason, seconds: float) -> None:
        """Count the end of a connection that lasted so many seconds."""
        self.closes[reason.label] += 1
        self.durations.observe(seconds)

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


Kind = Literal["counter", "histogram", "gauge_livesum", "gauge_livemax"]
"""Type of a family, and the beginning of its file's name.

``livesum`` adds up the gauges of living processes, ``livemax`` takes the worst of them.
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
    _counters(
        "websocket_errors_total", "Error messages sent to clients.", "code", lambda t: t.errors
    ),
    _counters("auth_total", "Credentials checked, by outcome.", "outcome", lambda t: t.auth),
    _counters(
        "notifications_delivered_total",
        "Notifications accepted for a connection, by where they came from.",
        "source",
        lambda t: t.notifications_delivered,
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
    _worst(
        "redis_ping_seconds",
        "How long Redis took to answer the last ping; the slowest process.",
        lambda t: t.redis_ping_seconds,
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
        "Metric files that could not be read and were set aside.",
        lambda t: t.bad_metric_files,
    ),
)
"""Every metric that processes write to files. The gateway adds what only it can know."""


class Exporter:
    """Copies a tally into this process's metric files.

    The caller flushes once a second and once more at the end, then closes.
    """

    __slots__ = ("_sheets", "_tally", "problem")

    def __init__(self, tally: Tally, directory: Path, identity: str) -> None:
        """Create the files, or take over those of the predecessor under the same identity.

        Never fails because of the disk: a process that cannot be measured serves all the same.
        What is wrong is in `problem` then, for the log.

        Args:
            tally: What to copy.
            directory: Where the files of all processes are.
            identity: ``slot.generation``, such as ``w0.1`` or ``gateway.1``, without underscores.
        """
        if "_" in identity or "/" in identity:
            raise ValueError(f"not an identity for metric files: {identity!r}")
        self._tally = tally
        self._sheets: list[_Sheet] = []
        self.problem = ""
        """Why there are no files, or not all of them; empty if all is well."""
        for kind in dict.fromkeys(family.kind for family in FAMILIES):
            families = tuple(family for family in FAMILIES if family.kind == kind)
            path = directory / f"{kind}_{identity}{metric_files.SUFFIX}"
            try:
                sheet = _Sheet(path, families, goes_on=not kind.startswith("gauge"))
            except OSError as error:
                self.problem = f"{path}: {error.strerror}"
            else:
                self._sheets.append(sheet)

    def flush(self) -> None:
        """Write out what has changed: some 10 µs, and no system call."""
        for sheet in self._sheets:
            sheet.flush(self._tally)

    def close(self) -> None:
        """Write out the last counts and take the gauges away, which are nobody's from now on.

        Idempotent. The files of the counters stay: what was counted was counted.
        """
        self.flush()
        for sheet in self._sheets:
            sheet.close()
        self._sheets = []


class _Sheet:
    """One file: its families in order, what came before us, and what was written last."""

    __slots__ = ("_base", "_families", "_file", "_goes_on", "_last")

    def __init__(self, path: Path, families: tuple[Family, ...], *, goes_on: bool) -> None:
        self._families = families
        self._goes_on = goes_on
        keys = [key for family in families for key in family.keys()]  # noqa: SIM118 - not a dict
        before = _predecessor(path) if goes_on else {}
        self._base = [before.pop(key, 0.0) for key in keys]
        self._last = [0.0] * len(keys)
        # What is left was counted by other code under this identity: it is kept, after ours.
        values = dict(zip(keys, self._base, strict=True)) | before
        self._file = metric_files.MetricFile(path, values)

    def flush(self, tally: Tally) -> None:
        last = self._last
        values = (value for family in self._families for value in family.read(tally))
        for index, value in enumerate(values):
            if value != last[index]:
                last[index] = value
                self._file.store(index, self._base[index] + value)

    def close(self) -> None:
        self._file.close()
        if not self._goes_on:
            # Nobody can say any more that it is ours: see metric_files.is_owned.
            with contextlib.suppress(OSError):
                self._file.path.unlink()


def _predecessor(path: Path) -> dict[str, float]:
    """Return what an earlier process of the same identity has counted, as far as can be known."""
    try:
        return metric_files.read(path)
    except metric_files.BadMetricFile:
        metric_files.set_aside(path)
    except OSError:
        pass
    return {}
