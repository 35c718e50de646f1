"""Growing pauses: doubled, bounded, scattered, and short again after success."""

import random

from hypothesis import given
from hypothesis import strategies as st

from trioserver.pauses import SPREAD, Pauses


@given(st.integers(0, 2**32))
def test_they_double_up_to_the_cap_and_scatter(seed: int) -> None:
    """Each is around what it should be, whatever chance says."""
    pauses = Pauses(0.1, 2.0, random.Random(seed))
    for expected in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0):
        assert (1 - SPREAD) * expected <= pauses.take() <= (1 + SPREAD) * expected


def test_success_makes_them_short_again() -> None:
    """The next failure begins with the first pause."""
    pauses = Pauses(0.1, 2.0, random.Random(1))
    for _ in range(5):
        pauses.take()
    pauses.reset()
    assert pauses.take() <= (1 + SPREAD) * 0.1


def test_two_that_fail_together_do_not_come_back_together() -> None:
    """Their pauses are of the same size, and not the same."""
    one, other = Pauses(1.0, 1.0, random.Random(1)), Pauses(1.0, 1.0, random.Random(2))
    assert one.take() != other.take()
