"""Topics as their clients know them, on a real server with several workers."""

import contextlib
import json
import socket as socketlib
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import jwt
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.integration.clients import nothing_more, receive, url
from tests.running import SECRET, Running, eventually, running
from trioserver import kept_topics, resp
from trioserver.auth import sign
from trioserver.messages import MAX_DEPTH
from trioserver.settings import Settings

WORKERS: Final = 3
ENVIRON: Final = {
    "DURABLE_TOPICS": "news.**",
    "TOPIC_HISTORY_LENGTH": "5",
    "ANNOUNCED_TOPICS": "room.*",
    "PUBLIC_TOPICS": "status",
    "MAX_TOPICS_PER_CONNECTION": "4",
    "MAX_CONNECTIONS_PER_USER": "0",
}
Claim = Sequence[str] | Mapping[str, Sequence[str]]

EVERYTHING: Final[Claim] = {"subscribe": ["**"], "publish": ["**"]}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Some workers on the embedded Redis."""
    directory = tmp_path_factory.mktemp("topics")
    with running(directory, workers=WORKERS, environ=ENVIRON) as started:
        yield started


def token(user: str, topics: Claim) -> str:
    """Return a token that allows these topics."""
    settings = Settings(jwt_secret_key=SECRET)
    return sign(settings, user, time.time() + 600, topics=topics)


@contextlib.contextmanager
def member(
    server: Running, user: str, topics: Claim = EVERYTHING, query: str = ""
) -> Iterator[ClientConnection]:
    """Connect as somebody; the first message has been received."""
    headers = {"Authorization": f"Bearer {token(user, topics)}"}
    with connect(url(server, query), additional_headers=headers) as socket:
        assert "connection_established" == receive(socket)["type"]
        yield socket


def ask(socket: ClientConnection, **message: object) -> dict[str, Any]:
    """Send a request with a ref; return its answer, which comes next."""
    socket.send(json.dumps({"ref": "r", **message}))
    answer = receive(socket)
    assert "r" == answer.pop("ref")
    return answer


def subscribe(socket: ClientConnection, topic: str, **more: object) -> dict[str, Any]:
    """Subscribe; return the answer."""
    answer = ask(socket, type="subscribe", topic=topic, **more)
    assert ("subscribed", topic) == (answer["type"], answer["topic"])
    return answer


def publish(server: Running, topic: str, *payloads: str) -> None:
    """Publish from a back end."""
    for payload in payloads:
        done = server.run("publish", "--topic", topic, payload)
        assert (0, "") == (done.returncode, done.stderr)


def test_what_is_published_reaches_all_who_are_subscribed(fleet: Running) -> None:
    """On every worker, from a back end and from a client, and nobody else; then no more."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(member(fleet, f"user-{n}")) for n in range(8)]
        stranger = stack.enter_context(member(fleet, "stranger"))
        for socket in sockets:
            assert {"type": "subscribed", "topic": "chat.1"} == subscribe(socket, "chat.1")
        publish(fleet, "chat.1", '{"n":1}')
        for socket in sockets:
            got = receive(socket)
            assert ("notification", "chat.1", {"n": 1}) == (
                got["type"],
                got["topic"],
                got["payload"],
            )
            assert not {"from", "id", "seq", "position"} & set(got)
        say = {"type": "publish", "topic": "chat.1", "payload": "hi", "key": "k"}
        sockets[0].send(json.dumps(say))
        for socket in sockets:
            got = receive(socket)
            assert ("hi", "user-0", "k") == (got["payload"], got["from"], got["key"])
        sockets[0].send(json.dumps(say | {"exclude_self": True, "ref": "p"}))
        assert {"type": "publish", "topic": "chat.1", "ref": "p"} == receive(sockets[0])
        for socket in sockets[1:]:
            assert "hi" == receive(socket)["payload"]
        assert nothing_more(sockets[0])
        assert nothing_more(stranger)
        answer = ask(sockets[1], type="unsubscribe", topic="chat.1")
        assert {"type": "unsubscribed", "topic": "chat.1"} == answer
        publish(fleet, "chat.1", "2")
        assert 2 == receive(sockets[2])["payload"]
        assert nothing_more(sockets[1])


@pytest.mark.parametrize(
    ("topics", "request_", "code"),
    [
        ([], {"type": "subscribe", "topic": "a"}, "forbidden"),
        (["b.*"], {"type": "subscribe", "topic": "a"}, "forbidden"),
        (["b.*"], {"type": "subscribe", "topic": "b.c.d"}, "forbidden"),
        (["**"], {"type": "publish", "topic": "a", "payload": 1}, "forbidden"),
        ({"publish": ["a"]}, {"type": "subscribe", "topic": "a"}, "forbidden"),
        ({"publish": ["a"]}, {"type": "publish", "topic": "ab"}, "forbidden"),
        ({"publish": ["a"]}, {"type": "presence", "topic": "a"}, "forbidden"),
        (["**"], {"type": "subscribe", "topic": "a b"}, "bad_message"),
        (["**"], {"type": "subscribe"}, "bad_message"),
        (
            {"publish": ["**"]},
            {"type": "publish", "topic": "a", "payload": "x" * 11_000},
            "bad_message",
        ),
    ],
)
def test_what_a_token_does_not_allow(
    fleet: Running, topics: Claim, request_: dict[str, object], code: str
) -> None:
    """The right to publish and the right to subscribe are two; the connection lives."""
    with member(fleet, "ann", topics) as socket:
        answer = ask(socket, **request_)
        assert ("error", code) == (answer["type"], answer["code"])
        assert {"type": "subscribed", "topic": "status"} == subscribe(socket, "status")


def test_a_connection_has_so_many_topics(fleet: Running) -> None:
    """One more is refused, and there is room again when one was left."""
    with member(fleet, "ann") as socket:
        for number in range(4):
            subscribe(socket, f"chat.{number}")
        answer = ask(socket, type="subscribe", topic="chat.4")
        assert ("error", "too_many_topics") == (answer["type"], answer["code"])
        subscribe(socket, "chat.3")
        ask(socket, type="unsubscribe", topic="chat.0")
        subscribe(socket, "chat.4")


def test_a_token_joins_topics_by_itself(fleet: Running) -> None:
    """The client has to say nothing; another token on the open socket changes what it has."""
    with member(fleet, "ann", {"join": ["chat.7", "news.7"], "subscribe": ["chat.8"]}) as socket:
        joined = [receive(socket) for _ in range(2)]
        assert {"chat.7", "news.7"} == {one["topic"] for one in joined}
        assert {"subscribed"} == {one["type"] for one in joined}
        subscribe(socket, "chat.8")
        publish(fleet, "chat.7", "1")
        assert ("chat.7", 1) == ((got := receive(socket))["topic"], got["payload"])
        fresh = token("ann", {"join": ["news.7", "chat.9"]})
        socket.send(json.dumps({"type": "refresh", "token": fresh}))
        said = [receive(socket) for _ in range(4)]
        assert {
            ("token_refreshed", None, None),
            ("unsubscribed", "chat.7", "forbidden"),
            ("unsubscribed", "chat.8", "forbidden"),
            ("subscribed", "chat.9", None),
        } == {(one["type"], one.get("topic"), one.get("reason")) for one in said}


def test_a_durable_topic_goes_on_where_a_client_stopped(fleet: Running) -> None:
    """What was missed follows ``subscribed``; what is kept no more is a gap that says how much."""
    with member(fleet, "ann") as socket:
        first = subscribe(socket, "news.a")
        assert {"type", "topic", "position"} == set(first)
        publish(fleet, "news.a", "1", "2")
        got = [receive(socket) for _ in range(2)]
        assert [(1, 1), (2, 2)] == [(one["payload"], one["seq"]) for one in got]
    publish(fleet, "news.a", "3", "4")
    with member(fleet, "ann") as socket:
        again = subscribe(socket, "news.a", since=got[0]["position"])
        assert (True, got[0]["position"]) == (again["resumed"], again["position"])
        assert [2, 3, 4] == [receive(socket)["payload"] for _ in range(3)]
        assert nothing_more(socket)
        answer = ask(socket, type="publish", topic="news.a", payload=5, exclude_self=True)
        assert {"type", "topic", "id", "position"} == set(answer)
        assert nothing_more(socket)
    publish(fleet, "news.a", "6", "7", "8")
    with member(fleet, "ann") as socket:
        subscribe(socket, "news.a", since=got[0]["position"])
        gap = receive(socket)
        assert ("gap", "news.a", "trimmed", 2, 3, 2) == (
            gap["type"],
            gap["topic"],
            gap["reason"],
            gap["from_seq"],
            gap["to_seq"],
            gap["missing"],
        )
        got = [receive(socket) for _ in range(5)]
        assert [4, 5, 6, 7, 8] == [one["payload"] for one in got]
        assert [None, "ann", None, None, None] == [one.get("from") for one in got]
        assert 5 == len({one["id"] for one in got})
    with member(fleet, "bob") as socket:
        subscribe(socket, "news.a", since="start")
        assert [4, 5, 6, 7, 8] == [receive(socket)["payload"] for _ in range(5)]
        assert nothing_more(socket)
    with member(fleet, "bob") as socket:
        assert "resumed" not in subscribe(socket, "news.a", since="garbage")
        assert "gap" == receive(socket)["type"]


def test_who_is_there(fleet: Running) -> None:
    """A list and a count over all workers; in an announced topic comings and goings are told."""
    with contextlib.ExitStack() as stack:
        watcher = stack.enter_context(member(fleet, "ann", query="?device=d1&client_type=web"))
        subscribe(watcher, "room.1")
        event = receive(watcher)
        assert ("presence", "join", "ann", 1) == (
            event["type"],
            event["event"],
            event["user"],
            event["users"],
        )
        others = contextlib.ExitStack()
        with others:
            for name in ("bob", "bob", "carl"):
                subscribe(others.enter_context(member(fleet, name)), "room.1")
            came = [receive(watcher) for _ in range(2)]
            assert [("join", "bob"), ("join", "carl")] == [
                (one["event"], one["user"]) for one in came
            ]

            def complete() -> dict[str, Any] | None:
                answer = ask(watcher, type="presence", topic="room.1")
                return answer if answer["connections"] == 4 else None

            answer = eventually(complete, 10, "four connections")
            assert ("presence", 3) == (answer["type"], answer["users"])
            assert ["ann", "bob", "bob", "carl"] == [one["user"] for one in answer["members"]]
            assert ("d1", "web") == (
                answer["members"][0]["device"],
                answer["members"][0]["client_type"],
            )
        gone = [receive(watcher) for _ in range(2)]
        assert {("leave", "bob"), ("leave", "carl")} == {
            (one["event"], one["user"]) for one in gone
        }
        answer = ask(watcher, type="presence", topic="room.1")
        assert (1, 1) == (answer["connections"], answer["users"])


def test_several_messages_in_one_frame(fleet: Running) -> None:
    """A client that asks for it gets arrays; what is in them is complete and in order."""
    publications = [
        resp.pack("PUBLISH", "topic:chat.b", json.dumps({"payload": n})) for n in range(50)
    ]
    headers = {"Authorization": f"Bearer {token('ann', EVERYTHING)}"}
    with connect(url(fleet, "?batch=1"), additional_headers=headers) as socket:
        assert "connection_established" == json.loads(socket.recv(timeout=10))["type"]
        socket.send('{"type":"subscribe","topic":"chat.b"}')
        assert "subscribed" == json.loads(socket.recv(timeout=10))["type"]
        with redis_of(fleet) as pipe:
            pipe.sendall(b"".join(publications))
            got: list[dict[str, Any]] = []
            frames = 0
            while len(got) < 50:
                found = json.loads(socket.recv(timeout=10))
                frames += 1
                got.extend(found if isinstance(found, list) else [found])
        assert list(range(50)) == [one["payload"] for one in got]
        assert frames < 50


def test_a_terminal_of_its_own_knows_what_is_kept(fleet: Running) -> None:
    """It has nothing of the server's settings but where that is; what it publishes is kept."""
    environ = {name: value for name, value in fleet.environ.items() if name not in ENVIRON}
    command = [*fleet.command(), "publish", "--topic", "news.terminal", "1"]
    eventually(lambda: has_said(fleet), 10, "the server has said what is kept")
    for _ in range(2):
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=60, check=False
        )
        assert (0, "") == (done.returncode, done.stderr)
        assert done.stdout.startswith("accepted: t")
    with member(fleet, "ann") as socket:
        subscribe(socket, "news.terminal", since="start")
        assert [1, 2] == [receive(socket)["seq"] for _ in range(2)]


@pytest.mark.parametrize("topic", ["chat.deep", "news.deep"])
def test_what_may_be_said_comes(fleet: Running, topic: str) -> None:
    """Also nested as deeply as may be; more is refused, not dropped on the way."""
    say = {"type": "publish", "topic": topic, "ref": "p", "payload": 0}
    with member(fleet, "ann") as socket, member(fleet, "bob") as other:
        subscribe(other, topic)
        for depth, expected in ((MAX_DEPTH, "publish"), (MAX_DEPTH + 1, "error")):
            deep = "[" * depth + "]" * depth
            socket.send(json.dumps(say)[:-2] + deep + "}")
            assert expected == receive(socket)["type"]
        payload = receive(other)["payload"]
        depth = 0
        while payload:
            [payload] = payload
            depth += 1
        assert MAX_DEPTH - 1 == depth
        assert nothing_more(other)


def test_a_claim_that_is_none_locks_nobody_out(fleet: Running) -> None:
    """The token is good and grants no topics; the server's log says what is wrong, once."""
    with contextlib.ExitStack() as stack:
        for user in ("ann", "bob", "cy", "dan"):
            claims = {"sub": user, "exp": time.time() + 60, "topics": {"subscribe": "news.**"}}
            bearer = jwt.encode(claims, SECRET, algorithm="HS256")
            headers = {"Authorization": f"Bearer {bearer}"}
            socket = stack.enter_context(connect(url(fleet), additional_headers=headers))
            assert user == receive(socket)["user"]
            answer = ask(socket, type="subscribe", topic="news.claim")
            assert ("error", "forbidden") == (answer["type"], answer["code"])
    told = [line for line in fleet.log.splitlines() if "a token grants no topics" in line]
    assert 1 <= len(told) <= WORKERS
    assert all("the claim topics: " in line for line in told)


def test_topics_are_counted_while_somebody_is_subscribed(fleet: Running) -> None:
    """Each once per connection, over all workers; what was left, and who has gone, no more."""

    def subscriptions() -> float:
        _, page = fleet.get("/metrics")
        [line] = [one for one in page.decode().splitlines() if one.startswith("topic_subscr")]
        return float(line.split()[1])

    def counted(number: int) -> None:
        eventually(lambda: subscriptions() == number, 15, f"{number} subscriptions")

    counted(0)
    with member(fleet, "ann") as ann:
        with member(fleet, "bob") as bob:
            for socket in (ann, bob):
                for topic in ("chat.count", "news.count", "chat.count"):
                    subscribe(socket, topic)
            counted(4)
            ask(bob, type="unsubscribe", topic="chat.count")
            counted(3)
        counted(2)
    counted(0)


def has_said(server: Running) -> bool:
    """Return whether a worker has said which topics are kept."""
    with redis_of(server) as pipe:
        pipe.sendall(f"EXISTS {kept_topics.KEY}\r\n".encode())
        return pipe.recv(99) == b":1\r\n"


@contextlib.contextmanager
def redis_of(server: Running) -> Iterator[socketlib.socket]:
    """Connect to the embedded Redis, for inline commands."""
    with socketlib.socket(socketlib.AF_UNIX) as pipe:
        pipe.connect(str(server.data_dir / "redis.sock"))
        yield pipe
