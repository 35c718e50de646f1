"""The memory that all workers share: its layout, who owns which part of it, and how it is cleared.

The supervisor makes one file in memory (`create`) and hands its descriptor to every worker. It is
divided into segments. One life of a worker owns one segment and is the only one to write to it;
everybody reads all of them and adds up. So there are no locks around counting, no compare-and-swap
that Python does not have, and no count that a killed process could leave wrong in somebody else's
part.

Owning
    A worker claims the first segment that nobody owns, by locking one byte of the file that stands
    for it. Like the locks of metric files, the kernel lets go of it however the process ends.
    These locks belong to an open file and not to a process (``F_OFD_SETLK``), so each claim opens
    the file anew; a lock on the inherited descriptor would be everybody's.

    The claim is per life, not per slot: while a reload is under way, two lives of one slot count
    side by side, and after quick reloads three or four. There are three segments per slot and a
    few to spare. Should they ever run out, a worker can count for itself (`board.Board.alone`).

Clearing
    The supervisor calls `sweep` when it has reaped a worker: every segment that has an owner's
    mark and no lock is zeroed, so the counts are right as soon as the death is known. A worker
    zeroes what it claims in any case.

Layout, native byte order, words of 8 bytes: a header; columns with one word per segment, side by
side so that they are read in one go; the entries of addresses, segment by segment; and one byte
per entry, bucket by bucket with those of all segments side by side, which says at a glance in whose
entries of a bucket an address may be (`board`).

A word is aligned and written by one store of the machine, so a reader sees the old or the new one
and never half of each. Several words are not one: what that means is said where it matters.

The file is sealed against being shortened, and its memory is allocated at once: no process is ever
killed by SIGBUS for looking at it. Its size depends on the settings alone.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
from typing import Final

from trioserver.errors import TrioserverError

_MAGIC: Final = int.from_bytes(b"tsboard", "big") << 8 | 1
"""Its low byte is the version of the layout: the supervisor may be older than the workers."""

WAYS: Final = 4
"""Entries in one bucket of one segment."""

ENTRY_WORDS: Final = 2

UNEVEN: Final = 1.2
"""SO_REUSEPORT spreads by hash: the fullest worker has about this many times its share."""

MIN_BUCKETS: Final = 256
MAX_BUCKETS: Final = 1 << 16

# Words of the header.
_KIND, _SEGMENTS, _BUCKETS = 0, 1, 2
USED: Final = 3
"""Word: segments that are looked at; there is nobody behind them."""
_HASH: Final = 4
"""First of four words of chance: two of the multiplier, the summand, the second multiplier."""
_HEADER_WORDS: Final = 8
_HEADER: Final = struct.Struct(f"@{_HEADER_WORDS}Q")

# Columns: words of each segment.
_OWNER, _CONNECTIONS, _UNLISTED, _EVEN, _ODD = range(5)
_COLUMNS: Final = 5

_FLOCK: Final = struct.Struct("@hhqqi")
_WORD_BYTES: Final = 8


class BoardError(TrioserverError):
    """The shared memory cannot be used: all segments are taken, or another release made it."""


def create(slots: int, connections: int) -> int:
    """Return the descriptor of a new board, close-on-exec.

    Args:
        slots: Workers of one generation.
        connections: Of the whole server; what it has addresses for. More than that still count,
            but some of their addresses may not find room.

    Raises:
        OSError: There is not enough memory.
    """
    segments = 3 * slots + 4
    share = int(connections / slots * UNEVEN) if slots > 1 else connections
    buckets = 1 << (min(max(share, MIN_BUCKETS), MAX_BUCKETS) - 1).bit_length()
    fd = os.memfd_create("board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        header = (_MAGIC, segments, buckets, 0, *(secrets.randbits(64) for _ in range(4)))
        os.posix_fallocate(fd, 0, _size(segments, buckets))
        os.pwrite(fd, _HEADER.pack(*header), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    except OSError:
        os.close(fd)
        raise
    return fd


def sweep(fd: int) -> int:
    """Clear the segments whose owners are no more; return how many there were.

    For the supervisor, when it has reaped a worker. Never waits.

    Raises:
        BoardError: That is no board.
    """
    with contextlib.closing(BoardMap(fd)) as board:
        return board.sweep()


def _read_header(fd: int) -> tuple[int, ...]:
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        raise BoardError("the shared counters are no board")
    words: tuple[int, ...] = _HEADER.unpack(header)
    if words[_KIND] != _MAGIC:
        raise BoardError("the shared counters are of another release")
    return words


def _size(segments: int, buckets: int) -> int:
    words = _HEADER_WORDS + _COLUMNS * segments + segments * buckets * WAYS * ENTRY_WORDS
    return words * _WORD_BYTES + segments * buckets * WAYS


class BoardMap:
    """The shared memory, mapped, with its parts by name.

    Args:
        fd: What `create` returned, in whatever process; the caller's to close, at any time.

    Raises:
        BoardError: That is no board, or one of another release.
    """

    def __init__(self, fd: int) -> None:
        # Anew, so that locks are ours alone. Whoever forks without exec shares them: do not.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            header = _read_header(self._fd)
            self.segments: Final = header[_SEGMENTS]
            self.buckets: Final = header[_BUCKETS]
            self.data = mmap.mmap(self._fd, _size(self.segments, self.buckets))
        except BaseException:
            os.close(self._fd)
            raise
        low, high, self.summand, second = header[_HASH:_HEADER_WORDS]
        self.multiplier: Final = high << 64 | low | 1
        self.second_multiplier: Final = second | 1
        self._claimed: set[int] = set()
        self._bytes = memoryview(self.data)
        columns = [_HEADER_WORDS + column * self.segments for column in range(_COLUMNS + 1)]
        self._owner = columns[_OWNER]
        self.connections: Final = columns[_CONNECTIONS]
        """First word of a column: open connections."""
        self.unlisted: Final = columns[_UNLISTED]
        """First word of a column: those of them whose address found no room."""
        self.even: Final = columns[_EVEN]
        """First word of a column: handshakes of an even second: second << 32 | count."""
        self.odd: Final = columns[_ODD]
        """First word of a column: handshakes of an odd second."""
        self.entries: Final = columns[_COLUMNS]
        """First word of the entries of the first segment."""
        self.segment_words: Final = self.buckets * WAYS * ENTRY_WORDS
        """Words of the entries of one segment."""
        tags = self.entries + self.segments * self.segment_words
        self.words = self._bytes[: tags * _WORD_BYTES].cast("Q")
        """Everything but the tags. Written by owners only, but for `USED`."""
        self.tags: Final = tags * _WORD_BYTES
        """First byte of the tags in `data`; `WAYS` per segment, all segments of a bucket."""
        self._tags = self._bytes[self.tags :].cast("I")
        """One item is a bucket's tags of one segment."""

    def claim(self) -> int:
        """Take a segment that is nobody's, zeroed; it is ours until `close` or our end.

        Raises:
            BoardError: All are taken.
        """
        for segment in range(self.segments):
            if segment not in self._claimed and self._lock(segment):
                self._clear(segment)
                self._claimed.add(segment)
                self.words[self._owner + segment] = os.getpid()
                self.show(segment)
                return segment
        raise BoardError(f"all {self.segments} segments of the shared counters are taken")

    def show(self, segment: int) -> None:
        """See to it that everybody looks at this segment.

        Two who do this at once may undo each other's, and so may a sweep: so who finds his own
        segment outside, does it again.
        """
        if self.words[USED] <= segment:
            self.words[USED] = segment + 1

    def sweep(self) -> int:
        """Clear the segments whose owners are no more; return how many there were."""
        swept = last = 0
        for segment in range(self.segments):
            if self.words[self._owner + segment] == 0:
                continue
            # Our own lock would not hold us back.
            if segment not in self._claimed and self._lock(segment):
                self._clear(segment)
                self._unlock(segment)
                swept += 1
            else:
                last = segment + 1
        self.words[USED] = last
        return swept

    def release(self, segment: int) -> None:
        """Give a claimed segment back, zeroed."""
        self._clear(segment)
        self._claimed.discard(segment)
        self._unlock(segment)

    def owners(self) -> int:
        """Return how many segments are somebody's, those of the dead before a sweep included."""
        owner = self.words[self._owner : self._owner + self.segments]
        return sum(pid != 0 for pid in owner.tolist())

    def close(self) -> None:
        """Unmap it. Claimed segments are left as they are, for a sweep."""
        self.words.release()
        self._tags.release()
        self._bytes.release()
        self.data.close()
        os.close(self._fd)

    def _clear(self, segment: int) -> None:
        words = self.words
        for column in range(1, _COLUMNS):
            words[_HEADER_WORDS + column * self.segments + segment] = 0
        self._tags[segment :: self.segments] = memoryview(bytes(4 * self.buckets)).cast("I")
        begin = self.entries + segment * self.segment_words
        zeros = memoryview(bytes(self.segment_words * _WORD_BYTES)).cast("Q")
        words[begin : begin + self.segment_words] = zeros
        # Last: the mark is what makes the next sweep look here.
        words[self._owner + segment] = 0

    def _lock(self, segment: int) -> bool:
        try:
            self._set_lock(segment, fcntl.F_WRLCK)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, says fcntl(2)
            return False
        return True

    def _unlock(self, segment: int) -> None:
        self._set_lock(segment, fcntl.F_UNLCK)

    def _set_lock(self, segment: int, kind: int) -> None:
        flock = _FLOCK.pack(kind, os.SEEK_SET, segment, 1, 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, flock)
