"""How soon after a fault what is published arrives again."""

import threading
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.ledger.auditor import audit
from tests.ledger.clients import Client, Memory
from tests.ledger.nemesis import Blow, Kind
from tests.ledger.play import Cast, listening, play
from tests.ledger.publishers import Turns, publish_last, say
from tests.ledger.records import Journal
from tests.ledger.stage import Stage
from tests.redis_server import wait_until
from trioserver.publisher import Publisher
from trioserver.settings import Settings

BUSY: Final = 2.0
"""What a machine that runs other tests beside us may add to one second."""


def devices(stage: Stage, users: list[str]) -> list[Client]:
    """Return one client per user."""
    return [Client(stage.address, user, f"{user}-device", memory=Memory.DEVICE) for user in users]


async def arrives(stage: Stage, journal: Journal, clients: list[Client], seconds: float) -> float:
    """Publish to everybody's user; return the seconds until all have got it."""
    began = trio.current_time()
    users = [client.life.user for client in clients]
    last = await trio.to_thread.run_sync(publish_last, stage.redis.url, journal, users)
    await wait_until(
        lambda: all(last[client.life.user] in client.numbers for client in clients), seconds
    )
    return trio.current_time() - began


@pytest.mark.parametrize(
    "kills", [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(180)])]
)
async def test_a_dropped_subscription_is_back_within_a_second(
    shared_stage: Stage, kills: int
) -> None:
    """Each time Redis drops all subscriptions, what is published then arrives within a second."""
    journal = Journal()
    clients = devices(shared_stage, [f"r{kills}-{number}" for number in range(6)])
    async with listening(journal, clients):
        for _ in range(kills):
            shared_stage.redis.command("CLIENT", "KILL", "TYPE", "pubsub")
            assert await arrives(shared_stage, journal, clients, 10.0) < BUSY
        assert all(len(client.life.connections) == 1 for client in clients), "no client noticed"

    verdict = audit(journal.publishes, journal.lives)
    assert {} == verdict.findings, verdict
    assert 0 == verdict.duplicates
    assert not verdict.announced


async def test_what_was_announced_to_nobody_comes_with_the_next(shared_stage: Stage) -> None:
    """A notification whose announcement was lost is fetched, in its place, before the next."""
    journal = Journal()
    user = "unheard"
    redis = shared_stage.redis
    clients = devices(shared_stage, [user])
    async with listening(journal, clients):
        await arrives(shared_stage, journal, clients, 10.0)
        elsewhere = Settings(user_channel="elsewhere:{user}", data_dir=Path("/"))
        with Publisher(redis.url, settings=elsewhere) as publisher:
            turns = Turns(journal, "unheard", [user], 1.0, threading.Event())
            unheard = turns.take(user)
            turns.done(unheard, say(publisher, unheard.number, user))
        assert unheard.number not in clients[0].numbers
        await arrives(shared_stage, journal, clients, 10.0)

    verdict = audit(journal.publishes, journal.lives)
    assert {} == verdict.findings, verdict
    assert unheard.number in clients[0].numbers


@pytest.mark.parametrize("away", [0.2, pytest.param(3.0, marks=pytest.mark.slow)])
async def test_after_a_restart_of_redis_everything_is_soon_as_before(
    shared_stage: Stage, away: float
) -> None:
    """Once Redis answers again, what is published arrives within 2 s, on the old connections."""
    journal = Journal()
    redis = shared_stage.redis
    before = shared_stage.worker_pids()
    clients = devices(shared_stage, [f"s{away}-{number}" for number in range(6)])
    async with listening(journal, clients):
        await arrives(shared_stage, journal, clients, 10.0)
        await trio.to_thread.run_sync(redis.kill)
        await trio.sleep(away)
        await trio.to_thread.run_sync(redis.start)
        assert await arrives(shared_stage, journal, clients, 10.0) < 2 * BUSY
        assert all(len(client.life.connections) == 1 for client in clients), "no client noticed"
    assert before == shared_stage.worker_pids(), "Redis going away must not restart anybody"

    verdict = audit(journal.publishes, journal.lives)
    assert {} == verdict.findings, verdict


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_twenty_seconds_without_redis_lose_nothing(
    fresh_stage: Stage, tmp_path: Path
) -> None:
    """Redis is away for 20 s under 200 publishes per second: nothing is lost, nobody restarts."""
    before = fresh_stage.worker_pids()
    blow = Blow(at=3.0, kind=Kind.REDIS_KILL, seconds=20.0)

    result = await play(fresh_stage, Cast(users=100, rate=200.0), 28, [blow])

    result.check(tmp_path)
    assert before == fresh_stage.worker_pids()
    assert all(len(client.life.connections) == 1 for client in result.clients), "no client noticed"
