"""What the client is told about the ledger, and what is asked of it."""

from collections.abc import Iterator

import attrs
import hiredis
import pytest

from bench import backend, servers
from bench.client import BenchError
from bench.servers import Redis
from trioserver import ledger
from trioserver.ledger import Notification, Rules
from trioserver.resp import pack
from trioserver.settings import Settings


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """Return a Redis."""
    with servers.redis_serving(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


def parsed(packed: bytes) -> list[bytes]:
    """Return the words of a command."""
    reader = hiredis.Reader()
    reader.feed(packed)
    words: list[bytes] = reader.gets()
    return words


def test_template() -> None:
    """A filled template is the command that any back end sends, to the byte."""
    made = backend.publication(backend.template(), "u17", b'{"n":5}')

    words = parsed(made)
    notification = Notification(
        user="u17",
        payload=b'{"n":5}',
        id=words[words.index(b"id") + 1].decode(),
        ttl_ms=7 * ledger.DAY_MS,
    )
    rules = attrs.evolve(Rules.of(Settings()), rate=backend.RATE)
    assert pack(*ledger.publish(notification, rules=rules)) == made
    assert ledger.partition("u17") == ledger.partition_of(notification.id)


def test_unconfirmed(redis: Redis) -> None:
    """Whose newest notification is not received is counted, and nobody else."""
    records = {"u1": b"5-4096 5-4096 0-0 - 1", "u2": b"5-4096 0-0 0-0 - 1", "u3": None}
    for user, record in records.items():
        backend.ask(redis.port, [("HSET", ledger.key("meta", user), "last", "5-4096")])
        if record is not None:
            backend.ask(redis.port, [("HSET", ledger.key("cursors", user), "d:-", record)])
    backend.ask(redis.port, [("HSET", ledger.key("meta", "u4"), "last", "0-0")])

    assert [0, 0, 0, 1, 2, 2] == [backend.unconfirmed(redis.port, users) for users in range(6)]


def test_chat_counts(redis: Redis) -> None:
    """The count of every chat session is found, and of nothing else."""
    assert {} == backend.chat_counts(redis.port)
    for name, field in (("{one}", "n"), ("{two}", "n"), ("{broken}", "o")):
        backend.ask(redis.port, [("HSET", f"ts:session:{name}", field, "7")])

    assert {b"ts:session:{one}": 7, b"ts:session:{two}": 7} == backend.chat_counts(redis.port)


def test_errors(redis: Redis) -> None:
    """What Redis does not do, or nobody is there to do, is an expected error."""
    with pytest.raises(BenchError, match="WRONGTYPE"):
        backend.ask(redis.port, [("SET", "text", "x"), ("HGET", "text", "x")])
    with pytest.raises(BenchError, match="Redis"):
        backend.ask(servers.free_port(), [("PING",)])
