"""Listening sockets: one per slot, made before any worker and open until the supervisor ends.

The kernel spreads new connections over all sockets of one port that have ``SO_REUSEPORT``. If each
worker made its own, every restart would lose what waits in its queue: measured, 22 connections in
25 graceful restarts and 183 in 25 kills. A socket that the supervisor keeps open loses none: what
arrives while nobody owns the slot waits for the next owner.

The price of ``SO_REUSEPORT`` is that a second server could bind the same port unseen and take half
of the connections. So the port is first bound once without it, which fails if anybody else is
there.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from trioserver.errors import CommandError, SettingsError

_BACKLOG: Final = 4096
"""Connections that may wait for ``accept``; the kernel's own ``somaxconn`` caps it. A storm that
finds a worker busy for a second must fit: 500 handshakes per second, several times over."""

_KEEPALIVE: Final = (
    (socket.TCP_KEEPIDLE, 60),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)
"""Seconds, seconds, count. The kernel's own would notice a vanished client after two hours."""

_USER_TIMEOUT_MS: Final = 30_000
"""Unacknowledged data for so long ends a connection; the kernel's own is 15 minutes and more."""


_SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]


_COMMAND_CHARACTERS: Final = 120
"""Of a foreign command line, in an error message."""


class PortTakenError(CommandError):
    """Somebody else listens there."""


@attrs.frozen(kw_only=True)
class Address:
    """Where to listen, and which settings said so."""

    host: str
    port: int
    """0 = any free one."""
    host_setting: str
    port_setting: str


@attrs.frozen(kw_only=True)
class Buffers:
    """Socket buffers of accepted connections, in bytes; 0 = the kernel's choice."""

    receive: int = 0
    send: int = 0


def open_doors(address: Address, count: int, buffers: Buffers) -> list[socket.socket]:
    """Return ``count`` listening sockets on one port, non-blocking and close-on-exec.

    Accepted sockets inherit the options: no delay, keepalive, timeouts, buffers.

    Raises:
        PortTakenError: Somebody else has the port; the text says who.
        CommandError: The port may not be bound; the text says why.
        SettingsError: The host is not an address of this machine.
    """
    family, resolved = _resolve(address)
    if address.port:
        _opened(address, family, resolved, None).close()
    doors: list[socket.socket] = []
    try:
        for _ in range(count):
            door = _opened(address, family, resolved, buffers)
            doors.append(door)
            # Port 0: the kernel chooses for the first, the others join it.
            resolved = door.getsockname()
    except BaseException:
        for door in doors:
            door.close()
        raise
    return doors


def printable(door: socket.socket) -> str:
    """Return ``host:port`` of a socket, IPv6 hosts in brackets."""
    host, port = door.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(address: str) -> str:
    """Return a ``host:port`` that a client on this machine can connect to."""
    host, _, port = address.rpartition(":")
    loopback = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
    return f"{loopback.get(host, host)}:{port}"


def _resolve(address: Address) -> tuple[socket.AddressFamily, _SocketAddress]:
    try:
        infos = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise SettingsError(
            address.host_setting, f'"{address.host}": {error.strerror or error}', "0.0.0.0"
        ) from error
    family, _, _, _, resolved = infos[0]
    return family, resolved


def _opened(
    address: Address,
    family: socket.AddressFamily,
    resolved: _SocketAddress,
    buffers: Buffers | None,
) -> socket.socket:
    """Return a shared socket that listens; without ``buffers`` one that is only bound, alone."""
    try:
        with contextlib.ExitStack() as on_error:
            kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            door = on_error.enter_context(socket.socket(family, kind))
            # Connections of an earlier server in TIME_WAIT must not keep this one from starting.
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # "::" means everybody, whatever the machine's own default is.
                door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if buffers is not None:
                door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                _furnish(door, buffers)
            door.bind(resolved)
            if buffers is not None:
                door.listen(_BACKLOG)
            on_error.pop_all()
            return door
    except OSError as error:
        raise _explained(address, error) from error


def _furnish(door: socket.socket, buffers: Buffers) -> None:
    door.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        door.setsockopt(socket.IPPROTO_TCP, option, value)
    door.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    # Before listen(): the window scale is agreed upon in the handshake.
    if buffers.receive:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers.receive)
    if buffers.send:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers.send)


def _explained(address: Address, error: OSError) -> CommandError | SettingsError:
    if error.errno == errno.EADDRINUSE:
        return PortTakenError(
            f"{address.port_setting}: port {address.port} is taken by {_holder(address.port)}"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        problem = f"{address.host} is not an address of this machine"
        return SettingsError(address.host_setting, problem, "0.0.0.0")
    return CommandError(f"cannot listen on {address.host}:{address.port}: {error.strerror}")


def _holder(port: int) -> str:
    """Name the process that listens on a port, as far as /proc tells this user."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for process in Path("/proc").glob("[0-9]*"):
        if sockets.isdisjoint(_open_files(process)):
            continue
        with contextlib.suppress(OSError):  # It has just ended.
            words = (process / "cmdline").read_bytes().split(b"\0")
            # One line, whatever a script given on the command line looks like.
            command = " ".join(os.fsdecode(b" ".join(words)).split())
            return f"pid {process.name} ({command[:_COMMAND_CHARACTERS]})"
    return "another process (of another user, or in another container)"


def _open_files(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):  # It has ended, or belongs to another user.
        for fd in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # It has closed that one.
                yield str(fd.readlink())


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):  # No IPv6 here.
            yield from _listening_in(Path(table), port)


def _listening_in(table: Path, port: int) -> Iterator[str]:
    listening = "0A"
    for line in table.read_text("ascii").splitlines()[1:]:
        # sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...
        fields = line.split()
        if fields[3] == listening and int(fields[1].rpartition(":")[2], 16) == port:
            yield fields[9]
