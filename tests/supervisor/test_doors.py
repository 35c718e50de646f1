"""Listening sockets, real ones."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from supervisor.doors import Address, Buffers, PortTakenError, open_doors, printable, reachable
from tests.supervisor.harness import no_descriptors_left, open_fds
from trioserver.errors import CommandError, SettingsError


def address(host: str = "127.0.0.1", port: int = 0) -> Address:
    """Return an address of made-up settings."""
    return Address(host=host, port=port, host_setting="WS_HOST", port_setting="WS_PORT")


Open = Callable[..., list[socket.socket]]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Return `open_doors`; what it opens is closed afterwards."""
    with ExitStack() as doors:

        def opened(
            where: Address, count: int = 1, buffers: Buffers | None = None
        ) -> list[socket.socket]:
            return [
                doors.enter_context(door) for door in open_doors(where, count, buffers or Buffers())
            ]

        yield opened


def test_all_doors_share_the_port_that_the_kernel_chose(opened: Open) -> None:
    """Port 0 is for tests and for several servers on one machine."""
    doors = opened(address(), 3)

    assert len({door.getsockname() for door in doors}) == 1
    assert doors[0].getsockname()[1] != 0
    for door in doors:
        assert door.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        assert not door.getblocking()
        assert not door.get_inheritable()


def test_connections_are_spread_and_inherit_the_options(opened: Open) -> None:
    """Each door gets its part; accepted sockets need no further treatment."""
    doors = opened(address(), 2, Buffers(receive=100_000, send=50_000))
    where = doors[0].getsockname()
    with ExitStack() as clients:
        for _ in range(64):
            clients.enter_context(socket.create_connection(where, timeout=5))
        accepted = [accept_all(door) for door in doors]
        for connection in (each for door in accepted for each in door):
            clients.enter_context(connection)

        assert sum(len(door) for door in accepted) == 64
        assert all(accepted)
        option = accepted[0][0].getsockopt
        assert option(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        # The kernel doubles what it is told, for its own bookkeeping.
        assert option(socket.SOL_SOCKET, socket.SO_RCVBUF) == 200_000
        assert option(socket.SOL_SOCKET, socket.SO_SNDBUF) == 100_000


def accept_all(door: socket.socket) -> list[socket.socket]:
    """Return the connections that wait there."""
    connections = []
    while True:
        try:
            connections.append(door.accept()[0])
        except BlockingIOError:
            return connections


def test_without_buffer_sizes_the_kernel_chooses(opened: Open) -> None:
    """0 is no size."""
    (door,) = opened(address())
    with socket.socket() as plain:
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            assert door.getsockopt(socket.SOL_SOCKET, option) == plain.getsockopt(
                socket.SOL_SOCKET, option
            )


def test_ipv6_hosts_work(opened: Open) -> None:
    """Printed in brackets."""
    (door,) = opened(address("::1"))
    port = door.getsockname()[1]

    assert printable(door) == f"[::1]:{port}"
    with socket.create_connection(("::1", port), timeout=5):
        pass


def test_every_address_of_ipv6_includes_those_of_ipv4(opened: Open) -> None:
    """Whatever the machine's own default is."""
    (door,) = opened(address("::"))
    port = door.getsockname()[1]

    assert reachable(printable(door)) == f"[::1]:{port}"
    for host in ("127.0.0.1", "::1"):
        with socket.create_connection((host, port), timeout=5):
            pass


def test_names_are_resolved(opened: Open) -> None:
    """An address need not be a number."""
    (door,) = opened(address("localhost"))

    assert reachable(printable(door)) == printable(door)


@pytest.mark.parametrize("share", [False, True])
def test_a_taken_port_is_refused_and_the_holder_named(opened: Open, share: bool) -> None:  # noqa: FBT001
    """Also if the holder would share it."""
    with socket.socket() as holder:
        if share:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortTakenError) as caught:
            opened(address(port=port), 2)

    assert str(caught.value).startswith(f"WS_PORT: port {port} is taken by pid {os.getpid()} (")


def test_a_port_that_is_bound_but_not_listening_is_refused(opened: Open) -> None:
    """Its holder cannot be found out, only that there is one."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        with pytest.raises(PortTakenError) as caught:
            opened(address(port=port))

    expected = (
        f"WS_PORT: port {port} is taken by another process (of another user, or in another "
        "container)"
    )
    assert str(caught.value) == expected


def test_connections_that_linger_do_not_keep_a_port(opened: Open) -> None:
    """A restarted server does not wait for TIME_WAIT."""
    (first,) = opened(address())
    where = first.getsockname()
    with socket.create_connection(where, timeout=5), accept_all(first)[0]:
        first.close()
        (second,) = opened(address(port=where[1]))

    assert second.getsockname() == where
    second.close()

    # By now the server's side, which closed first or last, may be in TIME_WAIT.
    assert opened(address(port=where[1]))


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_here_is_a_setting_to_correct(opened: Open, host: str) -> None:
    """The message names the setting."""
    with pytest.raises(SettingsError) as caught:
        opened(address(host, 8081))

    assert caught.value.setting == "WS_HOST"
    assert host in caught.value.problem


def test_an_address_that_cannot_be_bound_says_why(opened: Open) -> None:
    """Anything else the kernel may say."""
    with pytest.raises(CommandError) as caught:
        # An IPv6 link-local address without its interface.
        opened(address("fe80::1", 8081))

    assert "cannot listen on fe80::1:8081: " in str(caught.value)


def test_doors_that_cannot_all_be_opened_are_closed_again(opened: Open) -> None:
    """Nothing is left behind of half a server."""
    before = open_fds()
    with no_descriptors_left(but=2), pytest.raises(CommandError, match="Too many open files"):
        opened(address(), 3)

    assert open_fds() == before
