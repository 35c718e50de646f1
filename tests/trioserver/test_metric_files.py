"""Metric files: whole or not there, readable by others, and known to be somebody's."""

import errno
import json
import math
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.multiprocess import MultiProcessCollector

from trioserver import metric_files
from trioserver.metric_files import BadMetricFile, Cell, MetricFile

KEY = json.dumps(["apples", "apples_total", {}, "Apples."])
PEARS = json.dumps(["pears", "pears_total", {"kind": "ripe"}, "Pears."])


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(
    cells=st.dictionaries(st.text(min_size=1), st.builds(Cell, FINITE, FINITE)),
    trailer=st.binary(max_size=9),
)
def test_unpack_is_the_inverse_of_pack(cells: dict[str, Cell], trailer: bytes) -> None:
    """Whatever was packed is read back, in order, and the offsets point at the values."""
    data, offsets = metric_files.pack(cells, trailer)

    unpacked, rest = metric_files.unpack(data)

    assert list(cells.items()) == list(unpacked.items())
    assert list(cells.values()) == [struct.unpack_from("=dd", data, at) for at in offsets]
    assert trailer == rest


@given(st.binary(max_size=300))
def test_any_bytes_are_values_or_a_bad_file(garbage: bytes) -> None:
    """Reading garbage ends, with an error that says so or with finite numbers."""
    try:
        cells, _ = metric_files.unpack(garbage)
    except BadMetricFile:
        return
    assert all(math.isfinite(cell.value) for cell in cells.values())


@given(st.data())
def test_a_torn_file_is_noticed(data: st.DataObject) -> None:
    """A file that lost its end is bad, wherever it was cut."""
    whole, _ = metric_files.pack({KEY: Cell(1.0), PEARS: Cell(2.0)})
    cut = data.draw(st.integers(min_value=0, max_value=len(whole) - 1))

    with pytest.raises(BadMetricFile):
        metric_files.unpack(whole[:cut])


@pytest.mark.parametrize(
    "length",
    [-24, -1, 0, 1 << 30],
    ids=["in circles", "negative", "empty", "beyond the end"],
)
def test_a_length_that_makes_no_sense_is_noticed(length: int) -> None:
    """A key length is checked before it moves the reader, so no file can send it in circles."""
    entry = struct.pack("=i", length) + bytes(60)
    data = struct.pack("=ii", 8 + len(entry), 0) + entry

    with pytest.raises(BadMetricFile):
        metric_files.unpack(data)


def test_a_file_that_ends_within_a_length_is_noticed() -> None:
    """An entry too short for its own length is bad."""
    with pytest.raises(BadMetricFile):
        metric_files.unpack(struct.pack("=ii", 10, 0) + b"ab")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_makes_the_file_bad(value: float) -> None:
    """One NaN would make a sum NaN for ever."""
    data, _ = metric_files.pack({KEY: Cell(value)})

    with pytest.raises(BadMetricFile):
        metric_files.unpack(data)


def test_a_key_that_is_not_text_makes_the_file_bad() -> None:
    """Bytes that are not UTF-8 are no key."""
    data, _ = metric_files.pack({"key": Cell(1.0)})

    with pytest.raises(BadMetricFile):
        metric_files.unpack(data.replace(b"key", b"\xff\xfe\xfd"))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    """Somebody else's gigabytes are not loaded into the gateway."""
    path = tmp_path / "counter_w0.1.db"
    with path.open("wb") as file:
        file.truncate(10 << 30)

    with pytest.raises(BadMetricFile):
        metric_files.read(path)


def test_the_library_reads_our_files(tmp_path: Path) -> None:
    """The format is that of prometheus_client: its collector sees the same numbers."""
    file = MetricFile(tmp_path / "counter_w0.1.db", {KEY: Cell(2.0), PEARS: Cell(0.0)})
    file.store(1, Cell(5.0))

    families = MultiProcessCollector.merge([str(file.path)])  # type: ignore[no-untyped-call]
    file.close()

    samples = {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}
    assert {("apples_total",): 2.0, ("pears_total", "ripe"): 5.0} == samples


def test_a_stored_value_is_seen_at_once(tmp_path: Path) -> None:
    """A reader sees what was stored last, without any flush to disk."""
    file = MetricFile(tmp_path / "counter_w0.1.db", {KEY: Cell(0.0), PEARS: Cell(0.0)})
    file.store(0, Cell(7.5))

    assert {KEY: Cell(7.5), PEARS: Cell(0.0)} == metric_files.read(file.path).cells
    file.close()
    file.close()


def test_a_new_file_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    """Nothing but the finished file ever has the name."""
    path = tmp_path / "counter_w0.1.db"
    path.write_bytes(b"torn")

    MetricFile(path, {KEY: Cell(3.0)}).close()

    assert [path] == list(tmp_path.iterdir())
    assert {KEY: Cell(3.0)} == metric_files.read(path).cells


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    """A failure to put the file in its place is an OSError and no litter."""
    path = tmp_path / "counter_w0.1.db"
    path.mkdir()

    with pytest.raises(OSError, match="directory"):
        MetricFile(path, {KEY: Cell(3.0)})

    assert [path] == list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    """Every byte is written before it is mapped, so no later store can end in a SIGBUS."""
    program = (
        "import pathlib, resource, sys; from trioserver.metric_files import Cell, MetricFile;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20));"
        "MetricFile(pathlib.Path(sys.argv[1]), {'k': Cell(1.0)})"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "counter_w0.1.db")],
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )

    assert b"OSError: [Errno 27]" in done.stderr
    assert [] == list(tmp_path.iterdir())


def test_an_owner_is_known_while_it_lives(tmp_path: Path) -> None:
    """A file is owned until its process closes it; a missing one is nobody's."""
    file = MetricFile(tmp_path / "gauge_livesum_w0.1.db", {KEY: Cell(1.0)})

    assert metric_files.is_owned(file.path)
    file.close()
    assert not metric_files.is_owned(file.path)
    assert not metric_files.is_owned(tmp_path / "nothing")


def test_a_killed_owner_is_known_to_be_dead(tmp_path: Path) -> None:
    """The kernel lets go of the file of a process that was killed."""
    path = tmp_path / "gauge_livesum_w0.1.db"
    program = (
        "import pathlib, sys; from trioserver.metric_files import Cell, MetricFile;"
        "file = MetricFile(pathlib.Path(sys.argv[1]), {'k': Cell(1.0)});"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert b"ready\n" == owner.stdout.readline()
        assert metric_files.is_owned(path)
        owner.kill()

    assert not metric_files.is_owned(path)
    assert {"k": Cell(1.0)} == metric_files.read(path).cells


def test_a_bad_file_is_set_aside(tmp_path: Path) -> None:
    """Its bytes stay, under a name that no scrape looks at."""
    path = tmp_path / "counter_w0.1.db"
    path.write_bytes(b"torn")

    metric_files.set_aside(path)
    metric_files.set_aside(path)

    assert b"torn" == (tmp_path / "counter_w0.1.db.bad").read_bytes()
    assert not path.exists()


def test_names_are_read_back() -> None:
    """What goes into a file's name comes out of it; whatever else is there is not one of ours."""
    name = metric_files.file_name("gauge_livesum", "w12.3")

    assert metric_files.Name(kind="gauge_livesum", slot="w12", generation=3) == (
        metric_files.parse_name(name)
    )
    for other in ("counter_archive.db", "counter_w0.1.db.new", "counter_w0.1.db.bad", "w0.1.db"):
        assert metric_files.parse_name(other) is None


def a_pipe(path: Path) -> None:
    """Put a pipe there, whose opening would wait for a writer."""
    os.mkfifo(path)


def a_link(path: Path) -> None:
    """Put a link there, to a good file."""
    elsewhere = path.with_name("elsewhere")
    MetricFile(elsewhere, {KEY: Cell(1.0)}).close()
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("make", [Path.mkdir, a_pipe, a_link])
def test_what_is_no_file_is_bad(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A directory, a pipe or a link by the name of a metric file is bad, and hangs nobody."""
    path = tmp_path / "counter_w0.1.db"
    make(path)

    with pytest.raises(BadMetricFile):
        metric_files.read(path)


def test_a_full_table_of_descriptors_says_nothing_about_a_file(tmp_path: Path) -> None:
    """Without a descriptor left a file is neither bad nor its owner dead: that is an OSError."""
    file = MetricFile(tmp_path / "gauge_livesum_w0.1.db", {KEY: Cell(1.0)})
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as reading:
            metric_files.read(file.path)
        with pytest.raises(OSError, match="Too many open files"):
            metric_files.is_owned(file.path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert errno.EMFILE == reading.value.errno
    assert metric_files.is_owned(file.path)
    file.close()


def test_only_ones_own_file_is_removed(tmp_path: Path) -> None:
    """Whoever lost the name to a successor leaves the successor's file alone."""
    path = tmp_path / "gauge_livesum_w0.1.db"
    old = MetricFile(path, {KEY: Cell(1.0)})
    new = MetricFile(path, {KEY: Cell(2.0)})

    old.close()
    old.remove()
    assert {KEY: Cell(2.0)} == metric_files.read(path).cells

    new.close()
    new.remove()
    new.remove()
    assert [] == list(tmp_path.iterdir())


def test_an_archive_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """An archive is nobody's, holds its trailer, and a failure leaves the older one as it was."""
    path = tmp_path / "counter_archive.db"
    metric_files.write_archive(path, {KEY: Cell(1.0)}, b"one")
    metric_files.write_archive(path, {KEY: Cell(2.0)}, b"two")
    (tmp_path / "counter_archive.db.new").mkdir()
    with pytest.raises(OSError, match="directory"):
        metric_files.write_archive(path, {KEY: Cell(3.0)}, b"three")

    contents = metric_files.read(path)
    assert ({KEY: Cell(2.0)}, b"two", False) == (contents.cells, contents.trailer, contents.owned)
