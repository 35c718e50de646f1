"""The nemesis: what breaks when, decided by a seed alone, and then done.

`schedule` is pure: the same seed gives the same blows on every machine. What they meet depends on
the moment, so a replay repeats the blows, not each race; it is repeated until it is caught.
"""

import random
import signal
from collections.abc import Sequence
from enum import Enum
from typing import Final

import attrs
import trio

from tests.ledger.clients import Client
from tests.ledger.stage import Stage


class Kind(Enum):
    """What can be done to a running system."""

    WORKER_KILL = "kill a worker"
    WORKER_PAUSE = "stop a worker for a while"
    REDIS_KILL = "kill Redis, start it again after a while"
    REDIS_PAUSE = "stop Redis for a while"
    PUBSUB_KILL = "have Redis drop all subscriptions"
    DEAF = "make all subscriptions deaf"
    CUT = "cut some clients"
    FREEZE = "let some clients read no more, then cut them"
    RELOAD = "reload"


WEIGHTS: Final = {
    Kind.WORKER_KILL: 2,
    Kind.WORKER_PAUSE: 1,
    Kind.REDIS_KILL: 2,
    Kind.REDIS_PAUSE: 1,
    Kind.PUBSUB_KILL: 3,
    Kind.DEAF: 1,
    Kind.CUT: 3,
    Kind.FREEZE: 2,
    Kind.RELOAD: 1,
}

DURATIONS: Final = {
    Kind.WORKER_PAUSE: (0.5, 2.0, 3.0),
    Kind.REDIS_KILL: (0.2, 0.2, 3.0),
    Kind.REDIS_PAUSE: (0.3, 1.5),
    Kind.FREEZE: (0.3, 1.5),
}
"""Seconds that are chosen from. A worker that is silent for five is given up by the supervisor."""

PAUSES: Final = (0.1, 2.0)
"""Least and longest time between two blows."""

KILLS_PER_SLOT: Final = 2
"""A slot whose worker dies again and again is filled later and later, as it should be."""

RELOAD_SECONDS: Final = 6.0
"""Between two reloads: a second one while the first is under way is refused."""

SHARES: Final = (0.05, 0.1, 0.3)
"""Of the clients that are cut."""


@attrs.frozen(kw_only=True)
class Blow:
    """One thing that breaks.

    Attributes:
        at: Seconds from the beginning.
        kind: What.
        seconds: How long it lasts, where it lasts.
        slot: Whose worker.
        share: Of the clients.
        seed: Decides which clients.
    """

    at: float
    kind: Kind
    seconds: float = 0.0
    slot: int = 0
    share: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        details = {
            Kind.WORKER_KILL: f"slot {self.slot}",
            Kind.WORKER_PAUSE: f"slot {self.slot}, {self.seconds} s",
            Kind.REDIS_KILL: f"{self.seconds} s",
            Kind.REDIS_PAUSE: f"{self.seconds} s",
            Kind.CUT: f"{self.share:.0%} of them",
            Kind.FREEZE: f"{self.share:.0%} of them, {self.seconds} s",
        }
        return f"{self.at:6.2f} s  {self.kind.value}  {details.get(self.kind, '')}".rstrip()


def schedule(
    seed: int, seconds: float, *, workers: int = 2, kinds: Sequence[Kind] = tuple(Kind)
) -> tuple[Blow, ...]:
    """Return what breaks within so many seconds.

    What would only hide something else is left out: nothing is done to Redis while it is away, a
    slot is not struck while its worker is stopped, nor oftener than the supervisor forgives.
    """
    dice = random.Random(f"nemesis {seed}")
    weights = [WEIGHTS[kind] for kind in kinds]
    free = {"redis": 0.0, "reload": 0.0} | {f"slot {slot}": 0.0 for slot in range(workers)}
    kills = dict.fromkeys(range(workers), 0)
    blows: list[Blow] = []
    at = 0.0
    while (at := at + dice.uniform(*PAUSES)) < seconds:
        kind = dice.choices(kinds, weights)[0]
        blow = Blow(
            at=round(at, 2),
            kind=kind,
            seconds=dice.choice(DURATIONS.get(kind, (0.0,))),
            slot=dice.randrange(workers),
            share=dice.choice(SHARES),
            seed=dice.getrandbits(32),
        )
        victim, busy = _victim(blow)
        if victim and at < free[victim]:
            continue
        if kind is Kind.WORKER_KILL:
            kills[blow.slot] += 1
            if kills[blow.slot] > KILLS_PER_SLOT:
                continue
        if victim:
            free[victim] = at + busy
        blows.append(blow)
    return tuple(blows)


def _victim(blow: Blow) -> tuple[str, float]:
    """Return what a blow keeps busy, and for how long; nothing if it may come any time."""
    match blow.kind:
        case Kind.REDIS_KILL | Kind.REDIS_PAUSE:
            return "redis", blow.seconds + 1.0
        case Kind.PUBSUB_KILL | Kind.DEAF:
            return "redis", 0.0
        case Kind.WORKER_KILL | Kind.WORKER_PAUSE:
            return f"slot {blow.slot}", blow.seconds + 1.0
        case Kind.RELOAD:
            return "reload", RELOAD_SECONDS
        case Kind.CUT | Kind.FREEZE:
            return "", 0.0


class Nemesis:
    """Does what a schedule says.

    Args:
        stage: What it is done to.
        clients: Those that can be cut.
    """

    def __init__(self, stage: Stage, clients: Sequence[Client]) -> None:
        self._stage = stage
        self._clients = clients

    async def strike_all(self, blows: Sequence[Blow]) -> None:
        """Strike each blow in its time; return when the last is over."""
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for blow in blows:
                await trio.sleep_until(began + blow.at)
                nursery.start_soon(self.strike, blow)

    async def strike(self, blow: Blow) -> None:
        """Strike one blow; return when it is over, not when it is healed."""
        stage, redis = self._stage, self._stage.redis
        match blow.kind:
            case Kind.WORKER_KILL:
                await _call(stage.signal_worker, blow.slot, signal.SIGKILL)
            case Kind.WORKER_PAUSE:
                await self._pause_worker(blow)
            case Kind.REDIS_KILL:
                await _call(redis.kill)
                await trio.sleep(blow.seconds)
                await _call(redis.start)
            case Kind.REDIS_PAUSE:
                redis.pause()
                await trio.sleep(blow.seconds)
                redis.resume()
            case Kind.PUBSUB_KILL:
                await _call(redis.command, "CLIENT", "KILL", "TYPE", "pubsub")
            case Kind.DEAF:
                stage.proxy.deafen()
            case Kind.CUT | Kind.FREEZE:
                await self._cut(blow)
            case Kind.RELOAD:
                stage.server.process.send_signal(signal.SIGHUP)

    async def _pause_worker(self, blow: Blow) -> None:
        pid = await _call(self._stage.signal_worker, blow.slot, signal.SIGSTOP)
        if pid is not None:
            await trio.sleep(blow.seconds)
            await _call(self._stage.wake, pid)

    async def _cut(self, blow: Blow) -> None:
        dice = random.Random(blow.seed)
        chosen = [client for client in self._clients if dice.random() < blow.share]
        if blow.kind is Kind.FREEZE:
            for client in chosen:
                client.freeze()
            await trio.sleep(blow.seconds)
        for client in chosen:
            client.cut(reset=dice.random() < 0.5)


_call = trio.to_thread.run_sync
