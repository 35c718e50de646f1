"""Children as the loop sees them: what each is started with, and its end of the control pair."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from supervisor.events import Kind
from supervisor.lives import Lives
from supervisor.processes import Processes
from trioserver.board_map import BoardMap
from trioserver.status import (
    BOARD_FD,
    CONTROL_FD,
    LISTEN_FD,
    PACKET_BYTES,
    SETTINGS_FD,
    Drain,
    Report,
    decode_report,
    encode,
)

_PACKETS_PER_TURN: Final = 64
"""A child that talks without end must not keep the loop from its siblings."""

_PYTHON: Final = (sys.executable, "-P", "-m")
# Not resolved: if it leads through a symbolic link to the current release, the next generation
# is started from whatever the link points to by then.


@attrs.frozen(kw_only=True)
class Commands:
    """What is executed. Tests put stand-ins here."""

    worker: tuple[str, ...] = (*_PYTHON, "trioserver.worker")
    """``--slot N --generation G --life NAME`` is appended, and ``--after NAME,NAME`` if lives are
    over."""
    gateway: tuple[str, ...] = (*_PYTHON, "trioserver.gateway")
    """``--generation G`` is appended."""
    snapshot: tuple[str, ...] = (*_PYTHON, "trioserver", "config", "--snapshot")
    """The flags of the original command are appended; prints a settings snapshot."""
    redis: tuple[str, ...] = ()
    """The whole command of the embedded Redis; empty if there is none."""


class Children:
    """Spawns children, and keeps this side of their control pairs."""

    def __init__(
        self,
        processes: Processes,
        commands: Commands,
        *,
        doors: Sequence[socket.socket],
        admin_door: socket.socket,
        board: int,
        lives: Lives,
        env: Mapping[str, str],
    ) -> None:
        """Prepare; nothing is spawned.

        Args:
            processes: Where they are spawned.
            commands: What is executed.
            doors: The listening socket of each slot.
            admin_door: The gateway's.
            board: Descriptor of `board_map.create`, for every worker; the caller's to close.
            lives: Names the workers.
            env: Environment of the children.

        Raises:
            OSError: The board cannot be mapped.
        """
        self._processes = processes
        self._commands = commands
        self._doors = doors
        self._admin_door = admin_door
        self._board = board
        self._lives = lives
        self._env = env
        # Mapped once and for all: at the moment of a sweep there may be no descriptor left.
        self._board_map = BoardMap(board)
        self._snapshots: dict[int, int] = {}
        self._pairs: dict[int, socket.socket] = {}

    def keep_snapshot(self, generation: int, snapshot: bytes) -> None:
        """Use these settings for every child of that generation, spawned now or later."""
        # A file in memory: it has no name, survives nobody, and is sealed against every writer.
        fd = os.memfd_create("settings", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(snapshot)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        self.drop_snapshot(generation)
        self._snapshots[generation] = fd

    def drop_snapshot(self, generation: int) -> None:
        """Forget the settings of a generation of which nobody will be spawned any more."""
        fd = self._snapshots.pop(generation, None)
        if fd is not None:
            os.close(fd)

    def spawn(self, kind: Kind, slot: int, generation: int) -> int:
        """Start a child and return its pid.

        Raises:
            OSError: It could not be started; nothing is left behind.
        """
        if kind is Kind.REDIS:
            # Its log goes where ours goes. Nobody's business is where the terminal's locale went.
            env = {**self._env, "LC_ALL": "C"}
            return self._processes.spawn(self._commands.redis, env=env, fds={1: 2})
        fds = {SETTINGS_FD: self._snapshots[generation]}
        life = ""
        if kind is Kind.WORKER:
            life = self._lives.next_name()
            argv = (*self._commands.worker, "--slot", str(slot))
            fds |= {LISTEN_FD: self._doors[slot].fileno(), BOARD_FD: self._board}
        else:
            argv = self._commands.gateway
            fds[LISTEN_FD] = self._admin_door.fileno()
        argv = (*argv, "--generation", str(generation), *self._named(life))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fds[CONTROL_FD] = theirs.fileno()
            try:
                pid = self._processes.spawn(argv, env=self._env, fds=fds)
            except OSError:
                ours.close()
                raise
        if life:
            self._lives.began(pid, life)
        ours.setblocking(False)
        self._pairs[pid] = ours
        return pid

    def _named(self, life: str) -> tuple[str, ...]:
        if not life:
            return ()
        over = self._lives.over
        return ("--life", life, *(("--after", ",".join(over)) if over else ()))

    def pair(self, pid: int) -> socket.socket | None:
        """Return our end of a child's pair, to wait for; ``None`` for Redis and strangers."""
        return self._pairs.get(pid)

    def receive(self, pid: int) -> tuple[list[Report], bool]:
        """Return what a child has said, and whether it may say more. Never blocks.

        What is not understood is skipped: it was said by newer code.
        """
        reports: list[Report] = []
        pair = self._pairs.get(pid)
        if pair is None:
            return reports, False
        for _ in range(_PACKETS_PER_TURN):
            try:
                packet = pair.recv(PACKET_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                return reports, False
            if not packet:
                return reports, False
            report = decode_report(packet)
            if report is not None:
                reports.append(report)
        return reports, True

    def send(self, pid: int, order: Drain) -> None:
        """Tell a child what to do. Never blocks; one that cannot take it is killed in time."""
        pair = self._pairs.get(pid)
        if pair is not None:
            try:
                pair.send(encode(order))
            except (BlockingIOError, ConnectionError):
                return

    def close_door(self, slot: int) -> None:
        """Close a slot's listening socket for good. Idempotent."""
        self._doors[slot].close()

    def forget(self, pid: int) -> None:
        """Close the pair of a child that is no more. Idempotent."""
        pair = self._pairs.pop(pid, None)
        if pair is not None:
            pair.close()

    def bury(self, pid: int) -> None:
        """Take the counts of a worker that was reaped from the board, and keep its name.

        Call it before its successor is spawned. Does nothing for other processes.
        """
        if self._lives.ended(pid):
            # If the kernel has no room for a lock: the next sweep finds them, or whoever takes
            # over the segment. Nothing to end the server for.
            with contextlib.suppress(OSError):
                self._board_map.sweep()

    def close(self) -> None:
        """Close whatever is open here; children that live are on their own."""
        for pid in list(self._pairs):
            self.forget(pid)
        for generation in list(self._snapshots):
            self.drop_snapshot(generation)
        self._board_map.close()
