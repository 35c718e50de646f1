"""The users of one worker: who counts, how often, until when; on a real Redis."""

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests.redis_server import RedisServer
from tests.trioserver.users_stage import lifetimes, number, run
from trioserver import users
from trioserver.users import ANEW_SECONDS, LASTS_SECONDS, PORTION, Users


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@attrs.frozen
class Guest:
    """A connection, as far as counting needs it."""

    user: str | None


def crowd(first: int, last: int) -> list[Guest]:
    """Return connections of as many users."""
    return [Guest(f"user-{number}") for number in range(first, last)]


def near(expected: int, counted: int) -> bool:
    """Return whether a number is as right as such numbers are: six times the usual error."""
    return abs(expected - counted) <= 0.05 * expected


def test_who_comes_is_counted_once(redis: RedisServer) -> None:
    """However many connections he has; and what is written does not last for ever."""
    counted = Users("aa.1.1")
    assert 1 == run(redis, counted.came([Guest("ann"), Guest("bob"), Guest("ann")]))
    run(redis, counted.came([Guest("ann")]))
    assert 2 == number(redis)
    (lasts,) = lifetimes(redis)
    assert 0 < lasts <= LASTS_SECONDS * 1000


def test_a_renewal_lets_the_count_live_on(redis: RedisServer) -> None:
    """It tells whether there is one, and makes none."""
    counted = Users("aa.1.1")
    assert 0 == run(redis, counted.renewed([], 0, 0.0))
    run(redis, counted.came([Guest("ann")]))
    redis.command("PEXPIRE", users.key("aa.1.1"), 5000)
    assert 1 == run(redis, counted.renewed([], 1, 0.0))
    assert lifetimes(redis)[0] > 5000
    assert 1 == number(redis)


def test_made_anew_in_portions(redis: RedisServer) -> None:
    """Who has left counts no more, who came meanwhile does; no key is ever without an end."""
    counted = Users("aa.1.1")
    everybody = crowd(0, 4 * PORTION)
    for at in range(0, len(everybody), PORTION):
        run(redis, counted.came(everybody[at : at + PORTION]))
    stay = everybody[: 2 * PORTION + 1]
    counted.left = True
    run(redis, counted.renewed(stay, len(stay), 0.0))
    portions = 0
    while counted.is_making:
        # It begins with nobody, so who comes is added behind the first portion.
        run(redis, counted.portion())
        portions += 1
        assert (portions < 3) == near(4 * PORTION, number(redis))
        run(redis, counted.came([Guest(f"late-{portions}")]))
        assert all(0 < lasts <= LASTS_SECONDS * 1000 for lasts in lifetimes(redis))
    assert 3 == portions
    assert near(2 * PORTION + 1 + 3, number(redis))
    late = [Guest(f"late-{number}") for number in (1, 2, 3)]
    before = number(redis)
    run(redis, counted.came(late))
    assert before == number(redis), "they are in it"
    assert 1 == len(lifetimes(redis))


def test_nobody_is_left(redis: RedisServer) -> None:
    """Then there is no count."""
    counted = Users("aa.1.1")
    run(redis, counted.came([Guest("ann")]))
    counted.left = True
    run(redis, counted.renewed([], 0, 0.0))
    run(redis, counted.portion())
    assert [] == lifetimes(redis)


def test_what_is_left_of_another_attempt_is_in_nobodys_way(redis: RedisServer) -> None:
    """One that was given up half-way leaves nothing in the next."""
    counted = Users("aa.1.1")
    run(redis, counted.came(crowd(0, PORTION + 1)))
    counted.left = True
    everybody = crowd(0, PORTION + 1)
    run(redis, counted.renewed(everybody, len(everybody), 0.0))
    run(redis, counted.portion())
    counted.lacking()
    assert not counted.is_making
    run(redis, counted.renewed([Guest("ann")], 1, 1000.0))
    run(redis, counted.portion())
    assert 1 == number(redis)


@pytest.mark.parametrize(
    ("size", "seconds"), [(PORTION, 3.0), (4 * PORTION, 12.0), (50_000, ANEW_SECONDS)]
)
def test_the_larger_the_seldomer(size: int, seconds: float) -> None:
    """A large worker makes its own anew once a minute, one portion a renewal on an average."""
    assert [True, False, True] == made_at(size, 100.0, 99.999 + seconds, 100.0 + seconds)


def test_a_small_one_is_made_anew_with_each_renewal() -> None:
    """It costs one command."""
    assert [True, True] == made_at(PORTION - 1, 100.0, 100.0)


def made_at(size: int, *moments: float) -> list[bool]:
    """Return whether it is made anew, with somebody leaving all the time."""
    counted = Users("aa.1.1")
    made: list[bool] = []
    for now in moments:
        counted.left = True
        counted.renewed([Guest("ann")], size, now)
        made.append(counted.is_making)
        if counted.is_making:
            counted.portion()
    return made


def test_nobody_has_left() -> None:
    """Then nothing is made anew."""
    counted = Users("aa.1.1")
    counted.renewed(crowd(0, 3), 3, 0.0)
    assert not counted.is_making


def test_another_life_has_its_own(redis: RedisServer) -> None:
    """Whatever was under way for the old one is over."""
    counted = Users("aa.1.1")
    counted.left = True
    counted.renewed(crowd(0, 3), 3, 0.0)
    counted.go_on("aa.1.1+1")
    assert (False, False) == (counted.is_making, counted.left)
    run(redis, counted.came([Guest("ann")]))
    assert (0, 1) == (number(redis), number(redis, "aa.1.1+1"))
    run(redis, counted.end())
    assert [] == lifetimes(redis)


def test_junk_under_our_name(redis: RedisServer) -> None:
    """Something else under that name makes place."""
    redis.command("RPUSH", users.key("aa.1.1"), "x")
    run(redis, Users("aa.1.1").came([Guest("ann")]))
    assert 1 == number(redis)


def test_earlier_lives_of_a_worker_count() -> None:
    """The latest of them, and only of one that lives; what is no number has none before it."""
    members = [b"aa.1.1+5", b"9000", b"bb.1.1+1", b"9000", b"cc.1.1+x", b"9000", b"dd.1.1+1", b"1"]
    lives = ["aa.1.1+2", "aa.1.1+3", "aa.1.1+4", "aa.1.1+5", "bb.1.1", "bb.1.1+1", "cc.1.1+x"]
    command = users.counts([[b"5", b"0"], members])
    assert command == ("PFCOUNT", *(users.key(life) for life in lives))
