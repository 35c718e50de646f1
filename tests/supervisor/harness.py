"""A real supervisor with real children, for tests: start it, look at it, hurt it, end it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from supervisor.processes import Processes
from trioserver.control_client import Op, ask
from trioserver.settings import Settings
from trioserver.statedir import StateDir
from trioserver.status import StatusReply, Verdict

HERE = Path(__file__).parent
LIMIT_SECONDS = 15.0
"""Absolute limit of every wait: far more than anything takes on a busy machine."""

QUICK_TIMING = {
    "unready_silence": 1.0,
    "abort_silence": 2.0,
    "abort_grace": 0.5,
    "startup": 8.0,
    "free_respawn": 0.3,
    "backoff": 0.05,
    "backoff_limit": 0.4,
    "reload": 8.0,
}


def eventually(condition: Callable[[], bool], limit: float = LIMIT_SECONDS) -> None:
    """Wait until something is true; fail if that takes too long."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """Return the living children of a process, and theirs."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [child for child in map(int, text.split()) if alive(child)]
    return children + [grandchild for child in children for grandchild in children_of(child)]


def alive(pid: int) -> bool:
    """Say whether a process runs: zombies, which wait for somebody else's PID 1, do not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def open_fds(pid: int | None = None) -> dict[int, str]:
    """Return what a process has open; this one if none is named."""
    found: dict[int, str] = {}
    for fd in Path(f"/proc/{pid or 'self'}/fd").iterdir():
        with suppress(FileNotFoundError):  # Closed meanwhile, like the one that lists them.
            found[int(fd.name)] = str(fd.readlink())
    return found


@contextmanager
def no_descriptors_left(but: int = 0) -> Iterator[None]:
    """Open all that may be open, for a while, except for a few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(open_fds())
    fillers: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + but, hard))
    try:
        with suppress(OSError):
            while True:
                fillers.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(but):
            os.close(fillers.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)


@contextmanager
def short_directory() -> Iterator[Path]:
    """Make a directory whose path leaves room for the name of a Unix socket, and remove it."""
    path = Path(tempfile.mkdtemp(prefix="ts-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Family:
    """Children of the test itself."""

    def __init__(self) -> None:
        """Start with none."""
        self.processes = Processes()
        self.codes: dict[int, int] = {}

    def spawn(
        self, *argv: str, env: dict[str, str] | None = None, fds: dict[int, int] | None = None
    ) -> int:
        """Start a program and return its pid."""
        return self.processes.spawn(argv, env=env or {}, fds=fds or {})

    def code_of(self, pid: int) -> int:
        """Wait for a child's end; return its exit code."""

        def ended() -> bool:
            self.codes.update(self.processes.reap())
            return pid in self.codes

        eventually(ended)
        return self.codes[pid]

    def close(self) -> None:
        """Kill and reap whoever is left, with those in their groups."""
        for pid in self.processes.alive:
            with suppress(ProcessLookupError):  # Only a zombie is left of it.
                os.killpg(pid, signal.SIGKILL)
            self.code_of(pid)


class Server:
    """One supervisor process, with stubs for children unless told otherwise."""

    def __init__(
        self,
        directory: Path,
        *,
        settings: dict[str, object] | None = None,
        timing: dict[str, float] | None = None,
        commands: dict[str, list[str]] | None = None,
        behaviour: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
        under: tuple[str, ...] = (),
    ) -> None:
        """Start it, as an argument of ``under`` if need be; it may not be ready yet."""
        self.directory = directory
        self.settings = {
            "ws_host": "127.0.0.1",
            "ws_port": 0,
            "admin_port": 0,
            "workers": 2,
            "data_dir": str(directory / "state"),
            "redis_url": "redis://127.0.0.1:1/0",
            "drain_seconds": 8.0,
            "drain_propagation": 0.0,
            "log_level": "debug",
            "logger_encoding": "json",
            **(settings or {}),
        }
        stub = [sys.executable, "-I", "-S", str(HERE / "stub_child.py"), str(directory)]
        self.snapshot_file = directory / "snapshot"
        given = {
            "settings": self.settings,
            "timing": {**QUICK_TIMING, **(timing or {})},
            "commands": {
                "worker": [*stub, "worker"],
                "gateway": [*stub, "gateway"],
                "snapshot": ["/bin/cat", str(self.snapshot_file)],
                **(commands or {}),
            },
            "flags": [],
        }
        self.new_settings()
        for who, how in (behaviour or {}).items():
            self.behave(who, how)
        program = [sys.executable, "-m", "tests.supervisor.run_supervisor"]
        self.log_file = directory / f"log-{time.monotonic_ns()}"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*under, *program, json.dumps(given)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=HERE.parent.parent,
                pass_fds=pass_fds,
            )
        self.pid = self.process.pid

    @property
    def state(self) -> StateDir:
        """Its state directory."""
        return StateDir(Path(str(self.settings["data_dir"])))

    def new_settings(self, **changed: object) -> None:
        """Change what a reload will read."""
        values: dict[str, Any] = {**self.settings, **changed}
        values["data_dir"] = Path(values["data_dir"])
        self.snapshot_file.write_bytes(Settings(**values).snapshot())

    def behave(self, who: str, how: str) -> None:
        """Tell stubs that start from now on how to behave; ``good`` takes it back."""
        (self.directory / who).write_text(how)

    def ask(self, op: Op = "status") -> StatusReply | Verdict:
        """Ask it something, and wait for the answer."""
        return ask(self.state.control_socket, op, LIMIT_SECONDS)

    def status(self) -> StatusReply:
        """Return its status."""
        reply = self.ask()
        assert isinstance(reply, StatusReply)
        return reply

    def verdict(self, op: Op) -> Verdict:
        """Ask for something to be done, and return what came of it."""
        reply = self.ask(op)
        assert isinstance(reply, Verdict)
        return reply

    def wait_ready(self) -> str:
        """Wait until it says that it is ready; return what it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line, self.log()
        return line

    def worker(self, slot: int = 0) -> int:
        """Return the pid of a worker, once there is one."""
        pid: int | None = None

        def there() -> bool:
            nonlocal pid
            pid = self.status().workers[slot].pid
            return pid is not None

        eventually(there)
        assert pid is not None
        return pid

    def replaced(self, slot: int, old: int) -> Callable[[], bool]:
        """Return a condition: somebody else owns that slot and is ready."""

        def condition() -> bool:
            worker = self.status().workers[slot]
            return worker.ready and worker.pid != old

        return condition

    def family(self) -> list[int]:
        """Return its children, and theirs."""
        return children_of(self.pid)

    def log(self) -> str:
        """Return its log so far."""
        return self.log_file.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log lines of one event."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == name]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(LIMIT_SECONDS)

    def close(self) -> None:
        """End it, whatever it is doing, and whoever is left of it."""
        family = self.family() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(3.0)
            self.process.kill()
        self.process.wait(LIMIT_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        for child in filter(alive, family):
            os.kill(child, signal.SIGKILL)
