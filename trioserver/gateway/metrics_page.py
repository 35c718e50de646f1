"""The metrics pages: what all processes have counted, added up.

A scrape reads the metric files of every process and of those that went before, so it costs no
worker anything. A file that is empty, torn or no metric file at all is set aside and counted; a
scrape never fails because of one. The gauges of a process that is gone are not looked at.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import attrs
import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import Metric, Sample
from prometheus_client.registry import Collector

from trioserver import metric_files
from trioserver.health import timestamp
from trioserver.metric_files import BadMetricFile
from trioserver.metrics import FAMILIES
from trioserver.status import StatusReply

# The plain format only: OpenMetrics forbids a gauge that is called websocket_connections_total.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

SERVICE: Final = "trioserver"

_KINDS: Final = frozenset(family.kind for family in FAMILIES)
_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_EDGE: Final = re.compile(r"\+Inf|[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")


class Series(NamedTuple):
    """One line of a page."""

    family: str
    name: str
    labels: tuple[tuple[str, str], ...]


@attrs.frozen(kw_only=True)
class Family:
    """Everything under one name, added up over all processes."""

    name: str
    type: str
    """``counter``, ``gauge`` or ``histogram``."""
    help: str
    values: dict[Series, float]


@attrs.frozen(kw_only=True)
class Scrape:
    """What was in the files at one moment."""

    families: Mapping[str, Family]
    bad_files: tuple[str, ...]
    """Names of files that could not be read, and that the next scrape will not see."""

    def total(self, name: str) -> float:
        """Return the sum of everything under the name of a sample; 0 if there is nothing."""
        return sum(
            value
            for family in self.families.values()
            for series, value in family.values.items()
            if series.name == name
        )


def scrape(directory: Path) -> Scrape:
    """Read and add up the metric files of all processes. Blocks: a few milliseconds, and the disk.

    Never fails because of a file. A directory that is not there holds no files.
    """
    families: dict[str, Family] = {}
    bad_files: list[str] = []
    for path in sorted(directory.glob(f"*{metric_files.SUFFIX}")):
        kind = path.stem.rpartition("_")[0]
        # Another kind is not ours, or that of a newer generation beside us.
        if kind not in _KINDS or (kind.startswith("gauge") and not metric_files.is_owned(path)):
            continue
        try:
            _add(families, kind, _read(path))
        except FileNotFoundError:
            continue  # Its process ended just now.
        except (BadMetricFile, OSError):
            bad_files.append(path.name)
            metric_files.set_aside(path)
    return Scrape(families=families, bad_files=tuple(bad_files))


def _read(path: Path) -> list[tuple[Series, str, float]]:
    return [(*_parse(key), value) for key, value in metric_files.read(path).items()]


@functools.lru_cache(maxsize=4096)  # the same few hundred keys in every file and every scrape
def _parse(key: str) -> tuple[Series, str]:
    try:
        family, name, labels, text = _key_decoder.decode(key)
    except msgspec.MsgspecError:
        raise BadMetricFile("a key is not one of a metric") from None
    # Whatever else gets into a name or an edge would break the page.
    if not all(map(_NAME.fullmatch, (family, name, *labels))):
        raise BadMetricFile("a name is not one of a metric")
    if not _EDGE.fullmatch(labels.get("le", "+Inf")):
        raise BadMetricFile("the edge of a bucket is not a number")
    return Series(family, name, tuple(labels.items())), text


_key_decoder: Final = msgspec.json.Decoder(tuple[str, str, dict[str, str], str])


def _add(families: dict[str, Family], kind: str, rows: Iterable[tuple[Series, str, float]]) -> None:
    worst = kind == "gauge_livemax"
    metric_type = kind.partition("_")[0]
    for series, text, value in rows:
        family = families.get(series.family)
        if family is None:
            family = Family(name=series.family, type=metric_type, help=text, values={})
            families[series.family] = family
        values = family.values
        if family.type != metric_type:
            continue  # Two generations disagree about it; one page cannot.
        if worst:
            values[series] = max(values.get(series, value), value)
        else:
            values[series] = values.get(series, 0.0) + value


def prometheus_page(scraped: Scrape, more: Iterable[Metric] = ()) -> bytes:
    """Return the page in Prometheus's plain text format.

    Args:
        scraped: What processes have counted.
        more: What only the gateway knows.
    """
    families = sorted(scraped.families.values(), key=lambda family: family.name)
    return generate_latest(_Collected([*map(_metric, families), *more]))


def json_page(
    scraped: Scrape, *, connections: int, users: int, uptime_seconds: float, now: float
) -> bytes:
    """Return the page for those who ask for JSON; a shape that dashboards already know."""
    return msgspec.json.encode(
        {
            "service": SERVICE,
            "timestamp": timestamp(now),
            "uptime_seconds": int(uptime_seconds),
            "connections": {"active": connections, "total_unique_users": users},
            "messages": {
                "received_from_redis": int(scraped.total("redis_messages_received_total")),
                "sent_to_clients": int(scraped.total("notifications_delivered_total")),
                "failed": int(scraped.total("notifications_failed_total")),
            },
        }
    )


def pool_metrics(reply: StatusReply | None, *, redis_up: bool) -> list[Metric]:
    """Return what no process counts about itself.

    Args:
        reply: The supervisor's word; None while it has not answered, which is not "up".
        redis_up: Whether Redis answered the gateway's last ping.
    """
    ready = reply is not None and reply.ready
    metrics = [
        _gauge("pool_ready", "Whether a client could be served now.", {(): ready}),
        _gauge("redis_up", "Whether Redis answers.", {(): redis_up}),
    ]
    if reply is not None:
        slots = {(("slot", str(worker.slot)),): worker for worker in reply.workers}
        metrics += [
            _gauge(
                "worker_up",
                "Whether the slot has a process.",
                {labels: worker.pid is not None for labels, worker in slots.items()},
            ),
            _gauge(
                "worker_ready",
                "Whether the slot's worker could serve a client now.",
                {labels: worker.ready for labels, worker in slots.items()},
            ),
            _restarts({labels: worker.restarts for labels, worker in slots.items()}),
        ]
    return metrics


class _Collected(Collector):
    """Metrics that have been collected already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


_Labels = tuple[tuple[str, str], ...]


def _gauge(name: str, text: str, values: Mapping[_Labels, float]) -> Metric:
    metric = Metric(name, text, "gauge")
    metric.samples = [Sample(name, dict(labels), value) for labels, value in values.items()]
    return metric


def _restarts(values: Mapping[_Labels, float]) -> Metric:
    metric = Metric("worker_restarts", "How often somebody new had to be started.", "counter")
    metric.samples = [
        Sample("worker_restarts_total", dict(labels), value) for labels, value in values.items()
    ]
    return metric


def _metric(family: Family) -> Metric:
    metric = Metric(family.name, family.help, family.type)
    rows = _cumulated(family) if family.type == "histogram" else family.values
    metric.samples = [
        Sample(series.name, dict(series.labels), value) for series, value in rows.items()
    ]
    return metric


def _cumulated(family: Family) -> dict[Series, float]:
    """Return a histogram as scrapers want it: each bucket holds all below, and there is a count.

    In the files each bucket stands for itself, so that files can be added up.
    """
    rows: dict[Series, float] = {}
    counts: dict[_Labels, float] = {}
    for series, value in sorted(family.values.items(), key=lambda row: _edge(row[0])):
        others = tuple(label for label in series.labels if label[0] != "le")
        if others == series.labels:
            rows[series] = value  # the sum
        else:
            counts[others] = counts.get(others, 0.0) + value
            rows[series] = counts[others]
    return rows | {
        Series(family.name, f"{family.name}_count", others): count
        for others, count in counts.items()
    }


def _edge(series: Series) -> float:
    return float(dict(series.labels).get("le", "+Inf"))
