"""Logs: one line per event, nothing secret, nothing that raises; files and their sweeping."""
# ruff: noqa: SIM300 - the expected value stands first

import datetime as dt
import fcntl
import gzip
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import attrs
import pytest
import structlog
from hypothesis import given
from hypothesis import settings as patience
from hypothesis import strategies as st

from trioserver import logs
from trioserver.logs import RateLimited, Swept, redact, sweep
from trioserver.settings import Settings

NOON = dt.datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=dt.UTC).timestamp()
DAY = 86_400
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI0MiJ9.c2lnbmF0dXJl"


@attrs.define
class Clock:
    """A clock that a test sets."""

    now: float = NOON

    def __call__(self) -> float:
        """Return the time that was set."""
        return self.now


@attrs.define(eq=False)
class Log:
    """A configured log whose standard error is a file."""

    path: Path
    fd: int
    clock: Clock = attrs.Factory(Clock)

    def configure(self, **settings: object) -> None:
        """Start over with these settings; JSON unless they say otherwise."""
        known: dict[str, object] = {"logger_encoding": "json", "data_dir": Path("/nowhere")}
        chosen = attrs.evolve(Settings(), **(known | settings))  # type: ignore[arg-type]
        logs.configure(chosen, "worker-0", slot=0, generation=2, clock=self.clock, fd=self.fd)

    @property
    def lines(self) -> list[str]:
        """What has been written, line by line."""
        return self.path.read_text(encoding="utf-8").split("\n")[:-1]

    @property
    def last(self) -> dict[str, object]:
        """The last line, decoded."""
        decoded: dict[str, object] = json.loads(self.lines[-1])
        return decoded


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """A log of its own; what it takes over is given back afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    path = tmp_path / "stderr"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = Log(path, fd)
    log.configure()
    yield log
    logs.reopen()
    os.close(fd)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks


def fail(text: str) -> NoReturn:
    """Raise a ValueError with this text."""
    raise ValueError(text)


def day_file(directory: Path, name: str) -> list[dict[str, object]]:
    """Return the decoded lines of a log file."""
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


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

    def test_process_without_slot(self, log: Log) -> None:
        """The supervisor has neither slot nor generation, and does not pretend to."""
        settings = Settings(logger_encoding="json", data_dir=Path("/nowhere"))
        logs.configure(settings, "supervisor", clock=log.clock, fd=log.fd)

        logs.get_logger().info("ready")

        assert ["timestamp", "level", "event", "process"] == list(log.last)

    def test_console(self, log: Log) -> None:
        """For people, a line has no braces, and values are quoted only where it helps."""
        log.configure(logger_encoding="console")

        logs.get_logger().warning("slow client", user="4 2", sent=3, peer="::1", note="")

        expected = (
            "2026-11-20T12:00:00.123Z warning  worker-0 slow client "
            'slot=0 generation=2 user="4 2" sent=3 peer=::1 note=""'
        )
        assert [expected] == log.lines

    @pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
    def test_levels(self, log: Log, level: str) -> None:
        """Each level writes its own name, and nothing below the configured one is written."""
        names = ["debug", "info", "warning", "error", "critical"]
        log.configure(log_level=level)
        logger = logs.get_logger()

        for name in names:
            getattr(logger, name)("x")

        assert names[names.index(level) :] == [json.loads(line)["level"] for line in log.lines]

    def test_below_level_is_cheap(self, log: Log) -> None:
        """A call below the level does not even look at its arguments."""

        class Untouchable:
            def __str__(self) -> str:
                raise AssertionError

        log.configure(log_level="error")

        logs.get_logger().bind().info("x", value=Untouchable())

        assert [] == log.lines

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

    def test_own_keys_win(self, log: Log) -> None:
        """A value whose name is taken is written under another one, not lost."""
        logs.get_logger().info("x", process="mine", level="high")

        assert ("worker-0", "info", "mine", "high") == tuple(
            log.last[key] for key in ("process", "level", "process_", "level_")
        )

    def test_values(self, log: Log) -> None:
        """Whatever is logged arrives as something that every reader of JSON understands."""
        logs.get_logger().info(
            "x",
            number=float("inf"),
            huge=1 << 5000,
            path=Path("/x"),
            raw=b"\xffab",
            nested={"a": [1, {"b": {"c": 2}}], 3: {True}},
            wide=list(range(100)),
            nothing=None,
        )

        last = log.last
        assert ("inf", "/x", "\\xffab", None) == tuple(
            last[key] for key in ("number", "path", "raw", "nothing")
        )
        assert str(last["huge"]).startswith("0x1")
        assert {"a": [1, {"b": "{'c': 2}"}], "3": [True]} == last["nested"]
        assert list(range(32)) == last["wide"]

    def test_long_values_are_cut(self, log: Log) -> None:
        """A long value keeps its beginning and its end, in 512 characters."""
        logs.get_logger().info("x", text="a" + "b" * 10_000 + "c", other="d" * 512)

        text = str(log.last["text"])
        assert (512, "a", "c") == (len(text), text[0], text[-1])
        assert "d" * 512 == log.last["other"]

    def test_tracebacks_keep_their_end(self, log: Log) -> None:
        """A long traceback is cut in its middle: its end names the exception."""
        try:
            fail("m" * 5_000 + "the end")
        except ValueError:
            logs.get_logger().exception("broke")

        assert str(log.last["exception"]).endswith("the end")
        assert len(log.lines[0]) < logs.LINE_BYTES

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
        assert len(log.path.read_bytes()) <= logs.LINE_BYTES

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
                journal = logs._Journal(identity={"process": "p"}, fd=write, console=console)
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

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, False),
            ({"ws_mode": "debug"}, True),
            ({"ws_mode": "release", "logger_mode": "development"}, True),
            ({"logger_mode": "production"}, False),
            ({"logger_encoding": "json", "ws_mode": "debug"}, False),
            ({"logger_encoding": "console"}, True),
        ],
    )
    def test_encoding(self, log: Log, settings: dict[str, str], expected: bool) -> None:  # noqa: FBT001
        """JSON unless a mode or the encoding asks for people's lines."""
        log.configure(**({"logger_encoding": "auto"} | settings))

        logs.get_logger().info("x")

        assert expected is not log.lines[0].startswith("{")

    def test_terminal(self, log: Log) -> None:
        """On a terminal lines are for people."""
        master, terminal = os.openpty()
        settings = Settings(data_dir=Path("/nowhere"))
        logs.configure(settings, "worker-0", clock=log.clock, fd=terminal)

        logs.get_logger().info("x")

        line = os.read(master, 1000)
        os.close(terminal)
        os.close(master)
        assert b"2026-11-20T12:00:00.123Z info     worker-0 x\r\n" == line


class TestSecrets:
    """What never appears."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("GET /ws?token=abc.d&position=1", "GET /ws?token=***&position=1"),
            ("/ws?access_token=abc", "/ws?access_token=***"),
            ("JWT_SECRET_KEY=abc other=1", "JWT_SECRET_KEY=*** other=1"),
            ("token='a b' x", "token=*** x"),
            ('password="a b', "password=***"),
            ("Authorization: Bearer abc", "Authorization: Bearer ***"),
            ("Authorization: Basic dXNlcg==", "Authorization: Basic ***"),
            ("BEARER  abc", "BEARER  ***"),
            ("bearer.abc.def.ghi, trioserver.v1", "bearer.***, trioserver.v1"),
            ("bearer%20abc", "bearer%20***"),
            ("[(b'authorization', b'Bearer abc')]", "[(b'authorization', b'Bearer ***')]"),
            ('{"type":"auth","token":"abc"}', '{"type":"auth","token":***}'),
            ('{"type":"auth","token": "abc', '{"type":"auth","token": ***'),
            ("{'api_key': 'abc', 'x': 1}", "{'api_key': ***, 'x': 1}"),
            (r'"{\"token\":\"abc\"}"', r'"{\"token\":***}"'),
            (f"refused {JWT}!", "refused ***!"),
            (JWT[:30], "***"),
            ("redis://:hunter2@h:1/0", "redis://***@h:1/0"),
            ("the token is expired", "the token is expired"),
            ("https://example.com/a?b=1", "https://example.com/a?b=1"),
            ("plain", "plain"),
        ],
    )
    def test_shapes(self, text: str, expected: str) -> None:
        """Secrets inside of text are masked, their surroundings stay."""
        assert expected == redact(text)

    @pytest.mark.parametrize(
        "key", ["token", "jwt_secret_key", "Password", "Authorization", "API-Key api_key", "Cookie"]
    )
    def test_keys(self, log: Log, key: str) -> None:
        """A value with a telling name is masked, at any depth; yes, no and nothing are not."""
        logs.get_logger().info("x", **{key: 7}, deep={key: ["hunter2"]}, request={key: None})

        assert "***" == log.last[key]
        assert {key: "***"} == log.last["deep"]
        assert {key: None} == log.last["request"]

    def test_everywhere_in_a_line(self, log: Log) -> None:
        """Event, values, keys, nested values and tracebacks are all masked."""
        try:
            fail(f"bad token {JWT}")
        except ValueError:
            logs.get_logger(bound=JWT).exception(
                f"x {JWT}", a=JWT, b=[JWT], c={JWT: JWT.encode()}, d=ValueError(JWT)
            )

        text = log.path.read_text()
        assert JWT[4:] not in text
        assert 7 <= text.count("***")

    @pytest.mark.parametrize("start", [0, 300, 16_000, 16_383])
    def test_cutting_never_uncovers(self, log: Log, start: int) -> None:
        """A token is masked also where a long text is cut in the middle of it."""
        token = "eyJ" + "Q" * 9000

        logs.get_logger().info("x", text="." * start + token + "." * 9000)

        assert "Q" not in log.lines[0]

    @pytest.mark.parametrize(
        "hostile",
        [
            "a-",
            "token",
            "token-",
            "a://b:",
            "bearer ",
            "bearer.",
            "eyJ",
            "'token':'",
            "token=",
            " ",
        ],
    )
    def test_hostile_text_is_cheap(self, hostile: str) -> None:
        """Masking takes time in proportion to the text, whatever it repeats."""
        # Steps are counted by the clock of the process; a quadratic pattern takes seconds.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime

        redact(("token" + hostile * 16_384)[:16_384])

        assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 0.5


class TestNeverRaises:
    """A log call neither raises nor waits."""

    def test_full_disk(self, log: Log) -> None:
        """A line that finds the disk full is dropped and counted."""
        log.fd, original = os.open("/dev/full", os.O_WRONLY), log.fd
        log.configure()

        logs.get_logger().info("x")
        logs.get_logger().info("y")

        os.close(log.fd)
        log.fd = original
        assert 2 == logs.dropped()

    def test_broken_and_closed(self, log: Log) -> None:
        """A pipe whose reader is gone, and a closed descriptor, cost the line."""
        read, write = os.pipe()
        os.close(read)
        log.fd, original = write, log.fd
        log.configure()
        logs.get_logger().info("x")
        os.close(write)
        logs.get_logger().info("y")

        log.fd = original
        assert 2 == logs.dropped()

    def test_sleeping_reader(self, log: Log) -> None:
        """A pipe that nobody reads is filled, then lines are dropped: the call does not wait."""
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        log.fd, original = write, log.fd
        log.configure()

        for _ in range(100):
            logs.get_logger().info("x" * 400)

        whole = os.read(read, 1 << 16)
        os.close(read)
        os.close(write)
        log.fd = original
        lines = whole.decode().splitlines()
        assert 100 == len(lines) + logs.dropped()
        assert all(json.loads(line)["level"] == "info" for line in lines)

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

    def test_exc_info_that_is_none(self, log: Log) -> None:
        """Strange exception information does not stop the line."""
        logs.get_logger().info("x", exc_info=(1, 2, 3))

        assert "x" == log.last["event"]

    def test_recursion(self, log: Log) -> None:
        """A value that contains itself is cut off."""
        value: list[object] = []
        value.append(value)

        logs.get_logger().info("x", value=value)

        assert "x" == log.last["event"]


class TestOthers:
    """Everybody else who would write to standard error."""

    def test_logging(self, log: Log) -> None:
        """Lines of the standard library's logging are lines like ours."""
        other = logging.getLogger("hypercorn.error")

        other.warning("Running on %s\nand on", "http://x")
        other.debug("too low")
        try:
            fail("oops")
        except ValueError:
            other.exception("failed")

        first, second = (json.loads(line) for line in log.lines)
        assert ("warning", "Running on http://x\nand on", "hypercorn.error", "worker-0") == tuple(
            first[key] for key in ("level", "event", "logger", "process")
        )
        assert "error" == second["level"]
        assert second["exception"].endswith("ValueError: oops")

    @pytest.mark.parametrize(
        ("number", "name"),
        [(5, "debug"), (25, "info"), (30, "warning"), (45, "error"), (99, "critical")],
    )
    def test_logging_levels(self, log: Log, number: int, name: str) -> None:
        """A level between ours counts as the one below it."""
        log.configure(log_level="debug")
        logging.root.setLevel(1)

        logging.getLogger("x").log(number, "x")

        assert name == log.last["level"]

    def test_logging_with_wrong_arguments(self, log: Log) -> None:
        """A text whose arguments do not fit is written as it is."""
        record = logging.LogRecord("x", logging.WARNING, "", 0, "%d and %d", ("one",), None)

        # Not through a logger, because pytest's own handler there does raise.
        logs._Forward().emit(record)

        assert "%d and %d" == log.last["event"]

    def test_warnings(self, log: Log) -> None:
        """A warning is one line."""
        warnings.showwarning("old\nstuff", DeprecationWarning, "file.py", 7)

        assert ("warning", "old\nstuff", "DeprecationWarning", "file.py:7") == tuple(
            log.last[key] for key in ("level", "event", "category", "where")
        )

    def test_last_resorts(self) -> None:
        """Exceptions that nobody catches are one line each, and the exit code tells."""
        program = """
import sys, threading, warnings
from pathlib import Path
from trioserver import logs
from trioserver.settings import Settings

logs.configure(Settings(data_dir=Path("/nowhere")), "supervisor")
warnings.warn("careful")

class Fails:
    def __del__(self):
        raise ValueError("in del")

del (lambda: [Fails()])()[0]
thread = threading.Thread(target=lambda: 1 / 0, name="t1")
thread.start()
thread.join()
raise RuntimeError("Bearer abc")
"""
        command = [sys.executable, "-W", "always", "-c", program]
        done = subprocess.run(command, check=False, capture_output=True, timeout=30)

        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert (1, b"") == (done.returncode, done.stdout)
        assert ["careful", "exception ignored", "uncaught exception", "uncaught exception"] == [
            line["event"].split(" in")[0].lower() for line in lines
        ]
        assert ["warning", "error", "critical", "critical"] == [line["level"] for line in lines]
        assert "function" == lines[1]["object"]
        assert "t1" == lines[2]["thread"]
        assert lines[3]["exception"].endswith("RuntimeError: Bearer ***")

    def test_hooks(self, log: Log) -> None:
        """Each hook writes what it was called with."""
        error = ValueError("oops")

        sys.excepthook(ValueError, error, None)
        ended = SimpleNamespace(exc_value=error, thread=None)
        threading.excepthook(cast("threading.ExceptHookArgs", ended))
        ignored = SimpleNamespace(exc_value=error, err_msg=None, object=None)
        sys.unraisablehook(cast("sys.UnraisableHookArgs", ignored))

        lines = [json.loads(line) for line in log.lines]
        assert ["uncaught exception", "uncaught exception", "exception ignored"] == [
            line["event"] for line in lines
        ]
        assert {"ValueError: oops"} == {line["exception"] for line in lines}

    def test_before_configure(self) -> None:
        """Before configuration, lines go to standard error, readable: never to standard output."""
        program = "from trioserver import logs; logs.get_logger().info('early', token='x')"

        command = [sys.executable, "-c", program]
        done = subprocess.run(command, check=True, capture_output=True, timeout=30)

        assert b"" == done.stdout
        assert done.stderr.endswith(b"Z info     trioserver early token=***\n")

    def test_capture(self, log: Log) -> None:
        """The test helper of structlog sees events of loggers that are in use."""
        logger = logs.get_logger()
        logger.info("x")

        with structlog.testing.capture_logs() as captured:
            logger.info("y", a=1)

        assert [{"event": "y", "a": 1, "log_level": "info"}] == captured
        assert 1 == len(log.lines)


class TestFiles:
    """The files in LOG_DIR."""

    def test_files(self, log: Log, tmp_path: Path) -> None:
        """Lines go to the day's file as well, errors to one of their own, too: always as JSON."""
        directory = tmp_path / "deep" / "logs"
        log.configure(log_dir=directory, logger_encoding="console")

        logs.get_logger().info("one")
        logs.get_logger().error("two")

        assert ["one", "two"] == [
            line["event"] for line in day_file(directory, "worker-0.2026-11-20.log")
        ]
        assert ["two"] == [
            line["event"] for line in day_file(directory, "worker-0.error.2026-11-20.log")
        ]
        assert 2 == len(log.lines)
        modes = {path.stat().st_mode & 0o777 for path in directory.iterdir()}
        assert {0o640} == modes

    def test_new_day(self, log: Log, tmp_path: Path) -> None:
        """Each line goes to the file of its own day, and the file of yesterday is let go."""
        log.configure(log_dir=tmp_path)
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - no directory of ours

        for day in range(3):
            log.clock.now = NOON + day * DAY
            logs.get_logger().error(f"day {day}")

        for day in range(3):
            [line] = day_file(tmp_path, f"worker-0.2026-11-{20 + day}.log")
            assert f"day {day}" == line["event"]
        assert descriptors + 2 == len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def test_two_generations_share_a_file(self, log: Log, tmp_path: Path) -> None:
        """Old and new worker of a slot append to one file without losing a line."""
        identity = {"process": "worker-0"}
        old, new = (
            logs._Journal(identity=identity, clock=log.clock, fd=log.fd, log_dir=tmp_path)
            for _ in range(2)
        )

        for number in range(10):
            (old, new)[number % 2].write("info", {"event": str(number)})

        old.close_files()
        new.close_files()
        assert [str(number) for number in range(10)] == [
            line["event"] for line in day_file(tmp_path, "worker-0.2026-11-20.log")
        ]

    def test_reopen(self, log: Log, tmp_path: Path) -> None:
        """After a file was moved away, reopening starts a new one."""
        log.configure(log_dir=tmp_path)
        file = tmp_path / "worker-0.2026-11-20.log"
        logs.get_logger().info("one")
        file.rename(tmp_path / "moved")

        logs.reopen()
        logs.get_logger().info("two")

        assert ["two"] == [line["event"] for line in day_file(tmp_path, file.name)]

    def test_full_disk(self, log: Log, tmp_path: Path) -> None:
        """With the disk full, lines of the file are counted, told once, and go on elsewhere."""
        file = tmp_path / "worker-0.2026-11-20.log"
        file.symlink_to("/dev/full")
        log.configure(log_dir=tmp_path)

        for number in range(3):
            logs.get_logger().info(str(number))
        file.unlink()
        logs.reopen()
        logs.get_logger().info("3")

        assert 3 == logs.dropped()
        assert ["0", "log file cannot be written", "1", "2", "3"] == [
            json.loads(line)["event"] for line in log.lines
        ]
        assert "worker-0" == json.loads(log.lines[1])["file"]
        assert "No space left" in json.loads(log.lines[1])["error"]
        assert ["3"] == [line["event"] for line in day_file(tmp_path, file.name)]

    def test_directory_that_cannot_be_made(self, log: Log, tmp_path: Path) -> None:
        """A log directory that cannot be used costs lines, not the process."""
        log.configure(log_dir=tmp_path / "stderr" / "below-a-file")

        logs.get_logger().info("x")

        assert 1 == logs.dropped()
        assert "x" == json.loads(log.lines[0])["event"]

    def test_torn_line(self, log: Log, tmp_path: Path) -> None:
        """Half a line, left by a full disk, spoils no other line, now or after a restart."""
        log.configure(log_dir=tmp_path)
        file = tmp_path / "worker-0.2026-11-20.log"
        logs.get_logger().info("first")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, hard))
        try:
            logs.get_logger().info("torn")
            logs.get_logger().info("lost")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        logs.get_logger().info("next")
        with file.open("a") as half:
            half.write('{"timestamp":')
        logs.reopen()
        logs.get_logger().info("last")

        assert 2 <= logs.dropped()
        lines = file.read_text().splitlines()
        assert ["first", None, "next", None, "last"] == [event_of(line) for line in lines]


def event_of(line: str) -> str | None:
    """Return the event of a line, None if it is no line."""
    try:
        event: str = json.loads(line)["event"]
    except json.JSONDecodeError:
        return None
    return event


class TestRateLimited:
    """Not too much of the same."""

    def test_interval(self) -> None:
        """One line per interval and key; the next one knows how many were held back."""
        limit = RateLimited(interval_seconds=10)

        assert [0, None, None, 2, None, 1] == [
            limit.due("a", now) for now in (100.0, 100.1, 109.9, 110.0, 115.0, 200.0)
        ]

    def test_keys_are_apart(self) -> None:
        """Each key has an interval of its own."""
        limit = RateLimited(interval_seconds=10)

        assert [0, 0, None, None] == [limit.due(key, 5.0) for key in "abab"]

    def test_keys_are_bounded(self) -> None:
        """However many keys there are, memory is not theirs; the oldest is forgotten."""
        limit = RateLimited(interval_seconds=10)

        for number in range(RateLimited.MAX_KEYS + 1):
            assert 0 == limit.due(str(number), 5.0)

        assert 0 == limit.due("0", 5.0)
        assert limit.due("2", 5.0) is None


TODAY = dt.date(2026, 11, 20)


def age(days: int, stem: str = "worker-0") -> str:
    """Return the name of a log file of that age."""
    return f"{stem}.{TODAY - dt.timedelta(days=days)}.log"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with log files of several ages, and other things."""
    for days in (-1, 0, 1, 14, 15, 30, 31):
        for stem in ("worker-0", "worker-0.error"):
            (tmp_path / age(days, stem)).write_text(f"{stem} {days}\n" * 1000)
    for name in ("notes.txt", "worker-0.2026-99-99.log", "worker-0.log", "x.2026-01-01.log.bak"):
        (tmp_path / name).write_text("x")
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    """Return what is in a directory, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class TestSweep:
    """Files of earlier days."""

    def test_sweep(self, directory: Path) -> None:
        """Earlier days are compressed, old ones deleted, errors later; the rest is left alone."""
        before = contents(directory)

        assert Swept(compressed=6, deleted=4, failed=0) == sweep(directory, TODAY)

        kept = [("worker-0", 1), ("worker-0", 14)]
        kept += [("worker-0.error", days) for days in (1, 14, 15, 30)]
        untouched = {age(days, stem) for days in (-1, 0) for stem in ("worker-0", "worker-0.error")}
        untouched |= {
            "notes.txt",
            "worker-0.2026-99-99.log",
            "worker-0.log",
            "x.2026-01-01.log.bak",
        }
        after = contents(directory)
        assert {f"{age(days, stem)}.gz" for stem, days in kept} | untouched == set(after)
        for stem, days in kept:
            assert before[age(days, stem)] == gzip.decompress(after[f"{age(days, stem)}.gz"])

    def test_idempotent(self, directory: Path) -> None:
        """A second sweep of the same day changes nothing; a later one deletes archives."""
        sweep(directory, TODAY)
        after = contents(directory)

        assert Swept() == sweep(directory, TODAY)
        assert after == contents(directory)
        assert Swept(compressed=1, deleted=9) == sweep(directory, TODAY + dt.timedelta(days=31))

    def test_several_at_once(self, directory: Path) -> None:
        """While one sweep is at work, another returns at once and touches nothing."""
        before = contents(directory)
        held = os.open(directory, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)

        assert Swept() == sweep(directory, TODAY)

        os.close(held)
        assert before == contents(directory)

    def test_many_threads(self, directory: Path) -> None:
        """Concurrent sweeps together do the work once."""
        results: list[Swept] = []
        threads = [
            threading.Thread(target=lambda: results.append(sweep(directory, TODAY)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        assert (6, 4, 0) == (
            sum(result.compressed for result in results),
            sum(result.deleted for result in results),
            sum(result.failed for result in results),
        )

    def test_killed_before_the_rename(self, directory: Path) -> None:
        """What a killed sweep left half-written is thrown away, and the work done again."""
        (directory / f"{age(1)}.gz.tmp").write_bytes(b"half")
        (directory / f"{age(2)}.gz.tmp").write_bytes(b"half")

        assert Swept(compressed=6, deleted=4) == sweep(directory, TODAY)

        assert not [name for name in contents(directory) if name.endswith(".tmp")]
        assert b"worker-0 1\n" * 1000 == gzip.decompress(contents(directory)[f"{age(1)}.gz"])

    def test_killed_before_the_delete(self, directory: Path) -> None:
        """A file that is already in its archive is only deleted: no line is doubled."""
        content = (directory / age(1)).read_bytes()
        sweep(directory, TODAY)
        (directory / age(1)).write_bytes(content)

        assert Swept(compressed=1) == sweep(directory, TODAY)

        assert content == gzip.decompress(contents(directory)[f"{age(1)}.gz"])
        assert age(1) not in contents(directory)

    def test_late_writer(self, directory: Path) -> None:
        """Lines that come to a day that is already compressed are added to its archive."""
        content = (directory / age(1)).read_bytes()
        sweep(directory, TODAY)
        (directory / age(1)).write_text("late\n")

        sweep(directory, TODAY)

        assert content + b"late\n" == gzip.decompress(contents(directory)[f"{age(1)}.gz"])

    def test_full_disk(self, directory: Path) -> None:
        """If there is no room for the archive, the file stays, and the others get their turn."""
        before = contents(directory)
        (directory / age(14)).write_text("short\n")
        (directory / age(1)).write_bytes(os.urandom(5000))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            swept = sweep(directory, TODAY)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        assert Swept(compressed=5, deleted=4, failed=1) == swept
        after = contents(directory)
        assert 5000 == len(after[age(1)])
        assert not [name for name in after if name.endswith(".tmp")]
        assert before[age(0)] == after[age(0)]

    def test_no_directory(self, tmp_path: Path) -> None:
        """Where there are no logs there is nothing to sweep."""
        assert Swept() == sweep(tmp_path / "missing", TODAY)
