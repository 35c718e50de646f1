"""How commands get through to Redis: decisions, without a Redis and without time."""

from collections.abc import Callable, Sequence
from typing import Final

import attrs
import pytest

from trioserver import ledger
from trioserver.errors import RedisError, RedisRefused, RedisUnavailable
from trioserver.ledger import Command
from trioserver.publisher.attempts import Answered, Exchange, Outcome, Pause, exchange

A: Final[Command] = ("GET", "a")
B: Final[Command] = ("GET", "b")
AWAY: Final = RedisUnavailable("GET: no answer")
NOSCRIPT: Final = RedisRefused("NOSCRIPT No matching script.")
LOADED: Final = [b"sha"] * len(ledger.loads())

Do = Callable[[Exchange], Outcome]


@attrs.define
class World:
    """A clock that moves with what is done, and what was done."""

    now: float = 100.0
    asked: list[Exchange] = attrs.field(factory=list)
    pauses: list[float] = attrs.field(factory=list)

    def run(
        self, commands: Sequence[Command], *answers: Outcome, seconds: float = 3.5, cost: float = 0
    ) -> Answered:
        """Answer each exchange with the next of ``answers``; the last one is repeated.

        An answer costs ``cost`` seconds; no answer all the time that was given.
        """
        waiting = list(answers)
        steps = exchange(commands, lambda: self.now, self.now + seconds)
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                answered: Answered = end.value
                return answered
            if isinstance(step, Pause):
                self.pauses.append(step.seconds)
                self.now += step.seconds
                outcome = None
                continue
            self.asked.append(step)
            outcome = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            self.now += cost if isinstance(outcome, list) else step.seconds


def texts(replies: Sequence[object]) -> list[object]:
    """Return replies with errors as (class, text)."""
    return [
        (type(reply), str(reply)) if isinstance(reply, RedisError) else reply for reply in replies
    ]


def test_an_answer_is_one_exchange() -> None:
    """What is answered at once is asked once; a refusal is an answer."""
    world = World()
    answered = world.run([A, B], [b"1", RedisRefused("WRONGTYPE no")])

    assert [b"1", (RedisRefused, "WRONGTYPE no")] == texts(answered.replies)
    assert not answered.repeated
    assert ([[A, B]], []) == ([list(one.commands) for one in world.asked], world.pauses)


def test_no_answer_is_asked_again() -> None:
    """Three repetitions, with growing pauses that nobody else makes at the same time."""
    worlds = [World() for _ in range(50)]
    for world in worlds:
        answered = world.run([A], AWAY, AWAY, AWAY, [b"1"])
        assert [b"1"] == answered.replies
        assert answered.repeated
        assert 4 == len(world.asked)
        for middle, pause in zip((0.1, 0.2, 0.4), world.pauses, strict=True):
            assert middle / 2 <= pause <= middle * 1.5
    assert len({world.pauses[0] for world in worlds}) > 25


def test_nobody_ever_answers() -> None:
    """After the last repetition the outcome is unknown; everything fits into the deadline."""
    for seconds in (0.05, 0.5, 3.5, 20):
        world = World()
        answered = world.run([A, B], AWAY, seconds=seconds)

        assert [AWAY, AWAY] == answered.replies
        assert 1 <= len(world.asked) <= 4
        assert world.now <= 100 + seconds + 1e-9
    assert 4 == len(world.asked)


def test_each_attempt_has_its_part_of_the_time() -> None:
    """One connection on which nothing comes back does not use up the time of the others."""
    world = World()
    world.run([A], AWAY, seconds=4)

    assert 1.0 == world.asked[0].seconds
    assert all(one.seconds > 0.25 for one in world.asked)


def test_no_time_is_left_for_another_attempt() -> None:
    """A pause that would end after the deadline is not begun."""
    world = World()
    answered = world.run([A], [RedisRefused("BUSY a script")], seconds=1, cost=0.99)

    assert 1 == len(world.asked)
    assert [] == world.pauses
    assert [(RedisRefused, "BUSY a script")] == texts(answered.replies)


@pytest.mark.parametrize(
    "code", ["BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "READONLY", "TRYAGAIN"]
)
def test_refusals_that_pass_are_asked_again(code: str) -> None:
    """During a failover or a long script Redis refuses for a moment only."""
    world = World()
    answered = world.run([A], [RedisRefused(f"{code} wait")], [b"1"])

    assert [b"1"] == answered.replies
    assert not answered.repeated
    assert 1 == len(world.pauses)


def test_only_what_has_no_answer_is_asked_again() -> None:
    """What one attempt has settled the next one leaves alone."""
    world = World()
    answered = world.run([A, B], [b"1", RedisRefused("READONLY wait")], [b"2"])

    assert [b"1", b"2"] == answered.replies
    assert [[A, B], [B]] == [list(one.commands) for one in world.asked]


def test_a_refusal_after_silence_leaves_a_doubt() -> None:
    """Who was not answered once cannot be told that nothing has happened."""
    answered = World().run([A], AWAY, [RedisRefused("READONLY wait")])

    assert [(RedisUnavailable, "READONLY wait")] == texts(answered.replies)


def test_unknown_scripts_are_loaded_at_once() -> None:
    """Loading and asking again is one exchange, without a pause and without a doubt."""
    world = World()
    answered = world.run([A, B], [b"1", NOSCRIPT], [*LOADED, b"2"])

    assert [b"1", b"2"] == answered.replies
    assert not answered.repeated
    assert [] == world.pauses
    assert [[A, B], [*ledger.loads(), B]] == [list(one.commands) for one in world.asked]


def test_scripts_are_loaded_with_each_later_attempt() -> None:
    """A Redis that was restarted again meanwhile gets them again."""
    world = World()
    answered = world.run([A], [NOSCRIPT], AWAY, [*LOADED, NOSCRIPT], [*LOADED, b"1"])

    assert [b"1"] == answered.replies
    assert [len(LOADED) + 1] * 3 == [len(one.commands) for one in world.asked[1:]]


def test_scripts_that_cannot_be_loaded() -> None:
    """The answer is why not, not that they are missing."""
    denied = RedisRefused("NOPERM this user has no permissions to run 'script|load'")
    answered = World().run([A], [NOSCRIPT], [*([denied] * len(LOADED)), NOSCRIPT])

    assert [(RedisRefused, str(denied))] == texts(answered.replies)
