"""The archive: what the dead have counted stays counted, exactly once, whenever we are killed."""

import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trioserver import metric_archive, metric_files
from trioserver.gateway.scrape import Scraper
from trioserver.metric_archive import Generations, fold
from trioserver.metric_files import BadMetricFile, Cell, MetricFile, write_archive
from trioserver.metrics import Exporter, Tally

OPENED = "websocket_connections_opened_total"


def serving(generation: int, *, reloading: bool = False) -> Generations:
    """Return what the supervisor says while it serves with a generation."""
    return Generations(serving=generation, reloading=reloading, asked_at=time.time())


def total(directory: Path, name: str = OPENED) -> float:
    """Return what a scrape finds."""
    return Scraper(directory).scrape().total(name)


def names(directory: Path) -> set[str]:
    """Return what is in a directory, but for the lock."""
    return {path.name for path in directory.iterdir()} - {metric_archive.LOCK}


def archives() -> set[str]:
    """Return the names of all archives."""
    kinds = ("counter", "histogram", "gauge_mostrecent")
    return {metric_files.file_name(kind, metric_files.ARCHIVE) for kind in kinds}


def ended(directory: Path, identity: str, opened: int, *, killed: bool = False) -> None:
    """Leave behind what a process leaves that had so many connections."""
    exporter = Exporter(Tally(opened=opened, connections=opened), directory, identity)
    exporter.flush()
    if not killed:
        exporter.close()


def test_the_retired_are_folded(tmp_path: Path) -> None:
    """Counters of a retired generation are archived, its gauges gone, the living as before."""
    ended(tmp_path, "w0.1", 3)
    ended(tmp_path, "w1.1", 4, killed=True)
    living = Exporter(Tally(opened=5, connections=5), tmp_path, "w0.2")
    living.flush()
    ours = {path.name for path in tmp_path.glob("*_w0.2.db")}

    folded = fold(tmp_path, serving(2))

    assert ours | archives() == names(tmp_path)
    assert (12, 5) == (total(tmp_path), total(tmp_path, "websocket_connections"))
    assert 8 == folded.files
    assert ([], 0) == (folded.bad_files, folded.unread)


def test_who_serves_or_drains_is_left_alone(tmp_path: Path) -> None:
    """Files of the serving generation are its successors', those of the living their own."""
    ended(tmp_path, "w0.2", 3, killed=True)
    draining = Exporter(Tally(opened=4, connections=4), tmp_path, "w1.1")
    draining.flush()
    before = names(tmp_path)

    fold(tmp_path, serving(2))
    assert before == names(tmp_path)

    draining.close()
    fold(tmp_path, serving(2))
    assert 7 == total(tmp_path)
    assert not list(tmp_path.glob("*_w1.1.db"))


@pytest.mark.parametrize(
    ("written", "reloading", "expected"),
    [(-10.0, False, True), (-10.0, True, False), (+10.0, False, False)],
    ids=["failed", "under way", "newer than the answer"],
)
def test_a_generation_that_never_served_is_folded_when_its_reload_has_failed(
    tmp_path: Path, *, written: float, reloading: bool, expected: bool
) -> None:
    """Not while a reload may still raise it, and not on word from before it was there."""
    ended(tmp_path, "w0.3", 3)
    moment = time.time() + written
    for path in tmp_path.iterdir():
        os.utime(path, (moment, moment))

    fold(tmp_path, serving(2, reloading=reloading))

    assert expected == (archives() == names(tmp_path))
    assert 3 == total(tmp_path)


def test_the_archive_grows_and_forgets_names(tmp_path: Path) -> None:
    """Generation after generation is added; the archive names only what it was made of last."""
    for generation in range(1, 6):
        ended(tmp_path, f"w0.{generation}", generation)
        fold(tmp_path, serving(generation + 1))

    archive = metric_files.read(metric_archive.archive_path(tmp_path, "counter"))
    assert {"counter_w0.5.db"} == metric_archive.absorbed(archive)
    assert 15 == total(tmp_path)
    assert archives() == names(tmp_path)


def test_of_drains_the_latest_is_kept(tmp_path: Path) -> None:
    """A gauge that outlives its process is not added up, and an older one does not replace it."""
    for slot, (moment, seconds) in enumerate([(100.0, 3.0), (300.0, 2.0), (200.0, 9.0)]):
        tally, wall = Tally(shutdown_seconds=seconds), itertools.repeat(moment).__next__
        Exporter(tally, tmp_path, f"w{slot}.1", wall=wall).close()

    fold(tmp_path, serving(2))

    assert 2.0 == total(tmp_path, "websocket_shutdown_time_seconds")


def test_another_help_text_is_the_same_series(tmp_path: Path) -> None:
    """What older code called by other words is added to the same row, so archives do not grow."""
    for generation, text in enumerate(["Old words.", "New words."], start=1):
        key = json.dumps(["a", "a_total", {"x": "y"}, text])
        MetricFile(tmp_path / f"counter_w0.{generation}.db", {key: Cell(2.0)}).close()

    fold(tmp_path, serving(3))

    archive = metric_files.read(tmp_path / "counter_archive.db")
    assert [Cell(4.0)] == list(archive.cells.values())
    assert "New words." in next(iter(archive.cells))


@pytest.mark.parametrize("content", [b"", b"torn", None], ids=["empty", "torn", "no key"])
def test_a_bad_file_is_set_aside_and_the_rest_is_folded(
    tmp_path: Path, content: bytes | None
) -> None:
    """What cannot be folded is named and out of the way."""
    ended(tmp_path, "w0.1", 3)
    bad = tmp_path / "counter_w1.1.db"
    MetricFile(bad, {"nonsense": Cell(1.0)}).close()
    if content is not None:
        bad.write_bytes(content)

    folded = fold(tmp_path, serving(2))

    assert [bad.name] == folded.bad_files
    assert archives() | {bad.name + ".bad"} == names(tmp_path)
    assert 3 == total(tmp_path)


@pytest.mark.parametrize("trailer", [b"", b"{}", b"[1]"])
def test_an_archive_that_does_not_say_what_is_in_it_is_bad(tmp_path: Path, trailer: bytes) -> None:
    """Nothing is added to what may hold it already."""
    path = metric_archive.archive_path(tmp_path, "counter")
    write_archive(path, {json.dumps(["a", "a_total", {}, "A."]): Cell(1.0)}, trailer)
    ended(tmp_path, "w0.1", 3)

    with pytest.raises(BadMetricFile):
        metric_archive.absorbed(metric_files.read(path))
    assert [path.name] == fold(tmp_path, serving(2)).bad_files
    assert 3 == total(tmp_path)


def test_drafts_of_the_dead_are_removed(tmp_path: Path) -> None:
    """What a process was writing when it was killed is nobody's."""
    for generation in (1, 2):
        (tmp_path / f"counter_w0.{generation}.db.new").write_bytes(b"half")

    fold(tmp_path, serving(2))

    assert {"counter_w0.2.db.new"} == names(tmp_path)


def test_two_do_not_fold_at_once(tmp_path: Path) -> None:
    """While another gateway folds, this one does nothing."""
    ended(tmp_path, "w0.1", 3)
    before = names(tmp_path)
    with (tmp_path / metric_archive.LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folded = fold(tmp_path, serving(2))

    assert 0 == folded.files
    assert before == names(tmp_path)


def test_without_a_directory_there_is_nothing_to_do(tmp_path: Path) -> None:
    """A directory that is not there is no error."""
    assert 0 == fold(tmp_path / "gone", serving(2)).files


# Folds in a child that is killed at the n-th thing it does to a file; n = 1, 2, ... until it
# survives. What each child has left behind is then in directory n.
KILLED = """
import itertools, os, pathlib, signal, sys
from tests.trioserver.test_metric_archive import ended, serving
from trioserver.metric_archive import fold

TOUCHES = {"open", "os.listdir", "os.scandir", "os.remove", "os.rename", "fcntl.flock"}

def touch(limit):
    left = itertools.count(limit, -1)
    def hook(event, args):
        if event in TOUCHES and next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return hook

for number in itertools.count(1):
    directory = pathlib.Path(sys.argv[1], str(number))
    directory.mkdir()
    ended(directory, "w0.1", 1)
    fold(directory, serving(2))
    for slot in (0, 1):
        ended(directory, f"w{slot}.2", 10, killed=slot == 1)
    pid = os.fork()
    if not pid:
        sys.addaudithook(touch(number))
        fold(directory, serving(3))
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        break
"""


def test_killed_at_any_moment_it_neither_loses_nor_doubles(tmp_path: Path) -> None:
    """Kill -9 before each single step: the sum is right at once, and after the next fold."""
    subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        check=True,
        timeout=50,
        cwd=Path(__file__).parent.parent.parent,
    )

    directories = list(tmp_path.iterdir())
    assert len(directories) > 25
    for directory in directories:
        assert 21 == total(directory), directory.name
        ended(directory, "w0.3", 100)
        fold(directory, serving(4))
        assert 121 == total(directory), directory.name
        left = names(directory) - {f"{name}.new" for name in archives()}
        assert archives() == left, directory.name
