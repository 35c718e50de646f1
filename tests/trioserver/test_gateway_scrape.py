"""Scraping: files in, an exact sum out, whatever else lies in the directory or happens to it."""

import fcntl
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trioserver import metric_archive
from trioserver.gateway import metrics_page
from trioserver.gateway.scrape import Scraper
from trioserver.metric_archive import Generations
from trioserver.metric_files import Cell, MetricFile
from trioserver.metrics import Exporter, Tally

OPENED = "websocket_connections_opened_total"


def key(family: str, name: str, labels: dict[str, str], text: str = "Words.") -> str:
    """Return a key of a metric file."""
    return json.dumps([family, name, labels, text])


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Let nobody here open anything."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_only_the_living_have_gauges(tmp_path: Path) -> None:
    """The gauges of a process that is gone are not counted, its counters are."""
    living = Exporter(Tally(connections=2, opened=2), tmp_path, "w0.1")
    living.flush()
    killed = Exporter(Tally(connections=3, opened=3), tmp_path, "w1.1")
    killed.flush()
    del killed  # As a kill does: the files stay, and nobody holds them.

    assert (tmp_path / "gauge_livesum_w1.1.db").exists()
    scraped = Scraper(tmp_path).scrape()
    assert 2 == scraped.total("websocket_connections")
    assert 5 == scraped.total("websocket_connections_opened_total")


def test_a_directory_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    """Without a directory the page is empty, not an error."""
    nothing = Scraper(tmp_path / "gone").scrape()

    assert b"" == metrics_page.prometheus_page(nothing)
    assert 0 == nothing.total("websocket_connections")
    assert () == nothing.bad_files


def a_pipe(path: Path) -> None:
    """Put a pipe there, whose opening would wait for a writer."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: os.truncate(path, 700), id="torn"),
        pytest.param(lambda path: path.write_bytes(b"\x00" * 4096), id="a hole"),
        pytest.param(lambda path: path.write_bytes(os.urandom(4096)), id="noise"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a directory"),
        pytest.param(a_pipe, id="a pipe"),
        pytest.param(lambda path: (path.unlink(), path.symlink_to("counter_w0.1.db")), id="a link"),
        pytest.param(lambda path: MetricFile(path, {"{}": Cell(1.0)}).close(), id="no key"),
        pytest.param(lambda path: MetricFile(path, {"[1]": Cell(1.0)}).close(), id="another key"),
        pytest.param(
            lambda path: MetricFile(path, {key("a b\n", "a_total", {}): Cell(1.0)}).close(),
            id="name",
        ),
        pytest.param(
            lambda path: MetricFile(path, {key("a", "a_total", {'"': "x"}): Cell(1.0)}).close(),
            id="label",
        ),
        pytest.param(
            lambda path: MetricFile(path, {key("a", "a_bucket", {"le": "x"}): Cell(1.0)}).close(),
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

    scraper = Scraper(tmp_path)
    first = scraper.scrape()
    second = scraper.scrape()

    assert ("counter_w1.1.db",) == first.bad_files
    assert () == second.bad_files
    assert 4 == first.total("websocket_connections_opened_total")
    assert os.path.lexists(tmp_path / "counter_w1.1.db.bad")


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    """Files of other kinds, also such as a newer release may have, are neither read nor moved."""
    names = {"summary_w0.1.db", "gauge_livemin_w0.1.db", "notes.txt", "x.db", "counter_w0.1.db.new"}
    for name in names:
        (tmp_path / name).write_bytes(b"")

    assert () == Scraper(tmp_path).scrape().bad_files
    assert {path.name for path in tmp_path.iterdir()} == names


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Hold a lease on a file: whoever opens it without patience gets EWOULDBLOCK."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # would say that somebody wants it
    with path.open("r+b") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        try:
            yield
        finally:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            signal.signal(signal.SIGIO, before)


def test_a_file_that_cannot_be_read_now_keeps_its_counts(tmp_path: Path) -> None:
    """It is left where it is, named, and its last known counts stand in: no sum ever drops."""
    living = Exporter(Tally(opened=4), tmp_path, "w0.1")
    living.flush()
    Exporter(Tally(opened=3), tmp_path, "w1.1").close()
    path = tmp_path / "counter_w1.1.db"
    scraper, newcomer = Scraper(tmp_path), Scraper(tmp_path)

    before = scraper.scrape()
    with leased(path):
        meanwhile = scraper.scrape()
        without = newcomer.scrape()
    after = newcomer.scrape()

    assert [7, 7, 4, 7] == [one.total(OPENED) for one in (before, meanwhile, without, after)]
    assert ((path.name,), ()) == (meanwhile.unread, after.unread)
    assert () == meanwhile.bad_files


def test_without_descriptors_nobody_is_taken_for_dead_or_bad(tmp_path: Path) -> None:
    """With no descriptor left the page is what it was; afterwards everything is still there."""
    tally = Tally(connections=7, opened=5)
    living = Exporter(tally, tmp_path, "w0.1")
    living.flush()
    scraper = Scraper(tmp_path)
    scraper.scrape()
    names = {path.name for path in tmp_path.iterdir()}

    with no_descriptor_left():
        meanwhile = scraper.scrape()
        with pytest.raises(OSError, match="Too many open files"):
            Scraper(tmp_path).scrape()
    tally.opened = 9
    living.flush()
    after = scraper.scrape()

    assert (7, 5) == (meanwhile.total("websocket_connections"), meanwhile.total(OPENED))
    assert names == set(meanwhile.unread)
    assert (7, 9) == (after.total("websocket_connections"), after.total(OPENED))
    assert ((), ()) == (after.unread, after.bad_files)
    assert names == {path.name for path in tmp_path.iterdir()}


def test_what_happens_meanwhile_is_not_seen(tmp_path: Path) -> None:
    """While processes come and go and are folded, no sum drops and nobody is called bad."""
    done = threading.Event()
    totals: list[float] = []
    bad: list[str] = []

    def keep_scraping() -> None:
        scraper = Scraper(tmp_path)
        while not done.is_set():
            scraped = scraper.scrape()
            totals.append(scraped.total(OPENED))
            bad.extend(scraped.bad_files)

    thread = threading.Thread(target=keep_scraping)
    thread.start()
    try:
        for generation in range(1, 101):
            for slot in range(3):
                Exporter(Tally(opened=1), tmp_path, f"w{slot}.{generation}").close()
            metric_archive.fold(
                tmp_path, Generations(serving=generation + 1, reloading=False, asked_at=0.0)
            )
    finally:
        done.set()
        thread.join()

    assert sorted(totals) == totals
    assert 300 == Scraper(tmp_path).scrape().total(OPENED)
    assert [] == bad
    assert len(totals) > 10


def quickest(call: Callable[[], object], times: int = 7) -> float:
    """Return the seconds of the quickest of some calls: the others had company."""
    durations = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        durations.append(time.perf_counter() - began)
    return min(durations)


@pytest.mark.parametrize("reloads", [False, True], ids=["respawns", "reloads"])
def test_a_thousand_restarts_leave_a_scrape_as_it_was(tmp_path: Path, *, reloads: bool) -> None:
    """No count is missing, at most 12 files per slot are left, and a page takes at most 50 ms."""
    for number in range(1000):
        generation = number + 1 if reloads else 1
        exporter = Exporter(Tally(opened=1), tmp_path, f"w0.{generation}")
        exporter.flush()
        del exporter  # killed: nothing is put away
    living = [Exporter(Tally(), tmp_path, f"w{slot}.1001") for slot in range(4)]

    generations = Generations(serving=1001 if reloads else 1, reloading=False, asked_at=0.0)
    metric_archive.fold(tmp_path, generations)
    files = len(list(tmp_path.iterdir()))
    scraper = Scraper(tmp_path)
    seconds = quickest(lambda: metrics_page.prometheus_page(scraper.scrape()))

    assert 1000 == scraper.scrape().total(OPENED)
    assert files <= 12 * len(living)
    assert seconds <= 0.05
