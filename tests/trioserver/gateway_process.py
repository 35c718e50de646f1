"""A gateway process for tests, with a supervisor that says what the test wants it to say."""

import contextlib
import fcntl
import http.client
import io
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import attrs
import trio

from trioserver import status
from trioserver.settings import Settings
from trioserver.statedir import StateDir
from trioserver.status import Beat, Drain, Report, StatusReply, WorkerStatus

LIMIT_SECONDS: Final = 15.0
"""For whatever should happen at once."""


def worker(
    slot: int, *, ready: bool = True, connections: int = 0, why: str = "", there: bool = True
) -> WorkerStatus:
    """Return one slot of a status reply."""
    return WorkerStatus(
        slot=slot,
        pid=1000 + slot if there else None,
        age_seconds=10.0,
        connections=connections,
        restarts=slot,
        ready=ready,
        why=why,
    )


def pool(*workers: WorkerStatus, ready: bool = True, draining: bool = False) -> StatusReply:
    """Return what the supervisor says about a pool of these workers."""
    return StatusReply(
        ready=ready,
        workers=list(workers),
        gateway=status.GatewayStatus(pid=1, age_seconds=1.0, restarts=0, ready=True),
        redis=status.RedisStatus(embedded=True, pid=2, age_seconds=1.0, restarts=0, ready=True),
        address="127.0.0.1:8081",
        admin_address="127.0.0.1:9081",
        pid=os.getpid(),
        generation=1,
        draining=draining,
        reloading=False,
        version="0",
        uptime_seconds=3600.5,
    )


class StubSupervisor:
    """Answers ``status`` on a control socket from a thread of its own.

    Attributes:
        reply: What it says; None says nothing at all, as a supervisor that hangs.
        asked: How often it was asked.
    """

    def __init__(self, path: Path) -> None:
        self.reply: StatusReply | None = pool(worker(0), worker(1))
        self.asked = 0
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(100)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """Be gone: connections are refused. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._path.unlink(missing_ok=True)
        self._thread.join()

    def _serve(self) -> None:
        held: list[socket.socket] = []
        with contextlib.suppress(OSError):
            while True:
                connection = self._socket.accept()[0]
                connection.settimeout(LIMIT_SECONDS)
                request = status.decode_request(connection.makefile("rb").readline())
                assert request is not None
                assert request.op == "status"
                self.asked += 1
                if self.reply is None:
                    held.append(connection)
                    continue
                with connection, contextlib.suppress(OSError):
                    connection.sendall(status.encode(self.reply) + b"\n")
        for connection in held:
            connection.close()


class GatewayProcess:
    """A gateway under a supervisor of ours: real process, real sockets.

        with GatewayProcess(tmp_path, settings) as gateway:
            gateway.wait_started()
            response = await gateway.get("/healthz")

    The listening socket is ours, as it is the supervisor's otherwise: it is there before `start`
    and after the end, and across several lives.
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.state = StateDir(directory)
        self.state.create()
        self.snapshot = attrs.evolve(settings, data_dir=self.state.path).snapshot()
        self.supervisor = StubSupervisor(self.state.control_socket)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self.listener.getsockname()[1]
        self.pid = 0
        self._log_path = directory / "stderr.log"
        self._pair: socket.socket | None = None

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log_path.read_text()

    def start(self, generation: int = 1) -> None:
        """Start a process, the first or the next one."""
        assert not self.pid
        self.desert()
        self._pair, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pair.settimeout(LIMIT_SECONDS)
        snapshot = os.memfd_create("settings")
        os.write(snapshot, self.snapshot)
        log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        placed = {2: log, 3: theirs.fileno(), 4: self.listener.fileno(), 5: snapshot}
        # Moved out of the way first: one of ours may be where another one has to go.
        moved = {to: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for to, fd in placed.items()}
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", "trioserver.gateway", "--generation", str(generation)],
            dict(os.environ),
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in moved.items()],
        )
        theirs.close()
        for fd in (snapshot, log, *moved.values()):
            os.close(fd)

    def report(self) -> Report:
        """Return the next thing that it says to its supervisor."""
        assert self._pair is not None
        report = status.decode_report(self._pair.recv(status.PACKET_BYTES))
        assert report is not None
        return report

    def wait_started(self) -> None:
        """Return when it has said that it serves."""
        while not isinstance(self.report(), status.Started):
            pass

    def wait_beat(self, *, ready: bool) -> Beat:
        """Return its next beat that is, or is not, ready."""
        while True:
            report = self.report()
            if isinstance(report, Beat) and report.ready == ready:
                return report

    def drain(self, seconds: float, *, propagation: float = 0.0, quick: bool = False) -> None:
        """Order it to finish."""
        assert self._pair is not None
        order = Drain(seconds=seconds, propagation=propagation, quick=quick)
        self._pair.send(status.encode(order))

    def desert(self) -> None:
        """Close the control pair, as the end of the supervisor does. Idempotent."""
        if self._pair is not None:
            self._pair.close()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait_exit()

    def wait_exit(self, limit_seconds: float = LIMIT_SECONDS) -> int:
        """Return its exit code, negative for a signal; fails if it does not end in time."""
        pidfd = os.pidfd_open(self.pid)
        try:
            ended, _, _ = select.select([pidfd], [], [], limit_seconds)
        finally:
            os.close(pidfd)
        assert ended, f"still there after {limit_seconds} s:\n{self.log}"
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code

    async def connect(self) -> trio.SocketStream:
        """Return a connection to the gateway."""
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def get(
        self, path: str, headers: Mapping[str, str] | None = None, *, method: str = "GET"
    ) -> "Answer":
        """Return the answer to one request on a connection of its own."""
        lines = {"Host": "gateway", "Connection": "close", **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return await self.ask(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1"), method)

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> "Answer":
        """Return the answer to one request with a body, on a connection of its own."""
        lines = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines |= {"Host": "gateway", "Connection": "close", **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return await self.ask(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)

    async def ask(self, request: bytes, method: str = "GET") -> "Answer":
        """Return the answer to these bytes."""
        with trio.fail_after(LIMIT_SECONDS):
            async with await self.connect() as stream:
                data = b""
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(request)
                    async for part in stream:
                        data += part
        return Answer.parse(data, method)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.pid:
            self.kill()
        self.desert()
        self.listener.close()
        self.supervisor.close()


@attrs.frozen
class Answer:
    """An HTTP response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @classmethod
    def parse(cls, data: bytes, method: str = "GET") -> "Answer":
        """Read a response with the standard library, which is not the one that wrote it."""
        response = http.client.HTTPResponse(_Wire(data), method=method)  # type: ignore[arg-type]
        response.begin()
        return cls(response.status, response.headers, response.read())


@attrs.frozen
class _Wire:
    """What `http.client` wants of a socket."""

    data: bytes

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self.data)
