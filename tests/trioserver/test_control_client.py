"""Asking the supervisor, against sockets that answer what they should or should not."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
import trio

from tests.supervisor.harness import short_directory
from tests.trioserver.test_status import REPLY
from trioserver.control_client import ask, ask_status
from trioserver.errors import CommandError
from trioserver.status import Verdict, encode


@pytest.fixture
def path() -> Iterator[Path]:
    """Return where the control socket is to be."""
    with short_directory() as directory:
        yield directory / "control.sock"


class Supervisor:
    """Answers one caller with fixed bytes, in pieces, and hangs up."""

    def __init__(self, path: Path, *answer: bytes, hang_up: bool = True) -> None:
        """Listen at once, answer from a thread."""
        self.request = b""
        self._answer = answer
        self._hang_up = hang_up
        self._done = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        caller, _ = self._listener.accept()
        with caller:
            self.request = caller.recv(1000)
            # A caller that has read enough hangs up in the middle of a long answer.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for part in self._answer:
                    caller.sendall(part)
            if not self._hang_up:
                self._done.wait(10)


def test_asking_returns_the_answer(path: Path) -> None:
    """A status or a verdict, whatever the pieces it comes in."""
    line = encode(REPLY) + b"\n"
    with Supervisor(path, line[:10], line[10:]) as supervisor:
        assert ask(path, "status", 5) == REPLY
    assert supervisor.request == b'{"op":"status","v":1}\n'

    with Supervisor(path, encode(Verdict(ok=False, reason="no")) + b"\n"):
        assert ask(path, "reload", 5) == Verdict(ok=False, reason="no")


async def test_asking_for_the_status_from_trio(path: Path) -> None:
    """The same answer, without blocking the loop."""
    line = encode(REPLY) + b"\n"
    with Supervisor(path, line[:10], line[10:]):
        assert await ask_status(path) == REPLY


def test_nobody_is_there(path: Path) -> None:
    """No socket, or one that a killed server has left behind."""
    expected = f"no trioserver is running with DATA_DIR {path.parent}"
    with pytest.raises(CommandError) as caught:
        ask(path, "status", 5)
    assert str(caught.value) == expected

    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    with pytest.raises(CommandError) as caught:
        ask(path, "stop", 5)
    assert str(caught.value) == expected


async def test_nobody_is_there_for_trio(path: Path) -> None:
    """The same sentence."""
    with pytest.raises(CommandError, match="no trioserver is running"):
        await ask_status(path)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"", "the supervisor went away before it answered 'status'"),
        (b'{"ok":tr', "the supervisor went away before it answered 'status'"),
        (b"hello\n", "the supervisor's answer to 'status' makes no sense to this version"),
        (b"{}\n", "the supervisor's answer to 'status' makes no sense to this version"),
    ],
)
async def test_answers_that_are_none(path: Path, answer: bytes, problem: str) -> None:
    """Said plainly, by both."""
    with Supervisor(path, answer), pytest.raises(CommandError) as caught:
        ask(path, "status", 5)
    assert str(caught.value) == problem

    with Supervisor(path, answer), pytest.raises(CommandError) as caught:
        await ask_status(path)
    assert str(caught.value) == problem


async def test_a_refusal_is_no_status(path: Path) -> None:
    """It is passed on."""
    with (
        Supervisor(path, encode(Verdict(ok=False, reason="no")) + b"\n"),
        pytest.raises(CommandError, match="the supervisor refused: no"),
    ):
        await ask_status(path)


async def test_no_answer_in_time(path: Path) -> None:
    """Nobody waits for ever."""
    problem = "the supervisor did not answer 'status' within 0.05 s"
    with Supervisor(path, hang_up=False), pytest.raises(CommandError) as caught:
        ask(path, "status", 0.05)
    assert str(caught.value) == problem

    with Supervisor(path, hang_up=False), pytest.raises(CommandError) as caught:
        await ask_status(path, 0.05)
    assert str(caught.value) == problem


async def test_an_answer_without_end_is_not_kept(path: Path) -> None:
    """A status of a thousand workers is taken; what is much longer makes no sense."""
    with (
        Supervisor(path, *[b"x" * 60_000] * 20, hang_up=False),
        trio.fail_after(5),
        pytest.raises(CommandError, match="went away before"),
    ):
        await ask_status(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_server_of_somebody_else_says_so(path: Path) -> None:
    """It may well be running; only not for this user."""
    script = (
        "import os, sys; from pathlib import Path\n"
        "from trioserver.control_client import ask\n"
        "os.setuid(65534)\n"
        "ask(Path(sys.argv[1]), 'status', 5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert done.stderr.endswith(f"may not talk to the trioserver with DATA_DIR {path.parent}\n")
