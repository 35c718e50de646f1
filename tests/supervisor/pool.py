"""A world for the policy: processes that are entries in a dict, and time that is a number."""

import random
from collections.abc import Callable, Sequence

from supervisor.events import (
    Action,
    Announce,
    Beat,
    Begin,
    DrainTimes,
    Event,
    Exit,
    Exited,
    Kill,
    Kind,
    RedisAnswered,
    Reply,
    Say,
    SendDrain,
    Spawn,
    Spawned,
    SpawnFailed,
    Started,
    Tick,
)
from supervisor.policy import Plan, Policy
from supervisor.report import Identity
from supervisor.slots import Timing
from trioserver.status import StatusReply

IDENTITY = Identity(address="0.0.0.0:8081", admin_address="127.0.0.1:9081", pid=1, version="0")
STEADY = Timing(backoff_jitter=0.0)
DRAIN = DrainTimes(seconds=30.0, propagation=5.0)

Happening = Callable[["Pool"], None]
"""Something that happens in the world; the policy hears of it sooner or later."""
Step = Event | Happening


class Pool:
    """Carries out what the policy wants, at once, and keeps a record.

    Process ids are given from 100 on, in the order of spawning. Processes do nothing by
    themselves, except that those in ``beating`` send a ready beat each second.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        redis: bool = False,
        timing: Timing = STEADY,
        drain: DrainTimes = DRAIN,
        seed: int = 0,
    ) -> None:
        plan = Plan(workers=workers, embedded_redis=redis, drain=drain, identity=IDENTITY)
        self.policy = Policy(plan, rng=random.Random(seed), now=0.0, timing=timing)
        self.now = 0.0
        self.next_pid = 100
        self.alive: dict[int, Spawn] = {}
        self.dismissed: set[int] = set()
        """Those that were drained or killed, or told to go."""
        self.beating: set[int] = set()
        self.unspawnable: set[tuple[Kind, int]] = set()
        self.record: list[tuple[float, Action]] = []
        self.exit_code: int | None = None

    def tell(self, event: Event) -> list[Action]:
        """Hand over an event and carry out what follows from it."""
        done: list[Action] = []
        queue = self.policy.handle(event, self.now)
        while queue:
            action = queue.pop(0)
            done.append(action)
            self.record.append((self.now, action))
            queue += self._perform(action)
        return done

    def _perform(self, action: Action) -> list[Action]:
        match action:
            case Spawn():
                return self.policy.handle(self._spawn(action), self.now)
            case SendDrain():
                self.dismissed.add(action.pid)
            case Kill():
                self.dismissed.add(action.pid)
            case Exit():
                assert self.exit_code is None
                self.exit_code = action.code
            case _:
                pass
        return []

    def _spawn(self, action: Spawn) -> Event:
        if (action.kind, action.slot) in self.unspawnable:
            return SpawnFailed(
                kind=action.kind, slot=action.slot, generation=action.generation, reason="full"
            )
        pid = self.next_pid
        self.next_pid += 1
        self.alive[pid] = action
        return Spawned(kind=action.kind, slot=action.slot, generation=action.generation, pid=pid)

    def advance(self, to: float) -> None:
        """Let time pass: ticks when the policy asks for one, and at least each second; beats."""
        idle = 0
        while self.now < to:
            before = self.now
            second = float(int(self.now) + 1)
            self.now = min(to, second, max(self.now, self.policy.next_deadline()))
            if self.now == second:
                for pid in sorted(self.beating & self.alive.keys()):
                    self.tell(Beat(pid=pid, connections=1, ready=True, why=""))
            self.tell(Tick())
            idle = idle + 1 if self.now == before else 0
            assert idle < 10, "the policy asks for a moment that has passed"

    def begin(self) -> None:
        """Start, and bring everything up at once, ready and beating."""
        self.tell(Begin())
        self.bring_up()

    def bring_up(self, *pids: int) -> None:
        """Make these ready and beating, or all who have been spawned, and those after them."""
        while fresh := sorted(pids or self.alive.keys() - self.beating - self.dismissed):
            for pid in fresh:
                self._bring_up(pid)
            if pids:
                break

    def _bring_up(self, pid: int) -> None:
        self.beating.add(pid)
        if self.alive[pid].kind is Kind.REDIS:
            self.tell(RedisAnswered(pid=pid))
        else:
            self.tell(Started(pid=pid))
            self.tell(Beat(pid=pid, connections=0, ready=True, why=""))

    def end(self, pid: int, code: int = 0) -> None:
        """Let a process end."""
        del self.alive[pid]
        self.beating.discard(pid)
        self.tell(Exited(pid=pid, code=code))

    def status(self) -> StatusReply:
        """Return the status at this moment."""
        return self.policy.status(self.now)

    def did(self, since: float = 0.0) -> list[tuple[float, Action]]:
        """Return what was done since then, log lines and the announcement left out."""
        return [
            (round(when, 3), action)
            for when, action in self.record
            if when >= since and not isinstance(action, Say | Announce)
        ]

    def said(self, event: str) -> list[dict[str, object]]:
        """Return the fields of each log line of that name."""
        return [a.fields for _, a in self.record if isinstance(a, Say) and a.event == event]

    def replies(self, request: int) -> list[object]:
        """Return what a request was answered with."""
        return [a.reply for _, a in self.record if isinstance(a, Reply) and a.request == request]


def play(pool: Pool, steps: Sequence[tuple[float, Step]], until: float) -> None:
    """Let each step happen at its time."""
    for when, step in steps:
        pool.advance(when)
        if callable(step):
            step(pool)
        else:
            pool.tell(step)
    pool.advance(until)
