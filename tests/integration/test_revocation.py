"""Revocation on a running server: who is connected is gone, and nobody gets in again."""

import contextlib
import datetime as dt
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any, Final

import jwt
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.integration.clients import PATIENCE, receive, url
from tests.redis_server import RedisServer
from tests.running import SECRET, Running, eventually, running
from trioserver.revocation import SEQ_KEY

HOUR: Final = 3600

REVOKED_SECONDS: Final = 10.0
"""Until an open socket is gone; 2 s on a machine that has time."""


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that can be killed."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[Running]:
    """Two workers; everybody comes from the same address."""
    environ = {"REDIS_URL": redis.url, "CHANNEL_PREFIX": "eu:", "MAX_CONNECTIONS_PER_USER": "100"}
    with running(tmp_path_factory.mktemp("server"), workers=2, environ=environ) as started:
        yield started


def signed(user: str, **claims: object) -> str:
    """Return a token that was issued a minute ago, unless it says otherwise."""
    now = int(time.time())
    said = {"sub": user, "exp": now + HOUR, "iat": now - 60, **claims}
    return jwt.encode(said, SECRET, algorithm="HS256")


@contextlib.contextmanager
def client(server: Running, token: str) -> Iterator[ClientConnection]:
    """Connect with a token; ``connection_established`` has been received."""
    with connect(url(server), additional_headers={"Authorization": f"Bearer {token}"}) as socket:
        assert "connection_established" == receive(socket)["type"]
        yield socket


@contextlib.contextmanager
def clients(server: Running, token: str, workers: int = 2) -> Iterator[list[ClientConnection]]:
    """Connect with a token until each worker has at least one; at most 40 times."""
    with contextlib.ExitStack() as stack:
        sockets: list[ClientConnection] = []
        seen: set[str] = set()
        while len(seen) < workers:
            assert len(sockets) < 40
            socket = stack.enter_context(
                connect(url(server), additional_headers={"Authorization": f"Bearer {token}"})
            )
            first = receive(socket)
            sockets.append(socket)
            # The last part of its id counts the connections of one worker.
            seen.add(first["connection_id"].rpartition("-")[0])
        yield sockets


def revoked(server: Running, *arguments: str) -> None:
    """Revoke, with the command."""
    ran = server.run("revoke", *arguments)
    assert (0, "revoked: ") == (ran.returncode, ran.stdout[:9]), ran.stderr


def ending(socket: ClientConnection) -> tuple[int, dict[str, Any]]:
    """Return the close code and the last message of a socket that is about to end."""
    last: dict[str, Any] = {}
    deadline = time.monotonic() + REVOKED_SECONDS
    with contextlib.suppress(ConnectionClosed):
        while True:
            last = json.loads(socket.recv(timeout=deadline - time.monotonic()))
    assert socket.close_code is not None
    return socket.close_code, last


def refused(server: Running, token: str) -> bool:
    """Return whether a token is refused in the handshake."""
    with contextlib.suppress(InvalidStatus), client(server, token):
        return False
    return True


def test_a_token(server: Running, redis: RedisServer) -> None:
    """Its connections on all workers end with 4401; others of the same user stay."""
    eventually(lambda: 2 == redis.subscribers("eu:revoked"), PATIENCE, "both workers listen")
    stolen, own = signed("ann", jti="7f3c"), signed("ann", jti="7f3d")
    with clients(server, stolen) as thieves, client(server, own) as owner:
        revoked(server, "--jti", "7f3c", "--until", "1h")
        for thief in thieves:
            code, goodbye = ending(thief)
            assert (4401, "goodbye", "unauthorized") == (code, goodbye["type"], goodbye["reason"])
        owner.send('{"type":"ping","ref":"still here"}')
        assert "pong" == receive(owner)["type"]
    assert refused(server, stolen)
    assert not refused(server, own)


def test_a_user(server: Running) -> None:
    """All that was issued so far, and what does not say when; a later token is good at once."""
    old = signed("bob")
    nameless = jwt.encode({"sub": "bob", "exp": int(time.time()) + HOUR}, SECRET)
    with (
        clients(server, old) as sockets,
        client(server, nameless) as other,
        client(server, signed("carl")) as neighbour,
    ):
        revoked(server, "--user", "bob", "--before", moment())
        assert {4401} == {ending(socket)[0] for socket in (*sockets, other)}
        neighbour.send('{"type":"ping","ref":"still here"}')
        assert "pong" == receive(neighbour)["type"]
    assert refused(server, old)
    assert refused(server, nameless)
    assert not refused(server, signed("bob", iat=int(time.time()) + 2))


def moment() -> str:
    """Return the present by the clock that tokens have their age from."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def test_an_issuer_whose_clock_is_ahead(server: Running) -> None:
    """What was accepted before the revocation is gone, although it says that it is younger."""
    ahead = signed("hugo", iat=int(time.time()) + 1)
    with client(server, ahead) as socket:
        revoked(server, "--user", "hugo")
        assert 4401 == ending(socket)[0]
    assert refused(server, ahead)


def test_a_worker_that_may_not_read_them_is_not_ready(server: Running, redis: RedisServer) -> None:
    """It says why, goes on with what it knows, and is ready again as soon as it may."""
    before = pids(server)
    with client(server, signed("iris")) as socket:
        redis.command("RENAME", SEQ_KEY, "aside")
        redis.command("SADD", SEQ_KEY, "x")
        why = {"revocations not read"}
        eventually(lambda: why == reasons(server), PATIENCE, "no worker is ready")
        assert 503 == server.get("/readyz", public=True)[0]
        assert not refused(server, signed("iris"))
        redis.command("RENAME", "aside", SEQ_KEY)
        server.wait_ready()
        socket.send('{"type":"ping","ref":"still here"}')
        assert "pong" == receive(socket)["type"]
    assert before == pids(server)


def pids(server: Running) -> set[int]:
    """Return those of the workers."""
    status = server.status()
    assert status is not None
    return {worker["pid"] for worker in status["workers"]}


def reasons(server: Running) -> set[str]:
    """Return why the workers are not ready."""
    status = server.status()
    return {worker["why"] for worker in status["workers"]} if status else set()


def test_a_new_worker_reads_them_before_it_lets_anybody_in(server: Running) -> None:
    """Who waits at the door while it starts is refused, if he is revoked."""
    token = signed("kate", jti="waiting")
    revoked(server, "--jti", "waiting")
    eventually(lambda: refused(server, token), PATIENCE, "it is known")
    host, _, port = url(server).removeprefix("ws://").partition("/")[0].rpartition(":")
    head = (
        f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        f"Authorization: Bearer {token}\r\n\r\n"
    ).encode()

    def answers() -> set[bytes]:
        """Kill the workers; return the statuses that those get who have queued meanwhile."""
        kill_workers(server, wait=False)
        with contextlib.ExitStack() as stack:
            queue = [
                stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE))
                for _ in range(8)
            ]
            for one in queue:
                one.sendall(head)
            return {status(one) for one in queue}

    # A worker opens its door after a second in any case: on a machine that is very busy Redis may
    # need longer. So it has a few attempts.
    for _ in range(3):
        seen = answers()
        server.wait_ready()
        if seen == {b"401"}:
            break
    assert {b"401"} == seen


def status(client: socket.socket) -> bytes:
    """Return the status of an answer; none if the connection was cut."""
    with contextlib.suppress(ConnectionError):
        return client.recv(1 << 12)[9:12]
    return b""


def test_a_token_that_comes_as_a_message(server: Running) -> None:
    """The first message is no way around it."""
    token = signed("dora", jti="by-message")
    revoked(server, "--jti", "by-message")
    with connect(url(server)) as socket:
        socket.send(json.dumps({"type": "auth", "token": token}))
        assert 4401 == ending(socket)[0]


def test_while_redis_is_away(server: Running, redis: RedisServer) -> None:
    """What is known stays applied; what is revoked as soon as Redis is back ends open sockets.

    A worker that was killed meanwhile knows all of it again.
    """
    known, unknown = signed("emil", jti="known"), signed("emil", jti="unknown")
    revoked(server, "--jti", "known")
    eventually(lambda: refused(server, known), PATIENCE, "it is known")
    with clients(server, unknown) as sockets:
        redis.kill()
        assert refused(server, known)
        redis.start()
        revoked(server, "--jti", "unknown")
        assert {4401} == {ending(socket)[0] for socket in sockets}
    kill_workers(server)
    server.wait_ready()
    eventually(lambda: refused(server, known), PATIENCE, "it is known again")
    eventually(lambda: refused(server, unknown), PATIENCE, "the later one, too")


def kill_workers(server: Running, *, wait: bool = True) -> None:
    """Kill each worker as the OOM killer would; others have taken their places on return."""
    before = pids(server)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    if not wait:
        return

    def replaced() -> bool:
        now = server.status()
        return now is not None and not before & {worker["pid"] for worker in now["workers"]}

    eventually(replaced, PATIENCE, "the workers were replaced")


def test_everybody(server: Running) -> None:
    """All that was issued up to a moment; whoever has a later token stays."""
    with (
        clients(server, signed("fred", iat=int(time.time()) - 1000)) as old,
        client(server, signed("gina")) as new,
    ):
        revoked(server, "--all", "--before", "10m")
        assert {4401} == {ending(socket)[0] for socket in old}
        new.send('{"type":"ping","ref":"still here"}')
        assert "pong" == receive(new)["type"]
    listed = server.run("revoke", "--list", "--json").stdout.splitlines()
    assert json.loads(listed[-1])["all"]
