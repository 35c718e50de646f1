"""The serving side of the control socket, driven by a real selector."""

import contextlib
import selectors
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.control import ControlServer
from tests.supervisor.harness import no_descriptors_left
from trioserver.status import Verdict, encode

YES = Verdict(ok=True)


class Driver:
    """A loop for the server, and the callers around it."""

    def __init__(self, path: Path) -> None:
        """Serve at that path."""
        self.path = path
        self.selector = selectors.DefaultSelector()
        self.asked: list[tuple[int, str]] = []
        self.server = ControlServer(
            path, self.selector, lambda number, op: self.asked.append((number, op))
        )
        self.callers: list[socket.socket] = []

    def turn(self) -> None:
        """Handle what is ready now, until nothing is."""
        for _ in range(1000):
            ready = self.selector.select(0)
            if not ready:
                return
            for key, mask in ready:
                key.data(mask)
        raise AssertionError("it never comes to rest")

    def call(self, said: bytes = b"") -> socket.socket:
        """Connect and say something."""
        caller = socket.socket(socket.AF_UNIX)
        caller.settimeout(5)
        caller.connect(str(self.path))
        caller.sendall(said)
        self.callers.append(caller)
        self.turn()
        return caller


@pytest.fixture
def driver(directory: Path) -> Iterator[Driver]:
    """Return a server and the loop that drives it."""
    driver = Driver(directory / "s")
    yield driver
    driver.server.close(0.1)
    driver.selector.close()
    for caller in driver.callers:
        caller.close()


def hung_up(caller: socket.socket) -> bool:
    """Say whether the server has closed the connection."""
    caller.settimeout(0.2)
    try:
        return caller.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_requests_are_numbered_and_answered_in_any_order(driver: Driver) -> None:
    """Each answer goes to its own caller."""
    first = driver.call(b'{"op":"stop"}\n')
    second = driver.call(b'{"op":"status","more":1}\n')

    assert driver.asked == [(1, "stop"), (2, "status")]

    driver.server.reply(2, YES)
    driver.server.reply(1, Verdict(ok=False, reason="no"))
    driver.turn()

    assert second.recv(1000) == encode(YES) + b"\n"
    assert first.recv(1000) == encode(Verdict(ok=False, reason="no")) + b"\n"


def test_a_connection_serves_many_requests(driver: Driver) -> None:
    """Also several lines at once, and a line in pieces."""
    caller = driver.call(b'{"op":"a"}\n{"op":"b"}\n{"op')
    caller.sendall(b'":"c"}\n')
    driver.turn()

    assert driver.asked == [(1, "a"), (2, "b"), (3, "c")]
    for number in (1, 2, 3):
        driver.server.reply(number, YES)
    driver.turn()
    assert caller.recv(1000) == 3 * (encode(YES) + b"\n")


@pytest.mark.parametrize("line", [b"hello", b"", b"\xff\x00", b"[]", b'{"op":1}', b'{"v":1}'])
def test_what_is_no_request_is_refused(driver: Driver, line: bytes) -> None:
    """Nobody is asked, and the connection lives."""
    caller = driver.call(line + b"\n")

    assert driver.asked == []
    assert caller.recv(1000) == (encode(Verdict(ok=False, reason="that is not a request")) + b"\n")
    caller.sendall(b'{"op":"status"}\n')
    driver.turn()
    assert len(driver.asked) == 1


def test_a_line_without_end_is_hung_up_on(driver: Driver) -> None:
    """Memory is bounded."""
    assert hung_up(driver.call(b"x" * 10_000))


def test_a_caller_may_close_its_side_before_the_answer(driver: Driver) -> None:
    """As ``nc`` does; the connection ends after the last answer, and does not spin till then."""
    caller = driver.call(b'{"op":"stop"}\n')
    caller.shutdown(socket.SHUT_WR)
    driver.turn()
    driver.turn()
    driver.server.reply(1, YES)
    driver.turn()

    assert caller.recv(1000) == encode(YES) + b"\n"
    assert hung_up(caller)


def test_answers_to_those_who_have_gone_are_dropped(driver: Driver) -> None:
    """Whether they left before or after their departure was noticed."""
    driver.call(b'{"op":"stop"}\n').close()
    driver.server.reply(1, YES)
    driver.turn()
    driver.call(b'{"op":"stop"}\n').close()
    driver.turn()
    driver.server.reply(2, YES)
    driver.turn()
    driver.server.reply(3, YES)
    driver.turn()

    assert driver.call(b'{"op":"status"}\n') is driver.callers[-1]


def test_a_caller_that_does_not_read_its_answers_is_hung_up_on(driver: Driver) -> None:
    """Memory is bounded on this side, too."""
    caller = driver.call()
    answer = Verdict(ok=False, reason="x" * 60_000)
    with contextlib.suppress(BrokenPipeError):
        for number in range(1, 41):
            caller.sendall(b'{"op":"status"}\n')
            driver.turn()
            driver.server.reply(number, answer)
            driver.turn()

    received = 0
    caller.settimeout(5)
    while part := caller.recv(1 << 20):
        received += len(part)
    assert received < 40 * 60_000


def test_a_caller_that_floods_without_reading_is_hung_up_on(driver: Driver) -> None:
    """Also in the middle of what it has said."""
    caller = driver.call(b"\n" * 65536)

    caller.settimeout(5)
    with contextlib.suppress(ConnectionError):
        while caller.recv(1 << 20):
            pass


def test_an_idle_caller_makes_room_for_a_new_one(driver: Driver) -> None:
    """Who waits for an answer does not."""
    waiting = driver.call(b'{"op":"stop"}\n')
    idle = [driver.call() for _ in range(63)]
    newest = driver.call(b'{"op":"status"}\n')

    assert hung_up(idle[0])
    assert not hung_up(idle[1])
    assert driver.asked == [(1, "stop"), (2, "status")]
    for number in (1, 2):
        driver.server.reply(number, YES)
    driver.turn()
    for caller in (waiting, newest):
        caller.settimeout(5)
        assert caller.recv(1000) == encode(YES) + b"\n"


def test_when_all_wait_a_new_one_is_turned_away(driver: Driver) -> None:
    """Those who came first keep their places."""
    for _ in range(64):
        driver.call(b'{"op":"stop"}\n')

    assert hung_up(driver.call(b'{"op":"status"}\n'))
    assert len(driver.asked) == 64


def test_without_descriptors_it_neither_spins_nor_gives_up(driver: Driver) -> None:
    """New callers wait for a second, and are served when there are descriptors again."""
    caller = socket.socket(socket.AF_UNIX)
    driver.callers.append(caller)
    with no_descriptors_left():
        caller.connect(str(driver.path))
        caller.sendall(b'{"op":"status"}\n')
        driver.turn()
        driver.turn()
        driver.server.tick(time.monotonic())
        driver.turn()
    assert driver.asked == []

    driver.server.tick(time.monotonic() + 1.0)
    driver.turn()

    assert driver.asked == [(1, "status")]


def test_it_can_be_closed_while_it_has_no_descriptors(driver: Driver) -> None:
    """The end does not depend on better times."""
    caller = socket.socket(socket.AF_UNIX)
    driver.callers.append(caller)
    with no_descriptors_left():
        caller.connect(str(driver.path))
        driver.turn()
        driver.server.stop_listening()

    assert not driver.path.exists()
    assert hung_up(caller)


def test_the_socket_is_private(driver: Driver) -> None:
    """Read and write for the owner, nothing for anybody else."""
    assert driver.path.stat().st_mode & 0o777 == 0o600


def test_an_old_socket_is_replaced(directory: Path) -> None:
    """A killed server leaves its file behind."""
    path = directory / "s"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    driver = Driver(path)
    driver.call(b'{"op":"status"}\n')
    driver.server.close(0.1)
    driver.callers[0].close()

    assert driver.asked == [(1, "status")]


def test_a_socket_that_cannot_be_made_is_an_error(directory: Path) -> None:
    """Nothing stays open."""
    with selectors.DefaultSelector() as selector, pytest.raises(FileNotFoundError):
        ControlServer(directory / "missing" / "s", selector, lambda _number, _op: None)


def test_closing_delivers_what_is_pending_and_removes_the_socket(driver: Driver) -> None:
    """First nobody may come any more, then everybody gets the last word."""
    caller = driver.call(b'{"op":"stop"}\n')
    driver.server.reply(1, YES)
    driver.server.stop_listening()

    assert not driver.path.exists()

    driver.server.close(1.0)

    assert caller.recv(1000) == encode(YES) + b"\n"
    assert hung_up(caller)
    assert not driver.selector.get_map()
