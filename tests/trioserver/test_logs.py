"""Logs: identity, levels, encoding, and what holds before `configure`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.trioserver.readable_log import Log, readable_log
from trioserver import logs
from trioserver.settings import Settings


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """A log of its own; what it takes over is given back afterwards."""
    with readable_log(tmp_path) as log:
        yield log


class TestConfigure:
    """What is chosen once."""

    def test_process_without_slot(self, log: Log) -> None:
        """The supervisor has neither slot nor generation, and does not pretend to."""
        settings = Settings(logger_encoding="json", data_dir=Path("/nowhere"))
        logs.configure(settings, "supervisor", clock=log.clock, fd=log.fd)

        logs.get_logger().info("ready")

        assert ["timestamp", "level", "event", "process"] == list(log.last)

    @pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
    def test_levels(self, log: Log, level: str) -> None:
        """Each level writes its own name, and nothing below the configured one is written."""
        names = ["debug", "info", "warning", "error", "critical"]
        log.configure(log_level=level)
        logger = logs.get_logger()

        for name in names:
            getattr(logger, name)("x")

        assert names[names.index(level) :] == [json.loads(line)["level"] for line in log.lines]

    def test_below_level_is_cheap(self, log: Log) -> None:
        """A call below the level does not even look at its arguments."""

        class Untouchable:
            def __str__(self) -> str:
                raise AssertionError

        log.configure(log_level="error")

        logs.get_logger().bind().info("x", value=Untouchable())

        assert [] == log.lines

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, False),
            ({"ws_mode": "debug"}, True),
            ({"ws_mode": "release", "logger_mode": "development"}, True),
            ({"logger_mode": "production"}, False),
            ({"logger_encoding": "json", "ws_mode": "debug"}, False),
            ({"logger_encoding": "console"}, True),
        ],
    )
    def test_encoding(self, log: Log, settings: dict[str, str], expected: bool) -> None:  # noqa: FBT001
        """JSON unless a mode or the encoding asks for people's lines."""
        log.configure(**({"logger_encoding": "auto"} | settings))

        logs.get_logger().info("x")

        assert expected is not log.lines[0].startswith("{")

    def test_terminal(self, log: Log) -> None:
        """On a terminal lines are for people."""
        master, terminal = os.openpty()
        settings = Settings(data_dir=Path("/nowhere"))
        logs.configure(settings, "worker-0", clock=log.clock, fd=terminal)

        logs.get_logger().info("x")

        line = os.read(master, 1000)
        os.close(terminal)
        os.close(master)
        assert b"2026-11-20T12:00:00.123Z info     worker-0 x\r\n" == line


class TestLoggers:
    """What loggers promise."""

    def test_exc_info_that_is_none(self, log: Log) -> None:
        """Strange exception information does not stop the line."""
        logs.get_logger().info("x", exc_info=(1, 2, 3))

        assert "x" == log.last["event"]

    def test_before_configure(self) -> None:
        """Before configuration, lines go to standard error, readable: never to standard output."""
        program = "from trioserver import logs; logs.get_logger().info('early', token='x')"

        command = [sys.executable, "-c", program]
        done = subprocess.run(command, check=True, capture_output=True, timeout=30)

        assert b"" == done.stdout
        assert done.stderr.endswith(b"Z info     trioserver early token=***\n")

    def test_capture(self, log: Log) -> None:
        """The test helper of structlog sees events of loggers that are in use."""
        logger = logs.get_logger()
        logger.info("x")

        with structlog.testing.capture_logs() as captured:
            logger.info("y", a=1)

        assert [{"event": "y", "a": 1, "log_level": "info"}] == captured
        assert 1 == len(log.lines)
