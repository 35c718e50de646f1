"""Revocations: the table of a worker, and the script on a real Redis."""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.redis_server import RedisServer
from trioserver import revocation
from trioserver.auth import Claims
from trioserver.revocation import (
    ENDS_KEY,
    ENTRIES_KEY,
    EVERYONE,
    LIFETIME_SECONDS,
    ORDER_KEY,
    SEQ_KEY,
    Ago,
    Outcome,
    Revocation,
    RevocationRefused,
    Revoked,
    revoke,
)

KEYS: Final = (SEQ_KEY, ENTRIES_KEY, ORDER_KEY, ENDS_KEY)

NOW: Final = 1_000_000

PAGE: Final = (Path(__file__).parents[2] / "docs/revocation.md").read_text(encoding="utf-8")


def claims(user: str = "ann", jti: str = "", issued_at: float = 0.0) -> Claims:
    """Return what a token says."""
    return Claims(user=user, expires_at=2e9, jti=jti, issued_at=issued_at)


def table(*revocations: Revocation) -> Revoked:
    """Return a table that knows these, at `NOW`."""
    revoked = Revoked(lambda: NOW)
    revoked.learn(revocations)
    return revoked


# ---- The table


def test_an_empty_table_covers_nothing() -> None:
    """Nobody is revoked where nothing is known, not even who says nothing about his token."""
    assert not Revoked().covers(claims())
    assert 0 == len(Revoked())


def test_a_token_is_revoked_by_its_jti() -> None:
    """The token, whoever has it and whenever it was issued; no other, and none without a jti."""
    revoked = table(Revocation("t:7f", 0, NOW + 1))

    assert revoked.covers(claims(jti="7f", issued_at=NOW))
    assert not revoked.covers(claims(jti="7F", issued_at=NOW))
    assert not revoked.covers(claims(jti="", issued_at=NOW))
    assert not revoked.covers(claims(user="7f"))


@pytest.mark.parametrize("name", ["u:ann", EVERYONE])
@pytest.mark.parametrize(
    ("issued_at", "expected"),
    [
        (0.0, True),
        (-5.0, True),
        (499.0, True),
        (500.0, True),
        (500.999, True),
        (501.0, False),
        (NOW, False),
        (math.nan, True),
    ],
)
def test_what_was_issued_until_a_second(name: str, issued_at: float, *, expected: bool) -> None:
    """That second is included; what does not say when it was issued is older than everything."""
    revoked = table(Revocation(name, 500, NOW + 1))
    assert expected == revoked.covers(claims(issued_at=issued_at))
    assert (name == EVERYONE) == revoked.covers(claims("bob"))


@pytest.mark.parametrize("name", ["t:7f", "u:ann", EVERYONE])
def test_a_revocation_lapses(name: str) -> None:
    """At its moment it ends, to the second, whether or not anybody has cleared up."""
    now = [NOW - 1.0]
    revoked = Revoked(lambda: now[0])
    revoked.learn([Revocation(name, 500, NOW)])
    assert revoked.covers(claims(jti="7f"))
    now[0] = NOW
    assert not revoked.covers(claims(jti="7f"))
    assert 1 == len(revoked)
    revoked.purge()
    assert 0 == len(revoked)


def test_who_has_lapsed_does_not_hide_others() -> None:
    """A revocation of the user counts although that of the token or of everybody has lapsed."""
    now = [NOW]
    revoked = Revoked(lambda: now[0])
    revoked.learn(Revocation(name, 500, NOW + 10) for name in ("t:7f", "u:ann"))
    revoked.learn([Revocation(EVERYONE, 400, NOW + 20)])
    now[0] = NOW + 10
    assert revoked.covers(claims(jti="7f", issued_at=400))
    assert not revoked.covers(claims(jti="7f", issued_at=450))


def test_what_has_lapsed_is_not_learned() -> None:
    """It would only take room."""
    revoked = Revoked(lambda: NOW)
    assert 0 == revoked.learn([Revocation("t:7f", 0, NOW), Revocation("u:ann", 5, NOW - 1)])
    assert 0 == len(revoked)


def test_only_news_counts_as_new() -> None:
    """Whoever reads everything once more need not walk over all connections once more."""
    revoked = table(Revocation("t:7f", 0, NOW + 5), Revocation("u:ann", 10, NOW + 5))
    assert 0 == revoked.learn(
        [
            Revocation("t:7f", 0, NOW + 5),
            Revocation("t:7f", 0, NOW + 4),
            Revocation("u:ann", 9, NOW + 4),
        ]
    )
    assert 1 == revoked.learn([Revocation("u:ann", 11, NOW + 4)])
    assert 1 == revoked.learn([Revocation(EVERYONE, 1, NOW + 4)])


_revocations: Final = st.builds(
    Revocation,
    st.sampled_from(["t:a", "t:b", "u:a", "u:b", EVERYONE]),
    st.integers(0, 20),
    st.integers(NOW - 2, NOW + 20),
)


@given(st.lists(_revocations, max_size=8), st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(known: list[Revocation], random: Any) -> None:
    """However a worker hears of them, it says the same about every token, now and later."""
    other = [*known, *random.sample(known, len(known) // 2)]
    random.shuffle(other)
    tables = [table(*known), table(*other)]
    questions = [
        claims(user, jti, float(issued))
        for user, jti, issued in itertools.product("ab", ["", "a", "b"], range(0, 23, 2))
    ]
    first, second = ([one.covers(question) for question in questions] for one in tables)
    assert first == second
    assert len(tables[0]) == len(tables[1])


@given(st.lists(_revocations, max_size=8))
def test_the_table_against_the_definition(known: list[Revocation]) -> None:
    """A token is covered if one living revocation says so, or the join of several of its kind."""
    revoked = table(*known)
    living = [one for one in known if one.until > NOW]
    for user, jti, issued in itertools.product("ab", ["", "a"], range(0, 22, 3)):
        expected = any(
            one.name == f"t:{jti}" or (one.name in {f"u:{user}", EVERYONE} and issued <= one.before)
            for one in living
        )
        assert expected == revoked.covers(claims(user, jti, float(issued)))


def test_purging_goes_round() -> None:
    """It looks at a bounded number at a time, and at all in the end."""
    now = [NOW]
    revoked = Revoked(lambda: now[0])
    names = [f"{'tu'[number % 2]}:{number}" for number in range(100)]
    revoked.learn(Revocation(name, 5, NOW + 1 + 9 * (name == "u:7")) for name in names)
    now[0] = NOW + 1
    revoked.purge(30)
    assert 70 <= len(revoked) <= 71
    for _ in range(4):
        revoked.purge(30)
    assert 1 == len(revoked)
    assert revoked.covers(claims("7"))


def test_the_table_is_bounded() -> None:
    """Beyond its bound the oldest half goes and is counted; what was learned last is known."""
    revoked = Revoked(lambda: NOW, bound=100)
    revoked.learn(Revocation(f"t:{number}", 0, NOW + 1) for number in range(1000))
    assert len(revoked) <= 100
    assert 1000 == len(revoked) + revoked.forgotten
    assert all(revoked.covers(claims(jti=str(number))) for number in range(950, 1000))
    revoked.learn(Revocation(f"u:{number}", 5, NOW + 1) for number in range(1000))
    assert len(revoked) <= 100
    assert revoked.covers(claims("999"))


# ---- What Redis says


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"t:a", None),
        (b"t:a", b""),
        (b"t:a", b"0"),
        (b"t:a", b"0 5 5"),
        (b"t:a", b"-1 5"),
        (b"t:a", b"1e9 5"),
        (b"t:a", b"0 999999999999"),
        (b"x:a", b"0 5"),
        (b"", b"0 5"),
        (b"t:" + b"x" * 257, b"0 5"),
        (b"t:\xff", b"0 5"),
    ],
)
def test_garbage_is_left_out(name: bytes, value: bytes | None) -> None:
    """What is no revocation hides none that is one."""
    found = revocation.revocations_in([name, b"u:b"], [value, b"7 9"])
    assert [Revocation("u:b", 7, 9)] == list(found)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (None, 0),
        (b"17", 17),
        (b"1763642530123456", 1763642530123456),
        (b"1.7636425301234560e+15", 1763642530123456),
        (b"x", 0),
        (b"inf", 0),
        (b"nan", 0),
        (b"-3", 0),
        (b"1e300", 0),
    ],
)
def test_numbers_in_redis(reply: bytes | None, expected: int) -> None:
    """A number, or 0 for everything else."""
    assert expected == revocation.seq_in(reply)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"token": "a", "user": "b"},
        {"token": ""},
        {"token": "x" * 257},
        {"token": "a\n"},
        {"token": "\ud800"},
        {"user": ""},
        {"user": "x" * 129},
        {"token": "a", "before": 5.0},
        {"token": "a", "before": Ago()},
        {"user": "a", "before": Ago(-1.0)},
        {"user": "a", "before": Ago(0.0, math.nan)},
        {"user": "a", "before": math.nan},
        {"user": "a", "before": -1.0},
        {"user": "a", "until": math.inf},
    ],
)
def test_what_cannot_be_revoked(asked: dict[str, Any]) -> None:
    """It is refused before Redis is asked."""
    with pytest.raises(RevocationRefused):
        revoke(**asked)


# ---- The script


Run = Callable[..., Outcome]


@pytest.fixture
def run(redis: RedisServer) -> Iterator[Run]:
    """Revoke on an empty Redis."""
    redis.command("FLUSHALL")

    def run(**asked: Any) -> Outcome:
        return Outcome.of(redis.command(*revoke(**asked)))

    yield run
    redis.command("FLUSHALL")


def known(redis: RedisServer) -> list[Revocation]:
    """Return what is in Redis, in order."""
    names, _ = revocation.names_in(redis.command(*revocation.page_after(0, 1 << 53, 1000)))
    if not names:
        return []
    reply = redis.command(*revocation.entries_of(names))
    return list(revocation.revocations_in(names, reply))


def test_defaults(run: Run, redis: RedisServer) -> None:
    """Issued until now plus the leeway, for 30 days, by the clock of Redis; in four keys."""
    earliest = int(time.time())
    outcomes = [run(token="7f"), run(user="ann"), run(everyone=True)]
    latest = int(time.time())

    names = [one.revocation.name for one in outcomes]
    assert ["t:7f", "u:ann", EVERYONE] == names
    assert 0 == outcomes[0].revocation.before
    assert all(earliest <= one.revocation.before - 2 <= latest for one in outcomes[1:])
    assert all(earliest <= one.revocation.until - LIFETIME_SECONDS <= latest for one in outcomes)
    assert [(1, True), (2, True), (3, True)] == [(one.entries, one.new) for one in outcomes]
    assert [one.revocation for one in outcomes] == known(redis)
    kept = redis.command("KEYS", "*")
    assert isinstance(kept, list)
    assert sorted(key.encode() for key in KEYS) == sorted(kept)
    last = outcomes[-1].revocation.until
    assert {last} == {redis.command("EXPIRETIME", key) for key in KEYS}


@pytest.mark.parametrize(
    ("before", "shift"), [(None, 2), (Ago(), 2), (Ago(leeway=0), 0), (Ago(600, 4.2), -595)]
)
def test_now_is_the_present_of_redis_plus_the_leeway(
    run: Run, before: Ago | None, shift: int
) -> None:
    """What was accepted so far is revoked, even if the clock of its issuer was ahead."""
    earliest = int(time.time())
    outcome = run(user="ann", before=before)
    latest = int(time.time())
    assert earliest + shift <= outcome.revocation.before <= latest + shift

    revoked = Revoked()
    revoked.learn([outcome.revocation])
    # The latest that an issuer whose clock is so far ahead has issued before the revocation.
    assert revoked.covers(claims(issued_at=earliest + shift + 0.9))
    assert not revoked.covers(claims(issued_at=latest + shift + 1))


def test_a_moment_that_is_said_is_that_of_the_tokens(run: Run) -> None:
    """Nothing is added: a token that is issued a second later is good at once."""
    now = int(time.time())
    assert now == run(user="ann", before=now + 0.9).revocation.before


def test_revocations_of_one_name_are_joined(run: Run, redis: RedisServer) -> None:
    """The later of both moments counts; what says nothing new changes nothing."""
    now = int(time.time())
    first = run(user="ann", before=now - 50, until=now + 1000)
    other = run(user="ann", before=now - 40.5, until=now + 900)
    again = run(user="ann", before=now - 45, until=now + 1000)

    assert Revocation("u:ann", now - 50, now + 1000) == first.revocation
    assert Revocation("u:ann", now - 41, now + 1000) == other.revocation
    assert (other.revocation, False, 1) == (again.revocation, again.new, again.entries)
    assert [other.revocation] == known(redis)
    longer = run(user="ann", before=now - 60, until=now + 2000)
    assert Revocation("u:ann", now - 41, now + 2000) == longer.revocation


def test_numbers_ascend(run: Run, redis: RedisServer) -> None:
    """Each change has a higher number than any before, also if the clock stands still or falls."""
    ahead = (int(time.time()) + 1000) * 1_000_000
    seqs = []
    for number in range(5):
        if number == 3:
            redis.command("SET", SEQ_KEY, ahead)
        run(token=str(number % 2), until=time.time() + 100 + number)
        seqs.append(revocation.seq_in(redis.command("GET", SEQ_KEY)))
    assert sorted(set(seqs)) == seqs
    assert [ahead + 1, ahead + 2] == seqs[3:]
    assert [b"1", b"0"] == [one.name[2:].encode() for one in known(redis)]


def test_there_is_a_bound(run: Run) -> None:
    """Beyond it Redis refuses, with a reason; what is there can still be changed."""
    for number in range(3):
        run(token=str(number), max_entries=3)
    with pytest.raises(RuntimeError, match="FULL there are 3") as refused:
        run(user="ann", max_entries=3)
    reason = revocation.refusal(str(refused.value))
    assert "no room: there are 3 revocations already; revoke by user" in str(reason)
    assert run(token="1", until=time.time() + 9e6, max_entries=3).new


def test_what_has_lapsed_makes_room(run: Run, redis: RedisServer) -> None:
    """The next revocation clears up."""
    past = int(time.time()) - 10
    for number in range(3):
        run(token=str(number))
    for number in range(2):
        redis.command("ZADD", ENDS_KEY, past, f"t:{number}")
    assert 2 == run(user="ann", max_entries=3).entries
    assert ["t:2", "u:ann"] == [one.name for one in known(redis)]
    assert 2 == redis.command("HLEN", ENTRIES_KEY)
    assert 2 == redis.command("ZCARD", ENDS_KEY)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("user",), "user has no value"),
        (("user", ""), "user has no value"),
        (("who", "x"), "unknown argument"),
        ((), "say one of"),
        (("user", "a", "all", "1"), "say one of"),
        (("all", "yes"), "all is 1"),
        (("token", "x" * 257), "a jti has"),
        (("user", "x" * 129), "a user has"),
        (("token", "a", "before", "5"), "before does not go with token"),
        (("token", "a", "ago", "5"), "ago does not go with token"),
        (("token", "a", "leeway", "5"), "leeway does not go with token"),
        (("user", "a", "before", "5", "ago", "0"), "ago does not go with before"),
        (("user", "a", "before", "5", "leeway", "0"), "leeway does not go with before"),
        (("user", "a", "leeway", "3601"), "leeway is at most 3600"),
        (("user", "a", "ago", "-1"), "ago is a whole number"),
        (("user", "a", "before", "-5"), "before is a whole number"),
        (("user", "a", "before", "1e3"), "before is a whole number"),
        (("user", "a", "before", "9999999999"), "before is in the future"),
        (("user", "a", "until", "99999999999"), "until is more than"),
        (("user", "a", "until", "1000"), "until is over"),
        (("user", "a", "until", "999999999999"), "until is a whole number"),
    ],
)
def test_what_the_script_refuses(
    run: Run, redis: RedisServer, arguments: tuple[str, ...], problem: str
) -> None:
    """Also who calls it by hand is told what is wrong, and nothing has happened."""
    with pytest.raises(RuntimeError, match=f"BADREQUEST {problem}") as refused:
        redis.command("EVAL", revocation.SCRIPT, 1, SEQ_KEY, *arguments)
    assert str(revocation.refusal(str(refused.value))).startswith(problem)
    assert 0 == redis.command("DBSIZE")


def test_the_page_names_every_argument() -> None:
    """Who calls the script from another language finds all of its arguments, but the bound."""
    table = PAGE.partition("| name | value |")[2].partition("Moments")[0]
    names = "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    documented = set(re.findall(r"`(\w+)`", names))
    line = re.search(rb"local known = {(.*)}", revocation.SCRIPT)
    assert line is not None
    known = set(re.findall(r"\w+", line[1].decode())) - {"1", "max"}
    assert known == documented


def test_the_script_wants_its_key(run: Run, redis: RedisServer) -> None:
    """A key of somebody else is not touched."""
    with pytest.raises(RuntimeError, match="BADREQUEST the key is"):
        redis.command("EVAL", revocation.SCRIPT, 1, "ts:{p00}:seq", "all", 1)


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_another_type(run: Run, redis: RedisServer, key: str) -> None:
    """Nothing is written beside garbage, and the error says what to delete."""
    redis.command("SADD", key, "x")
    with pytest.raises(RuntimeError, match=f"WRONGTYPE {key} is something else") as refused:
        run(user="ann")
    assert revocation.refusal(str(refused.value)) is None
    assert 1 == redis.command("DBSIZE")


@pytest.mark.parametrize("garbage", ["x", "", "-5", "inf", "nan", "1e300", "9" * 40])
def test_a_number_that_is_garbage(run: Run, redis: RedisServer, garbage: str) -> None:
    """The next revocation is numbered by the clock."""
    redis.command("SET", SEQ_KEY, garbage)
    run(user="ann")
    assert abs(revocation.seq_in(redis.command("GET", SEQ_KEY)) / 1e6 - time.time()) < 60


@pytest.mark.parametrize("garbage", ["", "x", "5", "99999999999999 5", "-1 -1"])
def test_an_entry_that_is_garbage(run: Run, redis: RedisServer, garbage: str) -> None:
    """It is written anew."""
    run(user="ann")
    redis.command("HSET", ENTRIES_KEY, "u:ann", garbage)
    outcome = run(user="ann")
    assert outcome.new
    assert [outcome.revocation] == known(redis)


def test_a_full_redis(run: Run, redis: RedisServer) -> None:
    """A Redis without memory refuses and has nothing of it; then it is as it was."""
    run(user="ann")
    before = known(redis)
    redis.command("CONFIG", "SET", "maxmemory", 1)
    try:
        with pytest.raises(RuntimeError, match="OOM"):
            run(user="bob")
    finally:
        redis.command("CONFIG", "SET", "maxmemory", 0)
    assert before == known(redis)
    assert run(user="bob").new
