"""Log files of earlier days: compressed, and after some weeks deleted.

`trioserver.log_journal` writes the files and says how they are named.
"""

import datetime as dt
import fcntl
import gzip
import os
import re
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import attrs

KEEP_DAYS = 14
KEEP_ERROR_DAYS = 30

_FILE_NAME = re.compile(r"[\w-]+(?P<error>\.error)?\.(?P<day>\d{4}-\d\d-\d\d)\.log(?P<gz>\.gz)?")
_CHUNK_BYTES = 1 << 18


@attrs.frozen(kw_only=True)
class Swept:
    """What one `sweep` did."""

    compressed: int = 0
    deleted: int = 0
    failed: int = 0
    """Files that were left as they are, for the next time; the directory itself counts as one."""


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
    except OSError:
        # No locks on this file system, no descriptor left to list it with.
        return Swept(failed=1)
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
