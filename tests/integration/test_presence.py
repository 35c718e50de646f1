"""Who is there, on the servers themselves, whoever is killed meanwhile."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from tests.integration.clients import PATIENCE, client, receive
from tests.redis_server import RedisServer
from tests.running import Running, eventually, running
from trioserver import fleet

DEAD_SECONDS: Final = 2 * fleet.LEASE_SECONDS
"""So long those who were killed may be shown, if nobody says that they are gone."""

LEFT_SECONDS: Final = DEAD_SECONDS + fleet.LEASE_SECONDS
"""So long it may take until it is told that they have left."""

ENVIRON: Final = {"PUBLIC_TOPICS": "**", "ANNOUNCED_TOPICS": "loud.**"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two workers; everybody may subscribe to everything."""
    with running(tmp_path_factory.mktemp("server"), workers=2, environ=ENVIRON) as started:
        yield started


@contextlib.contextmanager
def subscribed(server: Running, user: str, *topics: str) -> Iterator[ClientConnection]:
    """Connect as a user, and subscribe."""
    with client(server, user) as socket:
        for topic in topics:
            socket.send(json.dumps({"type": "subscribe", "topic": topic, "ref": topic}))
            while (answer := receive(socket)).get("ref") != topic:
                assert "presence" == answer["type"]
            assert "subscribed" == answer["type"]
        yield socket


def present(socket: ClientConnection, topic: str) -> dict[str, Any]:
    """Return who is there; events that come meanwhile are dropped."""
    socket.send(json.dumps({"type": "presence", "topic": topic, "ref": "who"}))
    while (answer := receive(socket)).get("ref") != "who":
        assert "presence" == answer["type"]
    return answer


def users(socket: ClientConnection, topic: str) -> list[str]:
    """Return whose connections are there."""
    answer = present(socket, topic)
    found = [one["user"] for one in answer["members"]]
    assert (len(found), len(set(found))) == (answer["connections"], answer["users"])
    return found


def event(socket: ClientConnection, seconds: float = PATIENCE) -> tuple[str, str, int]:
    """Return the next event."""
    told = receive(socket, seconds)
    return told["event"], told["user"], told["users"]


def pids(server: Running) -> list[int]:
    """Return those of the workers."""
    status = server.status()
    assert status is not None
    return [worker["pid"] for worker in status["workers"]]


def fleet_of(server: Running) -> dict[str, Any]:
    """Return what the command says of the fleet."""
    return dict(json.loads(server.run("presence", "--json").stdout))


def test_who_is_there(server: Running) -> None:
    """On both workers together: in answers, at the terminal, and in events."""
    with subscribed(server, "ann", "loud.1") as ann:
        assert ("join", "ann", 1) == event(ann)
        with subscribed(server, "bob", "loud.1"), subscribed(server, "bob", "loud.1"):
            assert ("join", "bob", 2) == event(ann)
            three = ["ann", "bob", "bob"]
            assert eventually(lambda: users(ann, "loud.1") == three, PATIENCE, "three are there")
            # Some of it is looked at once in a second.
            expected = {"servers": 1, "workers": 2, "unique_users": 2, "connections_here": 3}
            assert eventually(lambda: expected.items() <= fleet_of(server).items(), PATIENCE, "all")
        assert ("leave", "bob", 1) == event(ann)
        assert ["ann"] == users(ann, "loud.1")


@pytest.mark.slow
def test_a_killed_worker(server: Running) -> None:
    """Who comes back is there, who does not is not shown, and subscribers hear that he has left."""
    with contextlib.ExitStack() as inside:
        sockets = {
            user: inside.enter_context(subscribed(server, user, "loud.1", "quiet.1"))
            for user in ("ann", "bob", "cy", "di", "eve", "flo", "gil", "hal")
        }
        everybody = sorted(sockets)
        ann = sockets["ann"]
        assert eventually(lambda: users(ann, "loud.1") == everybody, PATIENCE, "all are there")
        os.kill(pids(server)[0], signal.SIGKILL)
        cut = [user for user, socket in sockets.items() if not is_open(socket)]
        if len(cut) in {0, len(sockets)}:
            pytest.skip("the kernel gave them all to one worker")
        stays = next(socket for user, socket in sockets.items() if user not in cut)
        back, *others = cut
        again = inside.enter_context(subscribed(server, back, "loud.1", "quiet.1"))
        left = sorted(set(everybody) - set(others))
        assert eventually(lambda: users(again, "quiet.1") == left, DEAD_SECONDS, "as it was")
        told: set[str] = set()
        while not told >= set(others):
            kind, user, _ = event(stays, DEAD_SECONDS)
            told |= {user} if kind == "leave" else set()
        assert left == users(again, "loud.1")


def is_open(socket: ClientConnection) -> bool:
    """Return whether a connection answers."""
    try:
        present(socket, "loud.1")
    except (OSError, ConnectionClosed):
        return False
    return True


@pytest.mark.slow
def test_a_killed_server(tmp_path: Path) -> None:
    """Nobody says that it is gone, but two leases later its users have left."""
    with RedisServer(tmp_path / "redis") as redis, contextlib.ExitStack() as inside:
        environ = {**ENVIRON, "REDIS_URL": redis.url}
        first = inside.enter_context(running(tmp_path / "first", workers=2, environ=environ))
        second = inside.enter_context(running(tmp_path / "second", workers=2, environ=environ))
        watcher = inside.enter_context(subscribed(second, "ann", "loud.1"))
        for user in ("bob", "cy"):
            inside.enter_context(subscribed(first, user, "loud.1"))
        three = ["ann", "bob", "cy"]
        assert eventually(lambda: users(watcher, "loud.1") == three, PATIENCE, "all are there")
        workers = pids(first)
        # As when the machine loses its power: nobody is left to say goodbye.
        for pid in (first.process.pid, *workers):
            os.kill(pid, signal.SIGKILL)
        told: list[str] = []
        while len(told) < 2:
            kind, user, _ = event(watcher, LEFT_SECONDS)
            told += [user] if kind == "leave" else []
        assert ["bob", "cy"] == sorted(told)
        assert ["ann"] == users(watcher, "loud.1")
