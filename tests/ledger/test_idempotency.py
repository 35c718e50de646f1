"""A publish whose answer got lost, repeated with the same key: one entry, one id."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio

from tests.ledger.publishers import Answer, post, say, say_async
from tests.ledger.records import Outcome
from tests.ledger.stage import Stage
from tests.redis_server import RedisServer
from tests.toxic import Toxic
from trioserver import ledger
from trioserver.publisher import Publisher, TrioPublisher

KEY: Final = "invoice-7"
NUMBER: Final = 7


def entries(redis: RedisServer, user: str) -> int:
    """Return how many notifications are in a user's inbox."""
    length = redis.command("XLEN", ledger.key("inbox", user))
    assert isinstance(length, int)
    return length


async def check_lost_answer(
    proxy: Toxic, redis: RedisServer, user: str, publish: Callable[[str, int], Awaitable[Answer]]
) -> None:
    """Publish three times with one key; of the first nobody hears what became of it."""
    warm = await publish(f"{user}-before", NUMBER)
    assert Outcome.ACCEPTED is warm.outcome, "Redis has the scripts, and there is a connection"

    proxy.mute_to_client = True
    lost = await publish(user, NUMBER)
    proxy.mute_to_client = False
    assert Outcome.UNKNOWN is lost.outcome
    assert 1 == entries(redis, user), "the answer was lost, not the question"

    told = [await publish(user, NUMBER) for _ in range(2)]
    assert {Outcome.ACCEPTED} == {answer.outcome for answer in told}
    assert 1 == len({(answer.id, answer.position) for answer in told})
    assert 1 == entries(redis, user)


async def test_the_blocking_and_the_trio_publisher(tmp_path: Path) -> None:
    """The reply to the first is swallowed; the next two get the id that the first has made."""
    with RedisServer(tmp_path) as redis:
        async with trio.open_nursery() as nursery:
            proxy = Toxic(("127.0.0.1", redis.port))
            await nursery.start(proxy.run)
            url = f"redis://127.0.0.1:{proxy.port}/0"

            with Publisher(url, deadline=1.0) as publisher:

                async def blocking(user: str, number: int) -> Answer:
                    return await trio.to_thread.run_sync(say, publisher, number, user, KEY)

                await check_lost_answer(proxy, redis, "ann", blocking)
            async with TrioPublisher.open(url, deadline=1.0) as other:

                async def awaited(user: str, number: int) -> Answer:
                    return await say_async(other, number, user, KEY)

                await check_lost_answer(proxy, redis, "bob", awaited)
            nursery.cancel_scope.cancel()


async def test_http(shared_stage: Stage) -> None:
    """The gateway does not hear Redis's answer and says 503; asked again, it is the first's."""

    async def requested(user: str, number: int) -> Answer:
        return await trio.to_thread.run_sync(post, shared_stage.api, number, user, KEY)

    await check_lost_answer(shared_stage.proxy, shared_stage.redis, "cleo", requested)
    await trio.to_thread.run_sync(shared_stage.heal)
