"""What a server process costs, and how long its other clients wait."""

import contextlib
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from tests.integration.clients import token
from tests.running import Running
from tests.trioserver.wire import TEXT, head, split_frames, text

Address = tuple[str, int]

PATIENCE: Final = 10.0
"""Seconds that any single wait of a blocking socket may take."""

NOISE_SECONDS: Final = 0.005
"""What a machine that runs other things beside us may add to the slowest percent: one time
slice of the kernel, and a little."""


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


def percentile(values: list[float], percent: int) -> float:
    """Return the value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


class Neighbour:
    """Somebody who does no harm, and who must not notice anything."""

    def __init__(self, where: Address, user: str = "neighbour") -> None:
        self._socket = socket.create_connection(where, timeout=PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ping = text({"type": "ping", "ref": "r"})
        self._socket.sendall(head(credential=token(user)))
        data = b""
        while b"connection_established" not in data or split_frames(data.split(b"\r\n\r\n")[1])[1]:
            data += self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _receive(self) -> bytes:
        data = self._socket.recv(1 << 16)
        assert data, "the server has closed a connection that did no harm"
        return data

    def round_trip(self) -> float:
        """Ask and be answered; return the seconds that took."""
        began = time.perf_counter()
        self._socket.sendall(self._ping)
        data = b""
        while True:
            data += self._receive()
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
