"""Secrets that go in must come out nowhere: logs, metrics, answers, Redis, process list, files."""

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
import redis
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tests.integration.clients import receive, url
from tests.running import Running, running

MARK: Final = "canary7f3a9c"
"""Part of every secret below, in plain text or as base64 would show it."""

JWT_SECRET: Final = f"{MARK}-signs-tokens-for-this-test-only"
API_KEY: Final = f"{MARK}-opens-the-api"


def signed(user: str, **claims: object) -> str:
    """Return a token whose header has the mark in plain text, as its key's name."""
    body = {"sub": user, "exp": int(time.time()) + 3600, **claims}
    return jwt.encode(body, JWT_SECRET, algorithm="HS256", headers={"kid": MARK})


def traces(token: str) -> list[bytes]:
    """Return what would give a secret away: the mark, and each part of the token."""
    return [MARK.encode(), *(part.encode() for part in token.split("."))]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Return a server that logs all it can, with secrets that bear the mark."""
    environ = {
        "JWT_SECRET_KEY": JWT_SECRET,
        "JWT_SECRET_KEY_PREVIOUS": f"{MARK}-signed-tokens-before-that-was-so",
        "API_KEYS": API_KEY,
        "LOG_LEVEL": "debug",
        "LOGGER_ENCODING": "json",
        "LOG_DIR": str(tmp_path_factory.mktemp("logs")),
        "AUTH_TIMEOUT": "0.5s",
    }
    with running(tmp_path_factory.mktemp("secrets"), workers=2, environ=environ) as server:
        yield server


def try_to_connect(target: str, **options: Any) -> None:
    """Connect and say something, if that goes."""
    with (
        contextlib.suppress(WebSocketException, OSError, TimeoutError),
        connect(target, open_timeout=5, close_timeout=1, **options) as socket,
    ):
        receive(socket)
        socket.send('{"type":"ping"}')
        receive(socket)


def use_tokens(server: Running, token: str) -> None:
    """Bring a token by all ways there are."""
    bearer = f"Bearer {token}"
    try_to_connect(url(server), additional_headers={"Authorization": bearer})
    try_to_connect(url(server, f"?token={token}"))
    protocols = [Subprotocol("trioserver.v1"), Subprotocol(f"bearer.{token}")]
    try_to_connect(url(server), subprotocols=protocols)
    try_to_connect(url(server), additional_headers={"Cookie": f"token={token}"})
    try_to_connect(url(server, f"?device={token}"), additional_headers={"Authorization": bearer})
    with connect(url(server)) as socket:
        socket.send(json.dumps({"type": "auth", "token": token}))
        with contextlib.suppress(WebSocketException):
            receive(socket)
            socket.send(json.dumps({"type": "refresh", "token": token, "ref": "r"}))
            receive(socket)
            socket.send(json.dumps({"type": token}))
            receive(socket)


def ask(server: Running, *, public: bool, method: str, path: str, key: str, body: str) -> bytes:
    """Return all of an HTTP answer, head included."""
    status = server.status()
    assert status is not None
    address = status["address" if public else "admin_address"]
    connection = http.client.HTTPConnection(address, timeout=10)
    with contextlib.closing(connection):
        headers = {"X-API-Key": key, "Authorization": f"Bearer {key}", "Cookie": f"key={key}"}
        connection.request(method, path, body=body or None, headers=headers)
        response = connection.getresponse()
        return repr(response.getheaders()).encode() + response.read()


def answers(server: Running, key: str, token: str) -> list[bytes]:
    """Return what both ports answer to somebody who puts secrets everywhere."""
    publish = json.dumps({"to": {"user": "ann"}, "type": "news", "payload": {"n": 1}})
    found = []
    for public in (True, False):
        for path in ("/", "/ws", "/health", "/metrics", "/healthz", f"/{token}", "/api/v1/x"):
            asked = f"{path}?token={token}&api_key={key}"
            found.append(ask(server, public=public, method="GET", path=asked, key=key, body=""))
        path = "/api/v1/notifications"
        found += [
            ask(server, public=public, method="POST", path=path, key=key, body=body)
            for body in (publish, "{" + token, json.dumps({"to": {"user": "ann"}, token: 1}))
        ]
    return found


def kept_by_redis(server: Running) -> bytes:
    """Return every key and value, and what Redis remembers of commands and clients."""
    found = bytearray()
    with redis.Redis(unix_socket_path=str(server.data_dir / "redis.sock")) as client:
        for key in client.scan_iter(count=1000):
            found += key + (client.dump(key) or b"")
        for report in (client.client_list(), client.slowlog_get(1000), client.acl_log()):
            found += repr(report).encode()
    return bytes(found)


def processes_of(server: Running) -> bytes:
    """Return the command lines of the server's processes: everybody on the machine reads those."""
    found = bytearray()
    group = {server.process.pid}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if int(entry.name) in group or parent in group:
                found += (entry / "cmdline").read_bytes()
    assert b"trioserver" in found
    return bytes(found)


def test_no_secret_comes_out_anywhere(server: Running) -> None:
    """Good, expired and foreign tokens by all ways, and API keys in all places: nothing is left."""
    good = signed("ann")
    expired = signed("ann", exp=1_000_000_000)
    foreign = jwt.encode({"sub": "ann", "exp": 4e9}, "x" * 32, headers={"kid": MARK})
    found: dict[str, bytes] = {}
    for name, token in (("good", good), ("expired", expired), ("foreign", foreign)):
        use_tokens(server, token)
        for key in (API_KEY, f"{MARK}-is-wrong"):
            for number, answer in enumerate(answers(server, key, token)):
                found[f"answer {number} with the {name} token"] = answer
    done = server.run("publish", "--user", "ann", "--type", "news", '{"n":2}')
    assert 0 == done.returncode, done.stderr
    found["metrics"] = server.get("/metrics")[1]
    found["Redis"] = kept_by_redis(server)
    found["process list"] = processes_of(server)
    found["log"] = server.log.encode()
    for folder in (server.data_dir, Path(server.environ["LOG_DIR"])):
        for path in folder.rglob("*"):
            # Files that are not for others keep what they are for.
            if path.is_file() and not path.name.endswith(".secret"):
                found[str(path)] = path.read_bytes()
    assert b"handshake" in found["log"] or b"connection ended" in found["log"]
    leaks = [
        (where, trace)
        for token in (good, expired, foreign)
        for trace in traces(token)
        for where, text in found.items()
        if trace in text
    ]
    assert [] == leaks
