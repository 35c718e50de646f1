"""Log lines: one line per event, for programs and for people, bounded."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as patience
from hypothesis import strategies as st

from tests.trioserver.readable_log import Log, fail, readable_log
from trioserver import logs
from trioserver.log_journal import Journal
from trioserver.log_lines import LINE_BYTES


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """A log of its own; what it takes over is given back afterwards."""
    with readable_log(tmp_path) as log:
        yield log


class TestLines:
    """What a line looks like."""

    def test_json(self, log: Log) -> None:
        """A line is one JSON object: time, level, event, process, slot, generation, bound keys."""
        logs.get_logger(connection="c1").info("connection closed", seconds=1.5, user="42")

        expected = (
            '{"timestamp": "2026-11-20T12:00:00.123Z", "level": "info", '
            '"event": "connection closed", "process": "worker-0", "slot": 0, "generation": 2, '
            '"connection": "c1", "seconds": 1.5, "user": "42"}'
        )
        assert [expected] == log.lines

    def test_console(self, log: Log) -> None:
        """For people, a line has no braces, and values are quoted only where it helps."""
        log.configure(logger_encoding="console")

        logs.get_logger().warning("slow client", user="4 2", sent=3, peer="::1", note="")

        expected = (
            "2026-11-20T12:00:00.123Z warning  worker-0 slow client "
            'slot=0 generation=2 user="4 2" sent=3 peer=::1 note=""'
        )
        assert [expected] == log.lines

    def test_exception(self, log: Log) -> None:
        """A traceback is one value of one line."""
        try:
            _ = os.environb[b"MISSING"]
        except KeyError as error:
            logs.get_logger().exception("broke", error=error)

        assert 1 == len(log.lines)
        assert ("error", "broke", "KeyError: b'MISSING'") == (
            log.last["level"],
            log.last["event"],
            log.last["error"],
        )
        traceback = str(log.last["exception"])
        assert traceback.startswith("Traceback (most recent call last):\n")
        assert traceback.endswith("\nKeyError: b'MISSING'")

    def test_exception_for_people(self, log: Log) -> None:
        """A traceback for people has lines, marked so that none can pass for an event."""
        log.configure(logger_encoding="console")

        try:
            fail("x\n2026-11-20T12:00:00.123Z info forged \x1b[31m")
        except ValueError:
            logs.get_logger().exception("broke")

        assert all(line.startswith("    | ") for line in log.lines[1:])
        assert "    | 2026-11-20T12:00:00.123Z info forged \\x1b[31m" == log.lines[-1]

    def test_tracebacks_keep_their_end(self, log: Log) -> None:
        """A long traceback is cut in its middle: its end names the exception."""
        try:
            fail("m" * 5_000 + "the end")
        except ValueError:
            logs.get_logger().exception("broke")

        assert str(log.last["exception"]).endswith("the end")
        assert len(log.lines[0]) < LINE_BYTES

    @pytest.mark.parametrize("encoding", ["json", "console"])
    @pytest.mark.parametrize(
        "values",
        [
            {"many": ["\x00" * 512] * 32},
            {f"key{number}": "\x01" * 100 for number in range(1000)},
        ],
    )
    def test_lines_are_bounded(self, log: Log, encoding: str, values: Mapping[str, object]) -> None:
        """No line is longer than what a pipe takes at once, whatever it is made of."""
        log.configure(logger_encoding=encoding)

        logs.get_logger().info("\x02" * 5000, **values)

        assert 1 == len(log.lines)
        assert len(log.path.read_bytes()) <= LINE_BYTES

    @patience(deadline=None)
    @given(
        event=st.text(),
        key=st.text(st.characters(codec="utf-8")),
        value=st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.binary(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ),
    )
    def test_anything_is_one_line(self, event: str, key: str, value: object) -> None:
        """Any event with any value is exactly one line, which parses, in both encodings."""
        read, write = os.pipe()
        try:
            for console in (False, True):
                journal = Journal(identity={"process": "p"}, fd=write, console=console)
                journal.write("info", {"event": event, f"k{key}": value})
                line = os.read(read, 1 << 16).decode()
                assert 1 == len(line.splitlines())
                assert line.endswith("\n")
                assert line[:-1].isprintable()
                assert 0 == journal.dropped
                assert console or "info" == json.loads(line)["level"]
        finally:
            os.close(read)
            os.close(write)

    def test_values_that_raise(self, log: Log) -> None:
        """A value that cannot be printed is replaced, the rest of the line stays."""

        class Broken:
            def __str__(self) -> str:
                raise RuntimeError

        class BrokenMapping(dict[str, object]):
            def items(self) -> object:  # type: ignore[override]
                raise RuntimeError

        logs.get_logger().info("x", value=Broken(), user="42")
        assert ("?", "42") == (log.last["value"], log.last["user"])
        logs.get_logger().info("x", value=BrokenMapping())
        assert ("event could not be written", "RuntimeError", "info") == (
            log.last["event"],
            log.last["error"],
            log.last["level"],
        )
