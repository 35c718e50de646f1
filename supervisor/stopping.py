"""How everything ends, in order: workers, then the gateway, then the embedded Redis.

The gateway stays until the workers are gone, because it tells load balancers and operators how
the drain goes; Redis stays last, because whoever drains may still have something to write.

An ordinary stop keeps within ``DRAIN_SECONDS`` all in all: containers are killed 30 s after
SIGTERM, supervisor included, and that must not be what ends it. So the later stages' shares are
taken off the workers' time, and each worker is told a little less than it really has.
A quick stop takes at most two seconds. A stop can be hurried, never slowed.
"""

import signal
from collections.abc import Iterator
from typing import Final

import attrs

from supervisor.events import Action, DrainTimes, Exit, Kill, Kind, Reply, Say, SendDrain
from supervisor.slots import Life, Table, Timing
from trioserver.status import Verdict

_TOLD_SHARE: Final = 0.95
"""A child is told this share of the time it has: its own deadline comes before SIGKILL."""


def finish(life: Life, *, seconds: float, propagation: float, quick: bool) -> Iterator[Action]:
    """Tell one worker or gateway to finish within ``seconds``, of which ``life`` keeps no record.

    One that has not started serves nobody, and may not listen to orders yet: it also gets a
    SIGTERM, which ends it at once, or drains it if it has just begun to handle that.
    """
    yield SendDrain(
        pid=life.pid, seconds=seconds * _TOLD_SHARE, propagation=propagation, quick=quick
    )
    if life.started_at is None:
        yield Kill(pid=life.pid, signal=signal.SIGTERM)


@attrs.define(eq=False, kw_only=True)
class Stop:
    """A stop under way."""

    table: Table
    timing: Timing
    code: int
    """The exit code at the end."""
    quick: bool
    drain: DrainTimes
    requests: list[int] = attrs.Factory(list)
    """Who waits for the verdict."""

    def begin(self, now: float) -> list[Action]:
        """Give up every place, and tell everybody whose turn it is to finish."""
        for place in self.table.all_places():
            place.spawn_at = None
        if self.quick:
            return self.hurry(now)
        timing = self.timing
        reserve = timing.gateway_stop + timing.redis_stop + timing.stop_reserve
        seconds = max(self.drain.seconds - reserve, self.drain.seconds / 2)
        actions: list[Action] = []
        for life in list(self.table.lives()):
            if life.kind is not Kind.WORKER:
                # The gateway of a generation that a reload has replaced drains already.
                continue
            actions += self._finish(life, now, seconds, propagation=self.drain.propagation)
        return actions + self.advance(now)

    def hurry(self, now: float) -> list[Action]:
        """Make it a quick stop. Idempotent in effect: nobody gets more time by it."""
        self.quick = True
        actions: list[Action] = []
        for life in list(self.table.lives()):
            if life.kind is not Kind.REDIS:
                actions += self._finish(life, now, self.timing.quick, propagation=0.0)
            elif life.pid in self.table.leaving:
                life.kill_at = min(life.kill_at or now, now + self.timing.quick_redis)
        return actions + self.advance(now)

    def advance(self, now: float) -> list[Action]:
        """Go on to the next stage if the one before is done; `Exit` after the last."""
        if self.table.has(Kind.WORKER):
            return []
        gateway = [life for life in self.table.owners() if life.kind is Kind.GATEWAY]
        if gateway:
            seconds = self.timing.quick if self.quick else self.timing.gateway_stop
            return [
                action
                for life in gateway
                for action in self._finish(life, now, seconds, propagation=0.0, quick=True)
            ]
        if self.table.has(Kind.GATEWAY):
            return []
        redis = [life for life in self.table.owners() if life.kind is Kind.REDIS]
        for life in redis:
            self.table.dismiss(life)
            life.kill_at = now + (
                self.timing.quick_redis if self.quick else self.timing.redis_stop
            )
        if redis:
            return [Kill(pid=life.pid, signal=signal.SIGTERM) for life in redis]
        if self.table.has(Kind.REDIS):
            return []
        return self._end(Verdict(ok=True))

    def give_up(self, stuck: Life) -> list[Action]:
        """End although a process survives SIGKILL: the kernel cannot let go of it."""
        reason = f"{stuck.kind} pid {stuck.pid} does not die"
        self.code = self.code or 1
        return [
            Say(level="error", event="stop_gave_up", fields={"reason": reason}),
            *self._end(Verdict(ok=False, reason=reason)),
        ]

    def _finish(
        self, life: Life, now: float, seconds: float, *, propagation: float, quick: bool = False
    ) -> Iterator[Action]:
        quick = quick or self.quick
        # Who leaves since an earlier reload knows it already; its time only gets shorter.
        told = life.pid in self.table.leaving
        self.table.dismiss(life)
        kill_at = now + seconds
        life.kill_at = kill_at if life.kill_at is None else min(life.kill_at, kill_at)
        if quick or not told:
            yield from finish(life, seconds=seconds, propagation=propagation, quick=quick)

    def _end(self, verdict: Verdict) -> list[Action]:
        replies: list[Action] = [Reply(request=n, reply=verdict) for n in self.requests]
        return [*replies, Exit(code=self.code)]
