"""A worker that says which topics are kept."""

import pytest
import trio

from tests.redis_server import RedisServer, free_port, wait_until
from trioserver import herald, kept_topics
from trioserver.endpoint import Endpoint
from trioserver.ledger import TopicRules
from trioserver.redis_link import open_link
from trioserver.topics import Patterns

LIMIT = 20.0
"""Seconds after which a test is stuck."""

RULES = TopicRules(durable=Patterns.of(["room.*"]))


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats itself at once."""
    monkeypatch.setattr(herald, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(herald, "LAST_PAUSE", 0.01)


class Worker:
    """Something with a herald."""

    def __init__(self) -> None:
        self.over = False
        self.done = False
        self.troubles: list[str] = []

    async def run(self, where: Endpoint) -> None:
        """Say what is kept until it is over."""
        async with open_link(where) as link:
            await herald.keep_saying(
                link, RULES, is_over=lambda: self.over, log_trouble=self.troubles.append
            )
        self.done = True


async def test_it_is_said_again_until_it_is_over(redis: RedisServer) -> None:
    """Also to a Redis that has lost its memory; not by a worker that is on its way out."""
    worker = Worker()

    def known() -> bool:
        return kept_topics.heard(redis.command(*kept_topics.asked()), RULES) == RULES

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run, Endpoint(path=str(redis.path)))
            await wait_until(known)
            redis.command("FLUSHALL")
            await wait_until(known)
            worker.over = True
            await wait_until(lambda: worker.done)
    assert [] == worker.troubles


async def test_a_redis_that_is_away_is_asked_again() -> None:
    """It is told, and is no reason to fall silent."""
    worker = Worker()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run, Endpoint(host="127.0.0.1", port=free_port()))
            await wait_until(lambda: len(worker.troubles) > 1)
            worker.over = True
