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
        self.received = 0
        """Bytes that came while flooding."""
        self._data = b""
        self._frames: list[tuple[int, bytes]] = []
        while b"\r\n\r\n" not in self._data:
            self._read()
        answer, _, self._data = self._data.partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        self._parse()
        while user and not self._frames:
            self._read()
            self._parse()
        del self._frames[:1]
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
            self._read()

    def wait(self, seconds: float) -> int | None:
        """Read until the Close frame, or for so long; return its code, or None."""
        limit = time.monotonic() + seconds
        while self.code is None and (remaining := limit - time.monotonic()) > 0:
            if select.select([self.socket], [], [], remaining)[0]:
                self._read()
                self._parse()
        return self.code

    def flood(
        self, blob: bytes, times: int, *, seconds: float = PATIENCE, read: bool = True
    ) -> Outcome:
        """Send ``blob`` again and again, until the server ends it; with ``times`` 0 just wait.

        Raises:
            AssertionError: The server has not ended it in time.
        """
        began = time.monotonic()
        closed: float | None = None
        sent = 0
        total = len(blob) * times
        poll = select.poll()
        reading = True
        while reading:
            wanted = (select.POLLIN if read else 0) | (select.POLLOUT if sent < total else 0)
            poll.register(self.socket, wanted)
            remaining = began + seconds - time.monotonic()
            assert remaining > 0, f"not ended after {seconds} s: {sent=} {self._frames}"
            events = dict(poll.poll(remaining * 1000)).get(self.socket.fileno(), 0)
            if events & select.POLLOUT:
                try:
                    sent += self.socket.send(memoryview(blob)[sent % len(blob) :])
                except BlockingIOError:
                    pass
                except OSError:
                    # Reset. What came before that can still be read.
                    events |= select.POLLERR
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                reading = self._read_some()
                if closed is None and self.code is not None:
                    closed = time.monotonic() - began
        gone = time.monotonic() - began
        return Outcome(
            seconds=gone if closed is None else closed,
            gone=gone,
            code=self.code,
            sent=sent,
            received=self.received,
        )

    def _read_some(self) -> bool:
        """Read all there is; return False at the end of the stream."""
        while True:
            try:
                chunk = self.socket.recv(1 << 16)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not chunk:
                return False
            self.received += len(chunk)
            self._data += chunk
            self._parse()

    def _read(self) -> None:
        chunk = self.socket.recv(1 << 16)
        assert chunk, f"the stream ended early: {self._data!r} {self._frames}"
        self._data += chunk

    def _parse(self) -> None:
        frames, self._data = split_frames(self._data)
        self._frames += frames


# Heads.

UPGRADE: Final = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


def request(path: str, *lines: str) -> bytes:
    """Return a request head with these lines."""
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


HEADS: Final = {
    "101 headers": [f"X-{number}: y" for number in range(100)],  # and Host
    "a line of 9 KiB": ["X: " + "y" * 9216],
    "17 KiB": [f"X-{number}: " + "y" * 1016 for number in range(17)],
    "2,000 headers": [f"X-{number}: y" for number in range(2_000)],
    "32,000 spaces": ["Sec-WebSocket-Protocol: b" + " " * 32_000 + "x"],
}


@attrs.frozen(kw_only=True)
class Exchange:
    """A request and what came back until the server closed."""

    answer: bytes
    seconds: float
    reset: bool
    """Whether the server has closed in a way that may cost its answer."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self.answer.split(b" ", 2)[1])


def exchange(where: Address, data: bytes, piece: int | None = None) -> Exchange:
    """Send ``data`` in segments of ``piece`` bytes until there is an answer; read to the end."""
    began = time.monotonic()
    piece = piece or len(data)
    answer = b""
    reset = False
    with socket.create_connection(where, timeout=PATIENCE) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(data), piece):
                sock.sendall(data[start : start + piece])
                if select.select([sock], [], [], 0)[0]:
                    break
        try:
            while chunk := sock.recv(1 << 16):
                answer += chunk
        except ConnectionError:
            reset = True
    return Exchange(answer=answer, seconds=time.monotonic() - began, reset=reset)


@attrs.define(eq=False)
class Stalling:
    """A head that is begun and never ended."""

    sock: socket.socket
    began: float
    drips: bool
    ended: float | None = None
    answer: bytes = b""


class Siege:
    """Thousands of clients whose heads do not come: half are silent, half drip.

    Drive it with `turn`; it takes no thread, so that it does not slow down who measures.
    """

    DRIP_SECONDS: Final = 0.25

    def __init__(self, where: Address, count: int) -> None:
        self._poll = select.epoll()
        self._stalling: dict[int, Stalling] = {}
        self.ended: list[Stalling] = []
        for number in range(count):
            sock = socket.create_connection(where, timeout=PATIENCE)
            sock.setblocking(False)
            stalling = Stalling(sock, time.monotonic(), drips=number % 2 == 1)
            self._stalling[sock.fileno()] = stalling
            self._poll.register(sock, select.EPOLLIN)
        self._text = iter(request("/ws", *UPGRADE))
        self._drip_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._poll.close()
        for stalling in self._stalling.values():
            stalling.sock.close()

    @property
    def going_on(self) -> bool:
        """Whether somebody is still connected."""
        return bool(self._stalling)

    def turn(self, seconds: float) -> None:
        """Wait for at most so long, and do what there is to do."""
        for descriptor, _events in self._poll.poll(seconds):
            stalling = self._stalling[descriptor]
            chunk = stalling.sock.recv(4096)
            stalling.answer += chunk
            if not chunk:
                stalling.ended = time.monotonic()
                self.ended.append(self._stalling.pop(descriptor))
                stalling.sock.close()
        if time.monotonic() >= self._drip_at:
            self._drip_at = time.monotonic() + self.DRIP_SECONDS
            drop = bytes((next(self._text),))
            for stalling in self._stalling.values():
                if stalling.drips and not stalling.answer:
                    stalling.sock.send(drop)


# Floods: what is sent, and how often.

ENDLESS: Final = 1 << 20

FRAGMENT_FLOODS: Final = {
    "empty": (frame(CONTINUATION, fin=False) * 10_000, 100),
    "one byte": (frame(CONTINUATION, b"x", fin=False) * 10_000, 100),
    # Fewer pings than the budget of control frames in as many fragments as are allowed.
    "empty and pings": ((frame(CONTINUATION, fin=False) * 8 + frame(PING, b"p")) * 1_250, 100),
    "one byte and pings": (
        (frame(CONTINUATION, b"x", fin=False) * 8 + frame(PING, b"p")) * 1_250,
        100,
    ),
}

CONTROL_FLOODS: Final = {
    "pings": (frame(PING) * 10_000, ENDLESS),
    "long pings": (frame(PING, b"p" * 125) * 1_000, ENDLESS),
    "pongs": (frame(PONG, b"unasked") * 10_000, ENDLESS),
    "long pings, pongs unread": (frame(PING, b"p" * 125) * 1_000, ENDLESS),
}


def heads(where: Address, kind: str) -> Outcome:
    """Send a head beyond all bounds, whole and in small pieces."""
    data = request("/ws", *UPGRADE, *HEADS[kind])
    found = [exchange(where, data, piece) for piece in (None, 10)]
    seconds = max(one.seconds for one in found)
    codes = {one.status for one in found}
    assert len(codes) == 1, codes
    return Outcome(seconds=seconds, gone=seconds, code=codes.pop(), sent=2 * len(data), received=0)


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
    "heads": heads,
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
