"""Whoever stops waiting for the ledger costs nobody else the right answer."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.redis_server import RedisServer
from tests.toxic import Toxic
from tests.trioserver.ledger_calls import Caller
from trioserver import ledger, scripting
from trioserver.endpoint import Endpoint
from trioserver.ledger import Command, Notification, Rules
from trioserver.redis_link import RedisLink, open_link

RULES: Final = Rules()
USERS: Final = 40
DEVICE: Final = "phone"
LATENCY_SECONDS: Final = 0.025
"""In each direction."""

PATIENCES: Final = (0.001, 0.02, 0.045, 0.055, 0.07, 9.0)
"""Seconds after which a caller stops waiting: before the command has left, on its way, on the way
back, and never.
"""

LIMIT: Final = 55.0
LONG_LIMIT: Final = 280.0


def notification(number: int) -> Notification:
    """Return something new for a user."""
    user = f"user-{number}"
    return Notification(
        user=user,
        payload=b'{"user":%d}' % number,
        ttl_ms=60_000,
        id=ledger.new_id(ledger.partition(user), 0),
    )


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis where user n has n + 1 notifications, all of them acknowledged."""
    with RedisServer(tmp_path) as server, Caller(server.path) as caller:
        for number in range(USERS):
            place = ""
            for _ in range(number + 1):
                told = ledger.accepted(
                    caller.run(ledger.publish(notification(number), rules=RULES))
                )
                place = told.position.removeprefix("1.")
            caller.run(
                ledger.report(
                    f"user-{number}",
                    rules=RULES,
                    device=DEVICE,
                    sent=place,
                    received=place,
                    acked_seq=number + 1,
                )
            )
        yield server


class Asker:
    """One user who asks for what only it can get, and often stops waiting."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.user = f"user-{number}"
        self.right = self.cancelled = 0
        self._dice = random.Random(number)

    async def ask(self, link: RedisLink, rounds: int) -> None:
        """Ask so many times."""
        for _ in range(rounds):
            with trio.move_on_after(self._dice.choice(PATIENCES)) as scope:
                await self._dice.choice((self._publish, self._look))(link)
                self.right += 1
            self.cancelled += scope.cancelled_caught

    async def _publish(self, link: RedisLink) -> None:
        made = notification(self.number)
        (reply,) = await scripting.run(link, [ledger.publish(made, rules=RULES)], timeout=9)
        told = ledger.accepted(reply)
        assert (made.id, "accepted") == (told.id, told.outcome)

    async def _look(self, link: RedisLink) -> None:
        commands: list[Command] = [
            ("ECHO", self.user),
            ledger.read(self.user, device=DEVICE, point="", limit=20),
            ledger.report(self.user, rules=RULES, device=DEVICE),
        ]
        echo, read, report = await scripting.run(link, commands, timeout=9)
        assert self.user.encode() == echo
        payloads = {item.payload for item in ledger.page(read).items if hasattr(item, "payload")}
        assert {b'{"user":%d}' % self.number} >= payloads
        assert self.number + 1 == ledger.acked(report)


@pytest.mark.parametrize(
    ("questions", "limit"),
    [
        pytest.param(2_000, LIMIT, id="some"),
        pytest.param(
            20_000, LONG_LIMIT, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(300)]
        ),
    ],
)
async def test_cancelled_scripts_get_nobody_elses_reply(
    redis: RedisServer, questions: int, limit: float
) -> None:
    """Cancelled anywhere on a slow way, pipelines and scripts included: 0 wrong replies."""
    askers = [Asker(number) for number in range(USERS)]
    with trio.fail_after(limit):
        async with trio.open_nursery() as nursery:
            proxy = Toxic(("127.0.0.1", redis.port))
            await nursery.start(proxy.run)
            proxy.latency_seconds = LATENCY_SECONDS
            where = Endpoint(host="127.0.0.1", port=proxy.port)
            async with open_link(where, lanes=4) as link, trio.open_nursery() as asking:
                for asker in askers:
                    asking.start_soon(asker.ask, link, questions // USERS)
            nursery.cancel_scope.cancel()

    assert questions == sum(asker.right + asker.cancelled for asker in askers)
    assert sum(asker.cancelled for asker in askers) > questions / 5
    assert sum(asker.right for asker in askers) > questions / 5
