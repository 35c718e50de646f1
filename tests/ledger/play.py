"""A play: clients listen, publishers publish, the nemesis strikes; then it is healed and judged."""

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs
import trio

from tests.ledger.auditor import Verdict, audit
from tests.ledger.clients import Client, Memory
from tests.ledger.nemesis import Blow, Nemesis
from tests.ledger.publishers import every_way, publish_last, publishing
from tests.ledger.records import EVERYONE, Established, Journal, Outcome
from tests.ledger.stage import Stage
from tests.redis_server import wait_until

CONNECT_SECONDS: Final = 20.0
QUIET_SECONDS: Final = 25.0
"""For the last notification to reach everybody once all is healed. A client that has to come
back, a worker that is filled late and a probe that has to run out all fit into it."""

MOST_DUPLICATES: Final = 0.02
"""Of all receipts."""


@attrs.frozen(kw_only=True)
class Cast:
    """Who takes part.

    Attributes:
        users: How many.
        rate: Publishes per second, to all of them together.
        prefix: Of their names; a stage may see several plays.
    """

    users: int = 12
    rate: float = 30.0
    prefix: str = "u"

    def names(self) -> list[str]:
        """Return the users."""
        return [f"{self.prefix}{number}" for number in range(self.users)]

    def clients(self, stage: Stage) -> list[Client]:
        """Return the devices of all; users take turns in which they have."""
        clients: list[Client] = []
        for number, user in enumerate(self.names()):
            for memory, acks in DEVICES[number % len(DEVICES)]:
                name = f"{user}-{len(clients)}"
                clients.append(Client(stage.address, user, name, memory=memory, acks=acks))
        return clients


DEVICES: Final = (
    ((Memory.POSITION, False),),
    ((Memory.DEVICE, True),),
    ((Memory.DEVICE, False), (Memory.POSITION, False)),
    ((Memory.NONE, False),),
    ((Memory.DEVICE, True), (Memory.POSITION, True)),
)
"""What users have: each device with how it resumes and whether it acknowledges."""


@attrs.define(eq=False, kw_only=True)
class Play:
    """What happened.

    Attributes:
        journal: All of it.
        verdict: What the auditor says.
        clients: Those that took part.
        blows: What was done to them.
        replay: Says how to have the same again.
    """

    journal: Journal
    verdict: Verdict
    clients: Sequence[Client]
    blows: Sequence[Blow]
    replay: str

    def check(self, directory: Path, *, duplicates: float = MOST_DUPLICATES) -> None:
        """Fail if anything was lost, silent, out of order or too often.

        Args:
            directory: Where the logs of a failure are kept.
            duplicates: Part of all receipts that may have come before.
        """
        wrong = list(self._wrong(duplicates))
        if not wrong:
            return
        path = directory / "journal.jsonl"
        self.journal.dump(path)
        blows = "\n".join(str(blow) for blow in self.blows)
        raise AssertionError(
            f"{wrong}\n{self.verdict}\nthe nemesis:\n{blows}\n{self.replay}\njournal: {path}"
        )

    def _wrong(self, duplicates: float) -> Iterator[str]:
        verdict = self.verdict
        yield from verdict.findings
        if verdict.duplicate_share > duplicates:
            yield "too many duplicates"
        for client in self.clients:
            # It says itself where it stopped: nobody has to guess.
            if client.memory is Memory.POSITION and verdict.doubled[client.life.name]:
                yield f"duplicates for {client.life.name}, which keeps its position"
        for client in self.clients:
            established = [one for one in client.life.events if isinstance(one, Established)]
            named = client.memory is not Memory.NONE
            if named and not all(
                one.resumed or one.reason == "unavailable" for one in established[1:]
            ):
                yield f"{client.life.name} was not resumed"
        if verdict.announced:
            yield "gaps, though nothing was gone"
        if verdict.outcomes[Outcome.ACCEPTED] < verdict.outcomes.total() / 2:
            yield "too little was accepted"


@contextlib.asynccontextmanager
async def listening(journal: Journal, clients: Sequence[Client]) -> AsyncIterator[None]:
    """Have ``clients`` listen for the time of the block; all are connected when it begins."""
    journal.lives = [client.life for client in clients]
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(client.run)
        await wait_until(lambda: all(client.connected for client in clients), CONNECT_SECONDS)
        yield
        nursery.cancel_scope.cancel()


async def play(
    stage: Stage, cast: Cast, seconds: float, blows: Sequence[Blow] = (), *, replay: str = ""
) -> Play:
    """Play for so many seconds, or until the last blow is over; then heal, wait, and judge.

    Args:
        stage: Where.
        cast: Who.
        seconds: For how long is published.
        blows: What is done meanwhile.
        replay: Says how to have the same again.
    """
    journal = Journal()
    clients = cast.clients(stage)
    users = cast.names()
    # Everybody gets half as many broadcasts as notifications of their own.
    whom = [*users, *users, EVERYONE]
    async with listening(journal, clients):
        began = trio.current_time()
        with publishing(journal, every_way(stage.redis.url, stage.api), whom, cast.rate):
            await Nemesis(stage, clients).strike_all(blows)
            await trio.sleep_until(began + seconds)
        await trio.to_thread.run_sync(stage.heal)
        await quiesce(stage, journal, clients)
    verdict = audit(journal.publishes, journal.lives)
    return Play(journal=journal, verdict=verdict, clients=clients, blows=blows, replay=replay)


async def quiesce(stage: Stage, journal: Journal, clients: Sequence[Client]) -> None:
    """Publish one last notification to everybody, and wait until all have got it.

    What came before the last one has come by then, or has been announced, or never will. Returns
    in any case: what did not come in time is lost, and the auditor says so.
    """
    users = {client.life.user for client in clients}
    last = await trio.to_thread.run_sync(
        publish_last, stage.redis.url, journal, [*sorted(users), EVERYONE]
    )

    def done() -> bool:
        return all({last[client.life.user], last[EVERYONE]} <= client.numbers for client in clients)

    with contextlib.suppress(AssertionError):
        await wait_until(done, QUIET_SECONDS)
