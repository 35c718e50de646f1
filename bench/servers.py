"""What is measured: the product as its users run it, and any other server beside it."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol, TypeVar

import attrs

from bench import backend, machine
from bench.client import BenchError
from bench.tokens import SECRET
from supervisor.embedded import find_server
from trioserver.control_client import ask
from trioserver.errors import CommandError, SettingsError
from trioserver.settings import all_settings
from trioserver.status import StatusReply

Ready = TypeVar("Ready")

START_SECONDS: Final = 30.0
END_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.02

MIB: Final = 1 << 20

LIMITS: Final[Mapping[str, int | float]] = {
    "WS_MAX_CONNECTIONS": 100_000,
    "MAX_CONNECTIONS_PER_USER": 1000,
    "MAX_CONNECTIONS_PER_IP": 100_000,
    "LIMIT_LOOPBACK": True,
    "HANDSHAKES_PER_SECOND": 1_000_000,
    "HANDSHAKES_PER_SECOND_PER_IP": 0.0,
    "MESSAGES_PER_MINUTE_PER_USER": 1_000_000_000,
    "NOTIFICATIONS_PER_MINUTE_PER_USER": backend.RATE,
    "OUTBOX_BUDGET_BYTES": 1024 * MIB,
    "WS_MAX_MESSAGE_SIZE": MIB,
    "NOTIFICATION_MAX_SIZE": MIB,
    "OUTBOX_MAX_BYTES": 64 * MIB,
    "OUTBOX_MAX_FRAMES": 100_000,
    "HANDSHAKE_TIMEOUT": 60.0,
    "AUTH_TIMEOUT": 60.0,
    "WS_WRITE_WAIT": 60.0,
}
"""High, so that none of them ends a measurement, and not off, so that none of them is free.

One is off: all handshakes come from one address, and more of one address than the board counts
(4,000 a second) are no limit anyway. Its address is looked up all the same, for its connections.

All other settings are the defaults, above all pings, heartbeats, metrics, logs and canary."""

PUBSUB_LIMIT: Final = ("pubsub", "256mb", "64mb", "60")
"""As the embedded Redis has it; the default of Redis cuts a subscriber off at 8 MB in 60 s."""


@attrs.frozen(kw_only=True)
class Serving:
    """A server that accepts connections."""

    port: int
    worker: int
    """Process id of the one worker."""
    greets: bool
    """Whether it sends ``connection_established``."""
    healthy: Callable[[], bool]
    """Whether it is still the same worker, in good health."""


class Server(Protocol):
    """Something to measure."""

    @property
    def name(self) -> str:
        """How the results call it."""

    def serving(
        self, directory: Path, redis_port: int
    ) -> contextlib.AbstractContextManager[Serving]:
        """Run it with one worker for the time of the block, on a Redis that runs already.

        Raises:
            BenchError: It did not start.
        """


@attrs.frozen(kw_only=True)
class Redis:
    """A Redis that serves."""

    port: int
    pid: int


@contextlib.contextmanager
def redis_serving(directory: Path) -> Iterator[Redis]:
    """Run a Redis on the loopback for the time of the block; it keeps nothing.

    The program is the one that the embedded Redis would be. It serves over TCP, as a Redis beside
    the server would, because other servers cannot be expected to know Unix sockets.

    Raises:
        BenchError: There is none, or it did not start.
    """
    try:
        program = find_server(os.environ.get("PATH"))
    except SettingsError as error:
        raise BenchError(str(error)) from None
    port = free_port()
    argv = [
        program,
        *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)),
        *("--save", "", "--appendonly", "no"),
        *("--client-output-buffer-limit", *PUBSUB_LIMIT),
        *("--daemonize", "no", "--logfile", "", "--loglevel", "warning"),
    ]
    with _process(argv, directory / "redis.log") as process:
        _until(lambda: _answers_ping(port), process, directory / "redis.log")
        yield Redis(port=port, pid=process.pid)


def _answers_ping(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as asking:
            asking.settimeout(1)
            asking.sendall(b"PING\r\n")
            return asking.recv(100).startswith(b"+PONG")
    except OSError:
        return False


@attrs.frozen(kw_only=True)
class Product:
    """``trioserver supervise --workers 1``, with everything that is on by default."""

    name: str = "trioserver"

    @contextlib.contextmanager
    def serving(self, directory: Path, redis_port: int) -> Iterator[Serving]:
        """See `Server.serving`."""
        log = directory / "server.log"
        command = [*_COMMAND, "supervise", "--workers", "1"]
        control = directory / "state" / "control.sock"
        with _process(command, log, self._environ(directory, redis_port)) as process:
            status = _until(lambda: _status(control), process, log)
            worker = status.workers[0].pid
            if worker is None:  # pragma: no cover - it was ready a moment ago
                raise BenchError("the worker has gone again")

            def healthy() -> bool:
                now = _status(control)
                return now is not None and now.workers[0].pid == worker

            yield Serving(
                port=int(status.address.rpartition(":")[2]),
                worker=worker,
                greets=True,
                healthy=healthy,
            )

    def settings(self) -> dict[str, object]:
        """Return the settings that a measured server has in force, as it says itself.

        Raises:
            BenchError: One of `LIMITS` is not in force.
        """
        with tempfile.TemporaryDirectory() as directory:
            done = subprocess.run(
                [*_COMMAND, "config", "--json", "--workers", "1"],
                env=self._environ(Path(directory), 6379),
                cwd=directory,
                capture_output=True,
                text=True,
                check=False,
                timeout=START_SECONDS,
            )
        if done.returncode:
            raise BenchError(f"trioserver config: {done.stderr.strip()}")
        values = {name: one["value"] for name, one in json.loads(done.stdout).items()}
        wanted = {**LIMITS, "WORKERS": 1}
        wrong = {name: values.get(name) for name in wanted if values.get(name) != wanted[name]}
        if wrong:
            raise BenchError(f"these limits are not in force: {wrong}")
        # Each server has its own ports and directory; they say nothing about the measurement.
        for name in ("DATA_DIR", "REDIS_URL"):
            del values[name]
        return values

    @staticmethod
    def _environ(directory: Path, redis_port: int) -> dict[str, str]:
        # What happens to be set for another server must not count for this one.
        names = {alias for one in all_settings().values() for alias in (one.env, *one.aliases)}
        names.add("TRIOSERVER_CONFIG")
        return {
            **{key: value for key, value in os.environ.items() if key not in names},
            # This checkout, not what may be installed.
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(machine.ROOT), os.environ.get("PYTHONPATH")))
            ),
            "WS_HOST": "127.0.0.1",
            "WS_PORT": "0",
            "ADMIN_PORT": "0",
            "DATA_DIR": str(directory / "state"),
            "REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "JWT_SECRET_KEY": SECRET,
            "LOGGER_ENCODING": "json",
            **{name: _spelled(name, value) for name, value in LIMITS.items()},
        }


_COMMAND: Final = (sys.executable, "-m", "trioserver")


def _spelled(name: str, value: float) -> str:
    return f"{value:g}s" if name.endswith(("TIMEOUT", "WAIT")) else str(value)


def _status(control: Path) -> StatusReply | None:
    try:
        status = ask(control, "status", 2.0)
    except CommandError:
        return None
    return status if isinstance(status, StatusReply) and status.ready else None


@attrs.frozen(kw_only=True)
class Other:
    """A Python file that is a server: ``python FILE PORT REDIS_PORT WORKERS``.

    Expected of it: a WebSocket at ``/ws?token=`` with tokens signed with `tokens.SECRET`, workers
    that are its children, the channels ``user_noti:<user>`` and ``channels:broadcast`` in Redis,
    each message of type ``message`` answered with a ``message_response`` that counts, and an end at
    SIGINT.
    """

    file: Path

    @property
    def name(self) -> str:
        """How the results call it."""
        return self.file.stem

    @property
    def digest(self) -> str:
        """Says which version of the file it is."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()[:12]

    @contextlib.contextmanager
    def serving(self, directory: Path, redis_port: int) -> Iterator[Serving]:
        """See `Server.serving`."""
        log, port = directory / "server.log", free_port()
        argv = [sys.executable, str(self.file.absolute()), str(port), str(redis_port), "1"]
        with _process(argv, log) as process:
            _until(lambda: _accepts(port), process, log)
            worker = _only_child(process.pid)
            yield Serving(
                port=port,
                worker=worker,
                greets=False,
                healthy=lambda: process.poll() is None and _only_child(process.pid) == worker,
            )


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False


def _only_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if len(children) != 1:
        raise BenchError(f"one worker was expected of the other server, it has {len(children)}")
    return int(children[0])


def free_port() -> int:
    """Return a TCP port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _process(
    argv: list[str], log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server process for the time of the block, then end it quickly."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=log.parent,
            preexec_fn=machine.as_child,  # noqa: PLW1509 - system calls only
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(END_SECONDS)


def _until(
    condition: Callable[[], Ready | None], process: subprocess.Popen[bytes], log: Path
) -> Ready:
    """Return the first true value of ``condition``.

    Raises:
        BenchError: The process ended, or it takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while not (value := condition()):
        if process.poll() is not None or time.monotonic() > deadline:
            words = log.read_text(errors="replace")[-2000:]
            raise BenchError(f"{process.args!r} did not start: {words}")
        time.sleep(POLL_SECONDS)
    return value
