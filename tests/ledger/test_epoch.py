"""Redis loses everything: every session is told so, and none is left to believe it has it all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.ledger.auditor import audit
from tests.ledger.clients import Client, Memory
from tests.ledger.play import listening, quiesce
from tests.ledger.publishers import publish_last
from tests.ledger.records import ALL, EVERYONE, OWN, Gap, Journal
from tests.ledger.stage import Stage, stage
from tests.redis_server import wait_until

USERS = 8


def flush(built: Stage) -> None:
    """Forget everything, and go on."""
    built.redis.command("FLUSHALL")


def restart(built: Stage) -> None:
    """Crash, and come back with nothing."""
    built.redis.kill()
    built.redis.start()


@pytest.mark.parametrize("wipe", [flush, restart])
async def test_a_wiped_redis_is_announced_to_every_session(
    tmp_path: Path, wipe: Callable[[Stage], None]
) -> None:
    """Whoever is connected, or comes back with a position, gets a gap with reason epoch."""
    with stage(tmp_path, config={"appendonly": "no"}) as built:
        journal = Journal()
        clients = [
            Client(built.address, f"u{number}", f"u{number}-{memory.value}", memory=memory)
            for number in range(USERS)
            for memory in (Memory.POSITION, Memory.DEVICE)
        ]
        async with listening(journal, clients):
            await half_of_them_receive_something(built, journal, clients)
            # One that has received something, and one that has not.
            away = [client for client in clients[:4] if client.memory is Memory.POSITION]
            for client in away:
                client.leave()
            await trio.to_thread.run_sync(wipe, built)
            await trio.to_thread.run_sync(built.heal)
            for client in away:
                client.come_back()
            await quiesce(built, journal, clients)

    for client in clients:
        told = {
            event.stream
            for event in client.life.connections[-1]
            if isinstance(event, Gap) and event.reason == "epoch"
        }
        assert {OWN, ALL} == told, client.life
    verdict = audit(journal.publishes, journal.lives)
    assert {} == verdict.findings, verdict
    assert {"epoch"} == set(verdict.announced)


async def half_of_them_receive_something(
    built: Stage, journal: Journal, clients: list[Client]
) -> None:
    """Publish to every other user, and to everyone; return when it has arrived."""
    users = [client.life.user for client in clients[::4]]
    first = await trio.to_thread.run_sync(
        publish_last, built.redis.url, journal, [*users, EVERYONE]
    )

    def done() -> bool:
        return all(
            {first.get(client.life.user, 0), first[EVERYONE]} <= {0, *client.numbers}
            for client in clients
        )

    await wait_until(done)
