"""Bad input gets a clear answer and costs its sender alone."""

import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jwt
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.integration.clients import client, nothing_more, receive, token, url
from tests.running import SECRET, Running, running

Raw = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One worker with short deadlines; it must not have logged a traceback when all is done."""
    environ = {"HANDSHAKE_TIMEOUT": "1s", "AUTH_TIMEOUT": "1s"}
    with running(tmp_path_factory.mktemp("server"), workers=1, environ=environ) as started:
        status = started.status()
        yield started
        assert "Traceback" not in started.log
        assert '"bug"' not in started.log
        after = started.status()
        assert status is not None
        assert after is not None
        assert status["workers"][0]["pid"] == after["workers"][0]["pid"]


_NUMBERS = itertools.count()


@pytest.fixture
def neighbour(server: Running) -> Iterator[None]:
    """Somebody else, who must not notice anything."""
    # A new one each time: what the last one got may come again, for nobody has proved it yet.
    name = f"neighbour-{next(_NUMBERS)}"
    with client(server, name) as socket_:
        yield
        server.run("publish", "--user", name, '"fine"')
        assert "fine" == receive(socket_)["payload"]
        assert nothing_more(socket_)


@pytest.fixture
def raw(server: Running) -> Raw:
    """Send bytes, return everything that comes back until the server closes."""
    status = server.status()
    assert status is not None
    host, _, port = status["address"].rpartition(":")

    def exchange(data: bytes) -> bytes:
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(data)
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
            return answer

    return exchange


def make(claims: dict[str, object], key: str = SECRET, algorithm: str = "HS256") -> str:
    """Return a token with just these claims."""
    return jwt.encode(claims, key, algorithm=algorithm)


BAD_TOKENS = {
    "garbage": "garbage",
    "other secret": make({"sub": "ann", "exp": time.time() + 60}, key="x" * 40),
    "expired": make({"sub": "ann", "exp": time.time() - 3600}),
    "none": make({"sub": "ann", "exp": time.time() + 60}, key="", algorithm="none"),
    "no exp": make({"sub": "ann"}),
    "no sub": make({"exp": time.time() + 60}),
}


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("bad", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_a_bad_token_is_401_before_the_upgrade_and_4401_after(server: Running, bad: str) -> None:
    """A bad token is refused alike as a header, in the query and as the first message."""
    for query, headers in (("", {"Authorization": f"Bearer {bad}"}), (f"?token={bad}", {})):
        with (
            pytest.raises(InvalidStatus) as refused,
            connect(url(server, query), additional_headers=headers),
        ):
            pass
        assert 401 == refused.value.response.status_code
    with connect(url(server)) as socket_:
        socket_.send(json.dumps({"type": "auth", "token": bad}))
        assert "unauthorized" == receive(socket_)["reason"]
        with pytest.raises(ConnectionClosed) as closed:
            receive(socket_)
        assert closed.value.rcvd is not None
        assert 4401 == closed.value.rcvd.code


@pytest.mark.usefixtures("neighbour")
def test_a_first_message_brings_the_same_as_a_header(server: Running) -> None:
    """``auth`` as the first message, and ``bearer.`` as a sub-protocol, are as good as a header."""
    with connect(url(server)) as socket_:
        socket_.send(json.dumps({"type": "auth", "token": token("ann")}))
        assert "ann" == receive(socket_)["user"]
    protocols = ["trioserver.v1", f"bearer.{token('ann')}"]
    with connect(url(server), subprotocols=protocols) as socket_:  # type: ignore[arg-type]
        assert "trioserver.v1" == socket_.subprotocol
        assert "ann" == receive(socket_)["user"]


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("no json", "bad_json"),
        ("[1, 2]", "bad_json"),
        ("[" * 5000 + "]" * 5000, "bad_json"),
        ('{"type": "message", "payload": ' + "[" * 5000 + "]" * 5000 + "}", "bad_json"),
        ('{"type": "dance", "ref": "r"}', "unknown_type"),
        ('{"type": "ping", "ref": 7}', "bad_message"),
        ("{}", "bad_message"),
    ],
    ids=lambda value: value[:20],
)
def test_a_bad_message_is_answered_and_the_connection_lives(
    server: Running, message: str, code: str
) -> None:
    """Each malformed message gets one ``error`` with its code; the next message is served."""
    with client(server, "ann") as socket_:
        socket_.send(message)
        error = receive(socket_)
        assert ("error", code) == (error["type"], error["code"])
        socket_.send('{"type": "message", "payload": "still here"}')
        assert "still here" == receive(socket_)["payload"]


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("data", "code", "reason"),
    [
        (b"binary", 1003, "unsupported_data"),
        ("x" * 20_000, 1009, "too_big"),
    ],
    ids=["binary", "oversize"],
)
def test_a_message_beyond_the_rules_ends_its_connection(
    server: Running, data: str | bytes, code: int, reason: str
) -> None:
    """Binary and oversize messages end the connection with a goodbye and their close code."""
    with client(server, "ann") as socket_:
        socket_.send(data)
        goodbye = receive(socket_)
        assert ("goodbye", reason) == (goodbye["type"], goodbye["reason"])
        with pytest.raises(ConnectionClosed) as closed:
            receive(socket_)
        assert closed.value.rcvd is not None
        assert code == closed.value.rcvd.code


@pytest.mark.usefixtures("neighbour")
def test_twenty_malformed_messages_are_enough(server: Running) -> None:
    """The twentieth malformed message within ten seconds ends the connection with 1008."""
    with client(server, "ann") as socket_:
        for _ in range(20):
            socket_.send("rubbish")
        answers = [receive(socket_) for _ in range(20)]
        assert ["error"] * 19 + ["goodbye"] == [answer["type"] for answer in answers]
        with pytest.raises(ConnectionClosed) as closed:
            receive(socket_)
        assert closed.value.rcvd is not None
        assert 1008 == closed.value.rcvd.code


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /ws HTTP/1.1\r\nHost: x\r\nCookie: " + b"c" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /ws HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 150 + b"\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(50) + b"\r\n\r\n", 400),
        (b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n", 426),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /ws HTTP/1.1\r\nHos", 408),
        (b"", 408),
    ],
    ids=["20 KB header", "150 headers", "TLS", "no upgrade", "no page", "half a head", "silence"],
)
def test_a_bad_handshake_gets_its_status_in_time(raw: Raw, data: bytes, status: int) -> None:
    """Whatever is no handshake is answered with its HTTP status and closed in time."""
    began = time.monotonic()
    answer = raw(data)
    assert f"HTTP/1.1 {status} ".encode() == answer[:13]
    assert time.monotonic() - began < 4


@pytest.mark.usefixtures("neighbour")
def test_a_connection_without_credentials_ends_in_time(server: Running) -> None:
    """Who sends no ``auth`` gets 4408 at the deadline; pings and other messages change nothing."""
    with connect(url(server)) as socket_:
        began = time.monotonic()
        socket_.ping()
        socket_.send('{"type": "message", "payload": 1}')
        assert "unauthenticated" == receive(socket_)["code"]
        assert "auth_timeout" == receive(socket_)["reason"]
        assert 0.5 < time.monotonic() - began < 3


@pytest.mark.usefixtures("neighbour")
def test_unmasked_frames_and_lies_about_length_end_the_connection(server: Running) -> None:
    """An unmasked frame is 1002; a length of 2^62 is 1009 although nothing of it was sent."""
    status = server.status()
    assert status is not None
    host, _, port = status["address"].rpartition(":")
    head = (
        f"GET /ws HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('ann')}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()
    frames = {
        b"\x81\x02hi": 1002,
        b"\x81\xff" + struct.pack(">Q", 1 << 62): 1009,
        b"\x91\x80abcd": 1002,
        b"\x89\xfe\x00\x80": 1002,
    }
    for frame, code in frames.items():
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(head + frame)
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
        assert b"\x88" in answer, frame
        assert struct.pack(">H", code) in answer, frame


def test_commands_fail_with_one_clear_line(tmp_path: Path, server: Running) -> None:
    """No command ever answers a user's mistake with a traceback."""
    mistakes = {
        ("status", "--data-dir", str(tmp_path)): 1,
        ("publish", "--user", "ann", "no json"): 1,
        ("publish", "--user", "ann", '"x"', "--type", "goodbye"): 1,
        ("publish", "1"): 2,
        ("publish", "--user", "ann", "1", "--redis-url", "redis://127.0.0.1:1"): 1,
        ("checktoken", "garbage"): 1,
        ("config", "--ws-port", "seventy"): 4,
        ("config", "--get", "NOT_A_SETTING"): 4,
        ("supervise", "--config", str(tmp_path / "missing.toml")): 4,
        ("listen",): 2,
        ("gentoken", "--user", "x" * 200): 1,
        ("dance",): 2,
    }
    for arguments, code in mistakes.items():
        done = server.run(*arguments)
        assert code == done.returncode, (arguments, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stderr.strip(), arguments
        if code != 2:
            assert 1 == done.stderr.count("\n"), done.stderr
