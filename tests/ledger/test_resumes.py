"""Thousands come back while much is published: no hole, nothing twice."""

from collections import defaultdict
from pathlib import Path
from typing import Final

import pytest

from tests.ledger.pace import pace
from tests.ledger.resuming import Herd
from tests.ledger.stage import stage

USERS: Final = 20
EACH: Final = 3
"""Members per user."""

RESUMES_PER_BOUT: Final = 40
"""At the end of each bout all come back at once, and nothing more is published that could show a
hole: what was published while somebody was coming back has to be there all the same.
"""

SETTLE_SECONDS: Final = 10.0

LEAST_PACE: Final = 0.7
"""Of the rate, on a machine that has other things to do."""


@pytest.mark.parametrize(
    ("goal", "rate", "seconds"),
    [
        (500, 600.0, 20.0),
        pytest.param(10_000, 1000.0, 240.0, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
    ids=["some", "many"],
)
def test_resuming_while_publishing_leaves_no_hole_and_nothing_twice(
    tmp_path: Path, goal: int, rate: float, seconds: float
) -> None:
    """Through all its connections each gets every id that was accepted, once and in order."""
    users = [f"u{number}" for number in range(USERS)]
    accepted: defaultdict[str, list[str]] = defaultdict(list)
    took = 0.0
    with stage(tmp_path, proxied=False) as built, pace(built.redis.url, rate, users) as publishing:
        herd = Herd(built.address, users, EACH)
        try:
            herd.gather(SETTLE_SECONDS)
            while herd.resumes < goal and took < seconds:
                publishing.go()
                herd.resume(herd.resumes + RESUMES_PER_BOUT, seconds)
                herd.stampede()
                bout = publishing.stop()
                took += bout.seconds
                for user, ids in bout.accepted.items():
                    accepted[user] += [name for _, name in ids]
                herd.settle({user: len(ids) for user, ids in accepted.items()}, SETTLE_SECONDS)
        finally:
            herd.close()

    assert [] == herd.wrong[:10]
    for member in herd.members:
        assert accepted[member.user] == member.ids, member.user
    assert herd.resumes >= goal
    assert 0 == herd.lost
    assert sum(map(len, accepted.values())) > LEAST_PACE * rate * took
