"""Children of the supervisor: how they begin and end, and what they do once a second."""

import fcntl
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from trioserver import child
from trioserver.metric_files import read
from trioserver.metrics import Exporter, Tally
from trioserver.settings import Settings
from trioserver.status import BOARD_FD

# A child that ends in the way that it is told.
PROGRAM = """
import os, sys
from trioserver import child, logs
from trioserver.errors import CommandError

async def work(settings):
    there = [fd for fd in (3, 4, 5, 6) if os.path.exists(f"/proc/self/fd/{fd}")]
    inherited = [fd for fd in there if os.get_inheritable(fd)]
    logs.get_logger().info("at work", port=settings.ws_port, inherited=inherited)
    if sys.argv[1] == "impossible":
        raise CommandError("cannot be")
    if sys.argv[1] == "bug":
        raise RuntimeError("a bug")

sys.exit(child.run("worker-3", work, generation=7, slot=3))
"""

SETTINGS = Settings(ws_port=1234, logger_encoding="json", log_level="info")


def run(
    directory: Path, ending: str, snapshot: bytes, *, board: bool = False
) -> tuple[int, list[dict[str, object]]]:
    """Run the program as the supervisor would; return its exit code and its log."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    settings = os.memfd_create("settings")
    os.write(settings, snapshot)
    log = os.open(directory / "log", os.O_RDWR | os.O_CREAT)
    placed = {2: log, 3: theirs.fileno(), 4: theirs.fileno(), 5: settings}
    if board:
        placed[BOARD_FD] = settings
    moved = {to: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for to, fd in placed.items()}
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", PROGRAM, ending],
        dict(os.environ),
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in moved.items()],
    )
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lines = (directory / "log").read_text().splitlines()
    for fd in (settings, log, *moved.values()):
        os.close(fd)
    ours.close()
    theirs.close()
    return code, [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [("done", 0, ""), ("impossible", 4, "cannot run"), ("bug", 1, "broke")],
)
def test_how_it_ends_is_its_exit_code(tmp_path: Path, ending: str, code: int, said: str) -> None:
    """0 for work that is done, 4 for what cannot be done, 1 for a bug, and one line about it."""
    ended, log = run(tmp_path, ending, SETTINGS.snapshot())

    assert code == ended
    assert ("at work", 1234) == (log[0]["event"], log[0]["port"])
    assert ("worker-3", 3, 7) == tuple(log[0][key] for key in ("process", "slot", "generation"))
    assert said in str(log[-1]["event"])
    assert 1 + bool(said) == len(log)


@pytest.mark.parametrize("board", [False, True])
def test_it_passes_nothing_on(tmp_path: Path, *, board: bool) -> None:
    """What the supervisor has placed is for this process and not for what it may start.

    Workers have a board, the gateway has none.
    """
    _, log = run(tmp_path, "done", SETTINGS.snapshot(), board=board)

    assert [] == log[0]["inherited"]


def test_settings_that_are_none_end_it_with_4(tmp_path: Path) -> None:
    """A snapshot that cannot be read is a line and no traceback."""
    code, _ = run(tmp_path, "done", b"{")

    assert 4 == code
    text = (tmp_path / "log").read_text()
    assert "worker-3" in text
    assert "Traceback" not in text


async def test_counts_are_written_each_second(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Once a second the tally is brought up to date, then written."""
    tally = Tally()
    exporter = Exporter(tally, tmp_path, "w0.1")
    refreshed: list[float] = []
    written: list[float] = []

    def refresh(now: float) -> None:
        refreshed.append(now)
        tally.opened += 1

    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        nursery.start_soon(child.keep_counting, tally, exporter, refresh)
        for _ in range(3):
            await trio.sleep(1.1)
            cells = read(tmp_path / "counter_w0.1.db").cells
            written.append(sum(cell.value for key, cell in cells.items() if "opened" in key))
        nursery.cancel_scope.cancel()

    assert [1.0, 2.0, 3.0] == pytest.approx([moment - began for moment in refreshed])
    assert [1, 2, 3] == written
    exporter.close()


async def test_the_lag_of_the_loop_is_measured(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """A loop that stood still for three seconds was late by as much, and then it goes on."""
    tally = Tally()
    exporter = Exporter(tally, tmp_path, "w0.1")
    lags: list[float] = []

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            child.keep_counting, tally, exporter, lambda _: lags.append(tally.loop_lag)
        )
        for seconds in (1.0, 4.0, 1.0):
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(seconds)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert [0.0, 3.0, 0.0] == pytest.approx(lags[:2] + lags[-1:])
    assert len(lags) <= 4
    exporter.close()


async def test_a_problem_with_the_files_is_said_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    """That counts are not kept is logged once, and that they are again."""
    tally = Tally()
    directory = tmp_path / "later"
    exporter = Exporter(tally, directory, "w0.1")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.keep_counting, tally, exporter)
        await trio.sleep(5)
        directory.mkdir()
        await trio.sleep(5)
        nursery.cancel_scope.cancel()

    said = capfd.readouterr().err
    assert 1 == said.count("counts are not kept")
    assert 1 == said.count("counts are kept again")
    exporter.close()
