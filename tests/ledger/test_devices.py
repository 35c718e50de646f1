"""Devices that were there once and got nothing: what came while they were away is theirs."""

import pytest
import trio

from tests.ledger.auditor import audit
from tests.ledger.clients import Client, Memory
from tests.ledger.play import listening, quiesce
from tests.ledger.publishers import publish_last
from tests.ledger.records import EVERYONE, Journal
from tests.ledger.stage import Stage
from tests.redis_server import wait_until


@pytest.mark.parametrize("acks", [False, True], ids=["quiet", "acks"])
@pytest.mark.parametrize("memory", Memory, ids=[memory.value for memory in Memory])
async def test_who_was_greeted_and_left_gets_what_came_meanwhile(
    shared_stage: Stage, memory: Memory, *, acks: bool
) -> None:
    """Its own notifications and broadcasts, also if it had never got one before."""
    user = f"greeted-{memory.value}-{acks}"
    journal = Journal()
    client = Client(shared_stage.address, user, f"{user}-1", memory=memory, acks=acks)
    # Another device of the user stays, so that the user has received everything.
    other = Client(shared_stage.address, user, f"{user}-2", memory=Memory.DEVICE)
    clients = [client] if memory is Memory.NONE else [client, other]
    url = shared_stage.redis.url
    async with listening(journal, clients):
        client.leave()
        last = await trio.to_thread.run_sync(publish_last, url, journal, [user, EVERYONE])
        for one in clients[1:]:
            await wait_until(lambda one=one: set(last.values()) <= one.numbers)  # type: ignore[misc]
        client.come_back()
        await quiesce(shared_stage, journal, clients)

    verdict = audit(journal.publishes, journal.lives)
    assert {} == verdict.findings, verdict
    assert not verdict.announced
    assert 0 == verdict.duplicates
