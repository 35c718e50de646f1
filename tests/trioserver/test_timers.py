"""The timer wheel against a plain dictionary of moments."""

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from trioserver.timers import GRANULARITY, IDLE, Wheel


class Owner:
    """Somebody with a next moment."""

    def __init__(self) -> None:
        self.bucket = IDLE


class WheelMachine(RuleBasedStateMachine):
    """Any history of scheduling, cancelling and turning."""

    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.wheel: Wheel[Owner] = Wheel(self.now)
        self.due: dict[Owner, float] = {}
        """The model: who is to be fired, and not before when."""

    @rule(target=owners)
    def owner(self) -> Owner:
        """Bring somebody new."""
        return Owner()

    @rule(owner=owners, delay=st.floats(-5, 400))
    def schedule(self, owner: Owner, delay: float) -> None:
        """Set or move a moment."""
        self.wheel.schedule(owner, self.now + delay)
        self.due[owner] = self.now + max(0, delay)

    @rule(owner=owners)
    def never(self, owner: Owner) -> None:
        """Infinity cancels."""
        self.wheel.schedule(owner, math.inf)
        self.due.pop(owner, None)

    @rule(owner=owners, delay=st.floats(-5, 400))
    def hasten(self, owner: Owner, delay: float) -> None:
        """Only an earlier moment counts."""
        self.wheel.hasten(owner, self.now + delay)
        self.due[owner] = min(self.due.get(owner, math.inf), self.now + max(0, delay))

    @rule(owner=owners)
    def hasten_never(self, owner: Owner) -> None:
        """Infinity is later than anything."""
        self.wheel.hasten(owner, math.inf)

    @rule(owner=owners)
    def cancel(self, owner: Owner) -> None:
        """Nothing is left of a cancelled owner."""
        self.wheel.cancel(owner)
        self.wheel.cancel(owner)
        self.due.pop(owner, None)
        assert owner.bucket == IDLE

    @rule(step=st.one_of(st.floats(0, 0.5), st.floats(0, 1000), st.just(0.1)))
    def advance(self, step: float) -> None:
        """Fire nothing early, nothing late by more than a bucket, nothing twice."""
        self.now += step
        fired = self.wheel.advance(self.now)
        assert len(fired) == len(set(fired))
        for owner in fired:
            assert owner.bucket == IDLE
            # hasten may leave an owner in the bucket it is in: the same moment, to a bucket.
            assert self.due.pop(owner) <= self.now + 1e-6
        assert all(when > self.now - GRANULARITY - 1e-6 for when in self.due.values())
        assert fired == sorted(fired, key=lambda owner: owner.bucket)

    @invariant()
    def the_same_owners(self) -> None:
        """Those and only those who are scheduled are in the wheel."""
        assert len(self.due) == len(self.wheel)
        assert all(owner.bucket != IDLE for owner in self.due)
        assert all(self.wheel._buckets.values()), "an empty bucket was left behind"


TestWheel = WheelMachine.TestCase


@pytest.mark.parametrize("when", [i / 100 for i in range(300)])
def test_a_moment_is_never_early_and_late_by_at_most_one_bucket(when: float) -> None:
    """Turned in small steps, the wheel fires in the right tenth of a second."""
    wheel: Wheel[Owner] = Wheel(0.0)
    owner = Owner()
    wheel.schedule(owner, when)
    now = 0.0
    while not wheel.advance(now):
        now += 0.01
    assert when <= now + 1e-9
    assert now <= when + GRANULARITY + 0.02


def test_a_clock_that_stands_still_or_runs_back_fires_nothing_twice() -> None:
    """Turning to a moment that has passed changes nothing."""
    wheel: Wheel[Owner] = Wheel(50.0)
    owner = Owner()
    wheel.schedule(owner, 50.0)
    assert [] == wheel.advance(50.0)
    assert [owner] == wheel.advance(50.2)
    assert [] == wheel.advance(50.2)
    wheel.schedule(owner, 50.0)
    assert [] == wheel.advance(49.0)
    assert [owner] == wheel.advance(50.4)


def test_a_long_pause_costs_what_is_scheduled_not_what_has_passed() -> None:
    """After a stopped process the wheel looks at its buckets, in order of time."""
    wheel: Wheel[Owner] = Wheel(0.0)
    owners = [Owner() for _ in range(5)]
    for i, owner in enumerate(owners):
        wheel.schedule(owner, float(5 - i))
    assert owners[::-1] == wheel.advance(1e12)
    assert 0 == len(wheel)
