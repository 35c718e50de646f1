"""Each fault alone, under publishes from every side: nothing is lost, nothing is silent."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.ledger.nemesis import Blow, Kind
from tests.ledger.play import Cast, play
from tests.ledger.stage import Stage

AFTER_SECONDS: Final = 0.7
"""For how long is published after the last blow."""

FAULTS: Final[Mapping[str, Sequence[Blow]]] = {
    "none": (),
    "worker-kill": (
        Blow(at=0.5, kind=Kind.WORKER_KILL, slot=0),
        Blow(at=1.0, kind=Kind.WORKER_KILL, slot=1),
    ),
    "worker-pause": (Blow(at=0.5, kind=Kind.WORKER_PAUSE, slot=0, seconds=2.0),),
    "redis-kill-short": (Blow(at=0.5, kind=Kind.REDIS_KILL, seconds=0.2),),
    "redis-kill": (Blow(at=0.5, kind=Kind.REDIS_KILL, seconds=3.0),),
    "redis-pause": (Blow(at=0.5, kind=Kind.REDIS_PAUSE, seconds=1.5),),
    "pubsub-kill": tuple(Blow(at=0.5 + number / 2, kind=Kind.PUBSUB_KILL) for number in range(4)),
    "deaf": (Blow(at=0.5, kind=Kind.DEAF),),
    "cuts": tuple(
        Blow(at=0.3 + number / 4, kind=Kind.CUT, share=0.2, seed=number) for number in range(8)
    ),
    "frozen": (
        Blow(at=0.5, kind=Kind.FREEZE, share=0.4, seconds=1.5, seed=1),
        Blow(at=1.0, kind=Kind.FREEZE, share=0.4, seconds=1.5, seed=2),
    ),
    "reload": (Blow(at=0.5, kind=Kind.RELOAD),),
}

DISCONNECTING: Final = {"worker-kill", "cuts", "frozen", "reload"}
"""What clients notice; everything else they live through on their old connections."""

DISCONNECTED_DUPLICATES: Final = 0.3
"""So often within so short a time is nobody cut off in a life. A device that keeps no position is
believed to have received what a pong has confirmed, at most a second ago.
"""

_plays = itertools.count()


@pytest.mark.parametrize("fault", FAULTS)
async def test_one_fault_loses_nothing(shared_stage: Stage, tmp_path: Path, fault: str) -> None:
    """What was accepted reaches every device of its user, in order, and hardly anything twice."""
    cast = Cast(prefix=f"f{next(_plays)}-")
    blows = FAULTS[fault]
    over = max((blow.at + blow.seconds for blow in blows), default=0.5)

    result = await play(shared_stage, cast, over + AFTER_SECONDS, blows)

    often = fault in DISCONNECTING
    result.check(tmp_path, duplicates=DISCONNECTED_DUPLICATES if often else 0.0)
    connections = {len(client.life.connections) for client in result.clients}
    assert often or {1} == connections, "nobody's connection is to blame"
    if fault == "reload":
        assert max(connections) <= 2, "nobody is dropped twice"


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_five_reloads_drop_everybody_five_times(fresh_stage: Stage, tmp_path: Path) -> None:
    """Each generation drops each connection once, and nothing of what was accepted is lost."""
    blows = [Blow(at=1 + 7.0 * number, kind=Kind.RELOAD) for number in range(5)]

    result = await play(fresh_stage, Cast(users=50, rate=100.0), blows[-1].at + 7, blows)

    result.check(tmp_path)
    assert 6 == fresh_stage.status()["generation"]
    assert {6} == {len(client.life.connections) for client in result.clients}
