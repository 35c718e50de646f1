"""Where log lines go: standard error and day files, and what happens if they cannot."""

import fcntl
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trioserver.readable_log import NOON, Log, readable_log
from trioserver import logs
from trioserver.log_journal import Journal

DAY = 86_400


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """A log of its own; what it takes over is given back afterwards."""
    with readable_log(tmp_path) as log:
        yield log


def day_file(directory: Path, name: str) -> list[dict[str, object]]:
    """Return the decoded lines of a log file."""
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def event_of(line: str) -> str | None:
    """Return the event of a line, None if it is no line."""
    try:
        event: str = json.loads(line)["event"]
    except json.JSONDecodeError:
        return None
    return event


class TestStandardError:
    """A log call neither raises nor waits."""

    def test_own_keys_win(self, log: Log) -> None:
        """A value whose name is taken is written under another one, not lost."""
        logs.get_logger().info("x", process="mine", level="high")

        assert ("worker-0", "info", "mine", "high") == tuple(
            log.last[key] for key in ("process", "level", "process_", "level_")
        )

    def test_full_disk(self, log: Log) -> None:
        """A line that finds the disk full is dropped and counted."""
        log.fd, original = os.open("/dev/full", os.O_WRONLY), log.fd
        log.configure()

        logs.get_logger().info("x")
        logs.get_logger().info("y")

        os.close(log.fd)
        log.fd = original
        assert 2 == logs.dropped()

    def test_broken_and_closed(self, log: Log) -> None:
        """A pipe whose reader is gone, and a closed descriptor, cost the line."""
        read, write = os.pipe()
        os.close(read)
        log.fd, original = write, log.fd
        log.configure()
        logs.get_logger().info("x")
        os.close(write)
        logs.get_logger().info("y")

        log.fd = original
        assert 2 == logs.dropped()

    def test_sleeping_reader(self, log: Log) -> None:
        """A pipe that nobody reads is filled, then lines are dropped: the call does not wait."""
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        log.fd, original = write, log.fd
        log.configure()

        for _ in range(100):
            logs.get_logger().info("x" * 400)

        whole = os.read(read, 1 << 16)
        os.close(read)
        os.close(write)
        log.fd = original
        lines = whole.decode().splitlines()
        assert 100 == len(lines) + logs.dropped()
        assert all(json.loads(line)["level"] == "info" for line in lines)


class TestFiles:
    """The files in LOG_DIR."""

    def test_files(self, log: Log, tmp_path: Path) -> None:
        """Lines go to the day's file as well, errors to one of their own, too: always as JSON."""
        directory = tmp_path / "deep" / "logs"
        log.configure(log_dir=directory, logger_encoding="console")

        logs.get_logger().info("one")
        logs.get_logger().error("two")

        assert ["one", "two"] == [
            line["event"] for line in day_file(directory, "worker-0.2026-11-20.log")
        ]
        assert ["two"] == [
            line["event"] for line in day_file(directory, "worker-0.error.2026-11-20.log")
        ]
        assert 2 == len(log.lines)
        modes = {path.stat().st_mode & 0o777 for path in directory.iterdir()}
        assert {0o640} == modes

    def test_new_day(self, log: Log, tmp_path: Path) -> None:
        """Each line goes to the file of its own day, and the file of yesterday is let go."""
        log.configure(log_dir=tmp_path)
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - no directory of ours

        for day in range(3):
            log.clock.now = NOON + day * DAY
            logs.get_logger().error(f"day {day}")

        for day in range(3):
            [line] = day_file(tmp_path, f"worker-0.2026-11-{20 + day}.log")
            assert f"day {day}" == line["event"]
        assert descriptors + 2 == len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def test_two_generations_share_a_file(self, log: Log, tmp_path: Path) -> None:
        """Old and new worker of a slot append to one file without losing a line."""
        identity = {"process": "worker-0"}
        old, new = (
            Journal(identity=identity, clock=log.clock, fd=log.fd, log_dir=tmp_path)
            for _ in range(2)
        )

        for number in range(10):
            (old, new)[number % 2].write("info", {"event": str(number)})

        old.close_files()
        new.close_files()
        assert [str(number) for number in range(10)] == [
            line["event"] for line in day_file(tmp_path, "worker-0.2026-11-20.log")
        ]

    def test_reopen(self, log: Log, tmp_path: Path) -> None:
        """After a file was moved away, reopening starts a new one."""
        log.configure(log_dir=tmp_path)
        file = tmp_path / "worker-0.2026-11-20.log"
        logs.get_logger().info("one")
        file.rename(tmp_path / "moved")

        logs.reopen()
        logs.get_logger().info("two")

        assert ["two"] == [line["event"] for line in day_file(tmp_path, file.name)]

    def test_full_disk(self, log: Log, tmp_path: Path) -> None:
        """With the disk full, lines of the file are counted, told once, and go on elsewhere."""
        file = tmp_path / "worker-0.2026-11-20.log"
        file.symlink_to("/dev/full")
        log.configure(log_dir=tmp_path)

        for number in range(3):
            logs.get_logger().info(str(number))
        file.unlink()
        logs.reopen()
        logs.get_logger().info("3")

        assert 3 == logs.dropped()
        assert ["0", "log file cannot be written", "1", "2", "3"] == [
            json.loads(line)["event"] for line in log.lines
        ]
        assert "worker-0" == json.loads(log.lines[1])["file"]
        assert "No space left" in json.loads(log.lines[1])["error"]
        assert ["3"] == [line["event"] for line in day_file(tmp_path, file.name)]

    def test_directory_that_cannot_be_made(self, log: Log, tmp_path: Path) -> None:
        """A log directory that cannot be used costs lines, not the process."""
        log.configure(log_dir=tmp_path / "stderr" / "below-a-file")

        logs.get_logger().info("x")

        assert 1 == logs.dropped()
        assert "x" == json.loads(log.lines[0])["event"]

    def test_torn_line(self, log: Log, tmp_path: Path) -> None:
        """Half a line, left by a full disk, spoils no other line, now or after a restart."""
        log.configure(log_dir=tmp_path)
        file = tmp_path / "worker-0.2026-11-20.log"
        logs.get_logger().info("first")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, hard))
        try:
            logs.get_logger().info("torn")
            logs.get_logger().info("lost")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        logs.get_logger().info("next")
        with file.open("a") as half:
            half.write('{"timestamp":')
        logs.reopen()
        logs.get_logger().info("last")

        assert 2 <= logs.dropped()
        lines = file.read_text().splitlines()
        assert ["first", None, "next", None, "last"] == [event_of(line) for line in lines]
