"""Entries of topics on a real Redis: scripts, counts, what subscribers are told."""

import json
import random
import socket
from collections.abc import Iterator, Sequence

import attrs
import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.redis_server import RedisServer
from tests.trioserver.presence_stage import call
from trioserver import envelope, presence
from trioserver.envelope import Came
from trioserver.fleet import Lives
from trioserver.ledger import Command
from trioserver.presence import BEGINNING, attending

TOPIC = "room:7"
CHANNEL = "topic:room:7"
A, B = "aa.1.1", "bb.1.1"


@pytest.fixture(autouse=True)
def loaded(redis: RedisServer) -> None:
    """An empty Redis that knows the scripts."""
    redis.command("FLUSHALL")
    for load in presence.LOADS:
        call(redis, load)


def entry(user: str, connection: str, life: str = A, since: int = 1_763_630_000) -> str:
    """Return an entry of a phone."""
    return presence.entry(
        presence.who(user), life, connection, presence.about("phone", "web", since)
    )


def come(redis: RedisServer, *entries: str, channel: str = CHANNEL) -> object:
    """Write entries."""
    return call(redis, presence.come(TOPIC, channel, [(one, "") for one in entries]))


def go(redis: RedisServer, *entries: str, channel: str = CHANNEL) -> object:
    """Remove entries."""
    return call(redis, presence.go(TOPIC, channel, entries))


def entries(redis: RedisServer) -> list[str]:
    """Return what is there."""
    reply = call(redis, presence.entries_read(TOPIC, BEGINNING, 10_000))
    assert isinstance(reply, list)
    return [one.decode() for one in reply]


def counts(redis: RedisServer) -> dict[str, int]:
    """Return how many there are."""
    reply = call(redis, presence.counts_read(TOPIC))
    assert isinstance(reply, list)
    return {name.decode(): int(n) for name, n in zip(reply[::2], reply[1::2], strict=True)}


class Ear:
    """A subscriber, which hears what was said so far."""

    def __init__(self, redis: RedisServer) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(5.0)
        self._socket.connect(str(redis.path))
        self._reader = hiredis.Reader()
        self._socket.sendall(f"SUBSCRIBE {CHANNEL}\r\n".encode())
        self._next()
        self._redis = redis

    def _next(self) -> list[bytes]:
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(65536))
        assert isinstance(reply, list)
        return reply

    def heard(self) -> list[tuple[str, str, int]]:
        """Return events, users and their numbers since the last time."""
        self._redis.command("PUBLISH", CHANNEL, "now")
        found = []
        while (payload := self._next()[2]) != b"now":
            came = envelope.decode(payload)
            assert isinstance(came, Came)
            found.append((came.event, came.user, came.users))
        return found

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


@pytest.fixture
def ear(redis: RedisServer) -> Iterator[Ear]:
    """Somebody who is subscribed to the topic."""
    ear = Ear(redis)
    yield ear
    ear.close()


# ---- Coming and going


def test_a_user_comes_once_and_goes_once(redis: RedisServer, ear: Ear) -> None:
    """Subscribers are told of the first connection of a user and of the end of the last."""
    assert 1 == come(redis, entry("ann", "c1"))
    assert 1 == come(redis, entry("ann", "c2", B))
    assert 2 == come(redis, entry("anna", "c3"))
    go(redis, entry("ann", "c1"))
    assert [("join", "ann", 1), ("join", "anna", 2)] == ear.heard()

    go(redis, entry("ann", "c2", B), entry("anna", "c3"))
    assert [("leave", "ann", 1), ("leave", "anna", 0)] == ear.heard()
    assert {} == counts(redis)
    assert [] == entries(redis)


def test_nothing_is_said_twice(redis: RedisServer, ear: Ear) -> None:
    """To repeat a command whose outcome is unknown changes nothing."""
    come(redis, entry("ann", "c1"))
    come(redis, entry("ann", "c1"))
    assert {"users": 1, A: 1} == counts(redis)
    go(redis, entry("ann", "c1"))
    go(redis, entry("ann", "c1"))
    assert [("join", "ann", 1), ("leave", "ann", 0)] == ear.heard()


def test_nobody_is_told_without_a_channel(redis: RedisServer, ear: Ear) -> None:
    """Topics that are not announced are counted in silence."""
    come(redis, entry("ann", "c1"), channel="")
    go(redis, entry("ann", "c1"), channel="")
    assert [] == ear.heard()


def test_an_entry_under_another_life_is_no_coming(redis: RedisServer, ear: Ear) -> None:
    """A worker that goes on under another life replaces its entries, and nobody notices."""
    come(redis, entry("ann", "c1"))
    ear.heard()
    new = entry("ann", "c1", A + "+1")
    call(redis, presence.come(TOPIC, CHANNEL, [(new, entry("ann", "c1"))]))
    assert [] == ear.heard()
    assert [new] == entries(redis)
    assert {"users": 1, A + "+1": 1} == counts(redis)


@pytest.mark.parametrize("user", ["ann smith", "ä%20/b", 'q"\\\n', "a%b", "x" * 128])
def test_any_user(redis: RedisServer, ear: Ear, user: str) -> None:
    """Whatever a user is called, he comes out as he went in."""
    come(redis, entry(user, "c1"))
    assert [("join", user, 1)] == ear.heard()
    read = attending(entries(redis)[0].encode())
    assert read is not None
    assert (user, A, "phone", "web") == (
        read.user,
        read.life,
        read.shown.device,
        read.shown.client_type,
    )
    assert presence.start_after(read.cursor) > f"({entries(redis)[0]}"


def test_keys_lie_in_one_slot_and_do_not_last(redis: RedisServer) -> None:
    """Both keys have the topic's partition in braces, and go when nobody writes them any more."""
    come(redis, entry("ann", "c1"))
    keys = redis.command("KEYS", "*")
    assert isinstance(keys, list)
    names = sorted(key.decode() for key in keys)
    assert sorted([presence.members_key(TOPIC), presence.counts_key(TOPIC)]) == names
    assert 1 == len({name.partition("}")[0] for name in names})
    assert names[0].startswith("ts:{t")
    assert all(2900 < int(str(redis.command("TTL", name))) <= 3000 for name in names)


# ---- Sweeping


def sweep(redis: RedisServer, *over: str) -> int:
    """Sweep all; return in how many steps."""
    start, steps = BEGINNING, 0
    while start:
        start = presence.swept(call(redis, presence.sweep(TOPIC, CHANNEL, start, over)))
        steps += 1
    return steps


def test_a_sweep_removes_the_dead_and_says_so_once(redis: RedisServer, ear: Ear) -> None:
    """Who is there elsewhere has not gone; the others have, whoever sweeps how often."""
    come(redis, entry("ann", "c1"), entry("ann", "c2", B), entry("bob", "c3"), entry("cy", "c4", B))
    ear.heard()
    assert 1 == sweep(redis, A)
    assert 1 == sweep(redis, A)
    assert [("leave", "bob", 2)] == ear.heard()
    assert {"users": 2, B: 2} == counts(redis)


def test_who_is_back_before_the_sweep_was_never_away(redis: RedisServer, ear: Ear) -> None:
    """A user whose worker was killed comes back elsewhere: nobody is told anything."""
    come(redis, entry("ann", "c1"))
    ear.heard()
    come(redis, entry("ann", "c2", B))
    sweep(redis, A)
    assert [] == ear.heard()
    assert [entry("ann", "c2", B)] == entries(redis)


def test_a_sweep_is_done_in_portions(
    redis: RedisServer, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, one command looks at a bounded number; all of it is swept."""
    monkeypatch.setattr(presence, "SWEPT", 10)
    users = [f"u{number:03}" for number in range(55)]
    come(redis, *(entry(user, f"c{user}", random.choice([A, B])) for user in users))
    come(redis, *(entry(user, f"d{user}") for user in users))
    ear.heard()
    assert 6 <= sweep(redis, A, "other.1.1") <= 12
    left = {one.partition(" ")[0] for one in entries(redis)}
    assert sorted(set(users) - left) == [user for _, user, _ in ear.heard()]
    assert {"users": len(left), B: len(left)} == counts(redis)


# ---- Counting


def count(redis: RedisServer, *over: str) -> int:
    """Count users of those who live."""
    start, last, users = BEGINNING, "", 0
    while True:
        reply = call(redis, presence.count(TOPIC, start, last, over))
        more, start, last = presence.counted(reply)
        users += more
        if not start:
            return users


@pytest.mark.parametrize("most", [1, 2, 3, 1000])
def test_the_living_are_counted(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A user counts once, wherever a portion ends, and not if all his workers are dead."""
    monkeypatch.setattr(presence, "COUNTED", most)
    come(redis, *(entry("ann", f"c{number}") for number in range(5)))
    come(redis, entry("bob", "c1", B), entry("bob", "c2"), entry("cy", "c3", B), entry("di", "c4"))
    assert 4 == count(redis)
    assert 3 == count(redis, B)
    assert 2 == count(redis, A)
    assert 0 == count(redis, A, B)


def test_counts_tell_the_living_from_the_dead() -> None:
    """Connections are those of lives that go on; users those of all."""
    lives = Lives(1000, {A: 5000.0})
    found = presence.counts([b"users", b"3", A.encode(), b"4", B.encode(), b"2"], lives)
    assert presence.Counts(users=3, connections=4, over=(B,)) == found
    assert presence.Counts() == presence.counts(None, lives)


def test_a_worker_that_goes_on_is_there() -> None:
    """What it has written under an earlier life counts until it has written it anew."""
    lives = Lives(1000, {A + "+2": 5000.0})
    found = presence.counts(
        [b"users", b"3", A.encode(), b"4", (A + "+2").encode(), b"1", B.encode(), b"2"], lives
    )
    assert presence.Counts(users=3, connections=5, over=(B,), earlier=(A,)) == found


# ---- What is not as it should be


def test_a_lost_count_is_made_again(redis: RedisServer) -> None:
    """If one of the two keys has vanished alone, the other is not believed or is counted."""
    come(redis, entry("ann", "c1"), entry("ann", "c2", B), entry("bob", "c3"))
    redis.command("DEL", presence.counts_key(TOPIC))
    come(redis, entry("bob", "c3"))
    assert {"users": 2, A: 2, B: 1} == counts(redis)

    redis.command("DEL", presence.members_key(TOPIC))
    come(redis, entry("bob", "c3"))
    assert {"users": 1, A: 1} == counts(redis)


def test_a_count_that_was_made_again_does_not_last(redis: RedisServer) -> None:
    """Whatever makes it: it ends with the entries."""
    come(redis, entry("ann", "c1"), entry("bob", "c2"))
    redis.command("DEL", presence.counts_key(TOPIC))
    go(redis, entry("bob", "c2"))
    assert {"users": 1, A: 1} == counts(redis)
    assert 0 < int(str(redis.command("TTL", presence.counts_key(TOPIC)))) <= 3000


@pytest.fixture
def muted(redis: RedisServer) -> Iterator[None]:
    """Redis does not let anybody publish, as it does by default with users of its own."""
    redis.command("ACL", "SETUSER", "default", "resetchannels")
    yield
    redis.command("ACL", "SETUSER", "default", "allchannels")


@pytest.mark.usefixtures("muted")
def test_who_must_not_tell_counts_all_the_same(redis: RedisServer) -> None:
    """Nothing is done by halves if the channel is refused; that it was is said."""
    with pytest.raises(RuntimeError, match="channel"):
        come(redis, entry("ann", "c1"), entry("bob", "c2"), entry("bob", "c3", B))
    assert {"users": 2, A: 2, B: 1} == counts(redis)
    assert 2 == come(redis, entry("ann", "c1"), entry("bob", "c2"))
    with pytest.raises(RuntimeError, match="channel"):
        go(redis, entry("ann", "c1"), entry("bob", "c2"))
    assert {"users": 1, B: 1} == counts(redis)
    assert 1 == go(redis, entry("ann", "c1"))
    with pytest.raises(RuntimeError, match="channel"):
        sweep(redis, B)
    assert [] == entries(redis)


@pytest.mark.parametrize("which", [presence.members_key, presence.counts_key])
def test_a_key_of_the_wrong_type_makes_way(redis: RedisServer, which: object) -> None:
    """Somebody else's value under one of our names does not keep anybody out."""
    assert callable(which)
    redis.command("SET", which(TOPIC), "what?")
    assert 1 == come(redis, entry("ann", "c1"))
    assert {"users": 1, A: 1} == counts(redis)


@pytest.mark.parametrize(
    "text", ["", "ann", "a b c d", "a b c d e", "a b c d 1 f", "a b c d 9" * 9]
)
def test_a_strangers_entry_is_none(text: str) -> None:
    """What is not ours is not shown."""
    assert attending(text.encode()) is None


@given(st.text(max_size=40))
def test_any_cursor_is_understood(text: str) -> None:
    """What a client says as ``after`` is a place, or the beginning."""
    start = presence.start_after(text)
    assert start == BEGINNING or start.startswith("(")


# ---- All together


@attrs.frozen
class _Model:
    """What should be there."""

    entries: set[str]

    def users(self) -> set[str]:
        """Return who has an entry."""
        return {one.partition(" ")[0] for one in self.entries}


def _step(rng: random.Random, model: _Model) -> tuple[Command, set[str]]:
    """Return something to do, and what is there afterwards."""
    some = [
        entry(f"u{rng.randrange(4)}", f"c{rng.randrange(3)}", rng.choice([A, B]))
        for _ in range(rng.randrange(1, 4))
    ]
    match rng.randrange(5):
        case 0 | 1:
            return presence.come(TOPIC, CHANNEL, [(one, "") for one in some]), {
                *model.entries,
                *some,
            }
        case 2 | 3:
            return presence.go(TOPIC, CHANNEL, some), model.entries - set(some)
        case _:
            life = rng.choice([A, B])
            left = {one for one in model.entries if f" {life}/" not in one}
            return presence.sweep(TOPIC, CHANNEL, BEGINNING, [life]), left


@pytest.mark.parametrize("seed", range(5))
def test_counts_and_events_always_agree(redis: RedisServer, ear: Ear, seed: int) -> None:
    """After any history the counts are those of the entries; events alternate and add up."""
    rng = random.Random(seed)
    model = _Model(set())
    told: set[str] = set()
    for _ in range(60):
        command, left = _step(rng, model)
        call(redis, command)
        model = _Model(left)
        _follow(ear.heard(), told)
        assert model.users() == told
        assert sorted(model.entries) == entries(redis)
        by_life = {life: sum(f" {life}/" in one for one in left) for life in (A, B)}
        expected = {"users": len(told)} | {life: n for life, n in by_life.items() if n}
        assert (expected if told else {}) == counts(redis), json.dumps(command[4:], default=str)


def _follow(events: Sequence[tuple[str, str, int]], told: set[str]) -> None:
    for event, user, users in events:
        if event == "join":
            assert user not in told
            told.add(user)
        else:
            told.remove(user)
        assert users == len(told)
