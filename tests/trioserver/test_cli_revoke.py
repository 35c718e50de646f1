"""The command ``revoke``, on a real Redis."""

import datetime as dt
import json
import time
from functools import partial
from types import SimpleNamespace
from typing import Final

import pytest

from tests.redis_server import RedisServer, free_port
from tests.trioserver.ledger_calls import Caller
from tests.trioserver.terminal import Ran, Run
from trioserver import cli_revoke, revocation
from trioserver.revocation import LEEWAY_SECONDS, LIFETIME_SECONDS, MAX_ENTRIES, Revocation

DAY: Final = 86_400

LEEWAY: Final = LEEWAY_SECONDS


@pytest.fixture
def run(run: Run) -> Run:
    """Run ``trioserver revoke``, with an empty Redis."""
    return partial(run, "revoke")


def kept(redis: RedisServer) -> list[Revocation]:
    """Return what is in Redis, in order."""
    names, _ = revocation.names_in(redis.command(*revocation.page_after(0, 1 << 53, 1000)))
    reply = redis.command(*revocation.entries_of(names)) if names else []
    return list(revocation.revocations_in(names, reply))


def seconds(text: str) -> float:
    """Return a printed moment as seconds since 1970."""
    return dt.datetime.fromisoformat(text).timestamp()


def test_a_token(run: Run, redis: RedisServer) -> None:
    """One line says what was done and when it lapses; the second time it says so."""
    ran = run("--jti", "7f", "--until", "2099-01-01T00:00:00Z")
    again = run("--jti", "7f", "--until", "2099-01-01T01:00:00+01:00")

    assert Ran(0, "revoked: the token 7f; lapses 2099-01-01T00:00:00.000Z\n", "") == ran
    assert ran.out.replace("revoked", "revoked already", 1) == again.out
    assert [Revocation("t:7f", 0, 4_070_908_800)] == kept(redis)


def test_a_user(run: Run, redis: RedisServer) -> None:
    """Without a moment: what was issued until two seconds from now, for 30 days."""
    earliest = int(time.time())
    ran = run("--user", "ann")
    [one] = kept(redis)

    assert (0, "") == (ran.code, ran.err)
    assert ran.out.startswith("revoked: all tokens of user ann issued up to 20")
    assert "u:ann" == one.name
    assert earliest <= one.before - LEEWAY <= time.time()
    assert LIFETIME_SECONDS == one.until - one.before + LEEWAY


@pytest.mark.parametrize(("text", "ago"), [("now", 0), ("10m", 600)])
def test_now_is_what_redis_says(
    run: Run, redis: RedisServer, monkeypatch: pytest.MonkeyPatch, text: str, ago: int
) -> None:
    """A clock of this machine that is behind saves nobody."""
    monkeypatch.setattr(cli_revoke, "time", SimpleNamespace(time=lambda: 1_000_000_000.0))
    earliest = int(time.time())
    for whom in (("--user", "ann"), ("--all",)):
        ran = run(*whom, "--before", text)
        assert 0 == ran.code, ran.err
    for one in kept(redis):
        assert earliest <= one.before + ago - LEEWAY <= time.time()


def test_a_date_is_taken_as_it_is(run: Run, redis: RedisServer) -> None:
    """It is compared with what the issuer's clock has said: nothing is added."""
    assert 0 == run("--user", "ann", "--before", "2026-01-01T00:00:00.999Z").code
    assert [1_767_225_600] == [one.before for one in kept(redis)]


def test_everybody(run: Run, redis: RedisServer) -> None:
    """--before is a duration ago, now, or a date, of which the later counts."""
    for text, ago in (("10m", 600), ("now", 0)):
        earliest = int(time.time())
        ran = run("--all", "--before", text)
        assert 0 == ran.code, ran.err
        [one] = kept(redis)
        assert earliest - ago <= one.before - LEEWAY <= time.time() - ago
    ran = run("--all", "--before", "2020-01-01T00:00:00.999Z")
    assert ran.out.startswith("revoked already: all tokens of everybody issued up to ")
    assert "all" == one.name


def test_until_is_ahead(run: Run, redis: RedisServer) -> None:
    """--until is a duration from now; with --user and --all, too."""
    earliest = int(time.time())
    assert 0 == run("--user", "ann", "--before", "1h", "--until", "12h").code
    [one] = kept(redis)
    assert earliest - 3600 <= one.before - LEEWAY <= time.time() - 3600
    assert earliest + DAY / 2 <= one.until <= time.time() + DAY / 2


def test_for_programs(run: Run) -> None:
    """--json prints what there is, in the words of the options."""
    token = json.loads(run("--jti", "7f", "--json").out)
    user = json.loads(run("--user", "ann", "--before", "2020-01-01T00:00:00Z", "--json").out)
    everyone = json.loads(run("--all", "--before", "now", "--json").out)

    assert ("7f", True, 1) == (token["jti"], token["new"], token["count"])
    assert abs(seconds(token["until"]) - time.time() - LIFETIME_SECONDS) < 60
    assert ("ann", "2020-01-01T00:00:00.000Z") == (user["user"], user["before"])
    assert (True, 3) == (everyone["all"], everyone["count"])


def test_list(run: Run, redis: RedisServer) -> None:
    """Oldest first, as lines or as JSON; what has lapsed or is garbage is left out."""
    assert Ran(0, "", "") == run("--list")
    for arguments in (("--jti", "7f"), ("--user", "ann"), ("--all", "--before", "1d")):
        run(*arguments)
    redis.command("HSET", revocation.ENTRIES_KEY, "t:old", "0 5", "t:bad", "x")
    redis.command("ZADD", revocation.ORDER_KEY, 3, "t:old", 4, "t:bad")

    lines = run("--list").out.splitlines()
    objects = [json.loads(line) for line in run("--list", "--json").out.splitlines()]

    starts = ["the token 7f; lapses ", "all tokens of user ann issued", "all tokens of everybody"]
    assert [True] * 3 == [line.startswith(start) for line, start in zip(lines, starts, strict=True)]
    assert ["jti", "user", "all"] == [next(iter(one)) for one in objects]


def test_the_list_has_pages(run: Run, redis: RedisServer) -> None:
    """As many as there are."""
    for number in range(1001):
        redis.command("HSET", revocation.ENTRIES_KEY, f"t:{number}", "0 99999999999")
        redis.command("ZADD", revocation.ORDER_KEY, number + 1, f"t:{number}")
    redis.command("SET", revocation.SEQ_KEY, 1001)
    found = [json.loads(line)["jti"] for line in run("--list", "--json").out.splitlines()]
    assert [str(number) for number in range(1001)] == found


def test_the_script(run: Run, redis: RedisServer) -> None:
    """--script prints what other languages send with EVAL."""
    ran = run("--script")
    assert revocation.SCRIPT == ran.out.encode()
    redis.command("EVAL", ran.out, 1, "ts:{revoked}:seq", "user", "ann")
    assert ["u:ann"] == [one.name for one in kept(redis)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "say one of --jti J, --user U, --all"),
        (("--jti", "7f", "--user", "ann"), "say one of --jti J"),
        (("--list", "--all"), "say one of --jti J"),
        (("--all",), "say --before MOMENT with --all"),
        (("--jti", "7f", "--before", "now"), "--before does not go with --jti"),
        (("--list", "--until", "1d"), "--before and --until go with"),
        (("--all", "--before", "yesterday"), "is not a moment"),
        (("--all", "--before", "2026-01-01T00:00:00"), "has no time zone"),
        (("--all", "--before", "2026-13-01T00:00:00Z"), "is not a moment"),
        (("--user", "ann", "--until", "400d"), "is not from"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], problem: str) -> None:
    """It is told what to say, and nothing happens."""
    ran = run(*arguments)
    assert (2, "") == (ran.code, ran.out)
    assert problem in ran.err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--user", ""), "a user has 1 to 128 bytes of printable text"),
        (("--jti", "x" * 257), "a jti has 1 to 256 bytes of printable text"),
        (("--jti", "7f", "--until", "2020-01-01T00:00:00Z"), "until is over"),
        (("--all", "--before", "2099-01-01T00:00:00Z"), "before is in the future"),
        (("--all", "--before", "1960-01-01T00:00:00Z"), "before is beyond all reason"),
    ],
)
def test_refusals(run: Run, redis: RedisServer, arguments: tuple[str, ...], problem: str) -> None:
    """What cannot be revoked is one line and exit code 1."""
    assert Ran(1, "", f"trioserver: this cannot be revoked: {problem}\n") == run(*arguments)
    assert 0 == redis.command("DBSIZE")


def test_no_room(run: Run, redis: RedisServer) -> None:
    """Beyond the bound the operator is told what to do instead."""
    redis.command(
        "EVAL",
        "for i = 1, ARGV[1] do redis.call('ZADD', KEYS[1], 9e9, i) end",
        *(1, revocation.ENDS_KEY, MAX_ENTRIES),
    )
    ran = run("--jti", "7f")
    assert (1, "", 1) == (ran.code, ran.out, ran.err.count("\n"))
    assert "no room: there are 100000 revocations already; revoke by user" in ran.err


def test_garbage(run: Run, redis: RedisServer) -> None:
    """Keys that are somebody else's are named."""
    redis.command("SADD", revocation.SEQ_KEY, "x")
    ran = run("--user", "ann")
    assert (1, "", 1) == (ran.code, ran.out, ran.err.count("\n"))
    assert "WRONGTYPE ts:{revoked}:seq is something else; delete it" in ran.err
    assert 1 == run("--list").code


def test_no_redis(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Redis: one line that says what is unknown and what to do."""
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    ran = run("--user", "ann")
    assert (1, "", 1) == (ran.code, ran.out, ran.err.count("\n"))
    assert "whether it is revoked is unknown, try again" in ran.err


def test_the_channel_is_the_servers(run: Run, redis: RedisServer) -> None:
    """CHANNEL_PREFIX goes in front of the channel, as everywhere."""
    with Caller(redis.path) as listener:
        listener.ask("SUBSCRIBE", "eu:revoked")
        assert 0 == run("--user", "ann", "--channel-prefix", "eu:").code
        number = redis.command("GET", revocation.SEQ_KEY)
        assert [b"message", b"eu:revoked", number] == listener.next()
