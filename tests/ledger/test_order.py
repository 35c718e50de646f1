"""Order: many publish to the same users at once, two workers deliver, everybody sees one order."""

import pytest
import trio

from tests.ledger.auditor import audit
from tests.ledger.clients import Client, Memory
from tests.ledger.play import listening, quiesce
from tests.ledger.publishers import every_way, publishing
from tests.ledger.records import EVERYONE, Journal, Outcome, Receipt
from tests.ledger.stage import Stage

DEVICES = 6
"""Of each user: with two workers, some on each."""


@pytest.mark.parametrize("seconds", [3.0, pytest.param(20.0, marks=pytest.mark.slow)])
async def test_every_device_sees_the_order_that_publishers_were_told(
    shared_stage: Stage, seconds: float
) -> None:
    """The ids on each connection are those accepted, by their seq; broadcasts likewise."""
    journal = Journal()
    users = [f"o{seconds}-a", f"o{seconds}-b"]
    clients = [
        Client(shared_stage.address, user, f"{user}{number}", memory=Memory.POSITION)
        for user in users
        for number in range(DEVICES)
    ]
    ways = every_way(shared_stage.redis.url, shared_stage.api)
    # Twice each: at least eight publishers with several under way.
    speakers = {f"{name}{twin}": speak for name, speak in ways.items() for twin in "ab"}
    async with listening(journal, clients):
        with publishing(journal, speakers, [*users, EVERYONE], 300.0):
            await trio.sleep(seconds)
        busy = [one["connections"] for one in shared_stage.status()["workers"]]
        await quiesce(shared_stage, journal, clients)

    assert 0 not in busy, "both workers deliver"
    verdict = audit(journal.publishes, journal.lives)
    assert {} == verdict.findings, verdict
    assert {Outcome.ACCEPTED} == set(verdict.outcomes)
    assert verdict.outcomes.total() > 100 * seconds, "publishers competed"
    for client in clients:
        (connection,) = client.life.connections
        for owner in (client.life.user, EVERYONE):
            stream = "all" if owner == EVERYONE else "own"
            expected = [
                one.id
                for one in sorted(journal.publishes, key=lambda one: one.place.seq)
                if one.user == owner
            ]
            seen = [
                event.id
                for event in connection
                if isinstance(event, Receipt) and event.stream == stream
            ]
            assert expected == seen
