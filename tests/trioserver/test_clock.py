"""The wall clock as text."""

import datetime as dt
import time

from hypothesis import given
from hypothesis import strategies as st

from trioserver.clock import Stamp
from trioserver.messages import rfc3339

LAST = 253_402_300_799_999
"""The last millisecond of the year 9999."""
moments = st.integers(0, LAST)


def test_a_stamp_is_the_present_moment_in_utc() -> None:
    """Between the moments before and after the call, to the millisecond."""
    stamp = Stamp()
    for _ in range(100):
        before = time.time_ns() // 1_000_000
        text = stamp()
        after = time.time_ns() // 1_000_000
        assert text.endswith("Z")
        moment = dt.datetime.fromisoformat(text)
        assert before <= round(moment.timestamp() * 1000) <= after
        time.sleep(0.0003)


def test_a_stamp_is_formatted_at_most_once_per_millisecond() -> None:
    """Equal moments are one and the same text."""
    stamp = Stamp()
    texts = [stamp() for _ in range(10_000)]
    assert len({id(text) for text in texts}) == len(set(texts))


@given(st.lists(st.tuples(moments, st.integers(-1500, 1500)), max_size=20))
def test_any_moment_is_as_if_formatted_alone(asked: list[tuple[int, int]]) -> None:
    """Whatever was asked before: what is remembered of one second is used for no other."""
    stamp = Stamp()
    for milliseconds, step in asked:
        near = min(LAST, max(0, milliseconds + step))
        for moment in (milliseconds, near, milliseconds, milliseconds):
            assert rfc3339(moment) == stamp.at(moment)


def test_every_millisecond_of_a_second_has_three_digits() -> None:
    """From .000 to .999, and the next second begins anew."""
    stamp = Stamp()
    texts = [stamp.at(1_763_630_000_000 + rest) for rest in range(1001)]
    assert [f"2025-11-20T09:13:20.{rest:03d}Z" for rest in range(1000)] == texts[:1000]
    assert "2025-11-20T09:13:21.000Z" == texts[1000]


def test_other_moments_do_not_disturb_the_present() -> None:
    """Old notifications are stamped between new ones, on the same clock."""
    stamp = Stamp()
    for old in (0, 999, 1_000, 1_763_630_000_123, LAST):
        assert rfc3339(old) == stamp.at(old)
        before = time.time_ns() // 1_000_000
        now = stamp()
        assert rfc3339(before) <= now <= rfc3339(time.time_ns() // 1_000_000)


def test_a_moment_that_cannot_be_does_not_spoil_the_next() -> None:
    """It raises; what was remembered before is not mixed up with it."""
    stamp = Stamp()
    assert "1970-01-01T00:00:05.006Z" == stamp.at(5_006)
    for impossible in (10**18, 10**30):
        raised = False
        try:
            stamp.at(impossible)
        except (ValueError, OverflowError):
            raised = True
        assert raised
        assert "1970-01-01T00:00:05.007Z" == stamp.at(5_007)
        assert "1970-01-01T00:00:06.006Z" == stamp.at(6_006)
        stamp.at(5_006)
