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
A key is the JSON list ``[family, sample, labels, help]``.
"""

import contextlib
import fcntl
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SUFFIX: Final = ".db"
"""Ending of a live metric file; anything else in the directory is not looked at."""

ASIDE_SUFFIX: Final = ".bad"
"""Added to the name of a file that cannot be read, which takes it out of every later scrape."""

_HEADER_BYTES: Final = 8
_LENGTH: Final = struct.Struct("=i")
_CELL: Final = struct.Struct("=dd")
_ALIGNMENT: Final = 8
# No process of ours has a thousand series of a few hundred bytes; more is somebody else's file.
_MAX_BYTES: Final = 1 << 20


class BadMetricFile(Exception):  # noqa: N818 - reads as the state it reports
    """The bytes are not a whole metric file: empty, torn, or not one at all."""


def pack(values: Mapping[str, float]) -> tuple[bytes, list[int]]:
    """Lay out a whole file.

    Returns:
        The bytes, and for each key, in order, the offset of its value.
    """
    parts: list[bytes] = []
    offsets: list[int] = []
    used = _HEADER_BYTES
    for key, value in values.items():
        encoded = key.encode()
        padding = _padding(len(encoded))
        offsets.append(used + _LENGTH.size + len(encoded) + padding)
        parts.append(_LENGTH.pack(len(encoded)) + encoded + b" " * padding + _CELL.pack(value, 0.0))
        used += len(parts[-1])
    return b"".join((_LENGTH.pack(used), bytes(4), *parts)), offsets


def unpack(data: bytes) -> dict[str, float]:
    """Read the bytes of a whole file: the inverse of `pack`.

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
    values: dict[str, float] = {}
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
        value, _timestamp = _CELL.unpack_from(data, cell)
        if not math.isfinite(value):
            raise BadMetricFile("a value is not a number")
        values[key] = value
        position = cell + _CELL.size
    return values


def _padding(length: int) -> int:
    return _ALIGNMENT - (length + _LENGTH.size) % _ALIGNMENT


def read(path: Path) -> dict[str, float]:
    """Read one file, which its owner may be writing to.

    Raises:
        BadMetricFile: It is not a whole metric file.
        OSError: It cannot be opened or read; ``FileNotFoundError`` if it is gone.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise BadMetricFile("far too big")
    return unpack(data)


def set_aside(path: Path) -> None:
    """Take a bad file out of the way, keeping its bytes for whoever wants to know why.

    Never raises: if it cannot be renamed, it is looked at again next time.
    """
    with contextlib.suppress(OSError):
        path.rename(path.with_name(path.name + ASIDE_SUFFIX))


def is_owned(path: Path) -> bool:
    """Return whether the process that wrote this file lives.

    A file that is gone is nobody's. An owner that could not lock its file (some network file
    systems know no locks) is taken for dead.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class MetricFile:
    """One file that this process owns: created whole, then stored into.

    Not for two threads at once.
    """

    __slots__ = ("_map", "_offsets", "path")

    def __init__(self, path: Path, values: Mapping[str, float]) -> None:
        """Write the file, lock it and put it in place of any older one.

        Args:
            path: Where it shall be.
            values: Every key that it will ever have, with the value to start from.

        Raises:
            OSError: It could not be written; nothing is left behind.
        """
        self.path = path
        content, self._offsets = pack(values)
        draft = path.with_name(path.name + ".new")
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):  # no locks on this file system: see is_owned
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_all(fd, content)
            # It keeps a duplicate of the descriptor, and with it the lock.
            self._map = mmap.mmap(fd, len(content))
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def store(self, index: int, value: float) -> None:
        """Store the value of the key that was the ``index``-th at construction."""
        offset = self._offsets[index]
        # One slice assignment and not pack_into: that one stores byte by byte through zero.
        self._map[offset : offset + _CELL.size] = _CELL.pack(value, 0.0)

    def close(self) -> None:
        """Let go of the file, which stays where it is. Idempotent."""
        self._map.close()


def _write_all(fd: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]
