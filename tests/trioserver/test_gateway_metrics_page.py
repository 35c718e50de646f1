"""The metrics page: files in, an exact sum out, whatever else lies in the directory."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from trioserver.errors import CloseReason
from trioserver.gateway import metrics_page
from trioserver.metric_files import MetricFile
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
    return samples(metrics_page.prometheus_page(metrics_page.scrape(directory)))


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


def test_only_the_living_have_gauges(tmp_path: Path) -> None:
    """The gauges of a process that is gone are not counted, its counters are."""
    living = Exporter(Tally(connections=2, opened=2), tmp_path, "w0.1")
    living.flush()
    killed = Exporter(Tally(connections=3, opened=3), tmp_path, "w1.1")
    killed.flush()
    del killed  # As a kill does: the files stay, and nobody holds them.

    assert (tmp_path / "gauge_livesum_w1.1.db").exists()
    assert 2 == scraped(tmp_path)["websocket_connections",]
    assert 5 == scraped(tmp_path)["websocket_connections_opened_total",]


def test_a_directory_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    """Without a directory the page is empty, not an error."""
    nothing = metrics_page.scrape(tmp_path / "gone")

    assert b"" == metrics_page.prometheus_page(nothing)
    assert 0 == nothing.total("websocket_connections")
    assert () == nothing.bad_files


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: os.truncate(path, 700), id="torn"),
        pytest.param(lambda path: path.write_bytes(b"\x00" * 4096), id="a hole"),
        pytest.param(lambda path: path.write_bytes(os.urandom(4096)), id="noise"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a directory"),
        pytest.param(lambda path: MetricFile(path, {"{}": 1.0}).close(), id="no key"),
        pytest.param(lambda path: MetricFile(path, {"[1]": 1.0}).close(), id="another key"),
        pytest.param(
            lambda path: MetricFile(path, {key("a b\n", "a_total", {}): 1.0}).close(), id="name"
        ),
        pytest.param(
            lambda path: MetricFile(path, {key("a", "a_total", {'"': "x"}): 1.0}).close(),
            id="label",
        ),
        pytest.param(
            lambda path: MetricFile(path, {key("a", "a_bucket", {"le": "x"}): 1.0}).close(),
            id="edge",
        ),
    ],
)
def test_a_bad_file_is_set_aside_and_the_rest_is_served(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    """Whatever is wrong with one file: it is named, gone in the next scrape, and alone in that."""
    Exporter(Tally(opened=4), tmp_path, "w0.1").flush()
    path = tmp_path / "counter_w1.1.db"
    shutil.copy(tmp_path / "counter_w0.1.db", path)
    spoil(path)

    first = metrics_page.scrape(tmp_path)
    second = metrics_page.scrape(tmp_path)

    assert ("counter_w1.1.db",) == first.bad_files
    assert () == second.bad_files
    assert 4 == first.total("websocket_connections_opened_total")
    assert (tmp_path / "counter_w1.1.db.bad").exists()


def test_a_file_that_goes_away_while_it_is_read_is_no_bad_file(tmp_path: Path) -> None:
    """Its process ended cleanly just now; a link into nowhere looks the same."""
    (tmp_path / "counter_w0.1.db").symlink_to(tmp_path / "gone")
    (tmp_path / "gauge_livesum_w0.1.db").symlink_to(tmp_path / "gone")

    assert () == metrics_page.scrape(tmp_path).bad_files


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    """Files of other kinds, also such as a newer release may have, are neither read nor moved."""
    names = {"summary_w0.1.db", "gauge_livemin_w0.1.db", "notes.txt", "x.db", "counter_w0.1.db.new"}
    for name in names:
        (tmp_path / name).write_bytes(b"")

    assert () == metrics_page.scrape(tmp_path).bad_files
    assert {path.name for path in tmp_path.iterdir()} == names


def test_two_generations_that_disagree_make_one_page(tmp_path: Path) -> None:
    """A name that is a counter here and a gauge there appears once, as what it was first."""
    MetricFile(tmp_path / "counter_w0.1.db", {key("a", "a", {}): 1.0}).close()
    gauge = MetricFile(tmp_path / "gauge_livesum_w0.2.db", {key("a", "a", {}): 2.0})

    page = metrics_page.prometheus_page(metrics_page.scrape(tmp_path))

    assert 1 == page.count(b"# TYPE a")
    gauge.close()


def test_a_labelled_histogram_has_buckets_and_a_count_per_label(tmp_path: Path) -> None:
    """Buckets are cumulated within each label value, not across them."""
    values = {
        key("h", "h_bucket", {"le": edge, "source": source}): float(number)
        for number, (source, edge) in enumerate(
            (source, edge) for source in ("a", "b") for edge in ("+Inf", "10.0", "2.0")
        )
    }
    MetricFile(tmp_path / "histogram_w0.1.db", values | {key("h", "h_sum", {"source": "a"}): 9.5})

    seen = scraped(tmp_path)

    assert 2 == seen["h_bucket", "2.0", "a"]
    assert 3 == seen["h_bucket", "10.0", "a"]
    assert 3 == seen["h_bucket", "+Inf", "a"]
    assert (3, 9.5) == (seen["h_count", "a"], seen["h_sum", "a"])
    assert (5, 12) == (seen["h_bucket", "2.0", "b"], seen["h_count", "b"])


def test_a_scrape_of_many_processes_is_quick(tmp_path: Path) -> None:
    """Forty processes, four files each, are read well within a scrape's patience."""
    for slot in range(40):
        Exporter(Tally(opened=1), tmp_path, f"w{slot}.1").flush()

    assert 40 == scraped(tmp_path)["websocket_connections_opened_total",]
