"""Rate limits per key: exact against a naive model, bounded, and never worse than announced."""

import math
import tracemalloc
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trioserver.buckets import Buckets, Rate

MESSAGES = Rate(count=100, period=60.0, burst=20)
SMALLEST = 1e-5
"""Seconds: more than one may come too early, less than anybody notices."""


def taken(buckets: Buckets[str], key: str, now: float, attempts: int) -> int:
    """Return how many of so many attempts at one moment succeed."""
    return sum(buckets.take(key, now) == 0.0 for _ in range(attempts))


def test_a_burst_then_the_rate() -> None:
    """100 per minute, 20 of them at once: the 21st waits for what one costs."""
    buckets = Buckets[str](MESSAGES)

    assert 20 == taken(buckets, "ann", 1000.0, 50)
    assert pytest.approx(0.6) == buckets.take("ann", 1000.0)
    assert 0 == taken(buckets, "ann", 1000.5, 50)
    assert 1 == taken(buckets, "ann", 1000.6, 50)
    assert 5 == taken(buckets, "ann", 1003.6, 50)
    assert 20 == taken(buckets, "ann", 1060.0, 50)


def test_keys_are_apart() -> None:
    """One who presses on costs the others nothing."""
    buckets = Buckets[str](MESSAGES)
    assert 20 == taken(buckets, "ann", 5.0, 1000)
    assert 20 == taken(buckets, "bob", 5.0, 20)


def test_refusals_cost_nothing() -> None:
    """Whoever presses on while refused waits no longer than told."""
    buckets = Buckets[str](MESSAGES)
    taken(buckets, "ann", 5.0, 20)
    wait = buckets.take("ann", 5.0)
    taken(buckets, "ann", 5.3, 1000)
    assert 0.0 == buckets.take("ann", 5.0 + wait)


def test_several_at_once_are_all_or_none() -> None:
    """A batch that does not fit takes nothing; one that never fits is told so."""
    buckets = Buckets[str](Rate(count=10, period=1.0, burst=8))

    assert 0.0 == buckets.take("ann", 0.0, 6)
    assert pytest.approx(0.1) == buckets.take("ann", 0.0, 3)
    assert 0.0 == buckets.take("ann", 0.0, 2)
    assert math.inf == buckets.take("ann", 0.0, 9)
    assert math.inf == buckets.take("ann", 1e6, 9)
    assert 0.0 == buckets.take("ann", 1e6, 8)


def test_zero_is_no_limit() -> None:
    """And remembers nobody."""
    buckets = Buckets[str](Rate(count=0))
    assert 10_000 == taken(buckets, "ann", 0.0, 10_000)
    assert 0 == len(buckets)


@pytest.mark.parametrize("jump", [-3600.0, -13.0, -0.9, -0.001, 3600.0])
def test_a_clock_that_jumps_locks_nobody_out(jump: float) -> None:
    """Backwards it costs a burst at most, forwards nothing."""
    buckets = Buckets[str](MESSAGES)
    buckets.take("bob", 9_999.0)
    assert 20 == taken(buckets, "ann", 10_000.0, 20)

    wait = buckets.take("ann", 10_000.0 + jump)

    assert wait <= 0.601
    assert 0.0 == buckets.take("ann", 10_000.0 + jump + wait)
    assert 20 == taken(buckets, "ann", 10_000.0 + jump + 60.0, 50)


def test_time_may_be_zero_or_negative() -> None:
    """No moment means "never used"."""
    buckets = Buckets[str](Rate(count=1, period=1.0, burst=1))
    assert 0.0 == buckets.take("ann", -1.0)
    assert 1.0 == buckets.take("ann", -1.0)
    assert 0.0 == buckets.take("ann", 0.0)
    assert 1.0 == buckets.take("ann", 0.0)


def test_keys_are_forgotten_when_their_bucket_is_full() -> None:
    """Who has been quiet for two fillings is in nobody's memory, and nobody else is missing."""
    buckets = Buckets[int](MESSAGES)
    for second in range(1000):
        assert 0.0 == buckets.take(second, float(second))
    assert len(buckets) <= 2 * 12 + 1
    assert 0.0 < max(buckets.take(999, 999.0) for _ in range(20))


def test_memory_is_bounded() -> None:
    """A flood of users costs what the table holds; those who come back at once are remembered."""
    buckets = Buckets[str](MESSAGES)
    tracemalloc.start()
    try:
        for number in range(200_000):
            buckets.take(f"{number:0128}", 5.0)
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 32_000 < len(buckets) <= 65_536
    assert peak < 32 << 20
    assert size < 32 << 20
    assert 19 == taken(buckets, f"{199_999:0128}", 5.0, 50)


def test_a_full_table_forgets_the_longest_unused() -> None:
    """One who keeps using his bucket is remembered through a flood of strangers."""
    buckets = Buckets[str](MESSAGES, max_keys=100)
    assert 20 == taken(buckets, "ann", 5.0, 20)
    for number in range(10_000):
        now = 5.0 + 0.6 * (number // 40)
        buckets.take(f"stranger {number}", now)
        assert len(buckets) <= 100
        if number % 40 == 39:
            # Being refused is no use, so once in a while one is let through.
            assert 1 == taken(buckets, "ann", now + 0.6, 3)


class Model:
    """A token bucket as one would write it on paper, in exact numbers."""

    def __init__(self, cost: Fraction, burst: int) -> None:
        self.cost = cost
        self.burst = burst
        self.tokens: dict[str, Fraction] = {}
        self.seen: dict[str, Fraction] = {}

    def take(self, key: str, now: Fraction, count: int) -> Fraction | None:
        """Return 0, or how long to wait; None for never."""
        gained = (now - self.seen.get(key, now)) / self.cost
        tokens = min(Fraction(self.burst), self.tokens.get(key, Fraction(self.burst)) + gained)
        self.seen[key], self.tokens[key] = now, tokens
        if tokens >= count:
            self.tokens[key] -= count
            return Fraction(0)
        return (count - tokens) * self.cost if count <= self.burst else None


class AgainstTheModel(RuleBasedStateMachine):
    """With times that are exact in binary, every answer is exactly the model's."""

    def __init__(self) -> None:
        super().__init__()
        # 0.625 s each, five at once.
        self.buckets = Buckets[str](Rate(count=1.6, period=1.0, burst=5))
        self.model = Model(Fraction(5, 8), 5)
        self.now = Fraction(12_345)

    @rule(key=st.sampled_from("abc"), count=st.integers(1, 6), times=st.integers(1, 4))
    def take(self, key: str, count: int, times: int) -> None:
        """Yes or the wait, to the last bit."""
        for _ in range(times):
            expected = self.model.take(key, self.now, count)
            answer = self.buckets.take(key, float(self.now), count)
            assert (math.inf if expected is None else float(expected)) == answer

    @rule(eighths=st.integers(0, 64))
    def wait(self, eighths: int) -> None:
        """Time passes, also long enough for halves to turn and keys to be forgotten."""
        self.now += Fraction(eighths, 8)

    @invariant()
    def nobody_is_kept_for_nothing(self) -> None:
        """Three keys are three."""
        assert len(self.buckets) <= 6


TestAgainstTheModel = AgainstTheModel.TestCase


@given(
    rate=st.builds(
        Rate,
        count=st.floats(0.5, 1000),
        period=st.sampled_from([1.0, 60.0]),
        burst=st.integers(1, 30),
    ),
    steps=st.lists(st.floats(0, 5), min_size=1, max_size=100),
    start=st.floats(0, 2e9),
)
def test_no_span_of_time_has_more_than_announced(
    rate: Rate, steps: list[float], start: float
) -> None:
    """At most burst + t * rate in any t seconds, and the wait is neither too short nor too long."""
    buckets = Buckets[str](rate)
    now, times = start, []
    for step in steps:
        now += step
        wait = buckets.take("ann", now)
        if wait == 0.0:
            times.append(now)
        else:
            assert buckets.take("ann", now + wait - SMALLEST) > 0.0
            now += wait
            assert 0.0 == buckets.take("ann", now)
            times.append(now)
    for first, begin in enumerate(times):
        for last in range(first, len(times)):
            allowed = rate.burst + (times[last] - begin) * rate.count / rate.period
            assert last - first + 1 <= allowed + 0.01
