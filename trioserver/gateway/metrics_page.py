"""The metrics pages: what was added up, as text for Prometheus and as JSON."""

from collections.abc import Iterable
from typing import Final

import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import Metric, Sample
from prometheus_client.registry import Collector

from trioserver.gateway.scrape import Scrape, Series, Totals
from trioserver.health import timestamp
from trioserver.metric_files import Cell

# The plain format only: OpenMetrics forbids a gauge that is called websocket_connections_total.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

SERVICE: Final = "trioserver"


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


class _Collected(Collector):
    """Metrics that have been collected already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _metric(family: Totals) -> Metric:
    metric = Metric(family.name, family.help, family.type)
    rows = _cumulated(family) if family.type == "histogram" else family.cells
    metric.samples = [
        Sample(series.name, dict(series.labels), cell.value) for series, cell in rows.items()
    ]
    return metric


def _cumulated(family: Totals) -> dict[Series, Cell]:
    """Return a histogram as scrapers want it: each bucket holds all below, and there is a count.

    In the files each bucket stands for itself, so that files can be added up.
    """
    rows: dict[Series, Cell] = {}
    counts: dict[tuple[tuple[str, str], ...], float] = {}
    for series, cell in sorted(family.cells.items(), key=lambda row: _edge(row[0])):
        others = tuple(label for label in series.labels if label[0] != "le")
        if others == series.labels:
            rows[series] = cell  # the sum
        else:
            counts[others] = counts.get(others, 0.0) + cell.value
            rows[series] = Cell(counts[others])
    return rows | {
        Series(family.name, f"{family.name}_count", others): Cell(count)
        for others, count in counts.items()
    }


def _edge(series: Series) -> float:
    return float(dict(series.labels).get("le", "+Inf"))
