"""A child's end of the control pair: in virtual time, and in real children of real supervisors."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from tests.supervisor.harness import Server, alive, eventually, short_directory
from trioserver.lifeline import Lifeline
from trioserver.status import Beat, Drain, Report, Started, decode_report, encode

CHILD = Path(__file__).with_name("lifeline_child.py")


# --- in virtual time ------------------------------------------------------------------------------


@attrs.define(eq=False)
class Pair:
    """A lifeline, and the supervisor's end of its pair."""

    lifeline: Lifeline
    supervisor: socket.socket
    now: Beat = attrs.field(factory=Beat)
    """What the child would report."""

    def heard(self) -> list[Report | None]:
        """Return what the supervisor has heard since the last call."""
        heard: list[Report | None] = []
        with contextlib.suppress(BlockingIOError):
            while packet := self.supervisor.recv(65536):
                heard.append(decode_report(packet))
        return heard

    def order(self, order: Drain) -> None:
        """Send an order."""
        self.supervisor.send(encode(order))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """Return a lifeline that does not run yet."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    here: list[Pair] = []
    lifeline = Lifeline(
        theirs.detach(), lambda: here[0].now, drain_seconds=30.0, drain_propagation=5.0
    )
    here.append(Pair(lifeline, ours))
    yield here[0]
    ours.close()


async def test_it_beats_at_once_and_each_second(
    pair: Pair, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Each beat says how the child is at that moment."""
    await nursery.start(pair.lifeline.run)
    assert pair.heard() == [Beat()]

    pair.now = Beat(connections=1)
    await trio.sleep(2.5)
    assert pair.heard() == [Beat(connections=1)] * 2

    pair.now = Beat(connections=2, ready=True)
    pair.lifeline.changed()
    assert pair.heard() == [Beat(connections=2, ready=True)]


async def test_it_says_that_it_has_started(pair: Pair, nursery: trio.Nursery) -> None:
    """Once, when its owner says so."""
    await nursery.start(pair.lifeline.run)
    pair.lifeline.started()
    pair.lifeline.changed()

    assert pair.heard() == [Beat(), Started(), Beat()]


async def test_a_supervisor_that_does_not_listen_blocks_nobody(
    pair: Pair, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Beats are dropped; that it has started is said later."""
    await nursery.start(pair.lifeline.run)
    for _ in range(5000):
        pair.lifeline.changed()
    pair.lifeline.started()

    assert Started() not in pair.heard()
    await trio.sleep(1.5)
    assert pair.heard() == [Started(), Beat()]


async def test_an_order_to_finish_is_passed_on(pair: Pair, nursery: trio.Nursery) -> None:
    """Also to those who ask later; what is not understood is skipped."""
    await nursery.start(pair.lifeline.run)
    order = Drain(seconds=26.0, propagation=5.0)
    pair.supervisor.send(b'{"type":"dance"}')
    pair.order(order)
    with trio.fail_after(5):
        assert await pair.lifeline.wait_drain() == order
        assert await pair.lifeline.wait_drain() == order


async def test_haste_is_added_and_never_taken_back(pair: Pair, nursery: trio.Nursery) -> None:
    """A second order may only ask for more haste."""
    await nursery.start(pair.lifeline.run)
    slow, quick = Drain(seconds=26.0), Drain(seconds=1.0, quick=True)
    with trio.fail_after(5):
        pair.order(slow)
        pair.order(Drain(seconds=99.0))
        assert await pair.lifeline.wait_drain() == slow
        pair.order(quick)
        assert await pair.lifeline.wait_hurry() == quick
        pair.order(slow)
        pair.order(Drain(seconds=5.0, quick=True))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await pair.lifeline.wait_drain() == quick


async def test_the_end_of_the_supervisor_is_an_order_to_hurry(
    pair: Pair, nursery: trio.Nursery
) -> None:
    """While this child holds its socket, no new supervisor can bind the port."""
    await nursery.start(pair.lifeline.run)
    pair.supervisor.close()
    with trio.fail_after(5):
        order = await pair.lifeline.wait_hurry()

    assert order.quick
    assert order.propagation == 0.0
    assert order.seconds <= 2.0
    pair.lifeline.changed()  # Nobody hears it; that is no error.


async def test_cancelled_it_lets_go_of_the_pair(pair: Pair, nursery: trio.Nursery) -> None:
    """And has nothing more to say."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as inner:
            await inner.start(pair.lifeline.run)
            scope.cancel()

    assert pair.heard() == [Beat()]
    assert pair.supervisor.recv(10) == b""
    pair.lifeline.started()
    pair.lifeline.changed()


async def test_waiting_may_be_cancelled(
    pair: Pair, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """The order that comes later is not lost."""
    await nursery.start(pair.lifeline.run)
    with trio.move_on_after(1):
        await pair.lifeline.wait_drain()
    with trio.move_on_after(1):
        await pair.lifeline.wait_hurry()
    order = Drain(seconds=1.0, quick=True)
    pair.order(order)

    assert await pair.lifeline.wait_drain() == order
    assert await pair.lifeline.wait_hurry() == order


# --- in real children ----------------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[Path]:
    """Return a directory with a short path."""
    with short_directory() as path:
        yield path


Start = Callable[..., Server]


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    """Return a function that starts a server whose one worker is a lifeline."""
    with ExitStack() as servers:

        def start(mode: str = "good", **settings: object) -> Server:
            command = [sys.executable, "-P", str(CHILD), str(directory), mode]
            server = Server(
                directory,
                settings={"workers": 1, **settings},
                timing={"startup": 20.0, "abort_grace": 5.0},
                commands={"worker": command},
            )
            servers.callback(server.close)
            return server

        yield start


def told(directory: Path, name: str) -> str:
    """Return what the child was told, once it was."""
    eventually((directory / name).exists)
    return (directory / name).read_text()


def test_the_supervisors_order_arrives(start: Start, directory: Path) -> None:
    """Drain first, haste when it is asked for."""
    server = start(drain_seconds=60.0, drain_propagation=3.0)
    server.wait_ready()
    server.signal(signal.SIGTERM)
    seconds, propagation, quick = told(directory, "drain").split()

    assert 50.0 < float(seconds) < 60.0
    assert (propagation, quick) == ("3.0", "False")

    server.signal(signal.SIGTERM)
    assert told(directory, "hurry").endswith("0.0 True")
    assert server.wait() == 0
    assert server.events("child killed") == []


def test_a_sigterm_by_hand_is_a_drain_as_configured(start: Start, directory: Path) -> None:
    """Whoever stops one worker wants its clients to move on in order."""
    server = start()
    server.wait_ready()
    os.kill(server.worker(), signal.SIGTERM)

    assert told(directory, "drain") == "30.0 5.0 False"


def test_ctrl_c_means_nothing_to_a_child(start: Start, directory: Path) -> None:
    """Only the supervisor acts on it."""
    server = start()
    server.wait_ready()
    pid = server.worker()
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)

    assert told(directory, "drain") == "30.0 5.0 False"


def test_a_killed_supervisor_is_an_order_to_hurry(start: Start, directory: Path) -> None:
    """Whichever the child sees first, the end of the pair or the signal of the kernel."""
    server = start()
    server.wait_ready()
    pid = server.worker()
    os.kill(server.pid, signal.SIGKILL)

    assert told(directory, "hurry") == "1.5 0.0 True"
    eventually(lambda: not alive(pid), limit=2.0)


def test_a_hanging_child_leaves_its_stack_in_the_log(start: Start) -> None:
    """The line that does not end is named."""
    server = start("hang")
    eventually(lambda: len(server.events("child died")) >= 1)

    assert "in block_the_loop" in server.log()
    assert server.events("child died")[0]["how"] == "gave no sign of life for 2 s"


def test_a_child_whose_supervisor_is_gone_ends_at_once(directory: Path) -> None:
    """Nobody would ever tell it to."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        # The pair is this process's, but the parent is a shell in between.
        script = f"{sys.executable} -P {CHILD} {directory} good 3<&{theirs.fileno()}; exit $?"
        done = subprocess.run(
            ["/bin/bash", "-c", script],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
            pass_fds=(theirs.fileno(),),
        )

    assert (done.returncode, done.stderr) == (1, "the supervisor is gone\n")
