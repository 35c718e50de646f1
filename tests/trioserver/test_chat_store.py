"""The scripts of chat sessions on a real Redis, and what is said to them."""

import uuid
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.redis_server import RedisServer
from trioserver import chat_store
from trioserver.chat_store import (
    ALWAYS,
    CREATED,
    FORBIDDEN,
    LEAVES,
    NONE_LEFT,
    REMEMBERED,
    RESUMED,
    SESSIONS_PER_COMMAND,
    STAYS,
    SUPERSEDED,
    UNKNOWN,
    Attached,
    Commit,
    recall,
    remember,
)
from trioserver.ledger import Command

TTL_MS = 600_000
SESSION = "8f14e45f-ceea-467f-a0e6-25c0a5a5d5c5"
KEY = chat_store.key(SESSION)
HERE, THERE = "aa.1.1", "bb.1.1"
ONE, TWO, OTHER = f"{HERE}-1", f"{HERE}-2", f"{THERE}-1"


@pytest.fixture(autouse=True)
def scripts(redis: RedisServer) -> Iterator[None]:
    """An empty Redis that knows the scripts."""
    redis.command("FLUSHALL")
    for command in chat_store.LOADS:
        run(redis, command)
    yield
    redis.command("FLUSHALL")


def run(redis: RedisServer, command: Command) -> object:
    """Run one command."""
    return redis.command(*(part if isinstance(part, bytes) else str(part) for part in command))


def attach(
    redis: RedisServer,
    holder: str = ONE,
    user: str = "",
    *,
    may_create: bool = True,
    until: int = ALWAYS,
) -> Attached:
    """Attach somebody to the session."""
    return chat_store.attached(
        run(redis, attaching(holder, user, may_create=may_create, until=until))
    )


def attaching(
    holder: str = ONE, user: str = "", *, may_create: bool = True, until: int = ALWAYS
) -> Command:
    """Return the command for that."""
    return chat_store.attach(
        SESSION,
        until=until,
        holder=holder,
        user=user,
        may_create=may_create,
        ttl_ms=TTL_MS,
        channels="test:chat:",
        life=holder.rpartition("-")[0],
    )


def commit(
    redis: RedisServer,
    turn: int,
    version: int,
    count: int,
    *,
    holder: str = ONE,
    owner: str = "",
    ids: str = "",
    leaves: bool = False,
) -> str:
    """Write one session; return what is wrong with that, or nothing."""
    said = (KEY, holder, turn, version, count, owner, ids, LEAVES if leaves else STAYS)
    command = chat_store.commit([said], TTL_MS, until=ALWAYS)
    return chat_store.faults(run(redis, command)).get(0, "")


def stored(redis: RedisServer, *names: str) -> list[str | None]:
    """Return fields of the session."""
    reply = redis.command("HMGET", KEY, *names)
    assert isinstance(reply, list)
    return [None if value is None else value.decode() for value in reply]


# ---- Attaching


def test_a_session_begins(redis: RedisServer) -> None:
    """With nothing counted, for as long as sessions live."""
    came = attach(redis, user="ann")
    assert (CREATED, 0, "", "") == (came.outcome, came.count, came.ids, came.before)
    assert came.turn > 1_600_000_000_000
    assert ["0", "ann", ONE, None] == stored(redis, "n", "o", "h", "i")
    lives = redis.command("PTTL", KEY)
    assert isinstance(lives, int)
    assert TTL_MS - 10_000 < lives <= TTL_MS


def test_a_session_that_is_not_there(redis: RedisServer) -> None:
    """Is not made for who may not have it made."""
    assert UNKNOWN == attach(redis, may_create=False).outcome
    assert 0 == redis.command("EXISTS", KEY)


def test_a_session_goes_on(redis: RedisServer) -> None:
    """With its count and the ids of its latest messages, for who comes next."""
    turn = attach(redis).turn
    assert "" == commit(redis, turn, 1, 7, ids="\na 6\nb 7")
    came = attach(redis, OTHER, may_create=False)
    assert (RESUMED, 7, "\na 6\nb 7", ONE) == (came.outcome, came.count, came.ids, came.before)
    assert came.turn > turn


@pytest.mark.parametrize("user", ["", "bob"])
def test_somebody_elses_session(redis: RedisServer, user: str) -> None:
    """Is touched neither by another user nor by who is nobody."""
    attach(redis, user="ann")
    assert FORBIDDEN == attach(redis, OTHER, user).outcome
    assert [ONE, "ann"] == stored(redis, "h", "o")


def test_who_logs_in_keeps_his_session(redis: RedisServer) -> None:
    """A session without an owner becomes his, whether by coming back or by staying."""
    attach(redis)
    assert RESUMED == attach(redis, OTHER, "ann").outcome
    assert ["ann"] == stored(redis, "o")
    redis.command("DEL", KEY)
    turn = attach(redis).turn
    assert "" == commit(redis, turn, 1, 0, owner="ann")
    assert ["ann"] == stored(redis, "o")
    assert FORBIDDEN == commit(redis, turn, 2, 1, owner="bob")
    assert ["ann", "0"] == stored(redis, "o", "n")


def test_only_another_life_is_told_through_its_channel(redis: RedisServer) -> None:
    """A worker knows of its own connections."""
    redis.command("CONFIG", "RESETSTAT")
    attach(redis, ONE)
    attach(redis, TWO)
    assert 0 == redis.commands_seen("publish")
    assert TWO == attach(redis, OTHER).before
    assert 1 == redis.commands_seen("publish")


def test_attaching_again(redis: RedisServer) -> None:
    """Changes nothing, as its first reply may have been lost: it was created, or not."""
    first = attach(redis)
    assert first == attach(redis)
    commit(redis, first.turn, 1, 1)
    assert (RESUMED, 1, first.turn) == (
        (again := attach(redis, user="ann")).outcome,
        again.count,
        again.turn,
    )
    assert ["ann", "1"] == stored(redis, "o", "v")


def test_who_has_lost_a_session_never_gets_it_again(redis: RedisServer) -> None:
    """What comes late is a duplicate, and must not rob who came after."""
    attach(redis, ONE)
    attach(redis, TWO)
    attach(redis, OTHER)
    assert [SUPERSEDED] * 2 == [attach(redis, late).outcome for late in (ONE, TWO)]
    assert [OTHER] == stored(redis, "h")


def test_those_before_are_few(redis: RedisServer) -> None:
    """However often a session changes hands, little is kept of that."""
    for number in range(100):
        turn = attach(redis, f"{HERE}-{number}").turn
        if number % 2:
            assert "" == commit(redis, turn, 1, 0, holder=f"{HERE}-{number}", leaves=True)
    (past,) = stored(redis, "p")
    assert past is not None
    assert [f"{HERE}-{number}" for number in (99, 98, 97, 96)] == past.split()


@pytest.mark.parametrize("how", ["attach", "commit"])
def test_a_key_of_another_type(redis: RedisServer, how: str) -> None:
    """Is a session that is not there."""
    redis.command("SET", KEY, "x")
    if how == "attach":
        assert CREATED == attach(redis).outcome
    else:
        assert "" == commit(redis, 5, 1, 3)
        assert ["3", ONE] == stored(redis, "n", "h")


def test_fields_that_nobody_understands(redis: RedisServer) -> None:
    """Count as nothing, and are written over."""
    redis.command("HSET", KEY, "n", "x", "t", "y", "v", "z", "h", OTHER)
    came = attach(redis)
    assert (CREATED, 0) == (came.outcome, came.count)
    redis.command("HSET", KEY, "v", "z")
    assert "" == commit(redis, came.turn, 1, 2)
    assert ["2", "1"] == stored(redis, "n", "v")


# ---- Writing


def test_writing_is_absolute(redis: RedisServer) -> None:
    """To repeat it is harmless, and what is older changes nothing, also if it comes late."""
    turn = attach(redis).turn
    assert "" == commit(redis, turn, 2, 5, ids="\na 5")
    assert "" == commit(redis, turn, 2, 5, ids="\na 5")
    assert "" == commit(redis, turn, 1, 4, ids="\nz 4")
    assert ["5", "\na 5", "2"] == stored(redis, "n", "i", "v")
    assert "" == commit(redis, turn, 3, 4, ids=NONE_LEFT)
    assert ["4", NONE_LEFT] == stored(redis, "n", "i")


def test_writing_prolongs(redis: RedisServer) -> None:
    """By the whole life of a session."""
    turn = attach(redis).turn
    redis.command("PEXPIRE", KEY, 5000)
    commit(redis, turn, 1, 1)
    lives = redis.command("PTTL", KEY)
    assert isinstance(lives, int)
    assert lives > 5000


@pytest.mark.parametrize(
    ("user", "count", "short"), [("", 0, True), ("", 1, False), ("ann", 0, False)]
)
def test_an_empty_session_of_nobody_ends_soon(
    redis: RedisServer, user: str, count: int, *, short: bool
) -> None:
    """Who connects without a token makes one each time; only what was counted is kept for him."""
    turn = attach(redis, user=user).turn
    assert "" == commit(redis, turn, 1, count, owner=user, leaves=True)
    lives = redis.command("PTTL", KEY)
    assert isinstance(lives, int)
    assert short == (lives <= 60_000)


def test_who_was_superseded_writes_nothing(redis: RedisServer) -> None:
    """And hears of it, also if nobody has told him before."""
    mine = attach(redis).turn
    theirs = attach(redis, OTHER).turn
    assert SUPERSEDED == commit(redis, mine, 1, 9)
    assert "" == commit(redis, theirs, 1, 1, holder=OTHER)
    assert ["1", OTHER] == stored(redis, "n", "h")


def test_who_leaves(redis: RedisServer) -> None:
    """Writes once more, holds nothing then, and no duplicate of his makes it otherwise."""
    turn = attach(redis).turn
    assert "" == commit(redis, turn, 1, 3, leaves=True)
    assert ["", "3"] == stored(redis, "h", "n")
    assert SUPERSEDED == commit(redis, turn, 1, 3, leaves=True)
    assert SUPERSEDED == attach(redis).outcome
    assert "" == attach(redis, OTHER).before


def test_redis_has_lost_everything(redis: RedisServer) -> None:
    """A session comes back as its holder says, with its owner and its ids."""
    turn = attach(redis, user="ann").turn
    redis.command("FLUSHDB")
    assert "" == commit(redis, turn, 4, 12, owner="ann", ids="\na 12")
    assert ["12", "ann", ONE, "\na 12"] == stored(redis, "n", "o", "h", "i")
    assert FORBIDDEN == attach(redis, OTHER, "bob").outcome


def test_redis_has_lost_the_latest(redis: RedisServer) -> None:
    """Who came last is the holder, whatever an older state says; the one before is not again."""
    before = attach(redis, ONE).turn
    copy = redis.command("DUMP", KEY)
    latest = attach(redis, OTHER).turn
    assert isinstance(copy, bytes)
    redis.command("RESTORE", KEY, 0, copy, "REPLACE")
    assert "" == commit(redis, latest, 3, 8, holder=OTHER)
    assert SUPERSEDED == commit(redis, before, 9, 2)
    assert [OTHER, "8"] == stored(redis, "h", "n")


def test_many_sessions_in_one_command(redis: RedisServer) -> None:
    """One that is lost is told apart from those that are not."""
    said: list[Commit] = []
    for number in range(SESSIONS_PER_COMMAND):
        key = chat_store.key(str(uuid.UUID(int=number)))
        said.append((key, ONE, 5, 1, number, "", f"\nm {number}", STAYS))
    for number in (3, 100):
        redis.command("HSET", said[number][0], "h", OTHER, "t", 6)
    command = chat_store.commit(said, TTL_MS, until=ALWAYS)
    assert {3: SUPERSEDED, 100: SUPERSEDED} == chat_store.faults(run(redis, command))
    assert b"99" == redis.command("HGET", said[99][0], "n")
    assert b"\nm 101" == redis.command("HGET", said[101][0], "i")
    assert None is redis.command("HGET", said[100][0], "n")


# ---- Moments


def test_what_comes_too_late_is_void(redis: RedisServer) -> None:
    """Nobody waits for it any more: it changes nothing, and says only what time it is."""
    turn = attach(redis).turn
    assert "" == commit(redis, turn, 1, 1)
    before = redis.command("DUMP", KEY)
    now = chat_store.clock(run(redis, attaching()))
    said = (KEY, ONE, turn, 2, 2, "", "", STAYS)
    late = [
        attaching(OTHER, until=now - 1),
        chat_store.commit([said], TTL_MS, until=now - 1),
    ]
    for command in late:
        reply = run(redis, command)
        assert chat_store.was_late(reply)
        assert chat_store.clock(reply) >= now
    assert before == redis.command("DUMP", KEY)


def test_what_comes_in_time_is_not_void(redis: RedisServer) -> None:
    """Its moment is by the clock of Redis, which it is told."""
    now = chat_store.clock(run(redis, attaching()))
    assert RESUMED == attach(redis, OTHER, until=now + 60_000).outcome
    turn = attach(redis, OTHER).turn
    said = (KEY, OTHER, turn, 1, 3, "", "", STAYS)
    reply = run(redis, chat_store.commit([said], TTL_MS, until=now + 60_000))
    assert (False, {}) == (chat_store.was_late(reply), chat_store.faults(reply))
    assert now <= chat_store.clock(reply) < now + 60_000
    assert ["3"] == stored(redis, "n")


# ---- Commands


@pytest.mark.parametrize(("together", "expected"), [(True, SESSIONS_PER_COMMAND), (False, 1)])
def test_sessions_per_command(*, together: bool, expected: int) -> None:
    """Bounded; on a cluster one, as each lies in its own slot."""
    assert expected == chat_store.per_command(together=together)


def test_a_command_names_its_keys() -> None:
    """Clusters look at them, and so does who may write which."""
    said: list[Commit] = [(f"k{n}", ONE, 1, 1, n, "", "", STAYS) for n in range(5)]
    command = chat_store.commit(said, TTL_MS, until=ALWAYS)
    assert (5, "k0", "k1", "k2", "k3", "k4") == command[2:8]


def test_a_session_has_a_slot_of_its_own() -> None:
    """Its id is what clusters look at."""
    assert f"ts:session:{{{SESSION}}}" == KEY


# ---- Ids


@given(
    st.lists(
        st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=5),
        max_size=3 * REMEMBERED,
    )
)
def test_the_latest_ids_are_known(told: list[str]) -> None:
    """Each with its count, as many as are kept, and no other; whatever they look like."""
    ids, model = "", dict[str, int]()
    for count, one in enumerate(told, 1):
        assert model.get(one) == recall(ids, one)
        if one not in model:
            ids = remember(ids, one, count)
            model[one] = count
            model = dict(list(model.items())[-REMEMBERED:])
        assert REMEMBERED >= ids.count(" ")
    assert list(model.items()) == [
        (name, int(count)) for name, count in (line.split() for line in ids.split("\n") if line)
    ]


def test_ids_after_all_were_taken_back() -> None:
    """What stands for none is none."""
    assert None is recall(NONE_LEFT, "a")
    assert "\na 1" == remember(NONE_LEFT, "a", 1)


@pytest.mark.parametrize("ids", ["", "\na", "\na ", "\na x", "junk", "\na \nb 1"])
def test_ids_that_nobody_has_written(ids: str) -> None:
    """Whatever a key holds, it is no error."""
    assert None is recall(ids, "a")
