"""Serving: what the kernel and Hypercorn are told. Its running is tested with the process."""

import socket

import pytest
import trio
from starlette.applications import Starlette

from trioserver.gateway.serve import Server, bound_stuck_clients, make_config


def test_accepted_sockets_inherit_the_limit_for_stuck_clients() -> None:
    """A client that takes nothing for ten seconds is ended by the kernel."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bound_stuck_clients(listener.fileno())
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                limit = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

    assert 10_000 == limit


def test_hypercorn_writes_nothing_of_its_own() -> None:
    """No access log, no lines on standard error, no name of the software."""
    config = make_config(7)

    assert ["fd://7"] == config.bind
    assert config.log.access_logger is None
    assert config.log.error_logger is not None
    assert [] == config.log.error_logger.handlers
    assert (b"server", b"hypercorn-h11") not in config.response_headers("h11")


async def test_the_socket_stays_its_owners() -> None:
    """Serving and stopping leave the caller's socket as it was: listening."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(Starlette(), listener.fileno())
        with trio.fail_after(10.0):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.run)
                was_accepting = server.accepting
                server.stop(0.0)

        assert (True, False) == (was_accepting, server.accepting)
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


async def test_what_cannot_be_served_is_an_error_at_the_start() -> None:
    """A socket that is none for HTTP raises before `started`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wrong, trio.fail_after(10.0):
        server = Server(Starlette(), wrong.fileno())
        with pytest.raises(OSError, match="Protocol not available"):
            await server.run()
