"""A log that tests read: configured like that of a worker, its standard error a file."""

import contextlib
import datetime as dt
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import attrs
import structlog

from trioserver import logs
from trioserver.settings import Settings

NOON = dt.datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=dt.UTC).timestamp()


@attrs.define
class Clock:
    """A clock that a test sets."""

    now: float = NOON

    def __call__(self) -> float:
        """Return the time that was set."""
        return self.now


@attrs.define(eq=False)
class Log:
    """A configured log whose standard error is a file."""

    path: Path
    fd: int
    clock: Clock = attrs.Factory(Clock)

    def configure(self, **settings: object) -> None:
        """Start over with these settings; JSON unless they say otherwise."""
        known: dict[str, object] = {"logger_encoding": "json", "data_dir": Path("/nowhere")}
        chosen = attrs.evolve(Settings(), **(known | settings))  # type: ignore[arg-type]
        logs.configure(chosen, "worker-0", slot=0, generation=2, clock=self.clock, fd=self.fd)

    @property
    def lines(self) -> list[str]:
        """What has been written, line by line."""
        return self.path.read_text(encoding="utf-8").split("\n")[:-1]

    @property
    def last(self) -> dict[str, object]:
        """The last line, decoded."""
        decoded: dict[str, object] = json.loads(self.lines[-1])
        return decoded


@contextlib.contextmanager
def readable_log(directory: Path) -> Iterator[Log]:
    """Give a log of its own; what it takes over is given back afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    journal, config = logs._journal, structlog.get_config()
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    path = directory / "stderr"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = Log(path, fd)
    log.configure()
    try:
        yield log
    finally:
        logs.reopen()
        # Not left pointing at a descriptor that will soon mean something else.
        logs._journal = journal
        structlog.configure(**config)
        os.close(fd)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks


def fail(text: str) -> NoReturn:
    """Raise a ValueError with this text."""
    raise ValueError(text)
