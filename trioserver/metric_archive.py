"""The archive: what was counted by processes that are gone, in one file per kind.

Each reload leaves the files of a generation behind; read one by one, a thousand of them would cost
half a second per scrape. So what nobody will ever write to again is *folded*: added to the archive
and removed. Gauges of the dead mean nothing and are just removed.

What nobody will ever write to: a file without an owner whose generation has *retired*. In a
generation that serves, a dead process's successor takes over its files, and must not find them
gone; a generation that has retired is never raised again, nor is its number used again.

Killed at any moment, folding neither loses nor doubles a count. An archive is replaced as a whole,
and names the files that are in it. So a file is either in the directory and not in the list, or in
the list, and then whoever reads both leaves it out. The next fold removes what was left over.

Two gateways live beside each other during a reload: a lock lets one fold at a time.
"""

import contextlib
import fcntl
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs
import msgspec

from trioserver import metric_files
from trioserver.metric_files import BadMetricFile, Cell, Contents

LOCK: Final = "fold.lock"

_FOLDED_KINDS: Final = ("counter", "histogram", "gauge_mostrecent")
_NEWEST: Final = "gauge_mostrecent"


@attrs.frozen(kw_only=True)
class Generations:
    """What the supervisor says about generations."""

    serving: int
    """The one that serves."""

    reloading: bool
    """Whether a higher one is being raised."""

    asked_at: float
    """When it was asked, in seconds since 1970."""

    def retired(self, generation: int, written_at: float) -> bool:
        """Return whether no process of a generation will be started any more.

        Args:
            generation: Which.
            written_at: When one of its files was last written.
        """
        if generation <= self.serving:
            return generation < self.serving
        # A reload that failed. One that began after we had asked has only newer files.
        return not self.reloading and written_at < self.asked_at - 1.0


@attrs.define(kw_only=True)
class Folded:
    """What one fold did."""

    files: int = 0
    """Files that are gone."""

    bad_files: list[str] = attrs.field(factory=list)
    """Names of files that were none and were set aside."""

    unread: int = 0
    """Files that could not be read, written or removed this time."""


def archive_path(directory: Path, kind: str) -> Path:
    """Return where the archive of that kind is."""
    return directory / metric_files.file_name(kind, metric_files.ARCHIVE)


def absorbed(archive: Contents) -> frozenset[str]:
    """Return the names of files whose counts are in the archive, even if they are still there.

    Raises:
        BadMetricFile: It does not say.
    """
    try:
        return frozenset(_names.decode(archive.trailer))
    except msgspec.MsgspecError:
        raise BadMetricFile("an archive that does not say what is in it") from None


def fold(directory: Path, generations: Generations) -> Folded:
    """Put away what retired generations have left. Blocks: a millisecond per ten files.

    Does nothing while another process does it, nor if there is no such directory. What cannot be
    done now is left for the next time.

    Raises:
        OSError: The directory cannot be listed, or nothing can be locked there.
    """
    folded = Folded()
    if not directory.exists():
        return folded
    with _alone(directory) as alone:
        if alone:
            left = _left_behind(directory, generations, folded)
            for kind in _FOLDED_KINDS:
                try:
                    _fold_kind(directory, kind, left.get(kind, []), folded)
                except OSError:
                    folded.unread += 1
    return folded


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def _left_behind(
    directory: Path, generations: Generations, folded: Folded
) -> dict[str, list[Path]]:
    """Return what retired generations have left, by kind; what is worth nothing is removed."""
    left: dict[str, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        whole = path.name.removesuffix(metric_files.DRAFT_SUFFIX)
        name = metric_files.parse_name(whole)
        try:
            if name is None or not generations.retired(name.generation, path.stat().st_mtime):
                continue
            if whole != path.name:
                path.unlink()
            elif not metric_files.is_live_gauge(name.kind):
                left.setdefault(name.kind, []).append(path)
            elif not metric_files.is_owned(path):
                path.unlink()
                folded.files += 1
        except FileNotFoundError:
            pass
        except BadMetricFile:
            _set_aside(path, folded)
        except OSError:
            folded.unread += 1
    return left


def _fold_kind(directory: Path, kind: str, paths: list[Path], folded: Folded) -> None:
    path = archive_path(directory, kind)
    cells, inside = _read_archive(path, folded)
    # Written, and then killed before these were removed.
    remaining = {one.name for one in paths if one.name in inside and not _remove(one, folded)}
    total = _Total(kind)
    total.add(cells)
    sources: list[Path] = []
    for one in paths:
        if one.name not in inside and (contents := _read_source(one, folded)) is not None:
            try:
                total.add(contents.cells)
            except BadMetricFile:
                _set_aside(one, folded)
            else:
                sources.append(one)
    if not sources:
        return
    trailer = msgspec.json.encode(sorted(remaining | {one.name for one in sources}))
    metric_files.write_archive(path, total.cells(), trailer)
    for one in sources:
        _remove(one, folded)


def _read_archive(path: Path, folded: Folded) -> tuple[Mapping[str, Cell], frozenset[str]]:
    try:
        archive = metric_files.read(path)
        return archive.cells, absorbed(archive)
    except FileNotFoundError:
        pass
    except BadMetricFile:
        _set_aside(path, folded)
    return {}, frozenset()


def _read_source(path: Path, folded: Folded) -> Contents | None:
    """Return what is to be folded; None if its process still drains, or it cannot be read."""
    try:
        contents = metric_files.read(path)
    except FileNotFoundError:
        return None
    except BadMetricFile:
        _set_aside(path, folded)
        return None
    except OSError:
        folded.unread += 1
        return None
    return None if contents.owned else contents


def _remove(path: Path, folded: Folded) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        folded.unread += 1
        return False
    folded.files += 1
    return True


def _set_aside(path: Path, folded: Folded) -> None:
    folded.bad_files.append(path.name)
    metric_files.set_aside(path)


class _Total:
    """Cells of several files, added up.

    The same series may have had another help text in older code; it is one series all the same.
    """

    def __init__(self, kind: str) -> None:
        self._newest = kind == _NEWEST
        self._rows: dict[tuple[str, str, str], tuple[str, Cell]] = {}

    def add(self, cells: Mapping[str, Cell]) -> None:
        """Add a file, all of it or nothing.

        Raises:
            BadMetricFile: A key is not one of a metric.
        """
        rows = [(_series(key), key, cell) for key, cell in cells.items()]
        for series, key, cell in rows:
            known = self._rows.get(series, (key, Cell(0.0)))[1]
            if not self._newest:
                cell = Cell(known.value + cell.value)  # noqa: PLW2901 - it is the sum from here on
            elif cell.stamp < known.stamp:
                cell = known  # noqa: PLW2901 - the same
            self._rows[series] = (key, cell)

    def cells(self) -> dict[str, Cell]:
        """Return the sum, by key."""
        return dict(self._rows.values())


@functools.lru_cache(maxsize=4096)  # the same few hundred keys in every file
def _series(key: str) -> tuple[str, str, str]:
    try:
        family, sample, labels, _help = _keys.decode(key)
    except msgspec.MsgspecError:
        raise BadMetricFile("a key is not one of a metric") from None
    return family, sample, repr(sorted(labels.items()))


_keys: msgspec.json.Decoder[tuple[str, str, dict[str, str], str]] = msgspec.json.Decoder(
    tuple[str, str, dict[str, str], str]
)
_names: msgspec.json.Decoder[list[str]] = msgspec.json.Decoder(list[str])
