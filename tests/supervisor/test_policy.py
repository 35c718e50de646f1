"""The policy as tables of histories: this happened then, so that is done."""

import signal
from collections.abc import Sequence

import attrs
import pytest

from supervisor.events import (
    Action,
    Announce,
    Asked,
    Beat,
    Begin,
    CloseDoor,
    DrainTimes,
    DropSnapshot,
    Exit,
    Exited,
    Kill,
    Kind,
    RedisAnswered,
    Reply,
    SendDrain,
    SignalCame,
    SnapshotFailed,
    SnapshotReady,
    Spawn,
    Started,
    TakeSnapshot,
    Tick,
)
from supervisor.policy import describe_end
from supervisor.slots import Timing
from tests.supervisor.pool import DRAIN, IDENTITY, Happening, Pool, Step, play
from trioserver.status import GatewayStatus, RedisStatus, StatusReply, Verdict, WorkerStatus

TERM, INT, QUIT, HUP = (
    SignalCame(signal=number)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
)
W0, W1, GATEWAY = 100, 101, 102
"""Process ids of the first generation of a pool of two without Redis."""
NEW_W0, NEW_W1, NEW_GATEWAY = 103, 104, 105
REDIS = 100
"""With Redis, it comes first."""


def worker(slot: int, generation: int = 1) -> Spawn:
    """Return the order to start a worker."""
    return Spawn(kind=Kind.WORKER, slot=slot, generation=generation)


def gateway(generation: int = 1) -> Spawn:
    """Return the order to start the gateway."""
    return Spawn(kind=Kind.GATEWAY, slot=0, generation=generation)


def redis() -> Spawn:
    """Return the order to start Redis."""
    return Spawn(kind=Kind.REDIS, slot=0, generation=1)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> Kill:
    """Return the order to send a signal."""
    return Kill(pid=pid, signal=number)


def drain(pid: int, seconds: float, propagation: float = 0.0, *, quick: bool = False) -> SendDrain:
    """Return the order to finish."""
    return SendDrain(pid=pid, seconds=seconds, propagation=propagation, quick=quick)


def retire(pid: int, seconds: float, *, quick: bool = False) -> SendDrain:
    """Return the order to finish beside a successor, or a predecessor, on the same socket."""
    return SendDrain(pid=pid, seconds=seconds, propagation=0.0, quick=quick, replaced=True)


def silence(*pids: int) -> Happening:
    """Return a step: they stop beating."""
    return lambda pool: pool.beating.difference_update(pids)


def end(pid: int, code: int = 0) -> Happening:
    """Return a step: it ends."""
    return lambda pool: pool.end(pid, code)


def ready(*pids: int) -> Happening:
    """Return a step: they start and beat ready."""
    return lambda pool: pool.bring_up(*pids)


def beat(pid: int, *, ready: bool = True, why: str = "", connections: int = 0) -> Beat:
    """Return a beat."""
    return Beat(pid=pid, connections=connections, ready=ready, why=why)


def snapshot(generation: int = 2, drain: DrainTimes = DRAIN) -> SnapshotReady:
    """Return the news that settings were read."""
    return SnapshotReady(generation=generation, drain=drain)


@attrs.frozen(kw_only=True)
class History:
    """What happens to a running pool of two workers, and everything that is done about it."""

    promise: str
    steps: Sequence[tuple[float, Step]]
    until: float
    done: Sequence[tuple[float, Action]]
    redis: bool = False
    exit_code: int | None = None


FULL_DRAIN = 26 * 0.95
QUICK = 1.2 * 0.95

HISTORIES = [
    History(
        promise="nothing happens to a pool that beats",
        steps=[],
        until=1000.0,
        done=[],
    ),
    History(
        promise="the first death after ten healthy seconds is answered at once",
        steps=[(20.0, end(W0, -9))],
        until=40.0,
        done=[(20.0, worker(0))],
    ),
    History(
        promise="the death of a fresh child waits half a second",
        steps=[(3.0, end(W0, -9))],
        until=40.0,
        done=[(3.5, worker(0))],
    ),
    History(
        promise="from the second death within a minute waits double up to half a minute",
        steps=[
            (20.0, end(W0, 1)),
            *((when, end(NEW_W0 + n, 1)) for n, when in enumerate((21, 22, 24, 27, 32, 41, 58))),
        ],
        until=90.0,
        done=[
            (20.0, worker(0)),
            (21.5, worker(0)),
            (23.0, worker(0)),
            (26.0, worker(0)),
            (31.0, worker(0)),
            (40.0, worker(0)),
            (57.0, worker(0)),
            (88.0, worker(0)),
        ],
    ),
    History(
        promise="the second death within a minute waits, however well the child was",
        steps=[(20.0, end(W0, 1)), (21.0, ready(NEW_W0)), (36.0, end(NEW_W0, 1))],
        until=40.0,
        done=[(20.0, worker(0)), (36.5, worker(0))],
    ),
    History(
        promise="a minute of health forgets earlier deaths",
        steps=[
            (20.0, end(W0, 1)),
            (21.0, end(NEW_W0, 1)),
            (22.0, ready(NEW_W0 + 1)),
            (83.0, end(NEW_W0 + 1, 1)),
        ],
        until=100.0,
        done=[(20.0, worker(0)), (21.5, worker(0)), (83.0, worker(0))],
    ),
    History(
        promise="a death has no consequences for another slot",
        steps=[(20.0, end(GATEWAY, 1)), (25.0, ready(NEW_W0))],
        until=100.0,
        done=[(20.0, gateway())],
    ),
    History(
        promise="a silent worker gets SIGABRT after 15 s, SIGKILL 2 s later, then a successor",
        steps=[(20.0, silence(W0)), (37.5, end(W0, -9))],
        until=45.0,
        done=[
            (35.0, kill(W0, signal.SIGABRT)),
            (37.0, kill(W0)),
            (37.5, worker(0)),
        ],
    ),
    History(
        promise="a worker that falls silent for a while and beats again is left alone",
        steps=[(20.0, silence(W0)), (34.0, lambda pool: pool.beating.add(W0))],
        until=60.0,
        done=[],
    ),
    History(
        promise="a respawned child that does not start within a minute is aborted",
        steps=[(20.0, end(W0, 1)), (85.0, end(NEW_W0, -6))],
        until=86.0,
        done=[
            (20.0, worker(0)),
            (80.0, kill(NEW_W0, signal.SIGABRT)),
            (82.0, kill(NEW_W0)),
            (85.5, worker(0)),
        ],
    ),
    History(
        promise="silence is forgiven when it was the supervisor that did not turn",
        steps=[(20.0, silence(W0, W1, GATEWAY)), (20.5, lambda pool: setattr(pool, "now", 50.0))],
        until=50.5,
        done=[],
    ),
    History(
        promise="strangers that are reaped mean nothing",
        steps=[(20.0, Exited(pid=4711, code=-9)), (21.0, Started(pid=4711)), (22.0, beat(4711))],
        until=40.0,
        done=[],
    ),
    History(
        promise="a dead Redis is replaced, and nobody else notices",
        redis=True,
        steps=[(20.0, end(REDIS, -9))],
        until=30.0,
        done=[(20.0, redis())],
    ),
    History(
        promise="a silent Redis is no hung Redis",
        redis=True,
        steps=[(20.0, silence(REDIS))],
        until=500.0,
        done=[],
    ),
    History(
        promise="a Redis that comes back without answering is killed after a minute",
        redis=True,
        steps=[(20.0, end(REDIS, -9))],
        until=81.0,
        done=[(20.0, redis()), (80.0, kill(104))],
    ),
    History(
        promise="a Redis that says it is loading gets all the time it needs",
        redis=True,
        steps=[
            (20.0, end(REDIS, -9)),
            (70.0, RedisAnswered(pid=104, loading=True)),
            (120.0, RedisAnswered(pid=104, loading=True)),
        ],
        until=179.0,
        done=[(20.0, redis())],
    ),
    History(
        promise="SIGTERM drains the workers, then the gateway, and exits with 0",
        steps=[(20.0, TERM), (25.0, end(W0)), (30.0, end(W1)), (30.5, end(GATEWAY))],
        until=60.0,
        done=[
            (20.0, drain(W0, FULL_DRAIN, 5.0)),
            (20.0, drain(W1, FULL_DRAIN, 5.0)),
            (30.0, drain(GATEWAY, 1.5 * 0.95, quick=True)),
            (30.5, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="a stop gives a hung worker no more time",
        steps=[
            (20.0, silence(W0)),
            (36.0, TERM),
            (36.5, end(W1)),
            (37.1, end(W0, -9)),
            (37.2, end(GATEWAY)),
        ],
        until=60.0,
        done=[
            (35.0, kill(W0, signal.SIGABRT)),
            (36.0, drain(W0, FULL_DRAIN, 5.0)),
            (36.0, drain(W1, FULL_DRAIN, 5.0)),
            (37.0, kill(W0)),
            (37.1, drain(GATEWAY, 1.5 * 0.95, quick=True)),
            (37.2, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="the embedded Redis goes last",
        redis=True,
        steps=[
            (20.0, TERM),
            (25.0, end(101)),
            (25.0, end(102)),
            (26.0, end(103)),
            (26.5, end(REDIS)),
        ],
        until=60.0,
        done=[
            (20.0, drain(101, FULL_DRAIN, 5.0)),
            (20.0, drain(102, FULL_DRAIN, 5.0)),
            (25.0, drain(103, 1.5 * 0.95, quick=True)),
            (26.0, kill(REDIS, signal.SIGTERM)),
            (26.5, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="whoever does not go is killed, and all of it fits into DRAIN_SECONDS",
        redis=True,
        steps=[
            (20.0, TERM),
            (46.1, end(101, -9)),
            (46.1, end(102, -9)),
            (47.7, end(103, -9)),
            (49.8, end(REDIS, -9)),
        ],
        until=60.0,
        done=[
            (20.0, drain(101, FULL_DRAIN, 5.0)),
            (20.0, drain(102, FULL_DRAIN, 5.0)),
            (46.0, kill(101)),
            (46.0, kill(102)),
            (46.1, drain(103, 1.5 * 0.95, quick=True)),
            (47.6, kill(103)),
            (47.7, kill(REDIS, signal.SIGTERM)),
            (49.7, kill(REDIS)),
            (49.8, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="SIGINT is a quick stop of at most two seconds",
        redis=True,
        steps=[
            (20.0, INT),
            (21.2, end(101, -9)),
            (21.2, end(102, -9)),
            (21.2, end(103, -9)),
            (21.8, end(REDIS, -9)),
        ],
        until=30.0,
        done=[
            (20.0, drain(101, QUICK, quick=True)),
            (20.0, drain(102, QUICK, quick=True)),
            (20.0, drain(103, QUICK, quick=True)),
            (21.2, kill(101)),
            (21.2, kill(102)),
            (21.2, kill(103)),
            (21.2, kill(REDIS, signal.SIGTERM)),
            (21.8, kill(REDIS)),
            (21.8, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="a second SIGTERM hurries the drain",
        steps=[(20.0, TERM), (25.0, TERM), (25.1, end(W0)), (26.2, end(W1)), (26.2, end(GATEWAY))],
        until=60.0,
        done=[
            (20.0, drain(W0, FULL_DRAIN, 5.0)),
            (20.0, drain(W1, FULL_DRAIN, 5.0)),
            # The gateway, the last owner, first.
            (25.0, drain(GATEWAY, QUICK, quick=True)),
            (25.0, drain(W0, QUICK, quick=True)),
            (25.0, drain(W1, QUICK, quick=True)),
            (26.2, kill(W1)),
            (26.2, kill(GATEWAY)),
            (26.2, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="a signal that comes when only Redis is left shortens its time",
        redis=True,
        steps=[
            (20.0, TERM),
            (21.0, end(101)),
            (21.0, end(102)),
            (21.0, end(103)),
            (21.1, INT),
            (21.8, end(REDIS, -9)),
        ],
        until=60.0,
        done=[
            (20.0, drain(101, FULL_DRAIN, 5.0)),
            (20.0, drain(102, FULL_DRAIN, 5.0)),
            (21.0, drain(103, 1.5 * 0.95, quick=True)),
            (21.0, kill(REDIS, signal.SIGTERM)),
            (21.7, kill(REDIS)),
            (21.8, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="nobody is respawned during a stop, and waiting respawns are dropped",
        steps=[
            (3.0, end(W0, 1)),
            (3.1, TERM),
            (4.0, end(GATEWAY, 1)),
            (5.0, end(W1, 1)),
        ],
        until=60.0,
        done=[(3.1, drain(W1, FULL_DRAIN, 5.0)), (5.0, Exit(code=0))],
        exit_code=0,
    ),
    History(
        promise="a child that has not started is also sent a SIGTERM: it may not listen yet",
        steps=[
            (20.0, end(W0, 1)),
            (20.2, QUIT),
            (20.3, end(NEW_W0, -15)),
            (20.3, end(W1)),
            (20.4, end(GATEWAY)),
        ],
        until=30.0,
        done=[
            (20.0, worker(0)),
            (20.2, drain(NEW_W0, QUICK, quick=True)),
            (20.2, kill(NEW_W0, signal.SIGTERM)),
            (20.2, drain(W1, QUICK, quick=True)),
            (20.2, drain(GATEWAY, QUICK, quick=True)),
            (20.4, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="a process that survives SIGKILL does not keep the supervisor for ever",
        steps=[
            (20.0, Asked(request=1, op="stop")),
            (20.0, INT),
            (20.1, end(W1)),
            (20.1, end(GATEWAY)),
        ],
        until=60.0,
        done=[
            (20.0, drain(W0, FULL_DRAIN, 5.0)),
            (20.0, drain(W1, FULL_DRAIN, 5.0)),
            (20.0, drain(GATEWAY, QUICK, quick=True)),
            (20.0, drain(W0, QUICK, quick=True)),
            (20.0, drain(W1, QUICK, quick=True)),
            (21.2, kill(W0)),
            (
                26.2,
                Reply(request=1, reply=Verdict(ok=False, reason="SIGKILL did not end worker 100")),
            ),
            (26.2, Exit(code=1)),
        ],
        exit_code=1,
    ),
    History(
        promise="a request to stop is answered when everything is gone, and a second one with it",
        steps=[
            (20.0, Asked(request=7, op="stop")),
            (21.0, Asked(request=8, op="stop")),
            (22.0, end(W0)),
            (22.0, end(W1)),
            (22.0, end(GATEWAY)),
        ],
        until=30.0,
        done=[
            (20.0, drain(W0, FULL_DRAIN, 5.0)),
            (20.0, drain(W1, FULL_DRAIN, 5.0)),
            (22.0, drain(GATEWAY, 1.5 * 0.95, quick=True)),
            (22.0, Reply(request=7, reply=Verdict(ok=True))),
            (22.0, Reply(request=8, reply=Verdict(ok=True))),
            (22.0, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="a reload takes over when all new ones are ready, and only then drains the old",
        steps=[
            (20.0, Asked(request=1, op="reload")),
            (20.5, snapshot()),
            (21.0, ready(NEW_W0)),
            (22.0, ready(NEW_GATEWAY)),
            (25.0, Started(pid=NEW_W1)),
            (26.0, beat(NEW_W1, ready=False, why="redis")),
            (27.0, ready(NEW_W1)),
            (28.0, end(W0)),
            (40.0, end(W1)),
            (41.0, end(GATEWAY)),
        ],
        until=100.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, worker(0, 2)),
            (20.5, worker(1, 2)),
            (20.5, gateway(2)),
            (27.0, retire(W0, 30 * 0.95)),
            (27.0, retire(W1, 30 * 0.95)),
            (27.0, retire(GATEWAY, 30 * 0.95)),
            (27.0, Reply(request=1, reply=Verdict(ok=True, generation=2))),
            (27.0, DropSnapshot(generation=1)),
        ],
    ),
    History(
        promise="after a reload the old ones have their drain time and no more",
        steps=[
            (20.0, HUP),
            (20.5, snapshot()),
            (21.0, ready(NEW_W0, NEW_W1, NEW_GATEWAY)),
            (22.0, end(W0)),
            (22.0, end(GATEWAY)),
        ],
        until=100.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, worker(0, 2)),
            (20.5, worker(1, 2)),
            (20.5, gateway(2)),
            (21.0, retire(W0, 30 * 0.95)),
            (21.0, retire(W1, 30 * 0.95)),
            (21.0, retire(GATEWAY, 30 * 0.95)),
            (21.0, DropSnapshot(generation=1)),
            (51.0, kill(W1)),
        ],
    ),
    History(
        promise="an old worker that dies while draining has no successor, a new one has",
        steps=[
            (20.0, HUP),
            (20.5, snapshot()),
            (21.0, ready(NEW_W0, NEW_W1, NEW_GATEWAY)),
            (22.0, end(W0, -11)),
            (22.0, end(W1)),
            (22.0, end(GATEWAY)),
            (40.0, end(NEW_W0, -11)),
        ],
        until=60.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, worker(0, 2)),
            (20.5, worker(1, 2)),
            (20.5, gateway(2)),
            (21.0, retire(W0, 30 * 0.95)),
            (21.0, retire(W1, 30 * 0.95)),
            (21.0, retire(GATEWAY, 30 * 0.95)),
            (21.0, DropSnapshot(generation=1)),
            (40.0, worker(0, 2)),
        ],
    ),
    History(
        promise="a new worker's death before all are ready ends the reload, the old ones stay",
        steps=[
            (20.0, Asked(request=1, op="reload")),
            (20.5, snapshot()),
            (21.0, ready(NEW_W0)),
            (22.0, end(NEW_W1, 1)),
            (22.1, end(NEW_W0)),
            (22.1, end(NEW_GATEWAY, -15)),
        ],
        until=100.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, worker(0, 2)),
            (20.5, worker(1, 2)),
            (20.5, gateway(2)),
            (22.0, retire(NEW_W0, QUICK, quick=True)),
            (22.0, retire(NEW_GATEWAY, QUICK, quick=True)),
            (22.0, kill(NEW_GATEWAY, signal.SIGTERM)),
            (22.0, DropSnapshot(generation=2)),
            (
                22.0,
                Reply(
                    request=1,
                    reply=Verdict(ok=False, reason="worker 1 ended with exit code 1"),
                ),
            ),
        ],
    ),
    History(
        promise="a new worker that starts and dies before all are ready ends the reload, too",
        steps=[
            (20.0, HUP),
            (20.5, snapshot()),
            (21.0, ready(NEW_W0)),
            (22.0, end(NEW_W0, 1)),
            (22.1, end(NEW_W1, -15)),
            (22.1, end(NEW_GATEWAY, -15)),
        ],
        until=100.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, worker(0, 2)),
            (20.5, worker(1, 2)),
            (20.5, gateway(2)),
            (22.0, retire(NEW_W1, QUICK, quick=True)),
            (22.0, kill(NEW_W1, signal.SIGTERM)),
            (22.0, retire(NEW_GATEWAY, QUICK, quick=True)),
            (22.0, kill(NEW_GATEWAY, signal.SIGTERM)),
            (22.0, DropSnapshot(generation=2)),
        ],
    ),
    History(
        promise="settings that are read twice raise one generation",
        steps=[(20.0, HUP), (20.5, snapshot()), (20.6, snapshot())],
        until=21.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, worker(0, 2)),
            (20.5, worker(1, 2)),
            (20.5, gateway(2)),
        ],
    ),
    History(
        promise="a new generation that is not ready within a minute goes, and says what misses",
        steps=[
            (20.0, Asked(request=1, op="reload")),
            (20.5, snapshot()),
            (21.0, ready(NEW_W0, NEW_GATEWAY)),
            (21.5, Started(pid=NEW_W1)),
            *((t + 0.5, beat(NEW_W1, ready=False, why="redis is away")) for t in range(22, 80)),
            (80.6, end(NEW_W0)),
            (80.6, end(NEW_W1)),
            (80.6, end(NEW_GATEWAY)),
        ],
        until=100.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, worker(0, 2)),
            (20.5, worker(1, 2)),
            (20.5, gateway(2)),
            (80.5, retire(NEW_W0, QUICK, quick=True)),
            (80.5, retire(NEW_W1, QUICK, quick=True)),
            (80.5, retire(NEW_GATEWAY, QUICK, quick=True)),
            (80.5, DropSnapshot(generation=2)),
            (
                80.5,
                Reply(
                    request=1,
                    reply=Verdict(
                        ok=False, reason="not ready within 60 s: worker 1: redis is away"
                    ),
                ),
            ),
        ],
    ),
    History(
        promise="settings that cannot be read leave everything as it is",
        steps=[
            (20.0, Asked(request=1, op="reload")),
            (20.5, SnapshotFailed(generation=2, reason="WS_PORT: no")),
        ],
        until=100.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, DropSnapshot(generation=2)),
            (20.5, Reply(request=1, reply=Verdict(ok=False, reason="WS_PORT: no"))),
        ],
    ),
    History(
        promise="settings that are not read in time are given up",
        steps=[(20.0, Asked(request=1, op="reload"))],
        until=100.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (50.0, DropSnapshot(generation=2)),
            (
                50.0,
                Reply(
                    request=1,
                    reply=Verdict(ok=False, reason="the settings could not be read within 30 s"),
                ),
            ),
        ],
    ),
    History(
        promise="a second reload is refused while one is under way, also by SIGHUP",
        steps=[
            (20.0, Asked(request=1, op="reload")),
            (21.0, Asked(request=2, op="reload")),
            (22.0, HUP),
        ],
        until=23.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (
                21.0,
                Reply(
                    request=2,
                    reply=Verdict(ok=False, reason="a reload is under way already"),
                ),
            ),
        ],
    ),
    History(
        promise="a failed reload's number is not used again",
        steps=[
            (20.0, HUP),
            (20.5, SnapshotFailed(generation=2, reason="no")),
            (21.0, HUP),
            (21.5, snapshot(2)),  # Too late.
            (21.6, snapshot(3)),
        ],
        until=22.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, DropSnapshot(generation=2)),
            (21.0, TakeSnapshot(generation=3)),
            (21.6, worker(0, 3)),
            (21.6, worker(1, 3)),
            (21.6, gateway(3)),
        ],
    ),
    History(
        promise="an old worker that dies during a reload is replaced by its own generation",
        steps=[(20.0, HUP), (20.5, snapshot()), (21.0, end(W0, 1))],
        until=22.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, worker(0, 2)),
            (20.5, worker(1, 2)),
            (20.5, gateway(2)),
            (21.0, worker(0)),
        ],
    ),
    History(
        promise="a stop ends a reload and both generations",
        steps=[
            (20.0, Asked(request=1, op="reload")),
            (20.5, snapshot()),
            (21.0, ready(NEW_W0)),
            (21.5, INT),
            *((21.6, end(pid)) for pid in range(W0, NEW_GATEWAY + 1)),
        ],
        until=30.0,
        done=[
            (20.0, TakeSnapshot(generation=2)),
            (20.5, worker(0, 2)),
            (20.5, worker(1, 2)),
            (20.5, gateway(2)),
            (21.5, retire(NEW_W0, QUICK, quick=True)),
            (21.5, retire(NEW_W1, QUICK, quick=True)),
            (21.5, kill(NEW_W1, signal.SIGTERM)),
            (21.5, retire(NEW_GATEWAY, QUICK, quick=True)),
            (21.5, kill(NEW_GATEWAY, signal.SIGTERM)),
            (21.5, DropSnapshot(generation=2)),
            (21.5, Reply(request=1, reply=Verdict(ok=False, reason="the server is stopping"))),
            (21.5, drain(W0, QUICK, quick=True)),
            (21.5, drain(W1, QUICK, quick=True)),
            (21.5, drain(GATEWAY, QUICK, quick=True)),
            (21.6, Exit(code=0)),
        ],
        exit_code=0,
    ),
    History(
        promise="a reload during a stop is refused",
        steps=[(20.0, TERM), (21.0, Asked(request=1, op="reload")), (22.0, HUP)],
        until=23.0,
        done=[
            (20.0, drain(W0, FULL_DRAIN, 5.0)),
            (20.0, drain(W1, FULL_DRAIN, 5.0)),
            (21.0, Reply(request=1, reply=Verdict(ok=False, reason="the server is stopping"))),
        ],
    ),
    History(
        promise="an operation nobody knows is refused",
        steps=[(20.0, Asked(request=1, op="dance"))],
        until=21.0,
        done=[
            (20.0, Reply(request=1, reply=Verdict(ok=False, reason="unknown op 'dance'"))),
        ],
    ),
    History(
        promise="a signal without meaning does nothing",
        steps=[(20.0, SignalCame(signal=signal.SIGUSR2))],
        until=40.0,
        done=[],
    ),
]


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.promise)
def test_history(history: History) -> None:
    """A running pool does what the history says, at the time it says, and nothing else."""
    pool = Pool(redis=history.redis)
    pool.begin()
    play(pool, history.steps, history.until)

    # Doors have a test of their own below.
    did = [step for step in pool.did(since=0.001) if not isinstance(step[1], CloseDoor)]
    assert list(history.done) == did
    assert history.exit_code == pool.exit_code


def test_a_door_is_closed_when_its_worker_is_gone_in_a_stop_and_never_before() -> None:
    """Who knocks where nobody will open is better refused than left waiting."""
    pool = Pool(redis=False)
    pool.begin()
    workers = [action for _, action in pool.did() if isinstance(action, Spawn)]
    assert {0, 1} <= {spawn.slot for spawn in workers}
    pool.end(W1, 0)
    pool.advance(20.0)
    assert not [action for _, action in pool.did() if isinstance(action, CloseDoor)]
    pool.tell(SignalCame(signal=signal.SIGTERM))
    pool.end(W0, 0)
    assert [0] == [action.slot for _, action in pool.did() if isinstance(action, CloseDoor)]


# --- the first start ------------------------------------------------------------------------------


def test_redis_comes_first() -> None:
    """Workers and gateway are not spawned before the embedded Redis answers."""
    pool = Pool(redis=True)
    pool.tell(Begin())
    pool.advance(2.0)

    assert [(0.0, redis())] == pool.did()

    pool.tell(RedisAnswered(pid=REDIS, loading=True))
    pool.tell(RedisAnswered(pid=REDIS))

    assert [(2.0, worker(0)), (2.0, worker(1)), (2.0, gateway())] == pool.did(since=2.0)


def test_without_an_embedded_redis_everything_starts_at_once() -> None:
    """Nobody waits for a Redis that is not ours."""
    pool = Pool()
    pool.tell(Begin())

    assert [(0.0, worker(0)), (0.0, worker(1)), (0.0, gateway())] == pool.did()


def test_it_is_announced_once_when_everything_is_ready() -> None:
    """The announcement comes with the last one that gets ready, and never again."""
    pool = Pool(redis=True)
    pool.tell(Begin())
    pool.advance(0.5)
    ready(REDIS)(pool)
    pool.advance(1.0)
    ready(101, 102)(pool)
    pool.advance(1.25)
    pool.tell(Started(pid=103))

    assert announcements(pool) == []

    pool.advance(1.5)
    ready(103)(pool)
    pool.advance(30.0)
    end(102)(pool)
    pool.bring_up()
    pool.advance(60.0)

    assert announcements(pool) == [1.5]


def announcements(pool: Pool) -> list[float]:
    """Return the seconds of each announcement."""
    return [action.seconds for _, action in pool.record if isinstance(action, Announce)]


@pytest.mark.parametrize(
    ("code", "exit_code", "how"),
    [
        (1, 3, "ended with exit code 1"),
        (0, 3, "ended with exit code 0"),
        (-9, 3, "was killed by SIGKILL"),
        (4, 4, "ended with exit code 4"),
    ],
)
def test_a_child_that_ends_before_it_started_fails_the_first_start(
    code: int, exit_code: int, how: str
) -> None:
    """Everything stops quickly, the exit code 3, or the child's own 4."""
    pool = Pool()
    pool.tell(Begin())
    pool.advance(0.5)
    ready(W0)(pool)
    pool.advance(0.6)
    end(W1, code)(pool)

    expected = [
        (0.6, drain(W0, QUICK, quick=True)),
        (0.6, drain(GATEWAY, QUICK, quick=True)),
        (0.6, kill(GATEWAY, signal.SIGTERM)),
    ]
    assert expected == pool.did(since=0.6)
    assert [{"reason": f"worker 1 {how}"}] == pool.said("first start failed")

    end(W0)(pool)
    end(GATEWAY, -15)(pool)

    assert exit_code == pool.exit_code


def test_a_redis_that_ends_before_it_answers_fails_the_first_start() -> None:
    """There is nobody else yet, so it is over at once."""
    pool = Pool(redis=True)
    pool.tell(Begin())
    end(REDIS, 1)(pool)

    assert [(0.0, redis()), (0.0, Exit(code=3))] == pool.did()


def test_a_child_that_does_not_start_within_a_minute_fails_the_first_start() -> None:
    """It is aborted so that its stacks are in the log; the reason is not the signal."""
    pool = Pool()
    pool.tell(Begin())
    pool.advance(0.5)
    ready(W0, GATEWAY)(pool)
    pool.advance(60.0)

    assert [(60.0, kill(W1, signal.SIGABRT))] == pool.did(since=1.0)

    end(W1, -6)(pool)

    assert pool.said("first start failed") == [{"reason": "worker 1 did not start within 60 s"}]

    end(W0)(pool)
    end(GATEWAY)(pool)

    assert pool.exit_code == 3


def test_beats_before_the_start_do_not_prolong_it() -> None:
    """A child that only beats and never starts is aborted, too."""
    pool = Pool()
    pool.tell(Begin())
    ready(W0, GATEWAY)(pool)
    pool.beating.add(W1)
    pool.advance(60.5)

    assert [(60.0, kill(W1, signal.SIGABRT))] == pool.did(since=1.0)


def test_a_child_that_cannot_be_spawned_fails_the_first_start() -> None:
    """What was ordered in the same breath is killed before it does anything."""
    pool = Pool()
    pool.unspawnable.add((Kind.WORKER, 0))
    pool.tell(Begin())

    assert pool.said("first start failed") == [{"reason": "worker 0 could not be spawned: full"}]
    assert [kill(100), kill(101)] == [a for _, a in pool.did() if isinstance(a, Kill)]

    pool.end(100, -9)
    pool.end(101, -9)

    assert pool.exit_code == 3


def test_if_nothing_can_be_spawned_it_is_over_when_all_was_tried() -> None:
    """Not before: what is still ordered might succeed, and would be left alone."""
    pool = Pool()
    pool.unspawnable = {(Kind.WORKER, 0), (Kind.WORKER, 1), (Kind.GATEWAY, 0)}
    pool.tell(Begin())

    assert pool.did()[-1] == (0.0, Exit(code=3))
    assert pool.exit_code == 3


def test_a_child_that_dies_after_it_started_does_not_fail_the_first_start() -> None:
    """It has proven that this release works; the others may still be starting."""
    pool = Pool()
    pool.tell(Begin())
    pool.advance(0.5)
    ready(W0)(pool)
    pool.advance(0.6)
    end(W0, 1)(pool)
    pool.advance(1.2)

    assert [(1.1, worker(0))] == pool.did(since=0.6)


def test_a_stop_during_the_first_start_exits_with_0() -> None:
    """Somebody changed their mind; that is no failure."""
    pool = Pool()
    pool.tell(Begin())
    pool.tell(INT)
    for pid in (W0, W1, GATEWAY):
        pool.end(pid, -15)

    assert pool.exit_code == 0


def test_a_reload_during_the_first_start_is_refused() -> None:
    """Nobody knows yet whether there is anything to fall back on."""
    pool = Pool()
    pool.tell(Begin())
    pool.tell(Asked(request=1, op="reload"))

    assert [Verdict(ok=False, reason="the server is still starting")] == pool.replies(1)


# --- respawns ------------------------------------------------------------------------------------


def test_waits_are_jittered_by_a_fifth_and_capped() -> None:
    """Slots that crash for one reason do not crash in step, and never wait 36 s or more."""
    pool = Pool(timing=Timing(), seed=1)
    pool.begin()
    waits = []
    for _ in range(12):
        died = pool.now
        end(max(pid for pid, spawn in pool.alive.items() if spawn == worker(0)), 1)(pool)
        before = len(pool.record)
        while not any(action == worker(0) for _, action in pool.record[before:]):
            pool.advance(pool.now + 0.05)
        waits.append(pool.now - died)

    for wait, plain in zip(waits, (0.5, 1, 2, 4, 8, 16, *[30] * 6), strict=True):
        assert plain * 0.8 <= wait <= plain * 1.2 + 0.1
    assert len({round(wait, 1) for wait in waits[6:]}) > 1


def test_a_respawn_that_fails_is_tried_again() -> None:
    """No room for one more process is an accident like any other."""
    pool = Pool()
    pool.begin()
    pool.advance(20.0)
    pool.unspawnable.add((Kind.WORKER, 0))
    end(W0, 1)(pool)
    pool.advance(22.0)

    assert [(20.0, worker(0)), (20.5, worker(0)), (21.5, worker(0))] == pool.did(since=20.0)

    pool.unspawnable.clear()
    pool.advance(24.0)

    assert pool.next_pid - 1 in pool.alive


def test_a_new_generation_that_cannot_be_spawned_fails_the_reload() -> None:
    """Those that could be spawned are killed, the old ones stay."""
    pool = Pool(workers=3)
    pool.begin()
    pool.tell(Asked(request=1, op="reload"))
    pool.unspawnable = {(Kind.WORKER, 1), (Kind.WORKER, 2)}
    pool.tell(snapshot())

    expected = Verdict(ok=False, reason="worker 1 could not be spawned: full")
    assert [expected] == pool.replies(1)
    assert {100, 101, 102, 103, 104, 105} == pool.alive.keys()
    assert pool.dismissed == {104, 105}


# --- status --------------------------------------------------------------------------------------


def test_status_of_a_healthy_pool() -> None:
    """Every slot with its owner, its age and its connections."""
    pool = Pool(redis=True)
    pool.begin()
    pool.advance(9.75)
    status = pool.status()

    expected = WorkerStatus(
        slot=1, pid=102, age_seconds=9.75, connections=1, restarts=0, ready=True, why=""
    )
    assert expected == status.workers[1]
    assert GatewayStatus(pid=103, age_seconds=9.75, restarts=0, ready=True) == status.gateway
    assert (
        RedisStatus(embedded=True, pid=REDIS, age_seconds=9.75, restarts=0, ready=True)
        == status.redis
    )
    assert (
        status.ready,
        status.draining,
        status.reloading,
        status.generation,
    ) == (True, False, False, 1)
    assert (IDENTITY.address, IDENTITY.admin_address, IDENTITY.pid, IDENTITY.version) == (
        status.address,
        status.admin_address,
        status.pid,
        status.version,
    )
    assert status.uptime_seconds == 9.75


def test_a_slot_without_an_owner_makes_the_pool_unready() -> None:
    """New connections that hash to it would wait: the entry says for how long."""
    pool = Pool()
    pool.begin()
    pool.advance(3.0)
    end(W1, 1)(pool)
    status = pool.status()

    expected = WorkerStatus(
        slot=1,
        pid=None,
        age_seconds=None,
        connections=0,
        restarts=0,
        ready=False,
        why="next start in 0.5 s",
    )
    assert expected == status.workers[1]
    assert not status.ready

    pool.advance(4.0)
    status = pool.status()

    assert (status.workers[1].why, status.workers[1].restarts) == ("starting", 1)
    assert not status.ready

    pool.bring_up()

    assert pool.status().ready


def test_an_unready_worker_beside_a_ready_one_leaves_the_pool_ready() -> None:
    """It accepts; only what it says of itself is different."""
    pool = Pool()
    pool.begin()
    pool.tell(beat(W0, ready=False, why="canary is late", connections=7))
    status = pool.status()

    assert (
        status.workers[0].ready,
        status.workers[0].why,
        status.workers[0].connections,
    ) == (False, "canary is late", 7)
    assert status.ready

    pool.tell(beat(W1, ready=False, why="canary is late"))

    assert not pool.status().ready


def test_a_silent_worker_makes_the_pool_unready_after_five_seconds() -> None:
    """Readiness does not wait for the signals that follow; a beat restores it."""
    pool = Pool()
    pool.begin()
    pool.advance(20.0)
    silence(W0)(pool)
    pool.advance(24.9)

    assert pool.status().ready

    pool.advance(25.0)
    status = pool.status()

    assert (status.workers[0].ready, status.workers[0].why) == (False, "no sign of life for 5 s")
    assert not status.ready

    pool.tell(beat(W0))

    assert pool.status().ready
    assert len(pool.said("child silent")) == 1
    assert len(pool.said("child beats again")) == 1


def test_a_stop_makes_the_pool_unready_at_once() -> None:
    """Load balancers must hear of it before the first connection is closed."""
    pool = Pool()
    pool.begin()
    pool.tell(TERM)
    pool.tell(Asked(request=1, op="status"))
    (status,) = pool.replies(1)

    assert isinstance(status, StatusReply)
    assert (status.ready, status.draining) == (False, True)


def test_status_during_and_after_a_reload() -> None:
    """The old generation is shown until the new one has taken over; restarts are kept."""
    pool = Pool()
    pool.begin()
    pool.advance(20.0)
    end(W0, 1)(pool)
    pool.bring_up()
    pool.tell(HUP)
    pool.tell(snapshot())
    status = pool.status()

    assert (
        status.ready,
        status.reloading,
        status.generation,
        status.workers[0].pid,
    ) == (True, True, 1, 103)

    end(W1, 1)(pool)
    pool.bring_up()
    status = pool.status()

    assert status.workers[1].restarts == 1

    assert (
        status.ready,
        status.reloading,
        status.generation,
        status.workers[0].pid,
        status.workers[0].restarts,
    ) == (True, False, 2, 104, 1)


def test_an_external_redis_is_as_ready_as_the_workers_say() -> None:
    """Nobody else here talks to it."""
    pool = Pool()
    pool.begin()

    assert (
        pool.status().redis.embedded,
        pool.status().redis.pid,
        pool.status().redis.ready,
    ) == (False, None, True)

    for pid in (W0, W1):
        pool.tell(beat(pid, ready=False, why="redis is away"))

    assert not pool.status().redis.ready


# --- the rest ------------------------------------------------------------------------------------


def test_new_drain_times_count_from_the_generation_that_brought_them() -> None:
    """The old generation drains as it was configured, the new one as it is."""
    pool = Pool()
    pool.begin()
    pool.tell(HUP)
    pool.tell(snapshot(drain=DrainTimes(seconds=10.0, propagation=1.0)))
    pool.bring_up()

    assert retire(W0, 30 * 0.95) in [action for _, action in pool.did()]

    pool.tell(TERM)

    assert drain(NEW_W0, 6 * 0.95, 1.0) in [action for _, action in pool.did()]


def test_after_the_exit_nothing_is_done_any_more() -> None:
    """Whatever still comes in: it is over."""
    pool = Pool()
    pool.begin()
    pool.tell(INT)
    for pid in (W0, W1, GATEWAY):
        pool.end(pid)

    assert pool.tell(HUP) == []
    assert pool.tell(Tick()) == []
    assert float("inf") == pool.policy.next_deadline()


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (0, "ended with exit code 0"),
        (-11, "was killed by SIGSEGV"),
        (-63, "was killed by signal 63"),
    ],
)
def test_ends_are_described(code: int, how: str) -> None:
    """Exit codes and signals by their names, where they have one."""
    assert how == describe_end(code)
