"""The command itself, for tests: starts ``trioserver supervise`` and asks it things, blocking.

Every wait is for a condition and has a limit; what was started is ended by pid, and only that.
"""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from trioserver.control_client import ask
from trioserver.errors import CommandError
from trioserver.status import encode

T = TypeVar("T")

READY_SECONDS: Final = 20.0
POLL_SECONDS: Final = 0.02
SECRET: Final = "a-secret-for-tests-a-secret-for-tests"

TOKEN_SHAPE: Final = re.compile(r"eyJ[\w-]{8,}\.[\w-]{8,}")
"""The beginning of a JWT."""

# Fast enough for tests, otherwise as shipped.
QUICK: Final = {
    "WS_HOST": "127.0.0.1",
    "WS_PORT": "0",
    "ADMIN_PORT": "0",
    "DRAIN_SECONDS": "10s",
    "DRAIN_PROPAGATION": "0s",
    "JWT_SECRET_KEY": SECRET,
    "LOG_LEVEL": "info",
    # Crowds come at once here, and measure with messages. Tests of limits set their own.
    "HANDSHAKES_PER_SECOND": "0",
    "MESSAGES_PER_MINUTE_PER_USER": "0",
    "NOTIFICATIONS_PER_MINUTE_PER_USER": "0",
}


def eventually(
    condition: Callable[[], T | None], seconds: float, what: str, poll: float = POLL_SECONDS
) -> T:
    """Return the first true value of ``condition``; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(poll)


class Running:
    """A server that was started by a test."""

    def __init__(self, directory: Path, workers: int, environ: Mapping[str, str]) -> None:
        self.data_dir = directory / "state"
        self.log_path = directory / "log"
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("REDIS_")},
            **QUICK,
            "DATA_DIR": str(self.data_dir),
            "WORKERS": str(workers),
            **environ,
        }
        directory.mkdir(parents=True, exist_ok=True)
        self._log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            [*self.command(), "supervise"],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=directory,
        )

    @staticmethod
    def command() -> list[str]:
        """Return how the command is called."""
        return [sys.executable, "-m", "trioserver"]

    @property
    def log(self) -> str:
        """Everything it has logged so far."""
        return self.log_path.read_text(errors="replace")

    def wait_ready(self, seconds: float = READY_SECONDS) -> dict[str, Any]:
        """Return the status as soon as everything is ready, the gateway included."""

        def ready() -> dict[str, Any] | None:
            assert self.process.poll() is None, self.log
            status = self.status()
            if status is None or not (status["ready"] and status["gateway"]["ready"]):
                return None
            return status

        return eventually(ready, seconds, f"ready\n{self.status()}\n{self.log[-4000:]}")

    def status(self) -> dict[str, Any] | None:
        """Return what ``status --json`` would print; None while nobody answers."""
        try:
            reply = ask(self.data_dir / "control.sock", "status", 2.0)
        except CommandError:
            return None
        return dict(json.loads(encode(reply)))

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run another trioserver command with the same environment."""
        return subprocess.run(
            [*self.command(), *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **options,
        )

    def get(self, path: str, *, public: bool = False, **headers: str) -> tuple[int, bytes]:
        """GET a page of the internal port, or of the public one."""
        status = self.status()
        assert status is not None
        address = status["address" if public else "admin_address"]
        connection = http.client.HTTPConnection(address, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()

    def end(self, number: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            self._close()

    def secrets_in_log(self) -> list[str]:
        """Return the lines of the log that have a token or a secret in them; none should."""
        log = self.log
        if SECRET not in log and not TOKEN_SHAPE.search(log):
            return []
        return [line for line in log.splitlines() if SECRET in line or TOKEN_SHAPE.search(line)]

    def _close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._log.close()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def running(
    directory: Path, *, workers: int = 2, environ: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Run a server for the time of the block; it is ready when the block begins."""
    server = Running(directory, workers, environ or {})
    try:
        server.wait_ready()
        yield server
    finally:
        server.end(signal.SIGINT)
    # Whatever a test does to a server, its log never has what would let anybody in.
    assert [] == server.secrets_in_log()
