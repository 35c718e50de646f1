"""A reload: a whole generation is raised beside the one that serves, and takes over or vanishes.

    reading the settings ──► raising ──► taken over      (the old generation drains)
            │                   │
            └──────► failed ◄───┘                        (the old generation never noticed)

It succeeds at the one moment at which every new worker and the new gateway is ready. Both
generations share the slots' sockets, so from then on the old ones may stop accepting at once:
nobody has to learn a new address first, and no client is dropped twice.
"""

from collections.abc import Iterator

import attrs

from supervisor.events import (
    Action,
    DrainTimes,
    DropSnapshot,
    Kind,
    Reply,
    Say,
    Spawn,
    TakeSnapshot,
)
from supervisor.slots import Place, Table, Timing
from supervisor.stopping import finish
from trioserver.status import Verdict


@attrs.define(eq=False, kw_only=True)
class Reload:
    """A reload under way."""

    table: Table
    timing: Timing
    generation: int
    """The new one's number. Never used again, whatever comes of it."""
    requests: list[int]
    """Who waits for the verdict; nobody after SIGHUP."""
    deadline: float
    drain: DrainTimes | None = None
    """The new settings' own; ``None`` while they are being read."""

    @classmethod
    def begin(
        cls, table: Table, timing: Timing, generation: int, requests: list[int], now: float
    ) -> tuple["Reload", list[Action]]:
        """Start by having the settings read, by the new code."""
        reload = cls(
            table=table,
            timing=timing,
            generation=generation,
            requests=requests,
            deadline=now + timing.snapshot,
        )
        said = Say(level="info", event="reload begins", fields={"generation": generation})
        return reload, [said, TakeSnapshot(generation=generation)]

    def reading(self, generation: int) -> bool:
        """Say whether the settings of that generation are being waited for."""
        return self.drain is None and generation == self.generation

    def raise_generation(self, drain: DrainTimes, now: float) -> list[Action]:
        """Spawn everything that the generation consists of. Redis belongs to none."""
        self.drain = drain
        self.deadline = now + self.timing.reload
        for (kind, slot), old in self.table.places.items():
            if kind is not Kind.REDIS:
                self.table.candidates[kind, slot] = Place(
                    kind=kind, slot=slot, generation=self.generation, restarts=old.restarts
                )
        return [
            Spawn(kind=place.kind, slot=place.slot, generation=place.generation)
            for place in self.table.candidates.values()
        ]

    def complete(self, now: float) -> bool:
        """Say whether the new generation could take over at this moment."""
        places = self.table.candidates.values()
        return self.drain is not None and all(place.ready(now, self.timing) for place in places)

    def take_over(self, old_drain: DrainTimes, now: float) -> list[Action]:
        """Put the new generation in the old one's places, and let the old one drain."""
        actions: list[Action] = []
        for key, new in self.table.candidates.items():
            old = self.table.places[key]
            # Restarts of the old owner while the new one was raised count, too.
            new.restarts = old.restarts
            actions += self._retire(old, old_drain.seconds, now, quick=False)
            self.table.places[key] = new
        self.table.candidates.clear()
        verdict = Verdict(ok=True, generation=self.generation)
        said = Say(level="info", event="reload done", fields={"generation": self.generation})
        return [*actions, said, *self._reply(verdict)]

    def fail(self, reason: str, now: float) -> list[Action]:
        """Make everything of the new generation go away. The old one is not touched."""
        actions: list[Action] = []
        for new in self.table.candidates.values():
            # Quickly, but not brutally: it shared the sockets, so it may have clients already.
            actions += self._retire(new, self.timing.quick, now, quick=True)
        self.table.candidates.clear()
        fields: dict[str, object] = {"generation": self.generation, "reason": reason}
        return [
            *actions,
            DropSnapshot(generation=self.generation),
            Say(level="error", event="reload failed", fields=fields),
            *self._reply(Verdict(ok=False, reason=reason)),
        ]

    def expire(self, now: float) -> list[Action]:
        """Fail because time is up, and say what was still missing."""
        if self.drain is None:
            reason = f"the settings could not be read within {self.timing.snapshot:g} s"
            return self.fail(reason, now)
        missing = [
            f"{name(place)}: {place.why(now, self.timing)}"
            for place in self.table.candidates.values()
            if not place.ready(now, self.timing)
        ]
        return self.fail(f"not ready within {self.timing.reload:g} s: {'; '.join(missing)}", now)

    def _retire(self, place: Place, seconds: float, now: float, *, quick: bool) -> Iterator[Action]:
        life = place.life
        if life is None:
            return
        self.table.dismiss(life)
        kill_at = now + seconds
        life.kill_at = kill_at if life.kill_at is None else min(life.kill_at, kill_at)
        # Whoever stays shares its socket, so nobody in its queue is lost.
        yield from finish(life, seconds=seconds, propagation=0.0, quick=quick, replaced=True)

    def _reply(self, verdict: Verdict) -> list[Action]:
        return [Reply(request=number, reply=verdict) for number in self.requests]


def name(place: Place) -> str:
    """Return what to call a place in a sentence."""
    return f"worker {place.slot}" if place.kind is Kind.WORKER else str(place.kind)
