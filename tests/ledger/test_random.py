"""The nemesis: many faults at random moments, from a seed.

LEDGER_SEED=17 pytest tests/ledger/test_random.py        the everyday run with another seed
LEDGER_SEED=17 pytest -m slow tests/ledger/test_random.py    the long one
"""

import os
from pathlib import Path
from typing import Final

import pytest

from tests.ledger.nemesis import schedule
from tests.ledger.play import Cast, play
from tests.ledger.stage import Stage

SEED: Final = os.environ.get("LEDGER_SEED")
EVERYDAY_SEEDS: Final = [int(SEED)] if SEED else [1]
SLOW_SEEDS: Final = [int(SEED)] if SEED else [1, 2, 3, 4]

CROWDED_DUPLICATES: Final = 0.1
"""In a quarter of a minute so many faults come that clients are cut off every few seconds, and a
device that keeps no position is believed to have received what a pong has confirmed, at most once
a second. What is promised to more peaceful times is proved by the long run.
"""


@pytest.mark.parametrize("seed", EVERYDAY_SEEDS)
async def test_a_random_quarter_minute_loses_nothing(
    fresh_stage: Stage, tmp_path: Path, seed: int
) -> None:
    """Fifteen seconds of faults: what was accepted arrives, in order, and little of it twice."""
    replay = f"replay: LEDGER_SEED={seed} pytest {__file__}"
    blows = schedule(seed, 15)

    result = await play(fresh_stage, Cast(users=20, rate=40.0), 15, blows, replay=replay)

    result.check(tmp_path, duplicates=CROWDED_DUPLICATES)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", SLOW_SEEDS)
async def test_a_random_minute_with_a_hundred_users_loses_nothing(
    fresh_stage: Stage, tmp_path: Path, seed: int
) -> None:
    """A minute of faults under 100 users with 2 notifications per second: at most 2 % twice."""
    replay = f"replay: LEDGER_SEED={seed} pytest -m slow {__file__}"
    blows = schedule(seed, 60)

    result = await play(fresh_stage, Cast(users=100, rate=200.0), 60, blows, replay=replay)

    result.check(tmp_path)
    assert len(result.journal.publishes) > 4000, result.verdict
