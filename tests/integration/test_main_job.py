"""The main job: a notification published by a back end arrives at the right user."""

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.integration.clients import client, nothing_more, receive, token, url
from tests.redis_server import RedisServer
from tests.running import SECRET, Running, eventually, running

EPHEMERAL = {"type", "payload", "timestamp"}
"""Fields of a notification of which nothing is kept."""


def test_a_notification_reaches_every_device_of_its_user_and_nobody_else(server: Running) -> None:
    """Both devices of the user get what was published; another user gets nothing."""
    with (
        client(server, "ann") as phone,
        client(server, "ann") as laptop,
        client(server, "bob") as b,
    ):
        published = server.run("publish", "--user", "ann", '{"n": 1}', "--type", "order")

        assert (0, "") == (published.returncode, published.stderr)
        for device in (phone, laptop):
            message = receive(device)
            assert ("order", {"n": 1}) == (message["type"], message["payload"])
            assert {*EPHEMERAL, "id", "seq", "position", "attempt", "unread"} == set(message)
            assert message["id"] in published.stdout
            assert nothing_more(device)
        assert nothing_more(b)

        published = server.run("publish", "--user", "ann", "--ephemeral", "2")

        assert (0, "") == (published.returncode, published.stderr)
        for device in (phone, laptop):
            assert EPHEMERAL == set(receive(device))


def test_a_broadcast_reaches_connections_on_all_workers(server: Running) -> None:
    """What is published to everybody arrives once at each connection, on every worker."""
    with contextlib.ExitStack() as stack:
        sockets: list[ClientConnection] = []

        def every_worker_has_some() -> bool:
            sockets.append(stack.enter_context(client(server, f"user-{len(sockets)}")))
            status = server.status()
            assert status is not None
            return len(sockets) >= 8 and all(one["connections"] for one in status["workers"])

        eventually(every_worker_has_some, 30, "a connection on every worker")
        server.run("publish", "--all", '"hello"')

        for socket in sockets:
            assert "hello" == receive(socket)["payload"]
            assert nothing_more(socket)


def test_an_external_redis_and_a_plain_publish_are_enough(tmp_path: Path) -> None:
    """With REDIS_URL, a bare PUBLISH from any language arrives; malformed ones harm nobody."""
    with (
        RedisServer(tmp_path / "redis") as redis,
        running(tmp_path / "server", environ={"REDIS_URL": redis.url}) as server,
        client(server, "ann") as socket,
    ):
        for rubbish in (b"no json", b"[1]", b"{}", b'{"payload":1,"type":"goodbye"}', b"\xff\xfe"):
            redis.command("PUBLISH", "user_noti:ann", rubbish)
        redis.command(
            "PUBLISH", "user_noti:ann", b'{"type":"order","payload":{"n":2},"id":"forged","seq":9}'
        )
        redis.command("PUBLISH", "channels:broadcast", b'{"payload":"all"}')

        order, everybody = receive(socket), receive(socket)
        assert ("order", {"n": 2}) == (order["type"], order["payload"])
        assert not {"id", "seq"} & set(order)
        assert ("notification", "all") == (everybody["type"], everybody["payload"])
        assert nothing_more(socket)
        assert 1 == server.log.count("malformed publication")
        _, metrics = server.get("/metrics")
        eventually(
            lambda: b"notifications_malformed_total 5.0" in server.get("/metrics")[1],
            5,
            f"five counted: {metrics.decode()}",
        )


def test_listen_shows_what_publish_sends(server: Running) -> None:
    """The two commands of the README work together."""
    status = server.status()
    assert status is not None
    with subprocess.Popen(
        [*server.command(), "listen", "--user", "carl", "--url", url(server)],
        env=server.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as listening:
        try:
            assert listening.stdout is not None
            assert "connection_established" in listening.stdout.readline()
            server.run("publish", "--user", "carl", '{"title": "Hello"}')
            shown: dict[str, Any] = json.loads(listening.stdout.readline())
        finally:
            listening.kill()

    assert {"title": "Hello"} == shown["payload"]


def test_status_has_the_promised_shape(server: Running) -> None:
    """``status --json`` has an entry per slot with the promised fields; ready exits 0."""
    shown = server.run("status", "--json")
    status = json.loads(shown.stdout)

    assert 0 == shown.returncode
    assert [0, 1, 2, 3] == [worker["slot"] for worker in status["workers"]]
    fields = {"slot", "pid", "age_seconds", "connections", "restarts", "ready"}
    assert all(fields <= set(worker) for worker in status["workers"])
    assert {"ready", "workers", "gateway", "redis"} <= set(status)
    assert status["ready"] is True
    assert "ready" == server.run("status").stdout.split(":")[0]


@pytest.mark.parametrize("public", [True, False], ids=["worker", "gateway"])
def test_both_ports_answer_the_health_pages(server: Running, *, public: bool) -> None:
    """/healthz, /readyz and /health are 200 on a healthy server, on both ports."""
    for path in ("/healthz", "/readyz", "/health"):
        status, body = server.get(path, public=public)
        assert (200, dict) == (status, type(json.loads(body)))


def test_tokens_and_secrets_are_in_no_log(tmp_path: Path) -> None:
    """Neither a token nor the secret is found in the logs, however talkative."""
    log_dir = tmp_path / "logs"
    canary = token("ann")
    environ = {"LOG_LEVEL": "debug", "LOG_DIR": str(log_dir)}
    with running(tmp_path, environ=environ) as server:
        with connect(url(server, f"?token={canary}")) as socket:
            receive(socket)
        server.get(f"/health?token={canary}")
        server.run("checktoken", canary)
    logs = server.log + "".join(path.read_text() for path in log_dir.iterdir())

    assert len(list(log_dir.iterdir())) >= 4
    assert canary not in logs
    assert canary.split(".")[2] not in logs
    assert SECRET not in logs


def test_compression_is_off_unless_asked_for_on_both_sides(server: Running, tmp_path: Path) -> None:
    """A client that offers permessage-deflate gets it only with WS_DEFLATE, and reads as before."""
    with client(server, "ann") as socket:
        assert socket.response is not None
        assert "Sec-WebSocket-Extensions" not in socket.response.headers
    with (
        running(tmp_path, environ={"WS_DEFLATE": "1"}) as deflating,
        client(deflating, "ann") as socket,
        client(deflating, "ann", compression=None) as bare,
    ):
        assert socket.response is not None
        agreed = socket.response.headers["Sec-WebSocket-Extensions"]
        assert agreed.startswith("permessage-deflate")
        deflating.run("publish", "--user", "ann", json.dumps("x" * 9000))
        for either in (socket, bare):
            assert "x" * 9000 == receive(either)["payload"]
        socket.send(json.dumps({"type": "message", "payload": "y" * 9000}))
        assert "y" * 9000 == receive(socket)["payload"]
