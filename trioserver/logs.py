r"""Logs: one line per event, safe to print, safe to keep, never in the way.

What a line goes through:

    log.info("connection closed", user=...)      structlog, filtered by level: below it, nothing
      -> _render     adds time, level, process, slot, generation; masks, escapes and cuts values
      -> _Output     one write to standard error, one to the day's file if there is LOG_DIR

The standard library's ``logging`` (Hypercorn, asyncio, redis-py), ``warnings`` and uncaught
exceptions take the same way, so that nothing else ever writes to standard error.

Promises:

- *One event is one line*: control characters are escaped, long values cut. A line has at most
  4,096 bytes, because writes up to PIPE_BUF are atomic in a pipe, and all processes share one.
- *No token, secret or password in a line*, as far as they can be recognised by key or by shape.
- *A log call never raises and never waits.* What cannot be written at once (full disk, closed
  pipe, a reader that sleeps) is dropped and counted: `dropped`.

Files are named ``<process>.<day>.log`` and opened for appending; errors stand also in
``<process>.error.<day>.log``. Each line goes to the file of its own day (UTC), and nobody renames
a file that is in use: so two generations of one worker can share a file. `sweep` compresses and
deletes the files of earlier days. Files are JSON always; LOGGER_ENCODING is about standard error.
"""

import contextlib
import datetime as dt
import errno
import fcntl
import gzip
import itertools
import json
import logging
import math
import os
import re
import select
import struct
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, TextIO, cast

import attrs
import structlog

from trioserver.settings import MASK, Settings

LINE_BYTES = 4096
"""PIPE_BUF of Linux."""

TEXT_LENGTH = 512
"""Characters kept of one value; six times as much of a traceback."""

_DEPTH, _WIDTH = 3, 32
_INTEGER_BITS = 64

KEEP_DAYS = 14
KEEP_ERROR_DAYS = 30

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

_IDENTITY = ("timestamp", "level", "event", "process", "slot", "generation")

# Masking. Keys: what a value is called. Shapes: what it looks like inside of any text.
# Every repetition that may be tried from many places is bounded: hostile text comes through here.

_SECRET_KEY = re.compile(
    r"token|secret|passw|authorization|credential|cookie|api_?key", re.IGNORECASE
)
_NAME = r"(?:token|secret|passw(?:or)?d|api_?key|credential)[\w-]{0,40}"
_SHAPES = (
    # A JWT, whole or cut off: it begins with the base64 of '{"'.
    (re.compile(r"eyJ[\w-]{5,}(?:\.[\w-]*)*"), MASK),
    (re.compile(r"(?i)(bearer(?:[ .+]|%20)+)[^\s,;\"'&]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)(authorization[\"']?\s?[:=]\s?[\"']?\w{1,20} )[^\s,;\"']+"), rf"\1{MASK}"),
    # ?token=... and token="..."
    (re.compile(rf"(?i)({_NAME}=)(?:\"[^\"]*\"?|'[^']*'?|[^\s&;,\"']+)"), rf"\1{MASK}"),
    # "token": "..." in JSON, also in JSON within JSON, or in the repr of a dictionary
    (
        re.compile(rf"(?i)({_NAME}\\{{0,3}}[\"']\s?:\s?)\\{{0,3}}(?:\"[^\"]*\"?|'[^']*'?)"),
        rf"\1{MASK}",
    ),
    # user:password@ in a URL
    (re.compile(r"(\w://)[^\s/@]{0,256}:[^\s@]{0,256}@"), rf"\1{MASK}@"),
)
_SUSPECT = re.compile(r"(?i)token|secret|passw|bearer|authorization|api_?key|credential|eyJ|://")


def redact(text: str) -> str:
    """Return ``text`` without what looks like a token, a secret or a password."""
    if _SUSPECT.search(text):
        for shape, replacement in _SHAPES:
            text = shape.sub(replacement, text)
    return text


def _cut(text: str, limit: int) -> str:
    # The end matters as much as the beginning: there, a traceback names the exception.
    head = limit // 2
    return text if len(text) <= limit else f"{text[:head]}…{text[len(text) - limit + head + 1 :]}"


def _clean(value: object, limit: int, depth: int = 0) -> object:
    """Return ``value`` as JSON can carry it: masked, cut, bounded in depth and width."""
    if isinstance(value, str):
        # Cut before, so that huge text stays cheap. Only the end goes: with a hole in it, the
        # second half of a token would not be recognised any more.
        return _cut(redact(value[: 32 * TEXT_LENGTH]), limit)
    if value is None or isinstance(value, bool | int | float):
        return _clean_number(value, limit)
    if isinstance(value, bytes | bytearray):
        return _clean(value[: 32 * TEXT_LENGTH].decode(errors="backslashreplace"), limit)
    if isinstance(value, Mapping) and depth < _DEPTH:
        items = itertools.islice(value.items(), _WIDTH)
        return dict(_clean_item(str(key), item, limit, depth + 1) for key, item in items)
    if isinstance(value, list | tuple | set | frozenset) and depth < _DEPTH:
        return [_clean(item, limit, depth + 1) for item in itertools.islice(value, _WIDTH)]
    return _clean(_described(value), limit)


def _clean_number(value: object, limit: int) -> object:
    # Not every reader of JSON knows NaN, or integers beyond 64 bits.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        return hex(value)[:limit]
    return value


def _described(value: object) -> str:
    try:
        text = str(value)
    except Exception:  # noqa: BLE001 - foreign code, in a call that never raises
        text = "?"
    return f"{type(value).__name__}: {text}" if isinstance(value, BaseException) else text


def _clean_item(key: str, value: object, limit: int, depth: int) -> tuple[str, object]:
    if _SECRET_KEY.search(key) and not isinstance(value, bool | None):
        return str(_clean(key, limit)), MASK
    # A traceback is the one long text that is worth its length.
    limit = 6 * limit if key == "exception" else limit
    return str(_clean(key, limit)), _clean(value, limit, depth)


# Lines.


def _json_line(fields: Mapping[str, object]) -> bytes:
    # ensure_ascii also escapes what only some programs take for a line end (U+2028, U+0085).
    return json.dumps(fields).encode() + b"\n"


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _console_line(fields: Mapping[str, object]) -> bytes:
    rest = dict(fields)
    exception = rest.pop("exception", None)
    timestamp, level, event, process = (
        _printable(str(rest.pop(key))) for key in ("timestamp", "level", "event", "process")
    )
    pairs = "".join(f" {_printable(key)}={_console_value(value)}" for key, value in rest.items())
    line = f"{timestamp} {level:<8} {process} {event}{pairs}\n"
    if exception is not None:
        # The bar shows that these lines are no events of their own, whatever they claim.
        line += "".join(f"    | {_printable(part)}\n" for part in str(exception).splitlines())
    return line.encode(errors="backslashreplace")


def _console_value(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[^\s\"'=]+", value):
        return _printable(value)
    return _printable(json.dumps(value, ensure_ascii=False))


def _fitted(fields: Mapping[str, object], line: Callable[[Mapping[str, object]], bytes]) -> bytes:
    """Return the line of ``fields``, its values cut until it fits."""
    for limit in (TEXT_LENGTH, TEXT_LENGTH // 4, TEXT_LENGTH // 16):
        encoded = line(dict(_clean_item(key, value, limit, 0) for key, value in fields.items()))
        if len(encoded) <= LINE_BYTES:
            return encoded
    kept = {key: _clean(fields[key], TEXT_LENGTH) for key in _IDENTITY if key in fields}
    return line(kept | {"truncated": True})


# Output.


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


class _Journal:
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
        self._line = _console_line if console else _json_line
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
            line = _safe_line(fields, self._line)
            if not _ready(self._stderr.fd):
                raise BlockingIOError
            self._stderr.write(line)
        except OSError:
            self.dropped += 1

    def _write_files(self, now: dt.datetime, level: str, event: Mapping[str, object]) -> None:
        if not self._files:
            return
        line = _safe_line(self._fields(now, level, event), _json_line)
        serious = _LEVELS[level] >= logging.ERROR
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


def _safe_line(
    fields: Mapping[str, object], line: Callable[[Mapping[str, object]], bytes]
) -> bytes:
    try:
        return _fitted(fields, line)
    except Exception as error:  # noqa: BLE001 - whatever a value does, the call must not raise
        kept = {key: str(fields[key]) for key in _IDENTITY if key in fields and key != "event"}
        return line(kept | {"event": "event could not be written", "error": type(error).__name__})


# Until `configure` is called, lines go to standard error, for people: never to standard output.
_journal = _Journal(identity={"process": "trioserver"})


def _write(_logger: object, level: str, event: MutableMapping[str, Any]) -> NoReturn:
    """End the chain of structlog: the line is written here, nothing is left to return."""
    with contextlib.suppress(Exception):
        event = structlog.processors.format_exc_info(_logger, level, event)
    _journal.write(level, event)
    raise structlog.DropEvent


# One list for ever: loggers that are already in use keep it.
_CHAIN: list[structlog.typing.Processor] = [_write]
structlog.configure(
    processors=_CHAIN,
    wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    logger_factory=lambda *_: None,
)


def get_logger(**bound: object) -> structlog.typing.FilteringBoundLogger:
    """Return a logger; ``bound`` stands in each of its lines.

    It may be made before `configure`: it takes its level from there at its first use.
    """
    return cast("structlog.typing.FilteringBoundLogger", structlog.get_logger(**bound))


def configure(
    settings: Settings,
    process: str,
    *,
    slot: int | None = None,
    generation: int | None = None,
    clock: Callable[[], float] = time.time,
    fd: int = 2,
) -> None:
    """Take over everything that this process has to say.

    To be called once, before anything else is worth a line. A second call is for tests: loggers
    that have been used keep their level.

    Args:
        settings: Of which ``log_*``, ``logger_*`` and ``ws_mode`` count here.
        process: ``supervisor``, ``gateway``, ``worker-0``: also the name of the files.
        slot: The place of a worker.
        generation: Counts reloads.
        clock: Seconds since 1970.
        fd: Standard error.
    """
    global _journal  # noqa: PLW0603 - there is one log per process, as there is one standard error
    identity = {"process": process, "slot": slot, "generation": generation}
    _journal.close_files()
    _journal = _Journal(
        identity={key: value for key, value in identity.items() if value is not None},
        clock=clock,
        fd=fd,
        console=_for_people(settings, fd),
        log_dir=settings.log_dir,
    )
    level = _LEVELS[settings.log_level]
    structlog.configure(
        processors=_CHAIN,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: None,
        cache_logger_on_first_use=True,
    )
    _take_over(level)


def dropped() -> int:
    """Return the number of lines that could not be written."""
    return _journal.dropped


def reopen() -> None:
    """Close the files; the next lines open them anew (SIGUSR1)."""
    _journal.close_files()


def _for_people(settings: Settings, fd: int) -> bool:
    if settings.logger_encoding != "auto":
        return settings.logger_encoding == "console"
    return bool({settings.ws_mode, settings.logger_mode} & {"debug", "development"}) or os.isatty(
        fd
    )


# Others who would write to standard error.


class _Forward(logging.Handler):
    """Takes lines of the standard library's ``logging`` the common way."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; never raises."""
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001 - arguments that do not fit the text
            text = str(record.msg)
        level = max(
            (name for name in _LEVELS if _LEVELS[name] <= record.levelno),
            key=_LEVELS.__getitem__,
            default="debug",
        )
        _log_foreign(level, {"event": text, "logger": record.name, "exc_info": record.exc_info})


def _log_foreign(level: str, event: MutableMapping[str, Any]) -> None:
    with contextlib.suppress(structlog.DropEvent):
        _write(None, level, event)


def _take_over(level: int) -> None:
    logging.root.handlers[:] = [_Forward()]
    logging.root.setLevel(level)
    warnings.showwarning = _show_warning
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del file, line
    where = f"{filename}:{lineno}"
    _log_foreign("warning", {"event": str(message), "category": category.__name__, "where": where})


def _uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    _log_foreign("critical", {"event": "uncaught exception", "exc_info": (kind, error, traceback)})


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    event = {"event": "uncaught exception", "exc_info": args.exc_value}
    _log_foreign("critical", event | {"thread": args.thread and args.thread.name})


def _unraisable(args: "sys.UnraisableHookArgs") -> None:
    event = {"event": args.err_msg or "exception ignored", "exc_info": args.exc_value}
    _log_foreign("error", event | {"object": type(args.object).__name__})


# Not too much of the same.


class RateLimited:
    """Lets one line through per key and interval, and counts those that it held back.

    Pure: the caller says what time it is.

        held_back = malformed.due("not JSON", now)
        if held_back is not None:
            log.warning("malformed notification", reason="not JSON", held_back=held_back)
    """

    MAX_KEYS = 1024
    """Beyond it the oldest key is forgotten, so that hostile keys cost no memory."""

    __slots__ = ("_interval", "_seen")

    def __init__(self, interval_seconds: float) -> None:
        self._interval = interval_seconds
        self._seen: dict[str, tuple[float, int]] = {}

    def due(self, key: str, now: float) -> int | None:
        """Return how many lines were held back since the last one; None holds this one back.

        Args:
            key: What counts as "the same".
            now: Seconds of a clock that does not go backwards.
        """
        last, held_back = self._seen.get(key, (-math.inf, 0))
        if now - last < self._interval:
            self._seen[key] = (last, held_back + 1)
            return None
        self._seen.pop(key, None)
        if len(self._seen) >= self.MAX_KEYS:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = (now, 0)
        return held_back


# Files of earlier days.

_FILE_NAME = re.compile(r"[\w-]+(?P<error>\.error)?\.(?P<day>\d{4}-\d\d-\d\d)\.log(?P<gz>\.gz)?")
_CHUNK_BYTES = 1 << 18


@attrs.frozen(kw_only=True)
class Swept:
    """What one `sweep` did."""

    compressed: int = 0
    deleted: int = 0
    failed: int = 0
    """Files that were left as they are, for the next time."""


def sweep(log_dir: Path, today: dt.date) -> Swept:
    """Compress the log files of earlier days, and delete those that are too old.

    Idempotent, also after a crash in its middle; of several at once, one works and the others
    return at once. It blocks: call it in a thread. Never raises OSError.

    Args:
        log_dir: Other files in it are left alone.
        today: The day (UTC) whose files are in use.
    """
    try:
        directory = os.open(log_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return Swept()
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _sweep(log_dir, today)
    except BlockingIOError:
        return Swept()
    finally:
        os.close(directory)


def _sweep(log_dir: Path, today: dt.date) -> Swept:
    done = Counter[str]()
    for path in sorted(log_dir.iterdir()):
        try:
            done[_sweep_file(path, today)] += 1
        except OSError:
            done["failed"] += 1
    return Swept(compressed=done["compressed"], deleted=done["deleted"], failed=done["failed"])


def _sweep_file(path: Path, today: dt.date) -> str:
    if path.name.endswith(".log.gz.tmp"):
        # Left by a sweep that was killed; the lock says that none is at work. It is gone if
        # its own file has just been compressed again.
        path.unlink(missing_ok=True)
        return "left alone"
    match = _FILE_NAME.fullmatch(path.name)
    try:
        age = (today - dt.date.fromisoformat(match["day"])).days if match else 0
    except ValueError:
        return "left alone"
    if not match or age <= 0:
        return "left alone"
    if age > (KEEP_ERROR_DAYS if match["error"] else KEEP_DAYS):
        path.unlink()
        return "deleted"
    if match["gz"]:
        return "left alone"
    _compress(path)
    return "compressed"


def _compress(path: Path) -> None:
    archive = path.with_name(f"{path.name}.gz")
    temporary = path.with_name(f"{path.name}.gz.tmp")
    if not _ends_with(archive, path):
        try:
            _archive(path, archive, temporary)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    path.unlink()


def _archive(path: Path, archive: Path, temporary: Path) -> None:
    with path.open("rb") as source, temporary.open("wb") as raw:
        os.fchmod(raw.fileno(), 0o640)
        if archive.exists():
            # A process with the clock of yesterday wrote once more: its lines become the next
            # member of the archive, which is one text for every reader of gzip.
            with archive.open("rb") as earlier:
                _copy(earlier, raw)
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb") as packed:
            _copy(source, packed)
        raw.flush()
        os.fsync(raw.fileno())
    temporary.replace(archive)


def _ends_with(archive: Path, path: Path) -> bool:
    """Return whether the last member of ``archive`` is ``path``: then only deleting it is left."""
    if not archive.exists():
        return False
    with archive.open("rb") as packed:
        packed.seek(-8, os.SEEK_END)
        trailer = packed.read()
    checksum = length = 0
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
            length += len(chunk)
    return trailer == struct.pack("<II", checksum, length & 0xFFFFFFFF)


def _copy(source: BinaryIO, sink: BinaryIO | gzip.GzipFile) -> None:
    while chunk := source.read(_CHUNK_BYTES):
        sink.write(chunk)
