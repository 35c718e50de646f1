"""The slot table: which process owns which slot, for how long one waits for it, and when to retry.

A *place* is a slot as one generation sees it. It outlives the processes that own it one after the
other; each of those is a *life*, from spawn to reaping. A life is always in exactly one of three
homes, and moves only downwards:

    candidates   places of a generation that is being raised by a reload
    places       the generation that serves; the embedded Redis has its place here, too
    leaving      lives that were told to finish; they are nobody's owner any more

Pure: no clock, no randomness of its own, no operating system.
"""

import random
from collections.abc import Iterator
from typing import Final

import attrs

from supervisor.events import Kind

_DOUBLINGS: Final = 16
"""More would only overflow; the longest wait is reached long before."""


@attrs.frozen(kw_only=True)
class Timing:
    """Every number of seconds the policy decides by. Fixed in the product, shorter in tests."""

    unready_silence: float = 5.0
    """Without a sign of life for so long, a child counts as unready: four beats were missed."""
    abort_silence: float = 15.0
    """... it gets SIGABRT, so that its stacks are in the log. gunicorn waits 30 s; uvicorn's 5 s
    have killed healthy workers on busy machines."""
    abort_grace: float = 2.0
    """Between SIGABRT and SIGKILL: to write the stacks. A stopped process never wakes for it."""
    startup: float = 60.0
    """From spawn to `Started`, as Hypercorn. Importing takes 0.5 s, on a starved machine more."""
    free_respawn: float = 10.0
    """A child that was well for so long is replaced at once when it dies for the first time."""
    forget_deaths: float = 60.0
    """A child that was well for so long has outlived the deaths before it."""
    backoff: float = 0.5
    """First wait before a respawn; doubled from death to death."""
    backoff_limit: float = 30.0
    """Longest wait. Doubling from 0.5 s makes at most 8 respawns of a slot in any minute."""
    backoff_jitter: float = 0.2
    """Waits differ by up to this share, so that slots do not crash in step."""
    snapshot: float = 30.0
    """For a fresh interpreter to read and check the settings."""
    reload: float = 60.0
    """For a new generation to get ready as a whole."""
    quick: float = 1.2
    """Quick stop: from the order to SIGKILL for workers and gateway..."""
    quick_redis: float = 0.6
    """... and for the embedded Redis after them. Both together stay below 2 s."""
    gateway_stop: float = 1.5
    """Ordinary stop: the gateway's part, after the workers are gone."""
    redis_stop: float = 2.0
    """Ordinary stop: the embedded Redis's part. SIGKILL then loses nothing it has answered."""
    stop_reserve: float = 0.5
    """Ordinary stop: what is left of ``DRAIN_SECONDS`` at the end, for the supervisor itself."""
    give_up: float = 5.0
    """After SIGKILL: a process that the kernel cannot end (disk gone) must not keep us for ever."""
    pause: float = 3.0
    """The loop turns at least every second. If it did not for so long, the supervisor itself was
    stopped (Ctrl-Z, a frozen container), and the silence of the others proves nothing."""


@attrs.define(eq=False, kw_only=True)
class Life:
    """One process from spawn to reaping."""

    kind: Kind
    slot: int
    generation: int
    pid: int
    spawned_at: float
    heard_at: float = attrs.field()
    """Last sign of life; until it has started, the time from which patience is counted."""
    started_at: float | None = None
    ready: bool = False
    why: str = "starting"
    connections: int = 0
    silent: bool = False
    """Found silent, and logged; until the next sign of life."""
    kill_at: float | None = None
    """When to send SIGKILL, if it was aborted or told to finish."""
    killed_at: float | None = None
    hurried: bool = False
    """It was told to finish quickly; there is nothing more urgent to tell it."""
    given_up: bool = False
    """Even SIGKILL did not end it in time; nobody waits for it any more."""
    aborted_for: str = ""
    """Why it was killed before its time, for the log; empty if it was not."""

    @heard_at.default
    def _unheard(self) -> float:
        return self.spawned_at

    def quiet(self, now: float, seconds: float) -> bool:
        """Say whether nothing was heard for so long."""
        # The very sum that `deadlines` yields: a difference may round to the other side.
        return now >= self.heard_at + seconds

    @property
    def beats(self) -> bool:
        """Whether silence means anything: it has started, and it is one of ours, not Redis."""
        return self.kind is not Kind.REDIS and self.started_at is not None

    def deadlines(self, timing: Timing) -> Iterator[float]:
        """Yield each moment at which something may have to be done about this life."""
        if self.killed_at is not None:
            return
        if self.kill_at is not None:
            yield self.kill_at
        elif self.started_at is None:
            yield self.heard_at + timing.startup
        elif self.beats:
            yield self.heard_at + timing.abort_silence
            if not self.silent:
                yield self.heard_at + timing.unready_silence


@attrs.define(eq=False, kw_only=True)
class Place:
    """One slot of one generation."""

    kind: Kind
    slot: int
    generation: int
    life: Life | None = None
    """The owner."""
    spawn_at: float | None = None
    """When to spawn the next owner; ``None`` while there is one or none is wanted."""
    restarts: int = 0
    """Respawns since the supervisor started, over all generations of this slot."""
    proven: bool = False
    """Some owner has started: from now on a death is an accident, not a bad release."""
    _deaths: int = 0
    _waits: int = 0

    def lose(self, now: float, timing: Timing, rng: random.Random) -> float:
        """Note that the owner died; return for how many seconds to wait before the next.

        Call it with the dead owner still in ``life``; ``None`` there means that not even the spawn
        succeeded.
        """
        life, self.life = self.life, None
        started_at = life.started_at if life is not None else None
        healthy = now - started_at if started_at is not None else 0.0
        if healthy >= timing.forget_deaths:
            self._deaths = self._waits = 0
        self._deaths += 1
        if self._deaths == 1 and healthy >= timing.free_respawn:
            return 0.0
        wait = min(timing.backoff_limit, timing.backoff * (1 << min(self._waits, _DOUBLINGS)))
        self._waits += 1
        return wait * rng.uniform(1 - timing.backoff_jitter, 1 + timing.backoff_jitter)

    def owned(self, now: float, timing: Timing) -> bool:
        """Say whether somebody lives here who would serve: started, and not silent."""
        life = self.life
        if life is None or life.started_at is None:
            return False
        return not (life.beats and life.quiet(now, timing.unready_silence))

    def ready(self, now: float, timing: Timing) -> bool:
        """Say whether the owner is ready, as far as one can know."""
        return self.owned(now, timing) and self.life is not None and self.life.ready

    def why(self, now: float, timing: Timing) -> str:
        """Return why it is not ready, in a few words; empty if it is."""
        if self.ready(now, timing):
            return ""
        life = self.life
        if life is None:
            if self.spawn_at is None:
                return "nobody is here"
            return f"next start in {max(0.0, self.spawn_at - now):.1f} s"
        if life.beats and life.quiet(now, timing.unready_silence):
            return f"no sign of life for {now - life.heard_at:.0f} s"
        return life.why or "not ready"


Key = tuple[Kind, int]
"""A slot whatever the generation."""


@attrs.define(eq=False)
class Table:
    """Who is where. Keeps the homes disjoint; decides nothing."""

    places: dict[Key, Place] = attrs.Factory(dict)
    candidates: dict[Key, Place] = attrs.Factory(dict)
    leaving: dict[int, Life] = attrs.Factory(dict)
    ordered: int = 0
    """Spawns that have been ordered and not yet reported."""

    def all_places(self) -> Iterator[Place]:
        """Yield the places of both generations."""
        yield from self.places.values()
        yield from self.candidates.values()

    def owners(self) -> Iterator[Life]:
        """Yield every life that owns a place."""
        for place in self.all_places():
            if place.life is not None:
                yield place.life

    def lives(self) -> Iterator[Life]:
        """Yield every life that has not been reaped."""
        yield from self.owners()
        yield from self.leaving.values()

    def owned_by(self, pid: int) -> tuple[Place, Life] | None:
        """Return the place that this process owns, and its life there."""
        for place in self.all_places():
            if place.life is not None and place.life.pid == pid:
                return place, place.life
        return None

    def place(self, kind: Kind, slot: int, generation: int) -> Place | None:
        """Return the place of that slot in that generation."""
        for home in (self.places, self.candidates):
            place = home.get((kind, slot))
            if place is not None and place.generation == generation:
                return place
        return None

    def dismiss(self, life: Life) -> None:
        """Take its place from the owner; from now on it is only waited for. Idempotent."""
        place = self.place(life.kind, life.slot, life.generation)
        if place is not None and place.life is life:
            place.life = None
        self.leaving[life.pid] = life

    def has(self, *kinds: Kind) -> bool:
        """Say whether there is a process of these kinds to wait for."""
        return any(life.kind in kinds and not life.given_up for life in self.lives())
