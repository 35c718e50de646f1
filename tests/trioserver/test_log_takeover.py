"""Everybody else who would write to standard error writes log lines."""

import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.trioserver.readable_log import Log, fail, readable_log
from trioserver.log_takeover import Forward


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """A log of its own; what it takes over is given back afterwards."""
    with readable_log(tmp_path) as log:
        yield log


class TestLogging:
    """The standard library's ``logging``."""

    def test_logging(self, log: Log) -> None:
        """Lines of the standard library's logging are lines like ours."""
        other = logging.getLogger("hypercorn.error")

        other.warning("Running on %s\nand on", "http://x")
        other.debug("too low")
        try:
            fail("oops")
        except ValueError:
            other.exception("failed")

        first, second = (json.loads(line) for line in log.lines)
        assert ("warning", "Running on http://x\nand on", "hypercorn.error", "worker-0") == tuple(
            first[key] for key in ("level", "event", "logger", "process")
        )
        assert "error" == second["level"]
        assert second["exception"].endswith("ValueError: oops")

    @pytest.mark.parametrize(
        ("number", "name"),
        [(5, "debug"), (25, "info"), (30, "warning"), (45, "error"), (99, "critical")],
    )
    def test_logging_levels(self, log: Log, number: int, name: str) -> None:
        """A level between ours counts as the one below it."""
        log.configure(log_level="debug")
        logging.root.setLevel(1)

        logging.getLogger("x").log(number, "x")

        assert name == log.last["level"]

    def test_logging_with_wrong_arguments(self, log: Log) -> None:
        """A text whose arguments do not fit is written as it is."""
        record = logging.LogRecord("x", logging.WARNING, "", 0, "%d and %d", ("one",), None)

        # Not through a logger, because pytest's own handler there does raise.
        [forward] = [one for one in logging.root.handlers if isinstance(one, Forward)]
        forward.emit(record)

        assert "%d and %d" == log.last["event"]


class TestHooks:
    """Warnings, and exceptions that nobody catches."""

    def test_warnings(self, log: Log) -> None:
        """A warning is one line."""
        warnings.showwarning("old\nstuff", DeprecationWarning, "file.py", 7)

        assert ("warning", "old\nstuff", "DeprecationWarning", "file.py:7") == tuple(
            log.last[key] for key in ("level", "event", "category", "where")
        )

    def test_last_resorts(self) -> None:
        """Exceptions that nobody catches are one line each, and the exit code tells."""
        program = """
import sys, threading, warnings
from pathlib import Path
from trioserver import logs
from trioserver.settings import Settings

logs.configure(Settings(data_dir=Path("/nowhere")), "supervisor")
warnings.warn("careful")

class Fails:
    def __del__(self):
        raise ValueError("in del")

del (lambda: [Fails()])()[0]
thread = threading.Thread(target=lambda: 1 / 0, name="t1")
thread.start()
thread.join()
raise RuntimeError("Bearer abc")
"""
        command = [sys.executable, "-W", "always", "-c", program]
        done = subprocess.run(command, check=False, capture_output=True, timeout=30)

        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert (1, b"") == (done.returncode, done.stdout)
        assert ["careful", "exception ignored", "uncaught exception", "uncaught exception"] == [
            line["event"].split(" in")[0].lower() for line in lines
        ]
        assert ["warning", "error", "critical", "critical"] == [line["level"] for line in lines]
        assert "function" == lines[1]["object"]
        assert "t1" == lines[2]["thread"]
        assert lines[3]["exception"].endswith("RuntimeError: Bearer ***")

    def test_hooks(self, log: Log) -> None:
        """Each hook writes what it was called with."""
        error = ValueError("oops")

        sys.excepthook(ValueError, error, None)
        ended = SimpleNamespace(exc_value=error, thread=None)
        threading.excepthook(cast("threading.ExceptHookArgs", ended))
        ignored = SimpleNamespace(exc_value=error, err_msg=None, object=None)
        sys.unraisablehook(cast("sys.UnraisableHookArgs", ignored))

        lines = [json.loads(line) for line in log.lines]
        assert ["uncaught exception", "uncaught exception", "exception ignored"] == [
            line["event"] for line in lines
        ]
        assert {"ValueError: oops"} == {line["exception"] for line in lines}
