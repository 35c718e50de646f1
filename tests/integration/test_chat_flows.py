"""Chat sessions as their clients know them: every flow from the first message to the last."""

import contextlib
import datetime as dt
import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.integration.clients import PATIENCE, nothing_more, receive, token, url
from tests.running import Running, eventually, running

NOBODY: Final = str(uuid.UUID(int=1))
"""The id of a session that there is not."""


def chat_url(server: Running, path: str = "/") -> str:
    """Return the address of a chat path."""
    return url(server).removesuffix("/ws") + "/ws/chat" + path


@contextlib.contextmanager
def chat(
    server: Running, path: str = "/", user: str = ""
) -> Iterator[tuple[ClientConnection, dict[str, Any]]]:
    """Connect to a chat path; give the socket and the first message."""
    headers = {"Authorization": f"Bearer {token(user)}"} if user else {}
    with connect(chat_url(server, path), additional_headers=headers) as socket:
        established = receive(socket)
        assert "connection_established" == established["type"]
        yield socket, established


def say(socket: ClientConnection, text: str) -> dict[str, Any]:
    """Send a text; return the answer."""
    socket.send(text)
    return receive(socket)


def closed(socket: ClientConnection) -> tuple[dict[str, Any], int]:
    """Return the goodbye and the close code of a connection that the server ends."""
    goodbye = receive(socket)
    with pytest.raises(ConnectionClosed) as caught:
        socket.recv(timeout=PATIENCE)
    assert caught.value.rcvd is not None
    return goodbye, caught.value.rcvd.code


def test_a_counter_that_survives_a_reconnect(server: Running) -> None:
    """Connect without anything, say plain text, be counted, come back with the session's id."""
    with chat(server) as (socket, first):
        assert (False, "new", 0) == (first["resumed"], first["reason"], first["count"])
        assert 4 == uuid.UUID(first["session_id"]).version
        assert not {"user", "expires_in", "position", "label"} & set(first)
        for count, text in enumerate(["hello", "{not json", "[1]", "42"], 1):
            answer = say(socket, text)
            assert {"type", "count", "payload", "timestamp"} == set(answer)
            assert ("message_response", count, text) == (
                answer["type"],
                answer["count"],
                answer["payload"],
            )
    with chat(server, f"/?session_id={first['session_id']}") as (socket, again):
        assert (True, 4, first["session_id"]) == (
            again["resumed"],
            again["count"],
            again["session_id"],
        )
        assert "reason" not in again
        answer = say(socket, '{"type":"message","payload":{"n":1},"ref":"r"}')
        assert (5, {"n": 1}, "r") == (answer["count"], answer["payload"], answer["ref"])


def test_a_connection_with_a_name_of_its_own(server: Running) -> None:
    """The last part of the path is a label: it comes back, and two may have the same."""
    with (
        chat(server, "/support-desk-7") as (socket, first),
        chat(server, "/support-desk-7") as (other, second),
    ):
        assert "support-desk-7" == first["label"] == second["label"]
        assert first["session_id"] != second["session_id"]
        assert first["connection_id"] != second["connection_id"]
        assert (1, 1) == (say(socket, "a")["count"], say(other, "b")["count"])
        answer = say(socket, '{"type":"dance"}')
        assert ("error", "unknown_type") == (answer["type"], answer["code"])
        assert 2 == say(socket, "still here")["count"]


def test_heartbeats_come_by_themselves(tmp_path: Path) -> None:
    """A connection that says nothing hears ``{"type":"heartbeat","ts":<time>}`` again and again."""
    with (
        running(tmp_path, workers=1, environ={"HEARTBEAT_INTERVAL": "200"}) as server,
        chat(server) as (socket, _),
    ):
        for _ in range(2):
            beat = json.loads(socket.recv(timeout=PATIENCE))
            assert {"type", "ts"} == set(beat)
            assert "heartbeat" == beat["type"]
            assert dt.datetime.fromisoformat(beat["ts"]).tzinfo is not None


def test_the_end_of_the_server_is_a_goodbye_and_1001(tmp_path: Path) -> None:
    """SIGTERM ends with a goodbye, then 1001; the count is there after the restart."""
    with running(tmp_path / "one", workers=1) as server:
        with chat(server) as (socket, first):
            assert 1 == say(socket, "x")["count"]
            server.process.send_signal(signal.SIGTERM)
            goodbye, code = closed(socket)
        assert ("goodbye", "going_away", True, 1001) == (
            goodbye["type"],
            goodbye["reason"],
            goodbye["reconnect"],
            code,
        )
        server.process.wait(30)
    with running(tmp_path / "one", workers=1) as server:
        path = f"/?session_id={first['session_id']}"
        with chat(server, path) as (socket, again):
            assert (True, 1) == (again["resumed"], again["count"])


def test_a_session_belongs_to_its_user(server: Running) -> None:
    """With a token it is the user's: neither another user nor a stranger gets it."""
    with chat(server, user="ann") as (socket, first):
        assert ("ann", 1) == (first["user"], say(socket, "x")["count"])
    path = f"/?session_id={first['session_id']}"
    headers = {"Authorization": f"Bearer {token('bob')}"}
    with connect(chat_url(server, path), additional_headers=headers) as socket:
        goodbye, code = closed(socket)
        assert ("forbidden", False, 4403) == (goodbye["reason"], goodbye["reconnect"], code)
    with chat(server, path, user="ann") as (_, again):
        assert (True, 1) == (again["resumed"], again["count"])


def test_a_user_may_say_who_he_is_after_the_handshake(tmp_path: Path) -> None:
    """His session waits for ``auth``, named in the query or there; who does not come gets 4403."""
    with running(tmp_path, workers=1, environ={"AUTH_TIMEOUT": "2s"}) as server:
        with chat(server, user="ann") as (socket, first):
            assert 1 == say(socket, "x")["count"]
        mine = first["session_id"]
        auth = {"type": "auth", "token": token("ann")}
        with connect(chat_url(server, f"/?session_id={mine}")) as socket:
            error = receive(socket)
            assert ("error", "unauthenticated") == (error["type"], error["code"])
            assert "unauthenticated" == say(socket, "hello")["code"]
            established = say(socket, json.dumps(auth))
            assert (mine, "ann", True, 1) == (
                established["session_id"],
                established["user"],
                established["resumed"],
                established["count"],
            )
        with chat(server) as (socket, _):
            assert 1 == say(socket, "x")["count"]
            established = say(socket, json.dumps(auth | {"session_id": mine}))
            assert (mine, True, 1) == (
                established["session_id"],
                established["resumed"],
                established["count"],
            )
            assert 2 == say(socket, "y")["count"]
        with connect(chat_url(server, f"/?session_id={mine}")) as socket:
            assert "unauthenticated" == receive(socket)["code"]
            assert 4403 == closed(socket)[1]
        with connect(chat_url(server)) as socket:
            # At once, before the session can have been found.
            socket.send(json.dumps(auth))
            said = [receive(socket)]
            if said[0].get("user") is None:
                said.append(receive(socket))
            assert "ann" == said[-1]["user"]


def test_who_logs_in_keeps_the_session(server: Running) -> None:
    """An anonymous session becomes the user's with ``auth``, and gets what is published."""
    with chat(server) as (socket, first):
        assert 1 == say(socket, "x")["count"]
        established = say(socket, json.dumps({"type": "auth", "token": token("dora")}))
        assert ("connection_established", "dora", first["session_id"], 1) == (
            established["type"],
            established["user"],
            established["session_id"],
            established["count"],
        )
        assert 2 == say(socket, "y")["count"]
        server.run("publish", "--user", "dora", "--ephemeral", '"news"')
        assert "news" == receive(socket)["payload"]
    with connect(chat_url(server, f"/?session_id={first['session_id']}")) as stranger:
        assert "unauthenticated" == receive(stranger)["code"]


def test_a_chat_connection_of_a_user_gets_notifications(server: Running) -> None:
    """Kept ones as well, from the position on, as on any other connection."""
    with chat(server, user="erna") as (socket, first):
        server.run("publish", "--user", "erna", '{"n":1}')
        got = receive(socket)
        assert ({"n": 1}, 1) == (got["payload"], got["seq"])
        assert first["position"] != got["position"]
        assert 1 == say(socket, "x")["count"]
        server.run("publish", "--all", "--ephemeral", '"all"')
        assert "all" == receive(socket)["payload"]
    with chat(server) as (stranger, _):
        server.run("publish", "--all", "--ephemeral", '"nothing for strangers"')
        assert nothing_more(stranger)


def test_a_session_has_one_connection_at_a_time(server: Running) -> None:
    """The newer one takes it, on whatever worker; the older one hears 4409 at once."""
    with contextlib.ExitStack() as stack:
        older, first = stack.enter_context(chat(server))
        assert 1 == say(older, "x")["count"]
        path = f"/?session_id={first['session_id']}"
        for count in range(1, 7):  # Over four workers, most of these are elsewhere.
            newer, established = stack.enter_context(chat(server, path))
            assert (True, count) == (established["resumed"], established["count"])
            goodbye, code = closed(older)
            assert ("superseded", False, 4409) == (goodbye["reason"], goodbye["reconnect"], code)
            assert count + 1 == say(newer, "x")["count"]
            older = newer


def test_a_session_that_is_not_there_is_made(server: Running) -> None:
    """A stranger gets one with another id, a user the one that he has named; both are told."""
    with chat(server, f"/?session_id={NOBODY}") as (socket, first):
        assert (False, "expired", 0) == (first["resumed"], first["reason"], first["count"])
        assert NOBODY != first["session_id"]
        assert 1 == say(socket, "x")["count"]
    mine = str(uuid.uuid4())
    with chat(server, f"/?session_id={mine.upper()}", user="ann") as (_, first):
        assert (False, "expired", mine) == (
            first["resumed"],
            first["reason"],
            first["session_id"],
        )


def test_a_message_that_is_sent_again_is_counted_once(server: Running) -> None:
    """What has an id and came before is answered with its old count, also after a reconnect."""
    message = '{"type":"message","payload":1,"id":"m-%d"}'
    with chat(server) as (socket, first):
        assert [1, 2, 3] == [say(socket, message % number)["count"] for number in range(3)]
        answer = say(socket, message % 1)
        assert (2, True, "m-1") == (answer["count"], answer["repeated"], answer["id"])
    with chat(server, f"/?session_id={first['session_id']}") as (socket, again):
        assert 3 == again["count"]
        assert (1, True) == (
            (answer := say(socket, message % 0))["count"],
            answer["repeated"],
        )
        answer = say(socket, message % 7)
        assert (4, False) == (answer["count"], "repeated" in answer)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/?session_id=7", 400),
        ("/?session_id=", 101),
        ("/a/b", 404),
        ("/" + "x" * 65, 400),
        ("", 101),
    ],
)
def test_paths_that_there_are(server: Running, path: str, status: int) -> None:
    """What cannot be a session or a label is refused before the upgrade."""
    if status == 101:
        with chat(server, path):
            return
    with pytest.raises(InvalidStatus) as caught, connect(chat_url(server, path)):
        pass
    assert status == caught.value.response.status_code


def test_strangers_may_be_kept_out(tmp_path: Path) -> None:
    """With CHAT_ANONYMOUS=false the first message is auth, and nothing is counted before it."""
    environ = {"CHAT_ANONYMOUS": "false", "AUTH_TIMEOUT": "1s"}
    with running(tmp_path, workers=1, environ=environ) as server:
        with connect(chat_url(server)) as socket:
            assert "unauthenticated" == say(socket, "hello")["code"]
            established = say(socket, json.dumps({"type": "auth", "token": token("ann")}))
            assert ("ann", 0) == (established["user"], established["count"])
            assert 1 == say(socket, "hello")["count"]
        with connect(chat_url(server)) as socket:
            assert 4408 == closed(socket)[1]


def test_without_redis_the_connection_lives(tmp_path: Path) -> None:
    """Messages are answered ``unavailable``; when Redis is back, counting goes on where it was."""
    with running(tmp_path, workers=1) as server, chat(server) as (socket, first):
        assert 1 == say(socket, "x")["count"]
        status = server.status()
        assert status is not None
        redis = status["redis"]["pid"]
        os.kill(redis, signal.SIGSTOP)
        try:
            answer = say(socket, '{"type":"message","ref":"r"}')
            assert ("error", "unavailable", "r") == (
                answer["type"],
                answer["code"],
                answer["ref"],
            )
            assert answer["retry_after_ms"] > 0
            with connect(chat_url(server)) as late:
                established = receive(late)
                assert ("unavailable", None) == (established["reason"], established["count"])
                os.kill(redis, signal.SIGCONT)
                established = receive(late)
                assert ("connection_established", 0) == (
                    established["type"],
                    established["count"],
                )
        finally:
            os.kill(redis, signal.SIGCONT)

        def counted() -> int | None:
            answer = say(socket, "again")
            return answer["count"] if answer["type"] == "message_response" else None

        assert 2 == eventually(counted, 10, "counted again")
    assert 4 == uuid.UUID(first["session_id"]).version
