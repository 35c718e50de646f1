"""A worker that does not read while much is published: Redis cuts it off, and nothing is lost."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.ledger.auditor import audit
from tests.ledger.clients import Client, Memory
from tests.ledger.play import listening, quiesce
from tests.ledger.publishers import publish_many
from tests.ledger.records import Journal
from tests.ledger.stage import stage
from tests.redis_server import wait_until

USERS: Final = 20
PADDING: Final = "x" * 10_000
PAUSE_SECONDS: Final = 3.0
"""After five, the supervisor would wonder."""


@pytest.mark.parametrize(
    ("megabytes", "config"),
    [
        pytest.param(8, {"client-output-buffer-limit": "pubsub 2mb 1mb 10"}, id="some"),
        pytest.param(40, {}, id="much", marks=pytest.mark.slow),
    ],
)
async def test_a_worker_that_redis_cuts_off_for_being_slow_loses_nothing(
    tmp_path: Path, megabytes: int, config: Mapping[str, str]
) -> None:
    """Stopped for 3 s under megabytes of fan-out, it fetches from the streams what it missed."""
    with stage(tmp_path, workers=1, proxied=False, config=config) as built:
        journal = Journal()
        clients = [
            Client(built.address, f"u{number}", f"u{number}-device", memory=Memory.DEVICE)
            for number in range(USERS)
        ]
        users = [client.life.user for client in clients]
        async with listening(journal, clients):
            pid = built.signal_worker(0, signal.SIGSTOP)
            assert pid is not None
            began = trio.current_time()
            count = megabytes * 1_000_000 // len(PADDING)
            with trio.fail_after(12):
                await trio.to_thread.run_sync(
                    lambda: publish_many(built.redis.url, journal, users, count, padding=PADDING)
                )
            await wait_until(lambda: built.subscriptions() == 0)
            await trio.sleep_until(began + PAUSE_SECONDS)
            built.wake(pid)
            await quiesce(built, journal, clients)
        assert [pid] == built.worker_pids(), "the supervisor had no reason to end it"

    verdict = audit(journal.publishes, journal.lives)
    assert {} == verdict.findings, verdict
    assert not verdict.announced
    assert verdict.outcomes.total() == count + USERS + 1
