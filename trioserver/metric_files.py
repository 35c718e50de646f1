"""Metric files: how the counts of one process reach the process that is scraped.

Each process keeps a few small files, memory-mapped, in one directory; the gateway reads them all
and adds them up. The format is the one that ``prometheus_client`` uses for its own multiprocess
mode, so its tools read these files too. Ours are written differently, because more is known:

- Every series is known when the process starts (label sets are closed). So a file is written whole
  beside its final name and renamed: nobody ever sees an empty or half-written one, and a full disk
  is an ``OSError`` here and not a SIGBUS at the first store into a hole.
- The name carries ``slot.generation``, not a pid. A respawn in the same slot and generation goes
  on where its predecessor stopped; two generations never share a file, which would lose counts.
- The file is locked (``flock``) for as long as its process lives. The kernel lets go however the
  process ends, so a reader knows whether a gauge is still somebody's, whatever pids were reused.

Layout, native byte order, everything aligned to 8: an int32 "bytes used", 4 bytes of nothing, then
entries of int32 key length, the key, spaces up to the alignment, float64 value, float64 timestamp.
A key is the JSON list ``[family, sample, labels, help]``. What comes after the bytes used is no
entry: an archive notes there what it is made of (`metric_archive`).

A reader distinguishes what is wrong with a file from what is wrong with reading: `BadMetricFile`
will be bad the next time as well, an ``OSError`` (no descriptor left, a hiccup of the disk) may
not, and says nothing about the file.
"""

import contextlib
import errno
import fcntl
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import attrs

SUFFIX: Final = ".db"
"""Ending of a live metric file; anything else in the directory is not looked at."""

ASIDE_SUFFIX: Final = ".bad"
"""Added to the name of a file that cannot be read, which takes it out of every later scrape."""

DRAFT_SUFFIX: Final = ".new"
"""Added to the name of a file while it is written."""

ARCHIVE: Final = "archive"
"""Stands for ``slot.generation`` in the name of an archive."""

_HEADER_BYTES: Final = 8
_LENGTH: Final = struct.Struct("=i")
_CELL: Final = struct.Struct("=dd")
_ALIGNMENT: Final = 8
# No process of ours has a thousand series of a few hundred bytes; more is somebody else's file.
_MAX_BYTES: Final = 1 << 20

_NAME: Final = re.compile(r"([a-z_]+)_([a-z0-9]+)\.([0-9]{1,9})\.db")

# Opening or locking it will never succeed: it is no regular file, or not ours to read.
_NO_FILE_OF_OURS: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM})
# The file system has no locks, which is no news about the file.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class BadMetricFile(Exception):  # noqa: N818 - reads as the state it reports
    """It is not a whole metric file: empty, torn, or not one at all."""


class Cell(NamedTuple):
    """What a file holds under one key."""

    value: float
    stamp: float = 0.0
    """When it was set, in seconds since 1970; 0 where nobody asks."""


@attrs.frozen(kw_only=True)
class Name:
    """What the name of a metric file says."""

    kind: str
    slot: str
    generation: int


@attrs.frozen(kw_only=True)
class Contents:
    """What is in a file."""

    cells: dict[str, Cell]

    owned: bool
    """Whether the process that wrote it lives. On file systems without locks, always."""

    trailer: bytes
    """What comes after the entries."""


def file_name(kind: str, identity: str) -> str:
    """Return the name of the file of that kind and ``slot.generation``."""
    return f"{kind}_{identity}{SUFFIX}"


def parse_name(name: str) -> Name | None:
    """Return what the name of a process's metric file says; None if it is not one."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return Name(kind=match[1], slot=match[2], generation=int(match[3]))


def is_live_gauge(kind: str) -> bool:
    """Return whether values of that kind mean something only while their process lives."""
    return kind.startswith("gauge_live")


def pack(cells: Mapping[str, Cell], trailer: bytes = b"") -> tuple[bytes, list[int]]:
    """Lay out a whole file.

    Returns:
        The bytes, and for each key, in order, the offset of its value.
    """
    parts: list[bytes] = []
    offsets: list[int] = []
    used = _HEADER_BYTES
    for key, cell in cells.items():
        encoded = key.encode()
        padding = _padding(len(encoded))
        offsets.append(used + _LENGTH.size + len(encoded) + padding)
        parts.append(_LENGTH.pack(len(encoded)) + encoded + b" " * padding + _CELL.pack(*cell))
        used += len(parts[-1])
    return b"".join((_LENGTH.pack(used), bytes(4), *parts, trailer)), offsets


def unpack(data: bytes) -> tuple[dict[str, Cell], bytes]:
    """Read the bytes of a whole file, entries and trailer: the inverse of `pack`.

    Trusts nothing: every length is checked before it is used, so that garbage ends in an error and
    never in a long loop.

    Raises:
        BadMetricFile: The bytes are not a whole metric file.
    """
    if len(data) < _HEADER_BYTES:
        raise BadMetricFile("too short for a header")
    (used,) = _LENGTH.unpack_from(data, 0)
    if not _HEADER_BYTES <= used <= len(data):
        raise BadMetricFile(f"claims {used} bytes and has {len(data)}")
    cells: dict[str, Cell] = {}
    position = _HEADER_BYTES
    while position < used:
        if position + _LENGTH.size > used:
            raise BadMetricFile("ends within an entry")
        (length,) = _LENGTH.unpack_from(data, position)
        start = position + _LENGTH.size
        cell = start + length + _padding(length)
        if length <= 0 or cell + _CELL.size > used:
            raise BadMetricFile("ends within an entry")
        try:
            key = data[start : start + length].decode()
        except UnicodeDecodeError:
            raise BadMetricFile("a key is not text") from None
        value, stamp = _CELL.unpack_from(data, cell)
        if not (math.isfinite(value) and math.isfinite(stamp)):
            raise BadMetricFile("a value is not a number")
        cells[key] = Cell(value, stamp)
        position = cell + _CELL.size
    return cells, data[used:]


def _padding(length: int) -> int:
    return _ALIGNMENT - (length + _LENGTH.size) % _ALIGNMENT


def read(path: Path) -> Contents:
    """Read one file, which its owner may be writing to.

    Raises:
        BadMetricFile: It is not a whole metric file.
        OSError: It cannot be read now; ``FileNotFoundError`` if it is gone.
    """
    fd = _open(path)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BadMetricFile("not a file")
        owned = _owned(fd)
        data = os.read(fd, _MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > _MAX_BYTES:
        raise BadMetricFile("far too big")
    cells, trailer = unpack(data)
    return Contents(cells=cells, owned=owned, trailer=trailer)


def is_owned(path: Path) -> bool:
    """Return whether the process that wrote this file lives; a file that is gone is nobody's.

    Raises:
        BadMetricFile: It is not a file at all.
        OSError: It cannot be known now.
    """
    try:
        fd = _open(path)
    except FileNotFoundError:
        return False
    try:
        return _owned(fd)
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    try:
        # Not blocking, and no link: a pipe by that name must not hang us, a link lead us astray.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in _NO_FILE_OF_OURS:
            raise BadMetricFile(error.strerror) from error
        raise


def _owned(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        raise
    return False


def set_aside(path: Path) -> None:
    """Take a bad file out of the way, keeping its bytes for whoever wants to know why.

    Never raises: if it cannot be renamed, it is looked at again next time.
    """
    with contextlib.suppress(OSError):
        path.rename(path.with_name(path.name + ASIDE_SUFFIX))


class MetricFile:
    """One file that this process owns: created whole, then stored into.

    Not for two threads at once.
    """

    __slots__ = ("_inode", "_map", "_offsets", "path")

    def __init__(self, path: Path, cells: Mapping[str, Cell]) -> None:
        """Write the file, lock it and put it in place of any older one.

        Args:
            path: Where it shall be.
            cells: Every key that it will ever have, with the value to start from.

        Raises:
            OSError: It could not be written; nothing is left behind.
        """
        self.path = path
        content, self._offsets = pack(cells)
        with _draft(path) as fd:
            with contextlib.suppress(OSError):  # no locks on this file system: see _owned
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_all(fd, content)
            self._inode = os.fstat(fd).st_ino
            # It keeps a duplicate of the descriptor, and with it the lock.
            self._map = mmap.mmap(fd, len(content))

    def store(self, index: int, cell: Cell) -> None:
        """Store what the key holds that was the ``index``-th at construction."""
        offset = self._offsets[index]
        # One slice assignment and not pack_into: that one stores byte by byte through zero.
        self._map[offset : offset + _CELL.size] = _CELL.pack(*cell)

    def close(self) -> None:
        """Let go of the file, which stays where it is. Idempotent."""
        self._map.close()

    def remove(self) -> None:
        """Take the file away, if it is still there and ours; never raises. Idempotent."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()


def write_archive(path: Path, cells: Mapping[str, Cell], trailer: bytes) -> None:
    """Write a file that nobody owns, in place of any older one: both are whole, at any moment.

    Raises:
        OSError: It could not be written; the older one is untouched and nothing is left behind.
    """
    with _draft(path) as fd:
        _write_all(fd, pack(cells, trailer)[0])


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[int]:
    """Give a descriptor to write to; what was written is at ``path`` if the block ends well."""
    draft = path.with_name(path.name + DRAFT_SUFFIX)
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        yield fd
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _write_all(fd: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]
