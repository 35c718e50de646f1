"""Names, types, labels and meanings of metrics: what dashboards and alerts are built on.

A change here is a change for users. If it is meant: ``python -m tests.trioserver.test_metric_names
> tests/trioserver/metrics.golden``, and say so in the changelog.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.trioserver.gateway_process import pool, worker
from trioserver.gateway import metrics_docs, metrics_page
from trioserver.gateway.pool_metrics import POOL_FAMILIES, PoolFamily, pool_metrics
from trioserver.gateway.redis_watch import RedisPing
from trioserver.gateway.scrape import Scraper
from trioserver.gateway.usage import Usage
from trioserver.metrics import FAMILIES, Exporter, Tally

GOLDEN = Path(__file__).with_name("metrics.golden")
DOCS = Path(__file__).parent.parent.parent / "docs" / "metrics.md"

# Promised to those who come from elsewhere; they may be joined by others, but never go.
OLDER_NAMES = {
    "websocket_connections_total": "gauge",
    "active_connections": "gauge",
    "websocket_messages_total": "counter",
    "messages_total": "counter",
    "websocket_message_latency_seconds": "histogram",
    "websocket_connection_duration_seconds": "histogram",
    "websocket_errors_total": "counter",
    "websocket_shutdown_time_seconds": "gauge",
    "http_requests_total": "counter",
}

EVERYTHING = (*FAMILIES, *POOL_FAMILIES)


def a_page() -> str:
    """Return what a pool of two workers shows, all values zero."""
    with tempfile.TemporaryDirectory() as directory:
        exporter = Exporter(Tally(), Path(directory), "w0.1")
        scraped = Scraper(Path(directory)).scrape()
        exporter.close()
    nothing = Usage(cpu_seconds=0.0, resident_bytes=0, open_fds=0)
    roles = ("worker-0", "worker-1", "gateway", "supervisor", "redis")
    more = pool_metrics(
        pool(worker(0), worker(1)), dict.fromkeys(roles, nothing), RedisPing(seconds=None), users=0
    )
    return metrics_page.prometheus_page(scraped, more).decode()


def without_values(page: str) -> str:
    """Return a page as it would be whatever was counted."""
    return re.sub(r"^([^#].*) \S+$", r"\1", page, flags=re.MULTILINE)


def test_names_types_labels_and_help_stay_as_they_are() -> None:
    """Every line of a page, but for the values, is what it was."""
    assert GOLDEN.read_text(encoding="utf-8") == without_values(a_page())


def test_older_names_are_kept() -> None:
    """Names known from elsewhere are there, with their types, a gauge called _total included."""
    types = {family.name: family.type for family in EVERYTHING}

    assert OLDER_NAMES.items() <= types.items()


def test_a_page_can_be_parsed() -> None:
    """A parser finds every family once, with its type."""
    families = list(text_string_to_metric_families(a_page()))

    names = [family.name + ("_total" if family.type == "counter" else "") for family in families]
    assert sorted(family.name for family in EVERYTHING) == sorted(names)


@pytest.mark.parametrize("family", EVERYTHING, ids=lambda family: family.name)
def test_names_follow_the_conventions(family: PoolFamily) -> None:
    """As a linter wants them: counters end in _total, units are base units, help is a sentence."""
    assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in family.labels)
    assert not {"le", "quantile", "instance", "job"} & set(family.labels)
    if family.name != "websocket_connections_total":  # an older name
        assert (family.type == "counter") == family.name.endswith("_total")
    if family.type == "histogram":
        assert family.name.endswith("_seconds")
    assert not re.search(
        r"_(ms|millis|milliseconds|kb|mb|counter|gauge|count|sum|bucket)(_|$)", family.name
    )
    assert re.fullmatch(r"[A-Z][^\n]+\.", family.help)


def test_a_full_page_is_small() -> None:
    """With 16 workers a page has at most 500 series."""
    series = sum(not line.startswith("#") for line in a_page().splitlines())
    per_worker = 3 + 3

    assert series + 14 * per_worker <= 500


def test_the_page_of_the_documentation() -> None:
    """The page of metrics describes exactly the metrics that exist."""
    # If this fails: python -m trioserver.gateway.metrics_docs > docs/metrics.md
    assert metrics_docs.page() == DOCS.read_text(encoding="utf-8")


def test_the_command_of_the_documentation() -> None:
    """The command that the page names writes that page."""
    command = [sys.executable, "-m", "trioserver.gateway.metrics_docs"]

    printed = subprocess.run(command, check=True, capture_output=True, timeout=30)

    assert metrics_docs.page() == printed.stdout.decode()


if __name__ == "__main__":
    sys.stdout.write(without_values(a_page()))
