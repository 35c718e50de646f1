"""Every decision of the supervisor, as a function of what happened and when.

`Policy.handle` takes one event and the time and returns the actions; nothing here reads a clock,
rolls dice of its own or touches the operating system, so each rule can be tried as a table of
"then this happened". The loop around it only carries out.

Theory of operation
-------------------
* **Begin**: the embedded Redis first; when it answers, everything else. Workers survive without
  Redis, but then they would spend the start in their reconnect back-off.
* **First start**: until a child of the first generation has started once, its death, or its
  silence for a minute, says that this release or configuration does not work: stop all, exit 3 (or
  4 if the child said so). Later the same death is an accident and is answered with a respawn.
* **Respawn**: at once after the first accident of a healthy child, then with growing waits. A
  child's end never has consequences for another one; in particular Redis may come and go.
* **Hang**: silence makes unready, then SIGABRT (stacks into the log), then SIGKILL. If it was the
  loop itself that did not turn, silence is forgiven.
* **Reload** and **stop** have files of their own. While a stop is under way nothing is spawned;
  what arrives too late is killed at once. A second SIGTERM or SIGINT hurries the stop.

Every event is followed by a look at the time, so a late or missing `Tick` delays but never loses.

Killing by pid is safe here although pids are reused: an exited child keeps its pid until it is
reaped, only the loop reaps, and it reports `Exited` before it carries out another action.
"""

import random
import signal
from typing import Final

import attrs

from supervisor.events import (
    Action,
    Announce,
    Asked,
    Beat,
    Begin,
    ChildEvent,
    CloseDoor,
    DrainTimes,
    DropSnapshot,
    Event,
    Exit,
    Exited,
    Kill,
    Kind,
    RedisAnswered,
    Reply,
    Say,
    SignalCame,
    SnapshotFailed,
    SnapshotReady,
    Spawn,
    Spawned,
    SpawnFailed,
    Started,
    Tick,
)
from supervisor.reloading import Reload, name
from supervisor.report import Identity, Moment, status_of
from supervisor.slots import Life, Place, Table, Timing
from supervisor.stopping import Stop
from supervisor.watching import forgive, hear, say, watch
from trioserver.status import StatusReply, Verdict

_FIRST_START_FAILED: Final = 3
_CONFIGURATION: Final = 4
"""Exit codes, the child's and ours alike."""


@attrs.frozen(kw_only=True)
class Plan:
    """What the first generation is made of."""

    workers: int
    embedded_redis: bool
    drain: DrainTimes
    identity: Identity


class Policy:
    """The state of the pool, and what to do next."""

    def __init__(self, plan: Plan, *, rng: random.Random, now: float, timing: Timing) -> None:
        """Start with an empty pool; the first event is `Begin`.

        Args:
            plan: What to run.
            rng: Where the jitter comes from.
            now: The time on the clock that all later times come from, in seconds.
            timing: The numbers to decide by.
        """
        self._plan = plan
        self._drain = plan.drain
        self._timing = timing
        self._rng = rng
        self._began = now
        self._last_turn = now
        self._generation = 1
        self._highest_generation = 1
        self._announced = False
        self._waiting_for_redis = plan.embedded_redis
        self._over = False
        self._reload: Reload | None = None
        self._stop: Stop | None = None
        self._table = Table()
        for slot in range(plan.workers):
            self._add_place(Kind.WORKER, slot)
        self._add_place(Kind.GATEWAY, 0)
        if plan.embedded_redis:
            self._add_place(Kind.REDIS, 0)

    def _add_place(self, kind: Kind, slot: int) -> None:
        self._table.places[kind, slot] = Place(kind=kind, slot=slot, generation=1)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take note of an event and return what to do, in order. After `Exit` nothing, ever.

        ``now`` never goes backwards from call to call.
        """
        if self._over:
            return []
        actions = self._forgive_pause(now)
        actions += self._react(event, now)
        actions += self._act_on_time(now)
        actions += self._announce(now)
        self._table.ordered += sum(isinstance(action, Spawn) for action in actions)
        self._over = any(isinstance(action, Exit) for action in actions)
        return actions

    def next_deadline(self) -> float:
        """Return when to call with `Tick` if nothing happens before; infinity if never."""
        deadlines = [d for life in self._table.lives() for d in life.deadlines(self._timing)]
        deadlines += [p.spawn_at for p in self._table.all_places() if p.spawn_at is not None]
        if self._reload is not None:
            deadlines.append(self._reload.deadline)
        if self._stop is not None:
            deadlines += self._stop.deadlines()
        return min(deadlines, default=float("inf"))

    def status(self, now: float) -> StatusReply:
        """Return how the pool is at this moment."""
        return status_of(
            self._table,
            self._plan.identity,
            self._timing,
            Moment(
                now=now,
                uptime=now - self._began,
                generation=self._generation,
                draining=self._stop is not None,
                reloading=self._reload is not None,
            ),
        )

    # --- events ---------------------------------------------------------------------------------

    def _react(self, event: Event, now: float) -> list[Action]:
        if isinstance(event, ChildEvent):
            return self._react_to_child(event, now)
        match event:
            case Begin():
                return self._begin()
            case SignalCame():
                return self._signalled(event.signal, now)
            case Asked():
                return self._asked(event, now)
            case SnapshotReady() | SnapshotFailed():
                return self._snapshot(event, now)
            case Tick():
                return []

    def _react_to_child(self, event: ChildEvent, now: float) -> list[Action]:
        match event:
            case Spawned():
                return self._spawned(event, now)
            case SpawnFailed():
                return self._spawn_failed(event, now)
            case Started():
                return self._started(event.pid, now)
            case Beat():
                return self._beat(event, now)
            case RedisAnswered():
                return self._redis_answered(event, now)
            case Exited():
                return self._exited(event, now)

    def _begin(self) -> list[Action]:
        if self._plan.embedded_redis:
            return [_spawn(self._table.places[Kind.REDIS, 0])]
        return self._spawn_the_rest()

    def _spawn_the_rest(self) -> list[Action]:
        self._waiting_for_redis = False
        return [_spawn(p) for p in self._table.places.values() if p.kind is not Kind.REDIS]

    def _spawned(self, event: Spawned, now: float) -> list[Action]:
        self._table.ordered -= 1
        life = Life(
            kind=event.kind,
            slot=event.slot,
            generation=event.generation,
            pid=event.pid,
            spawned_at=now,
        )
        place = self._table.place(event.kind, event.slot, event.generation)
        if self._stop is not None or place is None:
            # Between order and execution the world changed: the spawn of a sibling failed.
            life.kill_at = life.killed_at = now
            self._table.leaving[life.pid] = life
            return [Kill(pid=life.pid, signal=signal.SIGKILL)]
        place.life = life
        return [say("debug", "child spawned", life)]

    def _started(self, pid: int, now: float) -> list[Action]:
        match self._table.owned_by(pid):
            case (place, life) if life.started_at is None:
                place.proven = True
                life.started_at = life.heard_at = now
                took = round(now - life.spawned_at, 3)
                return [say("info", "child started", life, seconds=took), *self._take_over(now)]
            case _:
                return []

    def _beat(self, event: Beat, now: float) -> list[Action]:
        owned = self._table.owned_by(event.pid)
        if owned is None:
            return []
        actions = hear(owned[1], event, now)
        return [*actions, *self._take_over(now)]

    def _redis_answered(self, event: RedisAnswered, now: float) -> list[Action]:
        owned = self._table.owned_by(event.pid)
        if owned is None:
            return []
        life = owned[1]
        if event.loading:
            # A big append-only file takes its time; as long as it says so, it is fine.
            life.heard_at, life.why = now, "loading its files"
            return []
        life.ready, life.why = True, ""
        actions = self._started(event.pid, now)
        return actions + (self._spawn_the_rest() if self._waiting_for_redis else [])

    def _exited(self, event: Exited, now: float) -> list[Action]:
        life = self._table.leaving.pop(event.pid, None)
        if life is None:
            owned = self._table.owned_by(event.pid)
            if owned is None:
                # As PID 1 one inherits everybody's orphans. They are reaped, and that is all.
                return []
            place, life = owned
            if self._stop is None:
                return self._lost(place, life.aborted_for or describe_end(event.code), now, event)
            place.life = None
        left = say("info", "child left", life, how=describe_end(event.code))
        if self._stop is None:
            return [left]
        # Nobody will accept there again: whoever comes is better refused than left waiting.
        shut = [CloseDoor(slot=life.slot)] if life.kind is Kind.WORKER else []
        return [left, *shut, *self._stop.advance(now)]

    def _signalled(self, number: signal.Signals, now: float) -> list[Action]:
        match number:
            case signal.SIGTERM | signal.SIGINT | signal.SIGQUIT:
                if self._stop is not None:
                    return [Say(level="info", event="stop hurried"), *self._stop.hurry(now)]
                return self._begin_stop(now, quick=number is not signal.SIGTERM)
            case signal.SIGHUP:
                return self._begin_reload([], now)
            case _:
                return []

    def _asked(self, event: Asked, now: float) -> list[Action]:
        match event.op:
            case "status":
                return [Reply(request=event.request, reply=self.status(now))]
            case "reload":
                return self._begin_reload([event.request], now)
            case "stop":
                if self._stop is not None:
                    self._stop.requests.append(event.request)
                    return []
                return self._begin_stop(now, quick=False, requests=[event.request])
            case _:
                reason = f"unknown op {event.op[:32]!r}"
                return [Reply(request=event.request, reply=Verdict(ok=False, reason=reason))]

    # --- deaths and respawns --------------------------------------------------------------------

    def _spawn_failed(self, event: SpawnFailed, now: float) -> list[Action]:
        self._table.ordered -= 1
        if self._stop is not None:
            return self._stop.advance(now)
        place = self._table.place(event.kind, event.slot, event.generation)
        if place is None:
            return []
        return self._lost(place, f"could not be spawned: {event.reason}", now)

    def _lost(
        self, place: Place, how: str, now: float, exited: Exited | None = None
    ) -> list[Action]:
        """Decide what it means that a place has no owner, although nobody has sent it away."""
        candidate = place in self._table.candidates.values()
        if candidate or not place.proven:
            place.life = None
            return self._fail_to_begin(place, how, now, exited.code if exited else None)
        wait = place.lose(now, self._timing, self._rng)
        place.spawn_at = now + wait
        about: dict[str, object] = {"kind": str(place.kind), "slot": place.slot, "how": how}
        return [Say(level="error", event="child died", fields={**about, "wait": round(wait, 3)})]

    def _fail_to_begin(
        self, place: Place, how: str, now: float, code: int | None = None
    ) -> list[Action]:
        """Give up a generation: it does not even start, or not as a whole."""
        reason = f"{name(place)} {how}"
        if place.generation != 1:
            return self._fail_reload(reason, now)
        said = Say(level="error", event="first start failed", fields={"reason": reason})
        exit_code = _CONFIGURATION if code == _CONFIGURATION else _FIRST_START_FAILED
        return [said, *self._begin_stop(now, quick=True, code=exit_code)]

    def _respawn(self, place: Place) -> Spawn:
        place.spawn_at = None
        place.restarts += 1
        return _spawn(place)

    # --- reload and stop ------------------------------------------------------------------------

    def _begin_reload(self, requests: list[int], now: float) -> list[Action]:
        refusal = self._no_reload()
        if refusal:
            said = Say(level="warning", event="reload refused", fields={"reason": refusal})
            verdict = Verdict(ok=False, reason=refusal)
            return [said, *(Reply(request=number, reply=verdict) for number in requests)]
        self._highest_generation += 1
        self._reload, actions = Reload.begin(
            self._table, self._timing, self._highest_generation, requests, now
        )
        return actions

    def _no_reload(self) -> str:
        if self._stop is not None:
            return "the server is stopping"
        if self._reload is not None:
            return "a reload is under way already"
        if not all(place.proven for place in self._table.places.values()):
            return "the server is still starting"
        return ""

    def _snapshot(self, event: SnapshotReady | SnapshotFailed, now: float) -> list[Action]:
        if self._reload is None or not self._reload.reading(event.generation):
            return []
        if isinstance(event, SnapshotFailed):
            return self._fail_reload(event.reason, now)
        return self._reload.raise_generation(event.drain, now)

    def _take_over(self, now: float) -> list[Action]:
        reload = self._reload
        if reload is None or reload.drain is None or not reload.complete(now):
            return []
        actions = reload.take_over(self._drain, now)
        actions.append(DropSnapshot(generation=self._generation))
        self._generation, self._drain, self._reload = reload.generation, reload.drain, None
        return actions

    def _fail_reload(self, reason: str, now: float) -> list[Action]:
        reload, self._reload = self._reload, None
        return reload.fail(reason, now) if reload is not None else []

    def _begin_stop(
        self, now: float, *, quick: bool, code: int = 0, requests: list[int] | None = None
    ) -> list[Action]:
        actions = self._fail_reload("the server is stopping", now)
        self._stop = Stop(
            table=self._table,
            timing=self._timing,
            code=code,
            quick=quick,
            drain=self._drain,
            requests=requests or [],
        )
        actions.append(Say(level="info", event="stopping", fields={"quick": quick}))
        return actions + self._stop.begin(now)

    # --- time -----------------------------------------------------------------------------------

    def _forgive_pause(self, now: float) -> list[Action]:
        paused = now - self._last_turn
        self._last_turn = now
        if paused < self._timing.pause:
            return []
        forgive(self._table, now)
        fields: dict[str, object] = {"seconds": round(paused, 1)}
        return [Say(level="warning", event="supervisor was paused", fields=fields)]

    def _act_on_time(self, now: float) -> list[Action]:
        actions: list[Action] = []
        if self._reload is not None and now >= self._reload.deadline:
            actions += self._reload.expire(now)
            self._reload = None
        actions += watch(self._table, self._timing, now)
        if self._stop is not None:
            return actions + self._stop.on_time(now)
        for place in self._table.places.values():
            if place.spawn_at is not None and now >= place.spawn_at:
                actions.append(self._respawn(place))
        return actions

    def _announce(self, now: float) -> list[Action]:
        ready = all(place.ready(now, self._timing) for place in self._table.places.values())
        if self._announced or self._stop is not None or not ready:
            return []
        self._announced = True
        return [Announce(seconds=now - self._began)]


def describe_end(code: int) -> str:
    """Return how a process ended, as the end of a sentence about it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        killer = signal.Signals(-code).name
    except ValueError:
        killer = f"signal {-code}"
    return f"was killed by {killer}"


def _spawn(place: Place) -> Spawn:
    return Spawn(kind=place.kind, slot=place.slot, generation=place.generation)
