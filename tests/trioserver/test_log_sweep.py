"""Log files of earlier days: compressed, deleted, never doubled or lost."""

import datetime as dt
import fcntl
import gzip
import os
import resource
import threading
from pathlib import Path

import pytest

from trioserver.log_sweep import Swept, sweep

TODAY = dt.date(2026, 11, 20)


def age(days: int, stem: str = "worker-0") -> str:
    """Return the name of a log file of that age."""
    return f"{stem}.{TODAY - dt.timedelta(days=days)}.log"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with log files of several ages, and other things."""
    for days in (-1, 0, 1, 14, 15, 30, 31):
        for stem in ("worker-0", "worker-0.error"):
            (tmp_path / age(days, stem)).write_text(f"{stem} {days}\n" * 1000)
    for name in ("notes.txt", "worker-0.2026-99-99.log", "worker-0.log", "x.2026-01-01.log.bak"):
        (tmp_path / name).write_text("x")
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    """Return what is in a directory, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class TestSweep:
    """Files of earlier days."""

    def test_sweep(self, directory: Path) -> None:
        """Earlier days are compressed, old ones deleted, errors later; the rest is left alone."""
        before = contents(directory)

        assert Swept(compressed=6, deleted=4, failed=0) == sweep(directory, TODAY)

        kept = [("worker-0", 1), ("worker-0", 14)]
        kept += [("worker-0.error", days) for days in (1, 14, 15, 30)]
        untouched = {age(days, stem) for days in (-1, 0) for stem in ("worker-0", "worker-0.error")}
        untouched |= {
            "notes.txt",
            "worker-0.2026-99-99.log",
            "worker-0.log",
            "x.2026-01-01.log.bak",
        }
        after = contents(directory)
        assert {f"{age(days, stem)}.gz" for stem, days in kept} | untouched == set(after)
        for stem, days in kept:
            assert before[age(days, stem)] == gzip.decompress(after[f"{age(days, stem)}.gz"])

    def test_idempotent(self, directory: Path) -> None:
        """A second sweep of the same day changes nothing; a later one deletes archives."""
        sweep(directory, TODAY)
        after = contents(directory)

        assert Swept() == sweep(directory, TODAY)
        assert after == contents(directory)
        assert Swept(compressed=1, deleted=9) == sweep(directory, TODAY + dt.timedelta(days=31))

    def test_several_at_once(self, directory: Path) -> None:
        """While one sweep is at work, another returns at once and touches nothing."""
        before = contents(directory)
        held = os.open(directory, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)

        assert Swept() == sweep(directory, TODAY)

        os.close(held)
        assert before == contents(directory)

    def test_many_threads(self, directory: Path) -> None:
        """Concurrent sweeps together do the work once."""
        results: list[Swept] = []
        threads = [
            threading.Thread(target=lambda: results.append(sweep(directory, TODAY)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        assert (6, 4, 0) == (
            sum(result.compressed for result in results),
            sum(result.deleted for result in results),
            sum(result.failed for result in results),
        )

    def test_killed_before_the_rename(self, directory: Path) -> None:
        """What a killed sweep left half-written is thrown away, and the work done again."""
        (directory / f"{age(1)}.gz.tmp").write_bytes(b"half")
        (directory / f"{age(2)}.gz.tmp").write_bytes(b"half")

        assert Swept(compressed=6, deleted=4) == sweep(directory, TODAY)

        assert not [name for name in contents(directory) if name.endswith(".tmp")]
        assert b"worker-0 1\n" * 1000 == gzip.decompress(contents(directory)[f"{age(1)}.gz"])

    def test_killed_before_the_delete(self, directory: Path) -> None:
        """A file that is already in its archive is only deleted: no line is doubled."""
        content = (directory / age(1)).read_bytes()
        sweep(directory, TODAY)
        (directory / age(1)).write_bytes(content)

        assert Swept(compressed=1) == sweep(directory, TODAY)

        assert content == gzip.decompress(contents(directory)[f"{age(1)}.gz"])
        assert age(1) not in contents(directory)

    def test_late_writer(self, directory: Path) -> None:
        """Lines that come to a day that is already compressed are added to its archive."""
        content = (directory / age(1)).read_bytes()
        sweep(directory, TODAY)
        (directory / age(1)).write_text("late\n")

        sweep(directory, TODAY)

        assert content + b"late\n" == gzip.decompress(contents(directory)[f"{age(1)}.gz"])

    def test_full_disk(self, directory: Path) -> None:
        """If there is no room for the archive, the file stays, and the others get their turn."""
        before = contents(directory)
        (directory / age(14)).write_text("short\n")
        (directory / age(1)).write_bytes(os.urandom(5000))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            swept = sweep(directory, TODAY)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        assert Swept(compressed=5, deleted=4, failed=1) == swept
        after = contents(directory)
        assert 5000 == len(after[age(1)])
        assert not [name for name in after if name.endswith(".tmp")]
        assert before[age(0)] == after[age(0)]

    def test_no_descriptor(self, directory: Path) -> None:
        """Where the directory can be opened and not be listed, nothing happens, and it is told."""
        before = contents(directory)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
        try:
            swept = sweep(directory, TODAY)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        assert Swept(failed=1) == swept
        assert before == contents(directory)

    def test_no_directory(self, tmp_path: Path) -> None:
        """Where there are no logs there is nothing to sweep."""
        assert Swept() == sweep(tmp_path / "missing", TODAY)
