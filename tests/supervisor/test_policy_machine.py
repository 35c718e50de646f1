"""The policy under any history at all: what must hold whatever happens."""

import collections
import signal
from collections.abc import Iterator

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from supervisor.events import (
    Asked,
    Beat,
    Begin,
    Exit,
    Exited,
    Kill,
    Kind,
    RedisAnswered,
    Reply,
    SignalCame,
    SnapshotFailed,
    SnapshotReady,
    Spawn,
    Started,
    TakeSnapshot,
)
from supervisor.slots import Timing
from tests.supervisor.pool import DRAIN, Pool

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
LONGEST_STOP = 40.0
"""30 s of drain, the later stages, and the patience with the immortal."""


class AnyHistory(RuleBasedStateMachine):
    """A pool to which everything happens that can happen to processes."""

    @initialize(
        workers=st.integers(1, 3), redis=st.booleans(), seed=st.integers(0, 3), up=st.booleans()
    )
    def begin(self, workers: int, redis: bool, seed: int, up: bool) -> None:  # noqa: FBT001
        """Start a pool; most of the time bring it up, because most of life comes after that."""
        self.pool = Pool(workers=workers, redis=redis, seed=seed, timing=Timing())
        self.pool.tell(Begin())
        self.stopped_at: float | None = None
        self.requests = 0
        if up:
            self.pool.bring_up()

    # --- what happens ----------------------------------------------------------------------------

    def some_pid(self, data: st.DataObject) -> int:
        """Return one of the living."""
        return data.draw(st.sampled_from(sorted(self.pool.alive)))

    def anybody(self) -> bool:
        """Say whether there is one."""
        return bool(self.pool.alive)

    @rule(seconds=st.sampled_from((0.01, 0.5, 1.0, 2.5, 6.0, 20.0, 65.0)))
    def time_passes(self, seconds: float) -> None:
        """Nothing else happens for a while."""
        self.pool.advance(self.pool.now + seconds)

    @rule()
    def all_that_were_spawned_come_up(self) -> None:
        """Everybody starts and is ready."""
        self.pool.bring_up()

    @precondition(anybody)
    @rule(data=st.data())
    def one_starts(self, data: st.DataObject) -> None:
        """One says that it has started, truly or again."""
        pid = self.some_pid(data)
        redis = self.pool.alive[pid].kind is Kind.REDIS
        loading = data.draw(st.booleans())
        self.pool.tell(RedisAnswered(pid=pid, loading=loading) if redis else Started(pid=pid))

    @precondition(anybody)
    @rule(data=st.data(), ready=st.booleans())
    def one_beats(self, data: st.DataObject, ready: bool) -> None:  # noqa: FBT001
        """One beats, ready or not."""
        pid = self.some_pid(data)
        if self.pool.alive[pid].kind is not Kind.REDIS:
            self.pool.tell(Beat(pid=pid, connections=3, ready=ready, why="" if ready else "x"))

    @precondition(anybody)
    @rule(data=st.data())
    def one_hangs(self, data: st.DataObject) -> None:
        """One falls silent."""
        self.pool.beating.discard(self.some_pid(data))

    @precondition(anybody)
    @rule(data=st.data(), code=st.sampled_from((0, 1, 4, -9, -11)))
    def one_dies(self, data: st.DataObject, code: int) -> None:
        """One dies, of whatever it is."""
        self.pool.end(self.some_pid(data), code)

    @rule()
    def the_dismissed_leave(self) -> None:
        """Those who were told to finish do."""
        for pid in sorted(self.pool.dismissed & self.pool.alive.keys()):
            self.pool.end(pid)

    @rule(pid=st.integers(1, 99))
    def a_stranger_is_reaped(self, pid: int) -> None:
        """PID 1 reaps what is not its own."""
        assert self.pool.tell(Exited(pid=pid, code=0)) == []

    @rule(number=st.sampled_from((*STOPS, signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1)))
    def a_signal_comes(self, number: signal.Signals) -> None:
        """The operator, or the terminal, sends a signal."""
        if number in STOPS:
            self.stopping()
        self.pool.tell(SignalCame(signal=number))

    def running(self) -> bool:
        """Say whether the loop still turns."""
        return self.pool.exit_code is None

    @precondition(running)
    @rule(op=st.sampled_from(("status", "reload", "reload", "stop", "?")))
    def somebody_asks(self, op: str) -> None:
        """A request arrives."""
        self.requests += 1
        if op == "stop":
            self.stopping()
        self.pool.tell(Asked(request=self.requests, op=op))

    @rule(good=st.booleans(), late=st.booleans())
    def settings_are_read(self, good: bool, late: bool) -> None:  # noqa: FBT001
        """The settings of a reload are there, or of the one before."""
        asked = [a.generation for _, a in self.pool.record if isinstance(a, TakeSnapshot)]
        for generation in asked[-1:]:
            number = generation - late
            self.pool.tell(
                SnapshotReady(generation=number, drain=DRAIN)
                if good
                else SnapshotFailed(generation=number, reason="no")
            )

    @rule(slot=st.integers(0, 2), full=st.booleans())
    def room_for_processes_changes(self, slot: int, full: bool) -> None:  # noqa: FBT001
        """The kernel has room for no more processes, or again."""
        self.pool.unspawnable = {(Kind.WORKER, slot)} if full else set()

    def stopping(self) -> None:
        """Note when the stop began."""
        if self.stopped_at is None:
            self.stopped_at = self.pool.now

    # --- what holds ------------------------------------------------------------------------------

    @invariant()
    def a_slot_has_one_owner_per_generation_and_one_generation_outside_reloads(self) -> None:
        """Nobody is doubled but by a reload, and the leaving own nothing."""
        staying = self.pool.alive.keys() - self.pool.dismissed
        owners = collections.Counter(self.pool.alive[pid] for pid in staying)
        assert all(count == 1 for count in owners.values())
        if not self.pool.status().reloading:
            slots = collections.Counter((spawn.kind, spawn.slot) for spawn in owners)
            assert all(count == 1 for count in slots.values())

    @invariant()
    def nobody_is_spawned_after_a_stop(self) -> None:
        """A stop is the end."""
        if self.stopped_at is not None:
            late = [w for w, a in self.actions() if isinstance(a, Spawn) and w > self.stopped_at]
            assert late == []

    @invariant()
    def a_slot_is_respawned_eight_times_a_minute_at_most(self) -> None:
        """A crash loop is slow."""
        spawned: dict[Spawn, list[float]] = collections.defaultdict(list)
        for when, action in self.actions():
            if isinstance(action, Spawn):
                spawned[action].append(when)
        for _, *respawns in spawned.values():
            for when in respawns:
                assert sum(when <= other < when + 60.0 for other in respawns) <= 8

    @invariant()
    def status_shows_living_owners_only(self) -> None:
        """No pid of the dead, no readiness without owners."""
        status = self.pool.status()
        pids = [w.pid for w in status.workers] + [status.gateway.pid, status.redis.pid]
        assert {pid for pid in pids if pid is not None} <= self.pool.alive.keys()
        assert not status.ready or all(w.pid is not None for w in status.workers)
        assert not (status.ready and status.draining)

    @invariant()
    def only_children_are_killed_and_at_most_once(self) -> None:
        """SIGKILL hits living children, each once."""
        killed = [a.pid for _, a in self.actions() if isinstance(a, Kill) and a.signal == 9]
        assert len(killed) == len(set(killed))
        assert all(100 <= pid < self.pool.next_pid for pid in killed)

    def actions(self) -> Iterator[tuple[float, object]]:
        """Yield what was done, and when."""
        yield from self.pool.record

    # --- how it ends -----------------------------------------------------------------------------

    def teardown(self) -> None:
        """Stop it: everybody who was killed dies, and it exits in time, with all answers given."""
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        self.stopping()
        pool.tell(SignalCame(signal=signal.SIGTERM))
        deadline = pool.now + LONGEST_STOP
        while pool.exit_code is None and pool.now < deadline:
            pool.advance(pool.now + 0.25)
            kills = {a.pid for _, a in pool.record if isinstance(a, Kill) and a.signal == 9}
            for pid in sorted(kills & pool.alive.keys()):
                pool.end(pid, -9)
            self.nobody_is_spawned_after_a_stop()
        assert pool.exit_code is not None
        immortal = {a.pid for _, a in pool.record if isinstance(a, Kill) and a.signal == 9}
        assert pool.alive.keys() <= immortal
        answered = collections.Counter(a.request for _, a in pool.record if isinstance(a, Reply))
        assert set(answered) == set(range(1, self.requests + 1))
        assert all(count == 1 for count in answered.values())
        assert sum(isinstance(action, Exit) for _, action in pool.record) == 1


AnyHistory.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, print_blob=True
)
test_any_history = AnyHistory.TestCase
