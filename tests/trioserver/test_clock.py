"""The wall clock as text."""

import datetime as dt
import time

from trioserver.clock import Stamp


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
