"""What a server process costs, and how long its other clients wait."""

import contextlib
import json
import os
import select
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

from tests.integration.clients import token
from tests.running import Running
from tests.trioserver.wire import TEXT, head, split_frames, text

Address = tuple[str, int]

PATIENCE: Final = 10.0
"""Seconds that any single wait of a blocking socket may take."""

NOISE_SECONDS: Final = 0.02
"""What a machine that runs other things beside us may add to the slowest percent: some time
slices of the kernel. In peace it takes 0.1 ms, beside an attacker 1 to 8."""


def address(server: Running, *, admin: bool = False) -> Address:
    """Return where the public or the internal port is."""
    status = server.status()
    assert status is not None
    host, _, port = status["admin_address" if admin else "address"].rpartition(":")
    return host, int(port)


class Usage:
    """What one process uses, as the kernel counts it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._proc = Path("/proc", str(pid))

    @classmethod
    def of_worker(cls, server: Running) -> Self:
        """Look at the only worker of a server."""
        status = server.status()
        assert status is not None
        (worker,) = status["workers"]
        return cls(worker["pid"])

    def cpu_seconds(self) -> float:
        """Return the processor time of its main thread so far, to the nanosecond."""
        return int((self._proc / "schedstat").read_text().split()[0]) / 1e9

    def descriptors(self) -> int:
        """Return how many files and sockets are open."""
        return len(os.listdir(self._proc / "fd"))  # noqa: PTH208 - counted, not looked at

    @contextlib.contextmanager
    def growth(self) -> Iterator[Callable[[], int]]:
        """Give a function that returns by how many bytes memory has grown since, at its peak."""
        (self._proc / "clear_refs").write_text("5")
        before = self._status("VmRSS")
        yield lambda: self._status("VmHWM") - before

    def _status(self, field: str) -> int:
        for line in (self._proc / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) << 10
        raise LookupError(field)


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


class Neighbour:
    """Somebody who does no harm, and who must not notice anything."""

    def __init__(self, where: Address, user: str = "neighbour") -> None:
        self.socket = socket.create_connection(where, timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ping = text({"type": "ping", "ref": "r"})
        self.socket.sendall(head(credential=token(user)))
        data = b""
        while b"connection_established" not in data or split_frames(data.split(b"\r\n\r\n")[1])[1]:
            data += self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def receive(self) -> bytes:
        """Return some bytes; the end of the stream would be a failure."""
        data = self.socket.recv(1 << 16)
        assert data, "the server has closed a connection that did no harm"
        return data

    def round_trip(self) -> float:
        """Ask and be answered; return the seconds that took."""
        began = time.perf_counter()
        self.socket.sendall(self._ping)
        data = b""
        while True:
            data += self.receive()
            for opcode, payload in split_frames(data)[0]:
                if opcode == TEXT and json.loads(payload)["type"] == "pong":
                    return time.perf_counter() - began

    def p99(self, count: int = 500, tries: int = 3) -> float:
        """Return the 99th percentile of ``count`` round trips: the median of some tries."""
        return statistics.median(
            percentile([self.round_trip() for _ in range(count)], 99) for _ in range(tries)
        )


def bearable(baseline: float) -> float:
    """Return what the slowest percent may take while somebody else is attacking."""
    return max(2 * baseline, baseline + NOISE_SECONDS)


class Audience:
    """Many good clients that note when each broadcast reached them. Drive it with `listen`."""

    def __init__(self, where: Address, count: int) -> None:
        self.latencies: list[float] = []
        self.numbers: list[list[int]] = [[] for _ in range(count)]
        """What each has got, in its order."""
        self._neighbours = [Neighbour(where, f"good-{index}") for index in range(count)]
        self._data = [b""] * count
        self._poll = select.epoll()
        self._index: dict[int, int] = {}
        for index, neighbour in enumerate(self._neighbours):
            self._index[neighbour.socket.fileno()] = index
            self._poll.register(neighbour.socket, select.EPOLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._poll.close()
        for neighbour in self._neighbours:
            neighbour.socket.close()

    def listen(self, until: float) -> None:
        """Take what comes until a moment of `time.perf_counter`."""
        while (remaining := until - time.perf_counter()) > 0:
            for descriptor, _events in self._poll.poll(remaining):
                self._take(self._index[descriptor])

    def _take(self, index: int) -> None:
        data = self._data[index] + self._neighbours[index].receive()
        now = time.perf_counter()
        frames, self._data[index] = split_frames(data)
        for opcode, payload in frames:
            if opcode == TEXT:
                message = json.loads(payload)
                if message["type"] == "numbered":
                    self.numbers[index].append(message["payload"]["number"])
                    self.latencies.append(now - message["payload"]["at"])

    def taken(self) -> list[float]:
        """Return the latencies since the last call."""
        latencies, self.latencies = self.latencies, []
        return latencies
