"""Both clients count the same, and exactly, whatever a server does."""

import contextlib
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jwt
import pytest

from bench import backend, client, servers
from bench.client import BenchError, Client, Program, Reply
from bench.servers import Other, Redis, Serving
from tests.bench.conftest import TOPIC
from trioserver import ledger
from trioserver.resp import pack

OTHER = Path(__file__).with_name("other_server.py")

Start = Callable[..., Client]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """Return a Redis."""
    with servers.redis_serving(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


@pytest.fixture(scope="module")
def serving(redis: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Return a server that makes faults on order."""
    directory = tmp_path_factory.mktemp("server")
    with Other(file=OTHER).serving(directory, redis.port) as serving:
        yield serving
        assert serving.healthy()


@pytest.fixture
def start(
    program: Program, redis: Redis, serving: Serving, tokens: Path, tmp_path: Path
) -> Iterator[Start]:
    """Return a function that runs a client against a server with these faults."""
    with contextlib.ExitStack() as stack:

        def start(*faults: str, connections: int = 0, tokens: Path = tokens) -> Client:
            publish(redis.port, "faults", json.dumps(faults))
            running = client.running(
                program,
                tmp_path,
                port=serving.port,
                redis_port=redis.port,
                tokens=tokens,
                patience_seconds=0.4,
            )
            started = stack.enter_context(running)
            opened = started.open(connections, 4, greets=False)
            assert (connections, 0) == (opened.units, opened.failed)
            return started

        yield start


def publish(port: int, channel: str, data: str) -> None:
    """Publish, and return when Redis has done it."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(pack("PUBLISH", channel, data))
        assert connection.recv(100).startswith(b":")


def counts(*replies: Reply) -> dict[str, int]:
    """Return what is not 0 of the sums over these replies."""
    names = ("lost", "doubled", "reordered", "failed")
    sums = {name: sum(getattr(reply, name) for reply in replies) for name in names}
    return {name: value for name, value in sums.items() if value}


def test_all_is_well(start: Start) -> None:
    """A server without faults gives counts of 0, and every unit is there."""
    client = start(connections=7)

    replies = [
        client.fanout(5, 200),
        client.unicast(33, 200, 10),
        client.echo(6),
        client.latency(50, 1000, 200)[0],
        client.paced(37, 2000)[0],
        client.echo(2),
        client.fanout(1, 60_000),
        client.counts(),
    ]

    assert [35, 33, 42, 50, 37, 14, 7, 0] == [reply.units for reply in replies]
    assert {} == counts(*replies)


def test_topic(start: Start, joining: Path) -> None:
    """What is published to a topic is counted for each connection that has joined it."""
    client = start(connections=7, tokens=joining)

    replies = [client.fanout(5, 200, TOPIC), client.fanout(3, 200), client.counts()]

    assert [35, 21, 0] == [reply.units for reply in replies]
    assert {} == counts(*replies)


def test_topic_faults(start: Start, joining: Path) -> None:
    """A notification that says it is of another topic is a failure; the rest as ever."""
    client = start("elsewhere", "doubled", connections=2, tokens=joining)

    replies = [client.fanout(10, 200, TOPIC), client.counts()]

    assert 20 == replies[0].units
    assert {"doubled": 2, "failed": 2} == counts(*replies)
    assert "not of this topic" in replies[0].trouble


def test_joining(start: Start, tokens: Path, joining: Path) -> None:
    """Whoever is to join is waited for, and who does not has lost something."""
    joined = start(tokens=joining).open(3, 2, greets=False, joins=True)
    missing = start(tokens=tokens).open(3, 2, greets=False, joins=True)

    assert (3, 3, {}) == (joined.units, joined.joined, counts(joined))
    assert (3, 0, {"lost": 3}) == (missing.units, missing.joined, counts(missing))


def test_paths(start: Start) -> None:
    """Connections go where they are told to; what is nowhere is a failure."""
    client = start()

    chat = client.open(2, 2, greets=False, path="/ws/chat/")
    nowhere = client.open(1, 1, greets=False, path="/nowhere")

    assert (2, {}) == (chat.units, counts(chat))
    assert (0, {"failed": 1}) == (nowhere.units, counts(nowhere))
    assert "404" in nowhere.trouble


def test_unicast_faults(start: Start) -> None:
    """Each lost, doubled, reordered or strange message is counted once, as what it is."""
    client = start("lost", "doubled", "reordered", "stray", connections=1)

    reply = client.unicast(20, 200, 20)

    assert 18 == reply.units
    expected = {"lost": 2, "doubled": 2, "reordered": 2, "failed": 2}
    assert expected == counts(reply, client.counts())
    assert "surprise" in reply.trouble


def test_durable(redis: Redis, start: Start) -> None:
    """What goes through the ledger is counted like the rest, phase after phase."""
    backend.make_known(redis.port)
    client = start(connections=7)
    template = backend.template()

    replies = [
        client.durable(33, 200, 10, template),
        client.unicast(5, 200, 5),
        client.durable(1, 200, 1, template),
        client.durable(50, 8_000, 50, template),
        client.counts(),
    ]

    assert [33, 5, 1, 50, 0] == [reply.units for reply in replies]
    assert {} == counts(*replies)


def test_durable_faults(redis: Redis, start: Start) -> None:
    """Faults are told apart; a number of the ledger that is not the right one is a failure."""
    backend.make_known(redis.port)
    client = start("lost", "doubled", "reordered", "misnumbered", connections=1)

    reply = client.durable(20, 200, 20, backend.template())

    expected = {"lost": 2, "doubled": 2, "reordered": 2, "failed": 2}
    assert expected == counts(reply, client.counts())
    assert "not its seq" in reply.trouble


def test_refused_publications(redis: Redis, start: Start) -> None:
    """What Redis does not accept is a failure, with its words, and is lost."""
    backend.make_known(redis.port)
    client = start(connections=2)

    reply = client.durable(3, 20_000, 3, backend.template())

    assert {"lost": 3, "failed": 3} == counts(reply)
    assert "BADREQUEST" in reply.trouble


def test_unknown_script(start: Start) -> None:
    """A Redis that does not know the script publishes nothing, and that is said."""
    unknown = backend.template().replace(ledger.SCRIPTS["publish"].sha.encode(), b"0" * 40)
    client = start(connections=1)

    reply = client.durable(1, 200, 1, unknown)

    assert {"lost": 1, "failed": 1} == counts(reply)
    assert "NOSCRIPT" in reply.trouble


def test_open_loop_faults(start: Start) -> None:
    """The open loop counts the same; a lost message has no latency."""
    client = start("lost", "doubled", connections=1)

    reply, late, latency = client.latency(20, 500, 200)

    assert {"lost": 2, "doubled": 2} == counts(reply, client.counts())
    assert [3, 13] == [number for number, one in enumerate(latency) if one < 0]
    assert all(0 <= one for one in late)
    assert all(before <= one for before, one in zip(late, latency, strict=True) if one >= 0)


def test_paced_faults(start: Start) -> None:
    """Answers of the open loop are counted like those of the closed one, and belong to one each."""
    client = start("lost", "doubled", connections=2)

    reply, late, latency = client.paced(19, 500)
    after = client.counts()

    # Each connection counts its own: number 3 is the third of both, and nothing waits for it.
    assert 17 == reply.units
    assert {"lost": 2, "doubled": 2} == counts(reply, after)
    assert [4, 5] == [number for number, one in enumerate(latency) if one < 0]
    assert all(0 <= one for one in late)
    assert all(before <= one for before, one in zip(late, latency, strict=True) if one >= 0)


def test_fanout_faults(start: Start) -> None:
    """Faults of a broadcast are counted for each connection; after a loss the rest is given up."""
    client = start("lost", "doubled", connections=3)

    first = client.fanout(6, 200)
    second = client.fanout(1, 200)

    assert 9 == first.units
    assert {"lost": 9} == counts(first)
    # Numbers go on, so this is the sixth.
    assert 3 == second.units
    assert {} == counts(second, client.counts())


def test_late_duplicates(start: Start) -> None:
    """What comes twice is counted, even when its phase is over."""
    client = start("doubled", connections=3)

    replies = [client.fanout(6, 200), client.fanout(1, 200), client.echo(1), client.counts()]

    assert {"doubled": 3} == counts(*replies)


def test_echo_faults(start: Start) -> None:
    """A missing answer loses all that would have followed it on its connection."""
    client = start("lost", connections=2)

    reply = client.echo(10)

    assert 4 == reply.units
    assert {"lost": 16} == counts(reply)


def test_doubled_answers(start: Start) -> None:
    """An answer that comes twice is counted, and asks for nothing more."""
    client = start("doubled", connections=2)

    replies = [client.echo(10), client.counts()]

    assert 20 == replies[0].units
    assert {"doubled": 2} == counts(*replies)


def test_closed_connections(start: Start) -> None:
    """The end of a connection is a failure, and what it would have got is lost."""
    client = start("closed", connections=2)

    reply = client.unicast(10, 200, 10)

    # Number 6 was for the first of two, and so was number 8.
    assert {"lost": 2, "failed": 1} == counts(reply, client.counts())


def test_refused_connections(start: Start, tmp_path: Path) -> None:
    """A refused handshake is a failure, with the server's words."""
    bad = tmp_path / "bad"
    bad.write_text(jwt.encode({"sub": "u0"}, "x" * 32) + "\n")
    client = start(tokens=bad)

    reply = client.open(1, 1, greets=False)

    assert 0 == reply.units
    assert {"failed": 1} == counts(reply)
    assert "401" in reply.trouble


def test_missing_greetings(start: Start) -> None:
    """A server that should greet and does not has lost something."""
    client = start()

    reply = client.open(2, 2, greets=True)

    assert (2, 0) == (reply.units, reply.greeted)
    assert {"lost": 2} == counts(reply)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_warnings_of_the_compiler(tmp_path: Path) -> None:
    """The compiler has nothing to say about the client."""
    source = Path(client.__file__).with_name("client.c")
    options = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror")

    done = subprocess.run(
        ["cc", *options, "-o", tmp_path / "client", source],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert "" == done.stderr


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the client is the one in Python, unless the other was asked for."""
    monkeypatch.setenv("PATH", str(tmp_path))

    assert "python" == client.program(tmp_path, None).kind
    with pytest.raises(BenchError, match="compiler"):
        client.program(tmp_path, "c")


def test_misunderstanding(start: Start) -> None:
    """A client that does not understand ends, and that is said."""
    client = start()

    with pytest.raises(BenchError, match="sing"):
        client._ask("sing")
