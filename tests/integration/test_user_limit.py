"""So many connections of one user over all workers, whoever is killed meanwhile."""

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.integration.clients import PATIENCE, nothing_more, receive, token, url
from tests.running import Running, eventually, running
from tests.trioserver.ledger_calls import Caller
from trioserver import fleet
from trioserver.errors import CloseReason
from trioserver.statedir import StateDir

LIMIT: Final = 3

DEAD_SECONDS: Final = 2 * fleet.LEASE_SECONDS
"""So long those who were killed may count, if nobody says that they are gone."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two workers, and three connections for each user."""
    environ = {"MAX_CONNECTIONS_PER_USER": str(LIMIT)}
    with running(tmp_path_factory.mktemp("server"), workers=2, environ=environ) as started:
        yield started


def entered(server: Running, user: str) -> set[str]:
    """Return the ids of a user's connections, as Redis knows them."""
    with Caller(StateDir(server.data_dir).redis_socket) as caller:
        replies = [caller.run(command) for command in fleet.whereabouts_reads(user)]
    return {one.connection_id for one in fleet.whereabouts(replies).connections}


def connected(server: Running, user: str) -> ClientConnection:
    """Connect as a user; whether he may stay is seen later."""
    return connect(url(server), additional_headers={"Authorization": f"Bearer {token(user)}"})


@contextlib.contextmanager
def arriving(server: Running, user: str) -> Iterator[ClientConnection]:
    """The same, until the end of the block."""
    with connected(server, user) as one:
        yield one


def code_of_end(socket: ClientConnection) -> int:
    """Return the code with which the server has closed a connection; 0 if it has not."""
    try:
        receive(socket, seconds=0)
    except TimeoutError:
        return 0
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd is not None else -1
    return 0


def stays(server: Running, socket: ClientConnection, user: str) -> bool:
    """Return whether a connection has been let in; if not it was closed for being too many."""
    connection_id = receive(socket)["connection_id"]

    def verdict() -> str | None:
        if code := code_of_end(socket):
            assert CloseReason.SUPERSEDED.code == code
            return "closed"
        return "in" if connection_id in entered(server, user) else None

    return eventually(verdict, PATIENCE, f"a verdict for {connection_id}") == "in"


def let_in(server: Running, user: str, number: int, inside: contextlib.ExitStack) -> list[bool]:
    """Have so many connections come, one after another; return who stays."""
    return [
        stays(server, inside.enter_context(arriving(server, user)), user) for _ in range(number)
    ]


def test_one_too_many_is_closed(server: Running) -> None:
    """The newcomer, wherever he comes in; others are not his concern, and who leaves makes room."""
    with contextlib.ExitStack() as inside:
        first, *others = (inside.enter_context(arriving(server, "ann")) for _ in range(LIMIT))
        for one in (first, *others):
            assert stays(server, one, "ann")
        with contextlib.ExitStack() as late:
            assert [False] * 4 == let_in(server, "ann", 4, late)
            assert [True] == let_in(server, "bob", 1, late)
        assert all(nothing_more(one) for one in (first, *others))
        first.close()
        assert eventually(lambda: len(entered(server, "ann")) < LIMIT, PATIENCE, "room for one")
        assert [True, False] == let_in(server, "ann", 2, inside)


def is_cut(socket: ClientConnection) -> bool:
    """Return whether a connection has ended with its worker."""
    try:
        assert nothing_more(socket)
    except ConnectionClosed:
        return True
    return False


def test_who_comes_back_at_once_is_let_in(server: Running) -> None:
    """After SIGKILL of one of two workers, though nobody has noticed yet: none is one too many."""
    users = [f"dora{number}" for number in range(6)]
    with contextlib.ExitStack() as inside:
        before = [
            (user, inside.enter_context(arriving(server, user)))
            for user in users
            for _ in range(LIMIT)
        ]
        assert all(stays(server, socket, user) for user, socket in before)
        status = server.status()
        assert status is not None
        os.kill(status["workers"][0]["pid"], signal.SIGKILL)
        lost = [user for user, socket in before if is_cut(socket)]
        assert 0 < len(lost) < len(before)
        # Some are taken by the survivor at once, others wait for the successor.
        with ThreadPoolExecutor(len(lost)) as clients:
            after = list(clients.map(lambda user: connected(server, user), lost))
        for user, socket in zip(lost, after, strict=True):
            inside.enter_context(socket)
            assert stays(server, socket, user), f"{user} was within the limit"
        assert [False] == let_in(server, users[0], 1, inside)


def test_who_was_killed_does_not_count(server: Running) -> None:
    """After SIGKILL of all workers at once a user has room for as many connections as before."""
    with contextlib.ExitStack() as inside:
        assert [True] * LIMIT == let_in(server, "carl", LIMIT, inside)
        status = server.status()
        assert status is not None
        for worker in status["workers"]:
            os.kill(worker["pid"], signal.SIGKILL)
        gone = eventually(lambda: not entered(server, "carl"), DEAD_SECONDS, "nobody is there")
        assert gone
    server.wait_ready()
    with contextlib.ExitStack() as inside:
        # Their entries are there still, and in nobody's way.
        assert [*[True] * LIMIT, False] == let_in(server, "carl", LIMIT + 1, inside)
