"""Clients that mean harm, at the level of bytes.

Each attack is a function that takes the address of the public port and returns an `Outcome`.
`Attacking` repeats one of them in a process of its own, so that what an attack costs its sender
does not slow down those who are measured meanwhile:

    with Attacking(where, "pings") as attack:
        ...
    assert all(outcome.code == 1008 for outcome in attack.outcomes)
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import attrs

from tests.integration.clients import token
from tests.integration.measuring import PATIENCE, Address
from tests.trioserver.wire import CLOSE, PING, PONG, TEXT, frame, head, split_frames

ROOT: Final = Path(__file__).parents[2]

CONTINUATION: Final = 0x0


@attrs.frozen(kw_only=True)
class Outcome:
    """How one attack went."""

    seconds: float
    """From its first byte until the server's Close frame, or until the stream ended without."""
    gone: float
    """From its first byte until the stream had ended."""
    code: int | None
    """Of the Close frame; None if there was none."""
    sent: int
    """Bytes that the kernel took from the attacker."""
    received: int


class Attacker:
    """One hostile client, non-blocking, that has joined as somebody."""

    def __init__(
        self, where: Address, user: str | None = "mallory", *, receive_buffer: int = 0
    ) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(where)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(head(credential=user and token(user)))
        data = b""
        last = b"connection_established" if user else b"\r\n\r\n"
        while last not in data:
            chunk = self.socket.recv(4096)
            assert chunk, data
            data += chunk
        assert data.startswith(b"HTTP/1.1 101 "), data
        self._data = data.partition(b"\r\n\r\n")[2]
        self._frames: list[tuple[int, bytes]] = []
        self.socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def code(self) -> int | None:
        """The code of the Close frame that has come, if one has."""
        for opcode, payload in self._frames:
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big")
        return None

    def ask(self, data: bytes, opcode: int) -> bytes:
        """Send ``data``, and return the payload of the next frame with this opcode."""
        self.socket.settimeout(PATIENCE)
        self.socket.sendall(data)
        while True:
            self._parse()
            for index, (found, payload) in enumerate(self._frames):
                if found == opcode:
                    del self._frames[: index + 1]
                    self.socket.setblocking(False)
                    return payload
            chunk = self.socket.recv(1 << 16)
            assert chunk, f"the end came before a frame {opcode}: {self._frames}"
            self._data += chunk

    def flood(
        self, blob: bytes, times: int, *, seconds: float = PATIENCE, read: bool = True
    ) -> Outcome:
        """Send ``blob`` again and again, until the server ends it; with ``times`` 0 just wait.

        Raises:
            AssertionError: The server has not ended it in time.
        """
        began = time.monotonic()
        closed: float | None = None
        sent = received = 0
        total = len(blob) * times
        poll = select.poll()
        while True:
            wanted = (select.POLLIN if read else 0) | (select.POLLOUT if sent < total else 0)
            poll.register(self.socket, wanted)
            remaining = began + seconds - time.monotonic()
            assert remaining > 0, f"not ended after {seconds} s: {sent=} {received=} {self.code=}"
            ready = poll.poll(remaining * 1000)
            events = ready[0][1] if ready else 0
            try:
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    chunk = self.socket.recv(1 << 16)
                    if not chunk:
                        break
                    received += len(chunk)
                    self._data += chunk
                    self._parse()
                    if closed is None and self.code is not None:
                        closed = time.monotonic() - began
                if events & select.POLLOUT:
                    sent += self.socket.send(memoryview(blob)[sent % len(blob) :])
            except BlockingIOError:
                continue
            except OSError:
                break
        gone = time.monotonic() - began
        return Outcome(
            seconds=gone if closed is None else closed,
            gone=gone,
            code=self.code,
            sent=sent,
            received=received,
        )

    def _parse(self) -> None:
        frames, self._data = split_frames(self._data)
        self._frames += frames


# Floods: what is sent, and how often.

FRAGMENT_FLOODS: Final = {
    "empty": (frame(CONTINUATION, fin=False) * 10_000, 100),
    "one byte": (frame(CONTINUATION, b"x", fin=False) * 10_000, 100),
    # Fewer pings than the budget of control frames in as many fragments as are allowed.
    "empty and pings": ((frame(CONTINUATION, fin=False) * 8 + frame(PING, b"p")) * 1_250, 100),
    "one byte and pings": ((frame(CONTINUATION, b"x", fin=False) * 8 + frame(PING, b"p")) * 1_250, 100),
}

CONTROL_FLOODS: Final = {
    "pings": (frame(PING) * 10_000, 100),
    "long pings": (frame(PING, b"p" * 125) * 1_000, 200),
    "pongs": (frame(PONG, b"unasked") * 10_000, 100),
    "long pings, pongs unread": (frame(PING, b"p" * 125) * 1_000, 200),
}


def fragments(where: Address, kind: str) -> Outcome:
    """Begin a message and never end it."""
    with Attacker(where) as attacker:
        attacker.socket.send(frame(TEXT, b"", fin=False))
        blob, times = FRAGMENT_FLOODS[kind]
        return attacker.flood(blob, times)


def controls(where: Address, kind: str, user: str | None = "mallory") -> Outcome:
    """Send nothing but control frames."""
    with Attacker(where, user) as attacker:
        return attacker.flood(*CONTROL_FLOODS[kind], read="unread" not in kind)


ATTACKS: Final[dict[str, Callable[[Address, str], Outcome]]] = {
    "fragments": fragments,
    "controls": controls,
}


class Attacking:
    """One attack, repeated in a process of its own for the time of a block."""

    def __init__(self, where: Address, attack: str, kind: str) -> None:
        self.outcomes: list[Outcome] = []
        """Of the attacks that have ended; known when the block has."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, where[0], str(where[1]), attack, kind],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        # The first has been carried out: from now on the server is under attack.
        self._keep(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:
            process.send_signal(signal.SIGTERM)
            rest, _error = process.communicate(timeout=PATIENCE)
        for line in rest.splitlines():
            self._keep(line)

    def _keep(self, line: str) -> None:
        assert line, "the attacker broke; see above"
        self.outcomes.append(Outcome(**json.loads(line)))


def main(host: str, port: str, attack: str, kind: str) -> None:
    """Attack until told to stop; one line per attack."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    while not stopped:
        outcome = ATTACKS[attack]((host, int(port)), kind)
        sys.stdout.write(json.dumps(attrs.asdict(outcome)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
