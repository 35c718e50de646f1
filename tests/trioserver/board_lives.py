"""Lives of workers as processes of their own, and the board they share; for tests."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

from trioserver.board_map import BoardMap, create, sweep

LIMIT_SECONDS: Final = 20.0
"""For a process to end."""


class Life:
    """One process on a board; it has joined when this returns."""

    def __init__(self, fd: int, limits: dict[str, float]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.trioserver.board_life", str(fd), json.dumps(limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            text=True,
        )
        self._answer = ""

    def joined(self) -> "Life":
        """Wait until it is on the board."""
        assert self.process.stdout is not None
        assert "ready\n" == self.process.stdout.readline()
        return self

    def begin(self, order: str) -> None:
        """Give an order without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Return the answer to what was begun."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, order: str) -> Any:
        """Give an order and return its answer."""
        self.begin(order)
        return self.answer()

    def kill(self) -> None:
        """End it as the kernel would, and reap it, as the supervisor would."""
        self.process.send_signal(signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        """Wait for its end."""
        self.process.wait(LIMIT_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                # A line that nobody reads any more is no failure of the test.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Lives:
    """A board, as the supervisor has it, and who is on it."""

    def __init__(self, slots: int, connections: int) -> None:
        self.fd = create(slots, connections)
        self.all: list[Life] = []

    def start(self, count: int, **limits: float) -> list[Life]:
        """Start so many lives at once; return them when they have joined."""
        started = [Life(self.fd, limits) for _ in range(count)]
        self.all += started
        return [life.joined() for life in started]

    def __len__(self) -> int:
        """Return how many connections are on it, as a bystander sees it."""
        with contextlib.closing(BoardMap(self.fd)) as shared:
            begin = shared.connections
            return sum(shared.words[begin : begin + shared.segments].tolist())

    def sweep(self) -> int:
        """Do what the supervisor does after reaping."""
        return sweep(self.fd)


@contextlib.contextmanager
def lives(slots: int, connections: int = 10_000) -> Iterator[Lives]:
    """Make a board; whoever is on it ends with the block."""
    board = Lives(slots, connections)
    try:
        yield board
    finally:
        for life in board.all:
            if life.process.poll() is None:
                life.kill()
            else:
                life.reap()
        os.close(board.fd)
