"""Sweeps away what dead workers have left behind under the topics.

A worker does it for the topics where it has somebody: after it has seen that a life is over, and
when the first of its connections comes to a topic, as others may have died before. Where comings
and goings are told, it looks after `GRACE_SECONDS`; where they are not, nobody sees it, because
entries of the dead do not count: there is time (`TIDY_SECONDS`).

When it looks is one thing, what it sweeps then is another: only what is ripe (`Deaths`). So who
comes back soon has never been away, whoever has died before him, and whatever else there was to
look for.

All workers do it, each in its own moment; usually the first one finds something.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final

import attrs
import trio

from trioserver import ledger, presence
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.fleet import Lives
from trioserver.presence import BEGINNING
from trioserver.presence_page import ask, run
from trioserver.redis_link import RedisLink
from trioserver.topics import Patterns

GRACE_SECONDS: Final = (2.5, 4.5)
"""So long after a life was over its entries are looked for under announced topics; none is swept
before the first of these. Longer than clients need to come back."""

PATIENT_SECONDS: Final = 5.0
"""The first of these where nobody has said that the life was over: maybe Redis was away for its
worker. Longer than that worker needs to be back when Redis is."""

REWRITE_SECONDS: Final = 120.0
"""The same where the worker goes on under another life. Longer than it needs to enter everybody
anew: with that it removes these entries itself."""

RIPE_SECONDS: Final = (0.0, 1.0)
"""So long after something has become ripe it is looked for once more."""

TIDY_SECONDS: Final = (20.0, 60.0)
"""The same where nobody is told."""

CHECKED: Final = 100
"""Topics that are looked at together."""

PACE_SECONDS: Final = 0.01
"""Between two looks, and between two sweeps: others need Redis, too."""

RETRY_SECONDS: Final = (0.5, 1.5)

MOST_REMEMBERED: Final = 10_000
"""Lives and workers. Who was forgotten is as one who has died only now."""

MOST_DOUBTED: Final = 100_000
"""Topics to look at after all was written anew."""

INFINITY: Final = float("inf")


@attrs.define(eq=False)
class _Round:
    """Topics that are to be looked at, and when."""

    seconds: tuple[float, float]
    """After how long, from and to."""
    names: dict[str, None] = attrs.field(factory=dict)
    at: float = INFINITY

    def take(self, now: float, most: int) -> list[str]:
        if now < self.at:
            return []
        taken = list(islice(self.names, most))
        for name in taken:
            del self.names[name]
        if not self.names:
            self.at = INFINITY
        return taken


class Deaths:
    """Since when which lives are over, as one worker has seen it: what is ripe to be swept.

    Nothing is, until `GRACE_SECONDS` after that. It may be seen later than it was, never sooner.
    """

    def __init__(self) -> None:
        self._lives = Lives()
        self._there: frozenset[str] = frozenset()
        """Workers."""
        self._over: dict[str, float] = {}
        """Lives that are over, and since when."""
        self._gone: dict[str, float] = {}
        """Workers that are gone, and when what they have left behind may be swept."""
        self._mine = ""
        """Our own worker, if it has nothing to enter anew."""

    def mine(self, worker: str, *, written: bool) -> None:
        """Take note whether our own worker has entered everybody anew."""
        self._mine = worker if written else ""

    def see(self, lives: Lives, now: float, *, doubtful: bool = False) -> None:
        """Take note of who lives now.

        Args:
            lives: As Redis says.
            now: By Trio's clock.
            doubtful: Whether Redis was away for us, so that it may have been for others, too.
        """
        before, self._lives = self._lives, lives
        there_before, self._there = self._there, presence.workers(lives)
        for life in before.living - lives.living:
            self._over.setdefault(life, now)
        for life in self._over.keys() & lives.living:
            del self._over[life]
        said = {
            presence.worker(life) for life in before.living if before.scores[life] > lives.now_ms
        }
        for worker in there_before - self._there:
            certain = worker in said and not doubtful
            self._gone.setdefault(worker, now + (GRACE_SECONDS[0] if certain else PATIENT_SECONDS))
        for worker in self._gone.keys() & self._there:
            del self._gone[worker]
        if doubtful:
            patient = now + PATIENT_SECONDS
            self._gone = {worker: max(at, patient) for worker, at in self._gone.items()}
        for remembered in (self._over, self._gone):
            for one in list(islice(remembered, max(0, len(remembered) - MOST_REMEMBERED))):
                del remembered[one]

    def ripe_at(self, life: str, now: float) -> float:
        """Return when the entries of a life that is over may be swept away."""
        since = self._over.setdefault(life, now)
        worker = presence.worker(life)
        if worker not in self._there:
            # Also if its latest life has ended only now: that is when its clients were cut off.
            gone = self._gone.setdefault(worker, now + PATIENT_SECONDS)
            return max(gone, since + GRACE_SECONDS[0])
        return since if worker == self._mine else since + REWRITE_SECONDS


class Sweeper:
    """One worker's sweeping.

    Args:
        announced: Topics whose subscribers are told of comings and goings.
        prefix: Put before the channel's name, as before every other.
        log_trouble: Called with what is wrong; limits its own rate.
    """

    def __init__(
        self, *, announced: Patterns, prefix: str, log_trouble: Callable[[str], None]
    ) -> None:
        self._announced = announced
        self._prefix = prefix
        self._log_trouble = log_trouble
        self._fresh = _Round(GRACE_SECONDS)
        """Announced topics that this worker has just come to."""
        self._over = _Round(GRACE_SECONDS)
        """Announced topics, after a life was over."""
        self._tidy = _Round(TIDY_SECONDS)
        """All others, after either."""
        self._again = _Round(RETRY_SECONDS)
        """Where it did not work."""
        self._ripening: dict[float, _Round] = {}
        """Where something becomes ripe, by when."""
        self._doubted: dict[str, None] = {}
        """Topics to look at when everybody was entered anew."""
        self._deaths = Deaths()
        self._worker = ""
        """Ours."""
        self._paused = True
        self._finished = False
        self._news = trio.Event()
        self._rng = random.Random()  # noqa: S311 - spreads load, guards nothing

    def channel(self, topic: str) -> str:
        """Return where comings and goings are told; empty if they are not."""
        if not self._announced.matches(topic):
            return ""
        return ledger.topic_channel(self._prefix, topic)

    def came(self, topic: str, *, announced: bool) -> None:
        """Take note that this worker has somebody under a topic now."""
        self._add(self._fresh if announced else self._tidy, (topic,))

    def found(self, topic: str) -> None:
        """Take note that the dead have left something behind under this topic."""
        self._add(self._over, [topic])

    def see(self, life: str, lives: Lives, *, anew: bool) -> None:
        """Take note of who lives now.

        Args:
            life: Of this worker.
            lives: As Redis says.
            anew: Whether this life is another one than before, so that all is to be written again;
                `written` is called when it was.
        """
        self._worker = presence.worker(life)
        self._deaths.see(lives, trio.current_time(), doubtful=anew)
        if anew:
            self._deaths.mine(self._worker, written=False)

    def over(self, announced: Iterable[str], others: Iterable[str]) -> None:
        """Take note that a life is over, and that this worker has somebody under these topics."""
        self._add(self._over, announced)
        self._add(self._tidy, others)

    def doubt(self, topics: Iterable[str]) -> None:
        """Take note that under these topics an earlier life of ours may have left something."""
        self._doubted.update(dict.fromkeys(topics))
        if len(self._doubted) > MOST_DOUBTED:
            self._doubted.clear()

    def written(self) -> None:
        """Take note that nothing is needed any more that this worker wrote under earlier lives."""
        self._deaths.mine(self._worker, written=True)
        doubted, self._doubted = self._doubted, {}
        self._add(self._over, doubted)
        # What was under way for long may arrive even later.
        self._add(self._tidy, doubted)

    def pause(self) -> None:
        """Wait for `resume`: Redis is away. So it is at the beginning."""
        self._paused = True

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self._news.set()

    def finish(self) -> None:
        """Have `run` end."""
        self._finished = True
        self._news.set()

    async def run(self, link: RedisLink) -> None:
        """Sweep until `finish`.

        Cancellation:
            What was not swept is kept for another `run`.
        """
        while not self._finished:
            self._news = trio.Event()
            rounds = (*self._ripening.values(), self._over, self._fresh, self._again, self._tidy)
            due = INFINITY if self._paused else min(one.at for one in rounds)
            if due > trio.current_time():
                with trio.move_on_at(due):
                    await self._news.wait()
                continue
            names: list[str] = []
            for one in rounds:
                names += one.take(trio.current_time(), CHECKED - len(names))
            self._ripening = {when: one for when, one in self._ripening.items() if one.names}
            await self._sweep(link, names)
            await trio.sleep(PACE_SECONDS)

    def _add(self, when: _Round, names: Iterable[str]) -> None:
        were_none = not when.names
        when.names.update(dict.fromkeys(names))
        if were_none and when.names:
            when.at = trio.current_time() + self._rng.uniform(*when.seconds)
            self._news.set()

    async def _sweep(self, link: RedisLink, names: list[str]) -> None:
        """Sweep these topics, as far as there is anything; once more if that did not work."""
        swept = False
        try:
            for name, over in await self._left_behind(link, names):
                await self._sweep_one(link, name, over)
            swept = True
        except (RedisUnavailable, RedisRefused) as problem:
            self._log_trouble(str(problem))
        finally:
            if not swept:
                self._add(self._again, names)

    async def _left_behind(
        self, link: RedisLink, names: Sequence[str]
    ) -> list[tuple[str, tuple[str, ...]]]:
        """Return those of these topics where there is something to sweep, and of which lives."""
        found = await ask(link, [presence.counts_read(name) for name in names])
        # Only now: a life that has begun meanwhile must not seem to be over.
        lives = presence.lives(*await ask(link, presence.lives_read()))
        self._deaths.see(lives, trio.current_time())
        if self._worker not in presence.workers(lives):
            # Redis does not know of us, so who else it does not know of means nothing.
            self._add(self._again, names)
            return []
        behind: list[tuple[str, tuple[str, ...]]] = []
        for name, one in zip(names, found, strict=True):
            counts = presence.counts(one, lives)
            ripe = self._ripe(name, (*counts.over, *counts.earlier))
            if ripe:
                behind.append((name, ripe))
        return behind

    def _ripe(self, name: str, over: Iterable[str]) -> tuple[str, ...]:
        """Return which of the lives that are over may be swept; for the rest, look again then."""
        now = trio.current_time()
        at = {life: self._deaths.ripe_at(life, now) for life in over}
        later = min((when for when in at.values() if when > now), default=INFINITY)
        if later < INFINITY:
            first, last = RIPE_SECONDS
            seconds = (later - now + first, later - now + last)
            self._add(self._ripening.setdefault(later, _Round(seconds)), (name,))
        return tuple(life for life, when in at.items() if when <= now)

    async def _sweep_one(self, link: RedisLink, name: str, over: Sequence[str]) -> None:
        start = BEGINNING
        while start:
            (reply,) = await run(link, [presence.sweep(name, self.channel(name), start, over)])
            if isinstance(reply, RedisRefused):
                raise reply
            start = presence.swept(reply)
            await trio.sleep(PACE_SECONDS)
