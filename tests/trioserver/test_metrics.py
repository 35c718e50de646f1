"""Metrics: what is counted is seen, and counters never go down."""

import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.multiprocess import MultiProcessCollector

from trioserver.errors import CloseReason
from trioserver.metric_files import Cell, MetricFile
from trioserver.metrics import Buckets, Exporter, Tally

Samples = dict[tuple[str, ...], float]


def scraped(directory: Path) -> Samples:
    """Return what the library's own collector makes of the files, an independent reader."""
    files = [str(path) for path in directory.glob("*.db")]
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def test_every_series_is_there_from_the_start(tmp_path: Path) -> None:
    """An untouched label value is a zero, not a hole."""
    Exporter(Tally(), tmp_path, "w0.1").flush()

    samples = scraped(tmp_path)

    assert {0.0} == set(samples.values())
    for reason in CloseReason.labels():
        assert ("websocket_closes_total", reason) in samples
    assert ("http_requests_total", "/readyz", "503") in samples
    assert ("websocket_connection_duration_seconds_bucket", "+Inf") in samples


def test_there_are_few_series(tmp_path: Path) -> None:
    """Label sets are closed and small, so a scrape stays small however many clients there are."""
    tally = Tally()
    for number in range(1000):
        tally.error(f"code-{number}")
        tally.refused(number)
        tally.answered(f"/{number}", number)

    Exporter(tally, tmp_path, "w0.1").flush()

    assert len(scraped(tmp_path)) < 350


def test_what_was_counted_is_scraped(tmp_path: Path) -> None:
    """Each field and each method of the tally shows up under its metric."""
    tally = Tally(connections=3, users=2, opened=9, messages_in=4, messages_out=5)
    tally.bytes_in, tally.bytes_out = 6, 7
    tally.redis_messages, tally.redis_reconnects, tally.failed = 8, 1, 2
    tally.notifications_malformed, tally.outbox_bytes = 3, 4096
    tally.canary_age, tally.loop_lag = 1.5, 0.125
    tally.log_lines_dropped, tally.bad_metric_files = 11, 12
    tally.notifications_delivered["ephemeral"] += 13
    tally.published["nobody"] += 14
    tally.shutdown_seconds, tally.unread_metric_files = 7.5, 15
    tally.auth["expired"] += 1
    tally.closed(CloseReason.TOO_SLOW, 2.0)
    tally.refused(503)
    tally.refused(418)
    tally.error("bad_json")
    tally.error("new")
    tally.answered("/health", 200)
    tally.answered("/elsewhere", 599)

    Exporter(tally, tmp_path, "w0.1").flush()

    assert {
        ("websocket_connections",): 3,
        ("websocket_connections_total",): 3,
        ("active_connections",): 3,
        ("websocket_users",): 2,
        ("websocket_connections_opened_total",): 9,
        ("websocket_messages_total", "in"): 4,
        ("websocket_messages_total", "out"): 5,
        ("messages_total",): 4,
        ("websocket_bytes_total", "in"): 6,
        ("websocket_bytes_total", "out"): 7,
        ("redis_messages_received_total",): 8,
        ("redis_reconnects_total",): 1,
        ("notifications_failed_total",): 2,
        ("notifications_malformed_total",): 3,
        ("outbox_bytes",): 4096,
        ("canary_age_seconds",): 1.5,
        ("event_loop_lag_seconds",): 0.125,
        ("log_lines_dropped_total",): 11,
        ("metrics_bad_files_total",): 12,
        ("notifications_delivered_total", "ephemeral"): 13,
        ("notifications_published_total", "nobody"): 14,
        ("websocket_shutdown_time_seconds",): 7.5,
        ("metrics_unread_files_total",): 15,
        ("auth_total", "expired"): 1,
        ("websocket_closes_total", "too_slow"): 1,
        ("websocket_refusals_total", "503"): 1,
        ("websocket_refusals_total", "other"): 1,
        ("websocket_errors_total", "bad_json"): 1,
        ("websocket_errors_total", "other"): 1,
        ("http_requests_total", "/health", "200"): 1,
        ("http_requests_total", "other", "other"): 1,
        ("websocket_connection_duration_seconds_bucket", "5.0"): 1,
        ("websocket_connection_duration_seconds_bucket", "15.0"): 1,
        ("websocket_connection_duration_seconds_bucket", "60.0"): 1,
        ("websocket_connection_duration_seconds_bucket", "300.0"): 1,
        ("websocket_connection_duration_seconds_bucket", "900.0"): 1,
        ("websocket_connection_duration_seconds_bucket", "3600.0"): 1,
        ("websocket_connection_duration_seconds_bucket", "14400.0"): 1,
        ("websocket_connection_duration_seconds_bucket", "86400.0"): 1,
        ("websocket_connection_duration_seconds_bucket", "+Inf"): 1,
        ("websocket_connection_duration_seconds_count",): 1,
        ("websocket_connection_duration_seconds_sum",): 2,
    } == {name: value for name, value in scraped(tmp_path).items() if value}


@given(st.lists(st.floats(min_value=0, max_value=200_000)))
def test_buckets_hold_what_is_at_most_their_bound(amounts: list[float]) -> None:
    """Each observation is in the first bucket whose bound it does not exceed."""
    buckets = Buckets((1.0, 60.0))
    for amount in amounts:
        buckets.observe(amount)

    low = [amount for amount in amounts if amount <= 1.0]
    middle = [amount for amount in amounts if 1.0 < amount <= 60.0]
    assert buckets.counts == [len(low), len(middle), len(amounts) - len(low) - len(middle)]
    assert buckets.total == pytest.approx(sum(amounts))


@given(lives=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4))
def test_a_respawn_goes_on_counting(
    lives: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Under one identity a counter never goes down, and its end is the sum of all lives."""
    directory = tmp_path_factory.mktemp("metrics")
    seen = [0.0]
    for life in lives:
        tally = Tally()
        exporter = Exporter(tally, directory, "w0.1")
        for increment in life:
            tally.opened += increment
            exporter.flush()
            seen.append(scraped(directory)["websocket_connections_opened_total",])

    assert sorted(seen) == seen
    assert sum(map(sum, lives)) == seen[-1]


def test_a_respawn_starts_with_its_own_gauges(tmp_path: Path) -> None:
    """The connections of a killed process are gone with it."""
    Exporter(Tally(connections=7), tmp_path, "w0.1").flush()

    Exporter(Tally(), tmp_path, "w0.1")

    assert 0 == scraped(tmp_path)["websocket_connections",]


def test_other_code_under_the_same_identity_loses_no_counts(tmp_path: Path) -> None:
    """A counter that this code does not know is kept as its predecessor left it."""
    key = '["old", "old_total", {}, "Gone since."]'
    path = tmp_path / "counter_w0.1.db"
    MetricFile(path, {key: Cell(4.0)}).close()

    Exporter(Tally(opened=1), tmp_path, "w0.1").flush()

    samples = scraped(tmp_path)
    assert 4 == samples["old_total",]
    assert 1 == samples["websocket_connections_opened_total",]


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff\x00\x00\x00torn"])
def test_a_bad_file_does_not_keep_a_process_from_starting(tmp_path: Path, content: bytes) -> None:
    """What a predecessor left torn is set aside, and counting starts anew."""
    (tmp_path / "counter_w0.1.db").write_bytes(content)

    Exporter(Tally(opened=1), tmp_path, "w0.1").flush()

    assert 1 == scraped(tmp_path)["websocket_connections_opened_total",]
    assert content == (tmp_path / "counter_w0.1.db.bad").read_bytes()


def test_the_end_writes_the_last_counts_and_takes_the_gauges_away(tmp_path: Path) -> None:
    """After a clean end the counters stay, complete, and no gauge is left."""
    tally = Tally(connections=5)
    exporter = Exporter(tally, tmp_path, "w0.1")
    exporter.flush()
    tally.opened += 5

    exporter.close()
    exporter.close()

    samples = scraped(tmp_path)
    assert 5 == samples["websocket_connections_opened_total",]
    assert ("websocket_connections",) not in samples


def test_two_processes_add_up(tmp_path: Path) -> None:
    """Counters and connections are summed, ages are the worst, over all identities."""
    Exporter(Tally(connections=2, opened=4, canary_age=0.5), tmp_path, "w0.1").flush()
    Exporter(Tally(connections=3, opened=5, canary_age=7.0), tmp_path, "w1.1").flush()

    samples = scraped(tmp_path)

    assert 5 == samples["websocket_connections",]
    assert 9 == samples["websocket_connections_opened_total",]
    assert 7 == samples["canary_age_seconds",]


def test_a_process_that_cannot_be_measured_serves_all_the_same(tmp_path: Path) -> None:
    """Without a place for its files an exporter does nothing, and says why."""
    exporter = Exporter(Tally(), tmp_path / "gone", "w0.1")

    exporter.flush()
    exporter.close()

    assert exporter.problem.endswith("No such file or directory")
    assert "" == Exporter(Tally(), tmp_path, "w0.1").problem


def test_what_was_missing_is_made_up_for(tmp_path: Path) -> None:
    """As soon as files can be written they are, with everything counted until then."""
    directory = tmp_path / "later"
    exporter = Exporter(Tally(opened=3), directory, "w0.1")
    exporter.flush()
    directory.mkdir()

    exporter.flush()

    assert "" == exporter.problem
    assert 3 == scraped(directory)["websocket_connections_opened_total",]


def test_a_predecessor_that_cannot_be_read_now_is_not_forgotten(tmp_path: Path) -> None:
    """Without a descriptor to read the old file it is left alone, and taken over later."""
    Exporter(Tally(opened=3), tmp_path, "w0.1").close()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        exporter = Exporter(Tally(opened=1), tmp_path, "w0.1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    problem = exporter.problem
    before = scraped(tmp_path)["websocket_connections_opened_total",]
    exporter.flush()

    assert problem.endswith("Too many open files")
    assert (3, 4) == (before, scraped(tmp_path)["websocket_connections_opened_total",])


def test_the_time_of_a_drain_outlives_its_process(tmp_path: Path) -> None:
    """The latest drain of anybody is shown, whoever lives; a process that serves says nothing."""
    clock = iter([100.0, 200.0, 300.0])
    slow, quick, serving = Tally(), Tally(), Tally()
    exporters = [
        Exporter(tally, tmp_path, f"w{slot}.1", wall=lambda: next(clock))
        for slot, tally in enumerate((slow, quick, serving))
    ]
    slow.shutdown_seconds = 9.0
    exporters[0].close()
    first = scraped(tmp_path)["websocket_shutdown_time_seconds",]
    quick.shutdown_seconds = 2.0
    exporters[1].close()
    second = scraped(tmp_path)["websocket_shutdown_time_seconds",]
    Exporter(Tally(), tmp_path, "w1.1").flush()

    assert (9.0, 2.0) == (first, second)
    assert 2.0 == scraped(tmp_path)["websocket_shutdown_time_seconds",]


@pytest.mark.parametrize("identity", ["w0_1", "../w0", "w0", "w.1.db", ""])
def test_an_identity_that_would_be_misread_is_refused(tmp_path: Path, identity: str) -> None:
    """Readers split file names at underscores, so an identity has none."""
    with pytest.raises(ValueError, match="identity"):
        Exporter(Tally(), tmp_path, identity)
