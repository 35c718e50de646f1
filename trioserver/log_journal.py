"""Where lines go: one write to standard error, one to the day's file if there is LOG_DIR.

What cannot be written at once (full disk, closed pipe, a reader that sleeps) is dropped and
counted.

Files are named ``<process>.<day>.log`` and opened for appending; errors stand also in
``<process>.error.<day>.log``. Each line goes to the file of its own day (UTC), and nobody renames
a file that is in use: so two generations of one worker can share a file. Files are JSON always;
LOGGER_ENCODING is about standard error.
"""

import datetime as dt
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from trioserver.log_lines import LEVELS, console_line, json_line, safe_line


class Journal:
    """What the lines of this process have in common, and where they go."""

    def __init__(
        self,
        *,
        identity: Mapping[str, object],
        clock: Callable[[], float] = time.time,
        fd: int = 2,
        console: bool = True,
        log_dir: Path | None = None,
    ) -> None:
        self.dropped = 0
        self._identity = identity
        self._clock = clock
        self._stderr = _Stream(fd)
        self._line = console_line if console else json_line
        process = identity["process"]
        self._files = [_DayFile(log_dir, f"{process}")] if log_dir else []
        self._error_files = [_DayFile(log_dir, f"{process}.error")] if log_dir else []
        # Threads share the files; a signal handler may interrupt the thread that writes.
        self._lock = threading.RLock()

    def write(self, level: str, event: Mapping[str, object]) -> None:
        """Write one event. Never raises; what cannot be written is counted."""
        now = dt.datetime.fromtimestamp(self._clock(), dt.UTC)
        with self._lock:
            self._write_stderr(self._fields(now, level, event))
            self._write_files(now, level, event)

    def close_files(self) -> None:
        """Close the files; the next lines open them again."""
        with self._lock:
            for file in self._files + self._error_files:
                file.close()

    def _fields(
        self, now: dt.datetime, level: str, event: Mapping[str, object]
    ) -> dict[str, object]:
        timestamp = now.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
        fields: dict[str, object] = {"timestamp": timestamp, "level": level}
        fields["event"] = event.get("event", "")
        fields |= self._identity
        for key, value in event.items():
            if key != "event":
                fields[f"{key}_" if key in fields else key] = value
        return fields

    def _write_stderr(self, fields: Mapping[str, object]) -> None:
        try:
            line = safe_line(fields, self._line)
            if not _ready(self._stderr.fd):
                raise BlockingIOError
            self._stderr.write(line)
        except OSError:
            self.dropped += 1

    def _write_files(self, now: dt.datetime, level: str, event: Mapping[str, object]) -> None:
        if not self._files:
            return
        line = safe_line(self._fields(now, level, event), json_line)
        serious = LEVELS[level] >= logging.ERROR
        for file in self._files + self._error_files if serious else self._files:
            try:
                file.write(now.date().isoformat(), line)
            except OSError as error:
                self.dropped += 1
                if not file.failing:
                    reason = {"event": "log file cannot be written", "file": file.stem}
                    self._write_stderr(self._fields(now, "error", reason | {"error": error}))
                file.failing = True
            else:
                file.failing = False


@attrs.define(eq=False)
class _Stream:
    """An open file to which whole lines are written."""

    fd: int
    torn: bool = False
    """Whether the last line ended in its middle: then the next one must not be glued to it."""

    def write(self, line: bytes) -> None:
        """Write one line.

        Raises:
            OSError: It is not, or not wholly, written.
        """
        data = b"\n" + line if self.torn else line
        written = os.write(self.fd, data)
        self.torn = not data[:written].endswith(b"\n")
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _ready(fd: int) -> bool:
    # A full pipe whose reader sleeps would stop the event loop. Up to PIPE_BUF bytes fit into
    # a pipe that reports room. O_NONBLOCK would do it, too, but for whoever shares the terminal.
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


@attrs.define(eq=False)
class _DayFile:
    """The file of one process for the current day."""

    directory: Path
    stem: str
    failing: bool = False
    """Whether the last write failed: that is told once, not for each line."""
    _day: str = ""
    _stream: _Stream | None = None

    def write(self, day: str, line: bytes) -> None:
        """Write one line to the file of ``day``.

        Raises:
            OSError: It is not, or not wholly, written.
        """
        if self._stream is None or day != self._day:
            self.close()
            self._stream, self._day = self._open(day), day
        self._stream.write(line)

    def close(self) -> None:
        """Close the file; the next line opens it again. Idempotent."""
        if self._stream is not None:
            os.close(self._stream.fd)
            self._stream = None

    def _open(self, day: str) -> _Stream:
        path = self.directory / f"{self.stem}.{day}.log"
        self.directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
        # A process that found the disk full may have left half a line.
        size = os.fstat(fd).st_size
        return _Stream(fd, torn=size > 0 and os.pread(fd, 1, size - 1) != b"\n")
