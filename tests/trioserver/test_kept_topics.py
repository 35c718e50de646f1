"""What servers say of topics, as publishers understand it."""

import attrs
import msgspec
import pytest

from tests.redis_server import RedisServer
from trioserver.kept_topics import KEY, LIFETIME_MS, asked, heard, said
from trioserver.ledger import TopicRules
from trioserver.topics import Patterns

RULES = TopicRules(durable=Patterns.of(["room.*", "status"]), max_length=7, ttl_ms=60_000)
OWN = TopicRules(max_payload=8, idempotency_ttl_ms=9)


def test_what_is_said_is_heard(redis: RedisServer) -> None:
    """Through Redis, as long as the word is good; what servers do not say is one's own."""
    assert heard(redis.command(*asked()), OWN) is None
    redis.command(*said(RULES))
    expected = attrs.evolve(RULES, max_payload=8, idempotency_ttl_ms=9)
    assert expected == heard(redis.command(*asked()), OWN)
    left = redis.command("PTTL", KEY)
    assert isinstance(left, int)
    assert LIFETIME_MS - 60_000 < left <= LIFETIME_MS


def test_that_nothing_is_kept_is_a_word_too() -> None:
    """Who hears it knows that every topic is live."""
    _, _, word, *_ = said(TopicRules())
    rules = heard(word, OWN)
    assert rules is not None
    assert not rules.durable


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"7",
        b"{}",
        b"\xff",
        msgspec.json.encode({"durable": ["a b"], "length": 1, "ttl": 1}),
        msgspec.json.encode({"durable": ["a"], "length": 0, "ttl": 1}),
        msgspec.json.encode({"durable": ["a"], "length": 1, "ttl": -1}),
        msgspec.json.encode({"durable": "a", "length": 1, "ttl": 1}),
        7,
        None,
    ],
)
def test_what_is_not_understood(reply: object) -> None:
    """It is as good as no word, and nothing is raised."""
    assert heard(reply, OWN) is None


def test_a_later_server_may_say_more() -> None:
    """What this release does not know is not looked at."""
    word = msgspec.json.encode({"durable": ["a"], "length": 1, "ttl": 2, "other": {}})
    rules = heard(word, OWN)
    assert rules is not None
    assert (("a",), 1, 2) == (rules.durable.texts, rules.max_length, rules.ttl_ms)
