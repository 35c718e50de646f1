"""Metrics, as far as one process goes: it counts in a `Tally`, and an `Exporter` writes that out.

    tally            what is counted, in plain integers
    metric_families  what it is called: names, types, label sets, help
    metrics          once a second from the tally to this process's files
    metric_files     the format of these files, and whose they are
    metric_archive   files of processes that are gone become one

The gateway adds up the files of all processes when it is scraped (`gateway.scrape`).

Counters in the files never go down: what the predecessor in the same slot and generation had
counted is added to the tally's own numbers. Gauges start anew, and are looked at only while their
process lives; but one of kind ``mostrecent`` keeps its predecessor's value until it has its own.
"""

import time
from collections.abc import Callable
from pathlib import Path

from trioserver import metric_files
from trioserver.metric_families import FAMILIES, Family
from trioserver.metric_files import Cell, MetricFile
from trioserver.tally import Buckets, Tally

__all__ = ["FAMILIES", "Buckets", "Exporter", "Tally"]


class Exporter:
    """Copies a tally into this process's metric files.

    The caller flushes once a second and once more at the end, then closes.
    """

    __slots__ = ("_directory", "_identity", "_missing", "_sheets", "_tally", "_wall", "problem")

    def __init__(
        self,
        tally: Tally,
        directory: Path,
        identity: str,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Create the files, or take over those of the predecessor under the same identity.

        Never fails because of the disk: a process that cannot be measured serves all the same.
        What is wrong is in `problem` then, for the log, and tried again at each flush.

        Args:
            tally: What to copy.
            directory: Where the files of all processes are.
            identity: ``slot.generation``, such as ``w0.1`` or ``gateway.1``, without underscores.
            wall: Seconds since 1970.
        """
        self._tally = tally
        self._directory = directory
        self._identity = identity
        self._wall = wall
        self._sheets: list[_Sheet] = []
        self._missing = list(dict.fromkeys(family.kind for family in FAMILIES))
        self.problem = ""
        """Why there are no files, or not all of them; empty if all is well."""
        for kind in self._missing:
            name = metric_files.parse_name(metric_files.file_name(kind, identity))
            if name is None or name.kind != kind:
                raise ValueError(f"not an identity for metric files: {identity!r}")
        self._create_missing()

    def flush(self) -> None:
        """Write out what has changed: some 20 µs, and no system call while there is no problem."""
        if self._missing:
            self._create_missing()
        for sheet in self._sheets:
            sheet.flush(self._tally, self._wall)

    def close(self) -> None:
        """Write out the last counts and take the gauges away, which are nobody's from now on.

        Idempotent. The files of the counters stay: what was counted was counted.
        """
        self.flush()
        for sheet in self._sheets:
            sheet.close()
        self._sheets, self._missing = [], []

    def _create_missing(self) -> None:
        self.problem = ""
        for kind in tuple(self._missing):
            path = self._directory / metric_files.file_name(kind, self._identity)
            families = tuple(family for family in FAMILIES if family.kind == kind)
            try:
                sheet = _Sheet(path, families)
            except OSError as error:
                self.problem = f"{path}: {error.strerror}"
            else:
                self._sheets.append(sheet)
                self._missing.remove(kind)


class _Sheet:
    """One file: its families in order, what came before us, and what was written last."""

    __slots__ = ("_base", "_families", "_file", "_last", "_timed")

    def __init__(self, path: Path, families: tuple[Family, ...]) -> None:
        """Create the file.

        Raises:
            OSError: It could not be, or what the predecessor left cannot be read for the moment.
        """
        kind = families[0].kind
        self._families = families
        self._timed = kind == "gauge_mostrecent"
        keys = [key for family in families for key in family.keys()]  # noqa: SIM118 - not a dict
        before = {} if metric_files.is_live_gauge(kind) else _predecessor(path)
        cells = {key: before.pop(key, Cell(0.0)) for key in keys}
        self._base = [0.0 if self._timed else cell.value for cell in cells.values()]
        self._last = [0.0] * len(keys)
        # What is left was counted by other code under this identity: it is kept, after ours.
        self._file = MetricFile(path, cells | before)

    def flush(self, tally: Tally, wall: Callable[[], float]) -> None:
        last = self._last
        values = (value for family in self._families for value in family.read(tally))
        for index, value in enumerate(values):
            if value != last[index]:
                last[index] = value
                stamp = wall() if self._timed else 0.0
                self._file.store(index, Cell(self._base[index] + value, stamp))

    def close(self) -> None:
        self._file.close()
        if metric_files.is_live_gauge(self._families[0].kind):
            # Nobody can say any more that it is ours: see metric_files.Contents.owned.
            self._file.remove()


def _predecessor(path: Path) -> dict[str, Cell]:
    """Return what an earlier process of the same identity has counted."""
    try:
        return metric_files.read(path).cells
    except metric_files.BadMetricFile:
        metric_files.set_aside(path)
    except FileNotFoundError:
        pass
    return {}
