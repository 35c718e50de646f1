"""The metrics page: sums in, a page out that scrapers read."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from trioserver.errors import CloseReason
from trioserver.gateway import metrics_page
from trioserver.gateway.scrape import Scraper
from trioserver.metric_files import Cell, MetricFile
from trioserver.metrics import Exporter, Tally

Samples = dict[tuple[str, ...], float]


def key(family: str, name: str, labels: dict[str, str], text: str = "Words.") -> str:
    """Return a key of a metric file."""
    return json.dumps([family, name, labels, text])


def samples(page: bytes) -> Samples:
    """Return what a scraper reads from a page."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def scraped(directory: Path) -> Samples:
    """Return what a scraper reads of a directory."""
    return samples(metrics_page.prometheus_page(Scraper(directory).scrape()))


@given(
    counts=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.floats(0, 1e6), max_size=5)),
        min_size=1,
        max_size=3,
    )
)
def test_the_library_adds_up_the_same(
    counts: list[tuple[int, list[float]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For any tallies of living processes our page says what prometheus_client's own would."""
    directory = tmp_path_factory.mktemp("metrics")
    exporters = []
    for slot, (number, durations) in enumerate(counts):
        tally = Tally(connections=number, opened=2 * number, canary_age=number / 4)
        # The library leaves one out that was never set.
        tally.shutdown_seconds = number + 0.5
        for seconds in durations:
            tally.closed(CloseReason.NORMAL, seconds)
        exporters.append(Exporter(tally, directory, f"w{slot}.1"))
        exporters[-1].flush()

    ours = scraped(directory)
    library = MultiProcessCollector(None, str(directory))  # type: ignore[no-untyped-call]
    theirs = samples(generate_latest(library))

    assert theirs == pytest.approx(ours)
    for exporter in exporters:
        exporter.close()


def test_two_generations_that_disagree_make_one_page(tmp_path: Path) -> None:
    """A name that is a counter here and a gauge there appears once, as what it was first."""
    MetricFile(tmp_path / "counter_w0.1.db", {key("a", "a", {}): Cell(1.0)}).close()
    gauge = MetricFile(tmp_path / "gauge_livesum_w0.2.db", {key("a", "a", {}): Cell(2.0)})

    page = metrics_page.prometheus_page(Scraper(tmp_path).scrape())

    assert 1 == page.count(b"# TYPE a")
    gauge.close()


def test_a_labelled_histogram_has_buckets_and_a_count_per_label(tmp_path: Path) -> None:
    """Buckets are cumulated within each label value, not across them."""
    values = {
        key("h", "h_bucket", {"le": edge, "source": source}): Cell(float(number))
        for number, (source, edge) in enumerate(
            (source, edge) for source in ("a", "b") for edge in ("+Inf", "10.0", "2.0")
        )
    }
    total = {key("h", "h_sum", {"source": "a"}): Cell(9.5)}
    MetricFile(tmp_path / "histogram_w0.1.db", values | total).close()

    seen = scraped(tmp_path)

    assert 2 == seen["h_bucket", "2.0", "a"]
    assert 3 == seen["h_bucket", "10.0", "a"]
    assert 3 == seen["h_bucket", "+Inf", "a"]
    assert (3, 9.5) == (seen["h_count", "a"], seen["h_sum", "a"])
    assert (5, 12) == (seen["h_bucket", "2.0", "b"], seen["h_count", "b"])
