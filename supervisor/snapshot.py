"""New settings for a reload, read by a fresh interpreter.

Not read here: this process holds the code of the release it was started from, and the new release
may know settings that this one does not. So the new code reads and checks them
(``trioserver config --snapshot``), and hands over the bytes that its own children will read.
"""

import contextlib
import functools
import os
import selectors
import signal
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from supervisor.processes import Processes
from trioserver.errors import TrioserverError
from trioserver.settings import Settings

_LIMIT_BYTES: Final = 1 << 20
"""More than any settings; a program that prints without end is not listened to any further."""

_FIXED: Final = (
    "ws_host",
    "ws_port",
    "admin_host",
    "admin_port",
    "data_dir",
    "workers",
    "ws_read_buffer_size",
    "ws_write_buffer_size",
)
"""What the supervisor itself was built from, once: addresses, slots, and the sockets' options."""


@attrs.frozen(kw_only=True)
class Outcome:
    """How the reading of settings ended."""

    generation: int
    snapshot: bytes = b""
    reason: str = ""
    """Why there is no snapshot; empty if there is one."""


@attrs.define(eq=False, kw_only=True)
class _Run:
    """One run of the command. Its pipes are ours to close, its process ours to kill."""

    generation: int
    pid: int
    output: int
    error: int
    taken: dict[int, bytearray] = attrs.Factory(dict)

    def take(self, pipe: int) -> bool:
        """Take what a pipe has; return whether there may be more. Never blocks."""
        taken = self.taken.setdefault(pipe, bytearray())
        while len(taken) <= _LIMIT_BYTES:
            try:
                part = os.read(pipe, 65536)
            except BlockingIOError:
                return True
            if not part:
                break
            taken += part
        return False

    def outcome(self, code: int) -> Outcome:
        """Return what has come of it, once the process was reaped."""
        for pipe in (self.output, self.error):
            # Not to the end of file: a helper it left behind may hold the pipe open.
            self.take(pipe)
        if code == 0:
            return Outcome(generation=self.generation, snapshot=bytes(self.taken[self.output]))
        lines = self.taken[self.error].decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1][:500] if lines else f"reading the settings ended with exit code {code}"
        return Outcome(generation=self.generation, reason=reason)


class SnapshotReader:
    """Runs the command, one at a time, on behalf of the loop."""

    def __init__(
        self,
        processes: Processes,
        selector: selectors.BaseSelector,
        argv: Sequence[str],
        env: Mapping[str, str],
    ) -> None:
        """Prepare; nothing is started.

        Args:
            processes: Where it is spawned and, by the loop, reaped.
            selector: Whoever drives it calls the data of ready keys with their mask.
            argv: The whole command.
            env: Its environment.
        """
        self._processes = processes
        self._selector = selector
        self._argv = argv
        self._env = env
        self._run: _Run | None = None

    def begin(self, generation: int) -> None:
        """Start reading; `reaped` will know the outcome.

        Raises:
            OSError: The command could not be started.
        """
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            pipes = [os.pipe2(os.O_CLOEXEC) for _ in ("output", "error")]
            for read_end, write_end in pipes:
                os.set_blocking(read_end, False)
                ours.callback(os.close, read_end)
                theirs.callback(os.close, write_end)
            (output, their_output), (error, their_error) = pipes
            pid = self._processes.spawn(
                self._argv, env=self._env, fds={1: their_output, 2: their_error}
            )
            ours.pop_all()
        run = self._run = _Run(generation=generation, pid=pid, output=output, error=error)
        for pipe in (output, error):
            ready = functools.partial(self._read, run, pipe)
            self._selector.register(pipe, selectors.EVENT_READ, ready)

    def reaped(self, pid: int, code: int) -> Outcome | None:
        """Return the outcome if that was the process that read; else ``None``."""
        run = self._run
        if run is None or run.pid != pid:
            return None
        outcome = run.outcome(code)
        self.close()
        return outcome

    def drop(self, generation: int) -> None:
        """Stop reading for that generation; its outcome will not be told. Idempotent."""
        if self._run is not None and self._run.generation == generation:
            self._processes.kill(self._run.pid, signal.SIGKILL)
            self.close()

    def close(self) -> None:
        """Close the pipes. Idempotent."""
        run, self._run = self._run, None
        if run is None:
            return
        for pipe in (run.output, run.error):
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
            os.close(pipe)

    def _read(self, run: _Run, pipe: int, _mask: int) -> None:
        if self._run is run and not run.take(pipe):
            self._selector.unregister(pipe)


def obstacle(running: Settings, snapshot: bytes) -> str:
    """Return why these settings cannot be reloaded into, naming the setting; empty if they can."""
    try:
        wanted = Settings.restore(snapshot)
    except TrioserverError as error:
        return f"the new settings make no sense to the running supervisor: {error}"
    for setting in _FIXED:
        if getattr(running, setting) != getattr(wanted, setting):
            return f"{setting.upper()} has changed, which needs a restart"
    if running.embedded_redis != wanted.embedded_redis:
        return "REDIS_URL or REDIS_HOST came or went, which needs a restart"
    return ""
