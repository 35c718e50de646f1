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

from supervisor.events import Action, DrainTimes, Exit, Kill, Kind, Reply, SendDrain
from supervisor.slots import Life, Table, Timing
from supervisor.watching import say
from trioserver.status import Verdict

_TOLD_SHARE: Final = 0.95
"""A child is told this share of the time it has: its own deadline comes before SIGKILL."""


def finish(
    life: Life, *, seconds: float, propagation: float, quick: bool, replaced: bool = False
) -> Iterator[Action]:
    """Tell one worker or gateway to finish within ``seconds``, unless it hurries already.

    When to kill it is not set here. One that has not started serves nobody, and may not listen to
    orders yet: it also gets a SIGTERM, which ends it at once, or drains it if it has just begun to
    handle that.
    """
    if life.hurried:
        return
    life.hurried = quick
    yield SendDrain(
        pid=life.pid,
        seconds=seconds * _TOLD_SHARE,
        propagation=propagation,
        quick=quick,
        replaced=replaced,
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
        propagation = min(self.drain.propagation, seconds / 2)
        for life in list(self.table.lives()):
            if life.kind is Kind.WORKER:
                actions += self._finish(life, now, seconds, propagation=propagation)
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
            life.kill_at = now + (self.timing.quick_redis if self.quick else self.timing.redis_stop)
        if redis:
            return [Kill(pid=life.pid, signal=signal.SIGTERM) for life in redis]
        if self.table.has(Kind.REDIS) or self.table.ordered:
            return []
        return self._end()

    def deadlines(self) -> Iterator[float]:
        """Yield each moment at which `on_time` may have something to do."""
        for life in self.table.lives():
            if life.killed_at is not None and not life.given_up:
                yield life.killed_at + self.timing.give_up

    def on_time(self, now: float) -> list[Action]:
        """Stop waiting for processes that even SIGKILL does not end: the kernel holds them."""
        actions: list[Action] = []
        for life in self.table.lives():
            if life.killed_at is None or life.given_up:
                continue
            if now >= life.killed_at + self.timing.give_up:
                life.given_up = True
                actions.append(say("error", "child immortal", life))
        return actions + (self.advance(now) if actions else [])

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

    def _end(self) -> list[Action]:
        immortal = [f"{life.kind} {life.pid}" for life in self.table.lives()]
        verdict = Verdict(ok=True)
        if immortal:
            self.code = self.code or 1
            verdict = Verdict(ok=False, reason=f"SIGKILL did not end {', '.join(immortal)}")
        replies: list[Action] = [Reply(request=n, reply=verdict) for n in self.requests]
        return [*replies, Exit(code=self.code)]
