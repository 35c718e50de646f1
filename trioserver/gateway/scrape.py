"""What all processes have counted, added up from their metric files.

A scrape reads the files of every process and of those that went before, so it costs no worker
anything, and never fails because of a file:

- one that is empty, torn or no metric file at all is set aside and counted;
- one that cannot be read for the moment (no descriptor left, a hiccup of the disk) is left where
  it is, and what was last read from it is taken again: a sum that drops and comes back would look
  like a restart, and be counted twice;
- the gauges of a process that is gone are not looked at.

Meanwhile somebody may be folding files into the archive (`metric_archive`). Who reads the archive
before and a file after that has missed the file's counts, so the archives are looked at once more
at the end; if one was replaced, everything is read again.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import attrs
import msgspec

from trioserver import metric_archive, metric_files
from trioserver.metric_families import FAMILIES
from trioserver.metric_files import BadMetricFile, Cell

_KINDS: Final = tuple(dict.fromkeys(family.kind for family in FAMILIES))
_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_EDGE: Final = re.compile(r"\+Inf|[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")

_ATTEMPTS: Final = 3
"""Folds are seconds apart, a scrape takes milliseconds."""


class Series(NamedTuple):
    """One line of a page."""

    family: str
    name: str
    labels: tuple[tuple[str, str], ...]


@attrs.frozen(kw_only=True)
class Totals:
    """Everything under one name, added up over all processes."""

    name: str
    type: str
    """``counter``, ``gauge`` or ``histogram``."""
    help: str
    cells: dict[Series, Cell]


@attrs.frozen(kw_only=True)
class Scrape:
    """What was in the files at one moment."""

    families: Mapping[str, Totals]
    bad_files: tuple[str, ...] = ()
    """Names of files that are none, and that the next scrape will not see."""
    unread: tuple[str, ...] = ()
    """Names of files that could not be read this time."""

    def total(self, name: str) -> float:
        """Return the sum of everything under the name of a sample; 0 if there is nothing."""
        return sum(
            cell.value
            for family in self.families.values()
            for series, cell in family.cells.items()
            if series.name == name
        )


@attrs.frozen
class _File:
    """What was read from one file."""

    kind: str
    rows: list[tuple[Series, str, Cell]]
    counts: bool
    """Whether its numbers are to be added: not if they are a dead process's gauges."""
    absorbed: frozenset[str] = frozenset()
    """Files that it contains, if it is an archive."""


_Known = dict[str, _File]


class Scraper:
    """Reads the metric files of one directory. For one thread at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: _Known = {}
        """What was read last, for when it cannot be read again."""

    def scrape(self) -> Scrape:
        """Read and add up everything. Blocks: a few milliseconds, and the disk.

        A directory that is not there holds no files.

        Raises:
            OSError: The directory cannot be listed, and never could.
        """
        for _ in range(_ATTEMPTS):
            before = self._archives()
            reading = _Reading(self._directory, self._known)
            reading.read_all()
            if self._archives() == before:
                break
        self._known = reading.known
        return Scrape(
            families=_add_up(reading.known.values()),
            bad_files=tuple(reading.bad_files),
            unread=tuple(reading.unread),
        )

    def _archives(self) -> list[tuple[int, int] | None]:
        return [_version(metric_archive.archive_path(self._directory, kind)) for kind in _KINDS]


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


class _Reading:
    """One pass over the directory."""

    def __init__(self, directory: Path, known: _Known) -> None:
        self._directory = directory
        self._before = known
        self.known: _Known = {}
        self.bad_files: list[str] = []
        self.unread: list[str] = []

    def read_all(self) -> None:
        """Read what is there, archives first: they say what is in them already."""
        inside: set[str] = set()
        archives = {metric_files.file_name(kind, metric_files.ARCHIVE): kind for kind in _KINDS}
        names = self._list()
        for name in archives.keys() & names:
            if (file := self._read(name, archives[name])) is not None:
                inside |= file.absorbed
        for name in names - archives.keys() - inside:
            parsed = metric_files.parse_name(name)
            # Another kind is not ours, or that of a newer generation beside us.
            if parsed is not None and parsed.kind in _KINDS:
                self._read(name, parsed.kind)

    def _list(self) -> set[str]:
        try:
            return {path.name for path in self._directory.iterdir()}
        except FileNotFoundError:
            return set()
        except OSError:
            if not self._before:
                raise
            return set(self._before)

    def _read(self, name: str, kind: str) -> _File | None:
        file: _File | None = None
        try:
            file = self._parsed(name, kind)
        except FileNotFoundError:
            pass  # Its process ended just now, or it was folded.
        except BadMetricFile:
            self.bad_files.append(name)
            metric_files.set_aside(self._directory / name)
        except OSError:
            self.unread.append(name)
            file = self._before.get(name)
        if file is not None:
            self.known[name] = file
        return file

    def _parsed(self, name: str, kind: str) -> _File:
        contents = metric_files.read(self._directory / name)
        archive = metric_files.parse_name(name) is None
        return _File(
            kind,
            rows=[(*_parse(key), cell) for key, cell in contents.cells.items()],
            counts=contents.owned or not metric_files.is_live_gauge(kind),
            absorbed=metric_archive.absorbed(contents) if archive else frozenset(),
        )


@functools.lru_cache(maxsize=4096)  # the same few hundred keys in every file and every scrape
def _parse(key: str) -> tuple[Series, str]:
    try:
        family, name, labels, text = _key_decoder.decode(key)
    except msgspec.MsgspecError:
        raise BadMetricFile("a key is not one of a metric") from None
    # Whatever else gets into a name or an edge would break the page.
    if not all(map(_NAME.fullmatch, (family, name, *labels))):
        raise BadMetricFile("a name is not one of a metric")
    if not _EDGE.fullmatch(labels.get("le", "+Inf")):
        raise BadMetricFile("the edge of a bucket is not a number")
    return Series(family, name, tuple(labels.items())), text


_key_decoder: Final = msgspec.json.Decoder(tuple[str, str, dict[str, str], str])


def _add_up(files: Iterable[_File]) -> dict[str, Totals]:
    families: dict[str, Totals] = {}
    for file in files:
        if file.counts:
            _add(families, file)
    return families


def _add(families: dict[str, Totals], file: _File) -> None:
    combine = _COMBINE.get(file.kind, _sum)
    metric_type = file.kind.partition("_")[0]
    for series, text, cell in file.rows:
        family = families.get(series.family)
        if family is None:
            family = Totals(name=series.family, type=metric_type, help=text, cells={})
            families[series.family] = family
        if family.type != metric_type:
            continue  # Two generations disagree about it; one page cannot.
        known = family.cells.get(series)
        family.cells[series] = cell if known is None else combine(known, cell)


def _sum(one: Cell, other: Cell) -> Cell:
    return Cell(one.value + other.value)


def _worst(one: Cell, other: Cell) -> Cell:
    return one if one.value > other.value else other


def _newest(one: Cell, other: Cell) -> Cell:
    return one if one.stamp > other.stamp else other


_COMBINE: Final = {"gauge_livemax": _worst, "gauge_mostrecent": _newest}
