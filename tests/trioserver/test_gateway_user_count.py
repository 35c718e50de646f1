"""The number of users that the gateway knows: it follows Redis, and is none without it."""

from pathlib import Path

import pytest
import trio

from tests.redis_server import RedisServer, wait_until
from trioserver import fleet, users
from trioserver.endpoint import Endpoint
from trioserver.gateway import user_count
from trioserver.gateway.user_count import UserCount
from trioserver.redis_link import open_link

SECONDS = 15.0
"""For what takes a moment."""


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks often here."""
    monkeypatch.setattr(user_count, "ASK_SECONDS", 0.1)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("loss", ["refusal", "silence", "end", "memory"])
async def test_it_follows_redis(tmp_path: Path, loss: str) -> None:
    """What Redis says is known when it was asked; while it knows nothing, nothing is."""
    counted = UserCount()
    assert counted.latest is None
    with RedisServer(tmp_path / "redis") as redis, trio.fail_after(4 * SECONDS):
        async with (
            open_link(Endpoint(path=str(redis.path))) as link,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(counted.run, link)
            redis.command("ZADD", fleet.LIVES_KEY, 1 << 50, "aa.1.1")
            await wait_until(lambda: counted.latest == 0, SECONDS)
            redis.command("PFADD", users.key("aa.1.1"), "ann", "bob")
            redis.command("DEL", users.COUNT_KEY)
            await wait_until(lambda: counted.latest == 2, SECONDS)
            if loss == "memory":
                redis.command("FLUSHALL")
            elif loss == "refusal":
                redis.command("DEL", users.key("aa.1.1"), users.COUNT_KEY)
                redis.command("RPUSH", users.key("aa.1.1"), "junk")
            elif loss == "silence":
                redis.pause()
            else:
                redis.kill()
            await wait_until(lambda: counted.latest is None, SECONDS)
            nursery.cancel_scope.cancel()


def test_two_seconds_old_at_most() -> None:
    """Between questions, for the answer to one, and as long as it was kept in Redis."""
    age = user_count.ASK_SECONDS + user_count.ANSWER_SECONDS + users.KEPT_MS / 1000
    assert age <= 2.0
