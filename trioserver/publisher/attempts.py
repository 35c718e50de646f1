"""How commands get through to Redis: attempts, pauses, scripts to be loaded. Pure decisions.

What is to be done is a generator of `Step`s, which a front performs: it sends commands or waits,
and sends back what came of it. So threads, asyncio and Trio share every decision, and tests need
neither a Redis nor time.

Whoever asks must be sure that its commands may be repeated: after an unanswered attempt nobody
knows whether Redis has run them.
"""

import random
from collections.abc import Callable, Generator, Sequence
from typing import Final, TypeAlias, TypeVar

import attrs

from trioserver import ledger
from trioserver.errors import RedisError, RedisRefused, RedisUnavailable
from trioserver.ledger import Command
from trioserver.redis_direct import Reply

T = TypeVar("T")

PAUSES: Final = (0.1, 0.2, 0.4)
"""Seconds before each repetition, ± `JITTER`: long enough for a failover's first hiccup, short
enough for the request of a user who waits."""

JITTER: Final = 0.5
"""Part of a pause: publishers that failed together must not come back together."""

DEADLINE_SECONDS: Final = 3.5
"""For all attempts and pauses together."""

_NOT_NOW: Final = ("BUSY ", "CLUSTERDOWN ", "LOADING ", "MASTERDOWN ", "READONLY ", "TRYAGAIN ")
"""Refusals that pass by themselves. The command had no effect."""


@attrs.frozen
class Exchange:
    """Send commands in one round trip and read one reply each."""

    commands: Sequence[Command]
    seconds: float


@attrs.frozen
class Pause:
    """Wait."""

    seconds: float


Step: TypeAlias = Exchange | Pause
Outcome: TypeAlias = list[Reply | RedisRefused] | RedisUnavailable | None
"""Of an `Exchange`: its replies, or why there are none. Of a `Pause`: None."""

Steps: TypeAlias = Generator[Step, Outcome, T]


@attrs.frozen
class Answered:
    """What came of some commands."""

    replies: list[Reply | RedisError]
    """One per command, in order: a reply, `RedisRefused`, or `RedisUnavailable` for those of which
    nobody knows whether Redis has run them."""
    repeated: bool
    """Commands may have been run before, by an attempt that was not answered."""


@attrs.define(eq=False)
class _Errand:
    """What has been answered so far."""

    commands: Sequence[Command]
    replies: dict[int, Reply | RedisError] = attrs.field(factory=dict)
    """By number of the command; those that are to be asked again are not in it."""
    loading: bool = False
    """Redis has said that it does not know the scripts."""
    repeated: bool = False
    problem: RedisError | None = None
    """Why there has to be one more attempt."""

    def ask(self, seconds: float) -> Steps[None]:
        """Ask once for what is missing, and once more if the scripts were missing too."""
        missing = self._missing()
        # Loading and running is one round trip: a script may be used as soon as it is there.
        loads = ledger.loads() if self.loading else ()
        asked = [*loads, *(self.commands[number] for number in missing)]
        outcome = yield Exchange(asked, seconds)
        if not isinstance(outcome, list):
            self.repeated = True
            self.problem = outcome
            return
        loaded, replies = outcome[: len(loads)], outcome[len(loads) :]
        if self._take(missing, replies) and not self.loading:
            self.loading = True
            yield from self.ask(seconds)
        elif refusals := [load for load in loaded if isinstance(load, RedisRefused)]:
            # Not "unknown script", but why it stays unknown: NOPERM, say.
            self.problem = refusals[0]

    def give_up(self) -> None:
        """Let the last problem be the answer to whatever has none."""
        problem = self.problem
        if self.repeated and isinstance(problem, RedisRefused):
            problem = RedisUnavailable(str(problem))
        self.replies.update(dict.fromkeys(self._missing(), problem))

    def _missing(self) -> list[int]:
        return [number for number in range(len(self.commands)) if number not in self.replies]

    def _take(self, missing: list[int], replies: list[Reply | RedisRefused]) -> bool:
        """Keep what is final; return whether scripts are unknown."""
        unknown = False
        self.problem = None
        for number, reply in zip(missing, replies, strict=True):
            refusal = str(reply) if isinstance(reply, RedisRefused) else ""
            if ledger.is_noscript(refusal) or refusal.startswith(_NOT_NOW):
                unknown |= ledger.is_noscript(refusal)
                self.problem = RedisRefused(refusal)
            else:
                self.replies[number] = reply
        return unknown


def exchange(
    commands: Sequence[Command],
    now: Callable[[], float],
    deadline: float,
    pauses: Sequence[float] = PAUSES,
) -> Steps[Answered]:
    """Get ``commands`` answered; raises nothing.

    Args:
        commands: May be repeated, each by itself.
        now: Seconds on some clock.
        deadline: On that clock.
        pauses: Seconds before each repetition.
    """
    errand = _Errand(commands)
    for attempt, pause in enumerate((*pauses, None)):
        # Each attempt has its part of what is left, so that a connection on which nothing comes
        # back does not use up the time of the attempts that could have found a better one.
        yield from errand.ask((deadline - now()) / (len(pauses) + 1 - attempt))
        if errand.problem is None or pause is None:
            break
        seconds = pause * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - spreads load
        if now() + seconds >= deadline:
            break
        yield Pause(seconds)
    errand.give_up()
    return Answered([errand.replies[number] for number in range(len(commands))], errand.repeated)
