"""A nemesis is replayable, and strikes only what its strike can teach us something about."""

from collections import Counter

import pytest

from tests.ledger.nemesis import DURATIONS, KILLS_PER_SLOT, RELOAD_SECONDS, Kind, schedule

SEEDS = range(200)


def test_the_seed_alone_decides() -> None:
    """The same seed gives the same blows, another one others."""
    assert schedule(7, 60) == schedule(7, 60)
    assert len(SEEDS) == len({schedule(seed, 60) for seed in SEEDS})


@pytest.mark.parametrize("seconds", [15, 60])
def test_blows_come_in_order_and_in_time(seconds: float) -> None:
    """Ascending, within the time, and enough of them."""
    for seed in SEEDS:
        times = [blow.at for blow in schedule(seed, seconds)]
        assert sorted(times) == times
        assert 0 < times[0] < times[-1] <= seconds
        assert len(times) >= seconds / 4


def test_every_kind_has_its_turn() -> None:
    """All kinds come, and each duration and each slot with them."""
    seen: Counter[object] = Counter()
    for seed in SEEDS:
        for blow in schedule(seed, 60):
            seen.update([blow.kind, (blow.kind, blow.seconds), (blow.kind, blow.slot)])
    for kind in Kind:
        assert seen[kind] > len(SEEDS)
        for seconds in DURATIONS.get(kind, ()):
            assert seen[kind, seconds]
    assert seen[Kind.WORKER_KILL, 0]
    assert seen[Kind.WORKER_KILL, 1]


def test_nothing_is_struck_that_is_down() -> None:
    """Not Redis while it is away, not a slot while it is stopped, and no slot too often."""
    redis_kinds = {Kind.REDIS_KILL, Kind.REDIS_PAUSE, Kind.PUBSUB_KILL, Kind.DEAF}
    slot_kinds = {Kind.WORKER_KILL, Kind.WORKER_PAUSE}
    for seed in SEEDS:
        free: dict[object, float] = {}
        kills: Counter[int] = Counter()
        for blow in schedule(seed, 60):
            if blow.kind in redis_kinds:
                victim: object = "redis"
            elif blow.kind in slot_kinds:
                victim = blow.slot
            elif blow.kind is Kind.RELOAD:
                victim = "reload"
            else:
                continue
            assert blow.at >= free.get(victim, 0.0), f"seed {seed}: {blow}"
            rest = RELOAD_SECONDS if blow.kind is Kind.RELOAD else blow.seconds
            free[victim] = blow.at + rest
            kills[blow.slot] += blow.kind is Kind.WORKER_KILL
        assert max(kills.values(), default=0) <= KILLS_PER_SLOT


def test_only_what_is_asked_for_is_broken() -> None:
    """A schedule of some kinds has no others."""
    kinds = (Kind.CUT, Kind.PUBSUB_KILL)
    assert set(kinds) == {blow.kind for blow in schedule(3, 60, kinds=kinds)}


def test_a_blow_is_one_line() -> None:
    """What is printed names the moment, the deed and its measure."""
    lines = [str(blow) for seed in SEEDS for blow in schedule(seed, 60)]
    assert not any("\n" in line for line in lines)
    assert any(line.endswith("kill Redis, start it again after a while  0.2 s") for line in lines)
