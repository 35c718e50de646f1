"""What cannot come any more is announced, exactly: nothing of it is silent."""

import threading
from collections.abc import Callable
from typing import Final

import pytest
import trio

from tests.ledger.auditor import Verdict, audit
from tests.ledger.clients import Client, Memory
from tests.ledger.play import listening, quiesce
from tests.ledger.publishers import Turns, accepted, publish_last, publish_many
from tests.ledger.records import Journal
from tests.ledger.stage import Stage
from tests.redis_server import wait_until
from tests.running import eventually
from trioserver import ledger
from trioserver.position import seq_of
from trioserver.publisher import Publisher

MEMORIES: Final = [Memory.POSITION, Memory.DEVICE]

Mishap = Callable[[Stage, Journal, str], None]
"""What happens while the client is away; blocks."""


async def come_back_after(stage: Stage, memory: Memory, user: str, mishap: Mishap) -> Verdict:
    """Have a client receive something, stay away during a mishap, and come back."""
    journal = Journal()
    client = Client(stage.address, user, f"{user}-device", memory=memory)
    url = stage.redis.url
    async with listening(journal, [client]):
        last = await trio.to_thread.run_sync(publish_last, url, journal, [user])
        await wait_until(lambda: set(last.values()) <= client.numbers)
        if memory is Memory.DEVICE:
            # The server, too, must know that it has arrived.
            await wait_until(lambda: _received_seq(stage, user, client.life.name) == 1)
        client.leave()
        await trio.to_thread.run_sync(mishap, stage, journal, user)
        client.come_back()
        await wait_until(lambda: journal.publishes[-1].number in client.numbers)
        await quiesce(stage, journal, [client])
    verdict = audit(journal.publishes, journal.lives)
    assert {} == verdict.findings, verdict
    return verdict


def _received_seq(stage: Stage, user: str, device: str) -> int:
    """Return what the ledger believes that a device has received."""
    record = stage.redis.command("HGET", ledger.key("cursors", user), f"d:{device}")
    assert isinstance(record, bytes)
    return seq_of(record.split()[1].decode())


@pytest.mark.parametrize("memory", MEMORIES)
async def test_what_was_pushed_out(shared_stage: Stage, memory: Memory) -> None:
    """1,500 notifications come for somebody who is away: 500 and their place are announced."""

    def mishap(stage: Stage, journal: Journal, user: str) -> None:
        publish_many(stage.redis.url, journal, [user], 1500)

    verdict = await come_back_after(shared_stage, memory, f"pushed-{memory.value}", mishap)

    assert {"trimmed": 1} == verdict.announced
    assert (500, 0) == (verdict.missing, verdict.duplicates)


@pytest.mark.parametrize("memory", MEMORIES)
async def test_what_has_expired(shared_stage: Stage, memory: Memory) -> None:
    """Two of four expire while somebody is away: two gaps of one."""

    def mishap(stage: Stage, journal: Journal, user: str) -> None:
        turns = Turns(journal, "mishap", [user], 1.0, threading.Event())
        with Publisher(stage.redis.url) as publisher:
            for ttl in (1, 60, 1, 60):
                turn = turns.take(user)
                told = publisher.publish({"n": turn.number}, user=user, ttl=ttl)
                turns.done(turn, accepted(told))
        # Nobody reads meanwhile: it is the gateway's clock that lets them expire.
        key = ledger.notification_key(journal.publishes[-2].id)
        assert key is not None
        eventually(lambda: stage.redis.command("HGET", key, "state") == b"expired", 10, "expired")

    verdict = await come_back_after(shared_stage, memory, f"expired-{memory.value}", mishap)

    assert {"expired": 2} == verdict.announced
    assert (2, 0) == (verdict.missing, verdict.duplicates)


@pytest.mark.parametrize("memory", MEMORIES)
async def test_what_somebody_has_deleted(shared_stage: Stage, memory: Memory) -> None:
    """An entry vanishes from the middle of a stream: a gap of one, in its place."""

    def mishap(stage: Stage, journal: Journal, user: str) -> None:
        publish_many(stage.redis.url, journal, [user], 5)
        inbox = ledger.key("inbox", user)
        entries = stage.redis.command("XRANGE", inbox, "-", "+")
        assert isinstance(entries, list)
        assert 1 == stage.redis.command("XDEL", inbox, entries[3][0])

    verdict = await come_back_after(shared_stage, memory, f"deleted-{memory.value}", mishap)

    assert (1, 1) == (verdict.announced.total(), verdict.missing)
    assert 0 == verdict.duplicates


@pytest.mark.parametrize("memory", MEMORIES)
async def test_what_redis_has_evicted(shared_stage: Stage, memory: Memory) -> None:
    """The record of a user is gone: a new epoch, announced before anything else comes."""

    def mishap(stage: Stage, journal: Journal, user: str) -> None:
        publish_many(stage.redis.url, journal, [user], 2)
        assert 1 == stage.redis.command("DEL", ledger.key("meta", user))
        publish_many(stage.redis.url, journal, [user], 2)

    verdict = await come_back_after(shared_stage, memory, f"evicted-{memory.value}", mishap)

    assert {"epoch": 1} == verdict.announced
