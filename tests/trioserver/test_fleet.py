"""Lives, leases and entries: the rules as tables, the scripts on a real Redis."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer
from tests.trioserver.ledger_calls import Caller
from trioserver import fleet, ledger
from trioserver import users as counting
from trioserver.fleet import Card, Doubt, InTheWay, Lease, Lives, Whereabouts

LEASE_MS: Final = int(fleet.LEASE_SECONDS * 1000)
NOW: Final = 1_763_630_000_000

CARD: Final = Card("phone", "web", "Firefox", "2001:db8::1", 1_763_630_000, 1_763_630_001)

words = st.text(alphabet="0123456789abcdef.+/", max_size=12)


class Fleet:
    """A Redis with the scripts, and the commands as workers give them."""

    def __init__(self, redis: RedisServer) -> None:
        self.redis = redis
        self.caller = Caller(redis.path)
        for load in fleet.LOADS:
            self.caller.run(load)

    def now_ms(self) -> int:
        """Return the time by Redis' clock."""
        seconds, micro = self.caller.run(("TIME",))
        return int(seconds) * 1000 + int(micro) // 1000

    def renew(self, life: str, ends_ms: int = 0, *over: str) -> Lease:
        """Renew a lease."""
        return fleet.lease(self.caller.run(fleet.renew(life, ends_ms=ends_ms, over=over)))

    def score(self, life: str, ms_from_now: int) -> None:
        """Have a lease end then."""
        self.caller.run(("ZADD", fleet.LIVES_KEY, self.now_ms() + ms_from_now, life))

    def enter(
        self,
        field: str,
        limit: int = 0,
        *over: str,
        user: str = "ann",
        age: int = 0,
        device: str = "phone",
        settled: bool = False,
    ) -> list[str]:
        """Enter a connection that came some seconds ago; return who is there instead.

        Of other lives their names, of its own ``/<connection id>``; ``<entry`` of who made way.
        """
        seen = self.now_ms() // 1000 - age
        card = fleet.encode(Card(device, "web", "Firefox", "::1", seen, seen))
        command = fleet.enter(user, field, card, limit, over, settled=settled)
        came = fleet.answer(self.caller.run(command))
        if came is None:
            return []
        if isinstance(came, str):
            return [f"<{came}"]
        return sorted([*came.lives, *(f"/{one}" for one in came.own)])

    def fields(self, user: str = "ann") -> set[str]:
        """Return the entries of a user."""
        return {field.decode() for field in self.caller.run(("HKEYS", fleet.key(user)))}

    def where(self, user: str = "ann") -> Whereabouts:
        """Return where a user is."""
        clock, lives, page = [self.ask(one) for one in fleet.whereabouts_reads(user)]
        where = fleet.whereabouts([clock, lives, page])
        while more := fleet.whereabouts_more(user, page):
            (page,) = [self.ask(one) for one in more]
            where = where.joined(fleet.whereabouts([clock, lives, page]))
        return where

    def ask(self, command: ledger.Command) -> Any:
        """Run one command; a refusal is a value."""
        try:
            return self.caller.run(command)
        except RuntimeError as refused:
            return refused


@pytest.fixture
def workers(redis: RedisServer) -> Iterator[Fleet]:
    """An empty Redis that knows the scripts."""
    redis.command("FLUSHALL")
    one = Fleet(redis)
    with one.caller:
        yield one


# ---- Lives


@pytest.mark.parametrize(
    ("life", "over"),
    [
        ("aa.1f.1", False),
        ("aa.1f.2", True),
        ("aa.1f.3", True),
        ("aa.1f.4", True),
        ("aa.1f.5", True),
        ("aa.1f.5+1", False),
        ("aa.1e.9", True),
        ("aa.f.9", True),
        ("bb.1e.1", False),
        ("nonsense", True),
        ("", True),
    ],
    ids=[
        "has a lease",
        "its lease has ended",
        "its lease has ended long ago",
        "unknown",
        "lost its lease",
        "and went on",
        "an earlier boot",
        "an earlier boot with fewer digits",
        "another server",
        "no life's name",
        "empty",
    ],
)
def test_which_lives_are_over(life: str, *, over: bool) -> None:
    """A life is over if it has no lease, or if its server has booted again."""
    lives = Lives(
        NOW,
        {
            "aa.1f.1": NOW + 1,
            "aa.1f.2": NOW,
            "aa.1f.3": -NOW,
            "aa.1f.5+1": NOW + 1,
            "aa.1e.9": NOW + 1,
            "aa.f.9": NOW + 1,
            "bb.1e.1": NOW + 1,
        },
    )
    assert over == lives.is_over(life)
    assert over == (life not in lives.living)


def test_who_has_renewed_since() -> None:
    """Whose lease ends later than it could have before."""
    lives = Lives(NOW, {"aa.1.1": NOW - 100 + LEASE_MS})
    assert lives.renewed_since("aa.1.1", NOW - 100)
    assert not lives.renewed_since("aa.1.1", NOW - 99)
    assert not lives.renewed_since("aa.1.2", 0)


def test_a_life_goes_on_under_a_new_name_each_time() -> None:
    """Names are never given twice, and all of them begin with the first one."""
    names = list(
        itertools.accumulate(range(12), lambda life, _: fleet.revived(life), initial="a.1.2")
    )
    assert ["a.1.2", "a.1.2+1", "a.1.2+2"] == names[:3]
    assert "a.1.2+12" == names[-1]


@given(st.lists(st.one_of(st.binary(max_size=12), st.none(), st.integers()), max_size=12), words)
def test_strangers_in_the_set_of_lives_are_harmless(members: list[object], life: str) -> None:
    """Whatever is in there, reading it and asking about any life works."""
    assert Lives.of(NOW, members).is_over(life) in {True, False}


# ---- Doubts


def test_a_doubt_lasts_until_everybody_has_been_seen() -> None:
    """Who lives must have said so since it was looked; the dead are named as soon as they are."""
    first = Doubt(rivals=("a.1.1", "b.1.1")).after(
        Lives(NOW, {"a.1.1": NOW + LEASE_MS, "b.1.1": NOW + 500})
    )
    assert (NOW, (), False) == (first.since_ms, first.over, first.settled)
    renewed = NOW + 900 + LEASE_MS
    half = first.after(Lives(NOW + 400, {"a.1.1": renewed, "b.1.1": NOW + 500}))
    assert (NOW, (), False) == (half.since_ms, half.over, half.settled)
    dead = half.after(Lives(NOW + 1000, {"a.1.1": renewed}))
    assert (NOW, ("b.1.1",), True) == (dead.since_ms, dead.over, dead.settled)
    lives = half.after(Lives(NOW + 1000, {"a.1.1": renewed, "b.1.1": renewed}))
    assert (NOW, (), True) == (lives.since_ms, lives.over, lives.settled)
    other = lives.again(["c.1.1"])
    assert (NOW, ("c.1.1",), (), False) == (
        other.since_ms,
        other.rivals,
        other.over,
        other.settled,
    )


def test_who_has_no_rivals_elsewhere_waits_for_one_look() -> None:
    """Then it is settled, as far as other workers go."""
    assert Doubt().after(Lives(NOW)).settled


def test_a_doubt_does_not_wait_for_a_clock_that_was_set_back() -> None:
    """What is since then is counted from the earliest moment that was seen."""
    doubt = Doubt(rivals=("a.1.1",)).after(Lives(NOW, {"a.1.1": NOW + 1}))
    back = NOW - 3_600_000
    doubt = doubt.after(Lives(back, {"a.1.1": back + LEASE_MS - 1}))
    assert (back, False) == (doubt.since_ms, doubt.settled)
    doubt = doubt.after(Lives(back + 9, {"a.1.1": back + 1 + LEASE_MS}))
    assert doubt.settled


# ---- The lease


def test_a_lease_is_renewed(workers: Fleet) -> None:
    """It begins with the first renewal and ends ten seconds after the last."""
    first = workers.renew("aa.1.1")
    assert ("aa.1.1", first.lives.now_ms + LEASE_MS) == (first.life, first.ends_ms)
    second = workers.renew("aa.1.1", first.ends_ms)
    assert ("aa.1.1", second.lives.now_ms + LEASE_MS) == (second.life, second.ends_ms)
    assert not second.lives.is_over("aa.1.1")


def test_an_answer_that_got_lost_costs_nothing(workers: Fleet) -> None:
    """A lease that ends later than its owner knows is his all the same."""
    first = workers.renew("aa.1.1")
    assert "aa.1.1" == workers.renew("aa.1.1").life
    workers.score("aa.1.1", LEASE_MS + 500)
    assert "aa.1.1" == workers.renew("aa.1.1", first.ends_ms).life


@pytest.mark.parametrize("loss", ["ended", "forgotten", "rewound", "given up", "said to be over"])
def test_a_lost_lease_is_not_taken_up_again(workers: Fleet, loss: str) -> None:
    """The worker goes on under a new life, again and again, and the one before is over."""
    life, ends = "aa.1.1", workers.renew("aa.1.1").ends_ms
    for times in (1, 2):
        if loss == "ended":
            workers.score(life, -1)
        elif loss == "forgotten":
            workers.redis.command("FLUSHALL")
        elif loss == "rewound":
            workers.caller.run(("ZADD", fleet.LIVES_KEY, ends - 1, life))
        elif loss == "given up":
            ends = fleet.LOST
        else:
            workers.renew("", 0, life)
        lease = workers.renew(life, ends)
        assert f"aa.1.1+{times}" == lease.life
        assert life not in lease.lives.scores
        assert lease.lives.is_over(life)
        assert lease.ends_ms == lease.lives.now_ms + LEASE_MS
        # Asked again, because the answer got lost: the same.
        assert lease.life == workers.renew(life, ends).life
        life, ends = lease.life, lease.ends_ms


def test_who_is_said_to_be_over_is_over_for_everybody(workers: Fleet) -> None:
    """By a newcomer, with all lives under which the dead one went on; by itself at its end."""
    workers.renew("aa.1.10")
    ends = workers.renew("aa.1.1").ends_ms
    workers.score("aa.1.1", -1)
    assert "aa.1.1+1" == workers.renew("aa.1.1", ends).life
    lives = workers.renew("aa.1.2", 0, "aa.1.1", "aa.1.0").lives
    assert {"aa.1.2", "aa.1.10"} == set(lives.scores)
    ends = workers.renew("aa.1.3").ends_ms
    again = workers.renew("aa.1.3", fleet.LOST)
    assert "aa.1.3+1" == again.life
    assert {"aa.1.10"} == set(workers.renew("", 0, "aa.1.2", "aa.1.3+1").lives.scores)
    assert "aa.1.3+2" == workers.renew("aa.1.3+1", again.ends_ms).life


def test_the_dead_are_not_kept(workers: Fleet) -> None:
    """However many there are, and since when: the set has the leases of those who live."""
    now = workers.now_ms()
    for number in range(100):
        score = now - 1 - number if number % 2 else -now
        workers.caller.run(("ZADD", fleet.LIVES_KEY, score, f"n{number}"))
    assert {"aa.1.1"} == set(workers.renew("aa.1.1").lives.scores)


def test_the_set_vanishes_with_the_last_worker(workers: Fleet) -> None:
    """Nobody has to clean up after a fleet that is gone."""
    workers.renew("aa.1.1")
    ttl = workers.caller.run(("PTTL", fleet.LIVES_KEY))
    assert 0 < ttl <= LEASE_MS


def test_a_clock_that_was_set_back_keeps_nobody_alive(workers: Fleet) -> None:
    """A lease that ends in a distant future is shortened to one lease."""
    workers.score("bb.1.1", 3_600_000)
    lives = workers.renew("aa.1.1").lives
    assert lives.scores["bb.1.1"] == lives.now_ms + LEASE_MS


@pytest.mark.parametrize("command", ["SET", "RPUSH", "SADD"])
def test_a_key_of_another_type_is_replaced(workers: Fleet, command: str) -> None:
    """Under the name of the lives or of a user's connections: as if it were not there."""
    workers.caller.run((command, fleet.LIVES_KEY, "x"))
    workers.caller.run((command, fleet.key("ann"), "x"))
    assert ([], False) == (workers.where().connections, workers.where().more)
    assert "aa.1.1" == workers.renew("aa.1.1").life
    assert [] == workers.enter("aa.1.1/c1", 1)
    assert {"aa.1.1/c1"} == workers.fields()


def test_nonsense_among_the_lives_is_harmless(workers: Fleet) -> None:
    """Names that are none, leases that never end or have never begun."""
    for score, name in ((b"inf", b"\xff\xfe"), (b"-inf", b"x"), (0, b""), (b"1.5", b"a.b.c.d")):
        workers.caller.run(("ZADD", fleet.LIVES_KEY, score, name))
    assert "aa.1.1" == workers.renew("aa.1.1").life


# ---- Entries


def test_the_limit_lets_in_so_many_and_no_more(workers: Fleet) -> None:
    """Who is one too many changes nothing and hears whose lives are in his way."""
    assert [[], [], []] == [workers.enter(f"aa.1.{n}/c{n}", 3) for n in range(3)]
    assert ["aa.1.0", "aa.1.1", "aa.1.2"] == sorted(workers.enter("aa.1.9/c9", 3))
    assert {"aa.1.0/c0", "aa.1.1/c1", "aa.1.2/c2"} == workers.fields()
    assert [] == workers.enter("aa.1.9/c9", 3, user="bob")


def test_who_is_there_is_never_too_many(workers: Fleet) -> None:
    """Entered again he stays, even if the limit is lower now; and without a limit anybody comes."""
    for number in range(4):
        workers.enter(f"aa.1.1/c{number}")
    assert [] == workers.enter("aa.1.1/c0", 1)
    assert ["/c0", "/c1", "/c2", "/c3"] == workers.enter("aa.1.1/c4", 4)
    assert [] == workers.enter("aa.1.1/c4", 0)
    assert 5 == len(workers.fields())


def test_who_leaves_makes_room(workers: Fleet) -> None:
    """And nothing of a user remains whose last connection has gone."""
    workers.enter("aa.1.1/c1", 1)
    assert ["/c1"] == workers.enter("aa.1.1/c2", 1)
    assert 1 == workers.caller.run(fleet.leave("ann", "aa.1.1/c1"))
    assert 0 == workers.caller.run(("EXISTS", fleet.key("ann")))
    assert [] == workers.enter("aa.1.1/c2", 1)


def test_the_dead_do_not_count_and_are_removed(workers: Fleet) -> None:
    """Those of the lives that are named, those that nobody has renewed, and what is no entry."""
    workers.enter("aa.1.1/old", age=fleet.ENTRY_SECONDS + 5)
    workers.enter("aa.1.1/c1")
    workers.enter("bb.1.1/c1")
    good = b'{"seen":%d}' % (workers.now_ms() // 1000)
    junk = {b"": b"", b"aa.1.1": good, b"/": good, b"aa.1.1/x": b"junk", b"a.1.\xff/x": good}
    for field, value in junk.items():
        workers.caller.run(("HSET", fleet.key("ann"), field, value))
    assert ["aa.1.1", "bb.1.1"] == sorted(workers.enter("cc.1.1/c1", 2))
    assert {"aa.1.1/c1", "bb.1.1/c1"} == workers.fields()
    assert [] == workers.enter("cc.1.1/c1", 2, "dd.1.1", "bb.1.1")
    assert {"aa.1.1/c1", "cc.1.1/c1"} == workers.fields()


def test_a_user_with_very_many_connections(workers: Fleet) -> None:
    """Without a limit they may be more than one page; a limit set later still holds."""
    for number in range(3):
        workers.renew(f"aa.1.{number}")
    card = fleet.encode(Card("", "", "", "", 0, workers.now_ms() // 1000))
    for number in range(3000):
        field = f"aa.1.{number % 3}/c{number}"
        workers.caller.run(fleet.enter("ann", field, card, 0))
    assert 3000 == len(workers.where().connections)
    assert workers.enter("aa.1.9/c", 1000)
    assert [] == workers.enter("aa.1.9/c", 1001, "aa.1.1", "aa.1.2")
    assert 1001 == len(workers.fields())


def test_without_a_limit_the_dead_do_not_pile_up(workers: Fleet) -> None:
    """What nobody has renewed goes little by little, however many connections are let in."""
    workers.renew("aa.1.1")
    old = fleet.encode(Card("", "", "", "", 0, workers.now_ms() // 1000 - fleet.ENTRY_SECONDS - 9))
    card = fleet.encode(Card("", "", "", "", 0, workers.now_ms() // 1000))
    for number in range(500):
        workers.caller.run(("HSET", fleet.key("ann"), f"dd.1.1/{number}", old))
    for number in range(900):
        workers.caller.run(fleet.enter("ann", f"aa.1.1/{number}", card, 0))
        if number >= 100:
            workers.caller.run(fleet.leave("ann", f"aa.1.1/{number - 100}"))
    stale = {one for one in workers.fields() if one.startswith("dd.")}
    assert len(stale) < 100
    assert 100 == len(workers.where().connections)


def test_the_living_are_found_among_the_dead(workers: Fleet) -> None:
    """Presence looks at page after page: most may be of those who were killed."""
    workers.renew("aa.1.1")
    card = fleet.encode(Card("", "", "", "", 0, workers.now_ms() // 1000))
    for number in range(3000):
        life = "aa.1.1" if number % 100 == 0 else "dd.1.1"
        workers.caller.run(("HSET", fleet.key("ann"), f"{life}/{number}", card))
    where = workers.where()
    assert (30, False) == (len(where.connections), where.more)


# ---- The same device


def test_who_comes_back_takes_his_own_place(workers: Fleet) -> None:
    """The oldest connection of his device makes way, if there is no room, once all are settled."""
    workers.enter("aa.1.1/c1", 3, age=3)
    workers.enter("bb.1.1/c2", 3, age=9)
    workers.enter("bb.1.1/c3", 3, age=20, device="laptop")
    assert ["aa.1.1", "bb.1.1"] == workers.enter("cc.1.1/c4", 3)
    assert ["<bb.1.1/c2"] == workers.enter("cc.1.1/c4", 3, settled=True)
    assert {"aa.1.1/c1", "bb.1.1/c3", "cc.1.1/c4"} == workers.fields()
    assert [] == workers.enter("cc.1.1/c5", 4, settled=True), "there is room"
    assert ["/c4", "/c5", "aa.1.1", "bb.1.1"] == workers.enter(
        "cc.1.1/c6", 4, settled=True, device="tablet"
    )


def test_who_has_no_device_takes_nobodys_place(workers: Fleet) -> None:
    """Those without a name are not the same; nor is what only looks like an entry."""
    workers.enter("aa.1.1/c1", 2, device="")
    seen = workers.now_ms() // 1000
    odd = b'{"device":"phone","since":null,"seen":%d}' % seen
    workers.caller.run(("HSET", fleet.key("ann"), "aa.1.1/odd", odd))
    assert ["aa.1.1"] == workers.enter("bb.1.1/c2", 2, device="", settled=True)
    assert ["aa.1.1"] == workers.enter("bb.1.1/c2", 2, settled=True)


def test_entries_expire(workers: Fleet) -> None:
    """A user who never comes back is forgotten; who stays is written down again in time."""
    workers.enter("aa.1.1/c1", 3)
    ttl = workers.caller.run(("TTL", fleet.key("ann")))
    assert fleet.ENTRY_SECONDS - 10 < ttl <= fleet.ENTRY_SECONDS
    assert 2 * fleet.REFRESH_SECONDS < fleet.ENTRY_SECONDS


def test_many_at_the_door_and_as_many_as_may_get_in(workers: Fleet) -> None:
    """Whoever asks when, over two connections to Redis: the limit is exact."""
    with Caller(workers.redis.path) as other:
        card = fleet.encode(Card("", "", "", "", 0, workers.now_ms() // 1000))
        commands = [fleet.enter("ann", f"aa.1.1/c{number}", card, 7) for number in range(40)]
        for number, command in enumerate(commands):
            (other if number % 2 else workers.caller).send(*command)
        replies = [(other if number % 2 else workers.caller).next() for number in range(40)]
    assert 7 == replies.count(1)
    assert 7 == len(workers.fields())


# ---- Presence


def test_where_a_user_is(workers: Fleet) -> None:
    """Devices, kinds, programs, addresses, since when; the oldest first; the dead not at all."""
    workers.renew("bb.1.2", 0, "bb.1.1")
    workers.renew("aa.1.1")
    seen = workers.now_ms() // 1000
    for field, device, since in (
        ("aa.1.1/c2", "phone", seen - 5),
        ("aa.1.1/c1", "laptop", seen - 9),
        ("bb.1.1/c3", "dead", seen - 7),
        ("aa.1.1/c/4", "", seen - 1),
    ):
        card = fleet.encode(Card(device, "web", "Firefox", "::1", since, seen))
        workers.caller.run(fleet.enter("ann", field, card, 10))
    workers.caller.run(("HSET", fleet.key("ann"), "junk", "junk"))
    workers.enter("aa.1.1/stale", age=fleet.ENTRY_SECONDS + 5)
    where = workers.where()
    assert not where.more
    assert [
        ("c1", "laptop", seen - 9),
        ("c2", "phone", seen - 5),
        ("c/4", "", seen - 1),
    ] == [(one.connection_id, one.device, one.since) for one in where.connections]
    first = where.connections[0]
    assert ("aa.1.1", "web", "Firefox", "::1") == (
        first.life,
        first.client_type,
        first.agent,
        first.ip,
    )
    assert Whereabouts(connections=[]) == workers.where("nobody")


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.integers(0, 2**40))
def test_a_card_is_read_as_it_was_written(device: str, kind: str, agent: str, seen: int) -> None:
    """Whatever clients say of themselves, it comes back, and the script finds ``seen``."""
    card = fleet.encode(Card(device, kind, agent, "::1", 7, seen))
    assert card.endswith(b'"seen":%d}' % seen)
    one = fleet.connected(b"a.1.1/c", card, Lives(NOW, {"a.1.1": NOW + 1}), 0)
    assert one is not None
    assert (device, kind, agent, "::1", 7) == (
        one.device,
        one.client_type,
        one.agent,
        one.ip,
        one.since,
    )
    assert json.loads(card)["seen"] == seen


@given(st.binary(max_size=20), st.binary(max_size=60))
def test_what_is_no_entry_is_nobody(field: bytes, card: bytes) -> None:
    """Junk in a user's key is left out, quietly."""
    lives = Lives(NOW, {"a.1.1": NOW + 1, "": NOW + 1})
    assert fleet.connected(field, card, lives, 0) is None
    assert fleet.connected(b"a.1.1", fleet.encode(CARD), lives, 0) is None
    assert fleet.connected(b"/c", fleet.encode(CARD), lives, 0) is None
    assert fleet.connected(b"b.1.1/c", fleet.encode(CARD), lives, 0) is None


@given(st.lists(st.binary(max_size=12), max_size=6))
def test_any_answer_can_be_read(names: list[bytes]) -> None:
    """Who fills a limit is somebody, whatever his name."""
    came = fleet.answer(names)
    assert isinstance(came, InTheWay)
    assert len(names) == len(came.lives) + len(came.own)
    assert fleet.answer(1) is None


# ---- On a cluster


def test_scripts_touch_one_slot(tmp_path: Path) -> None:
    """On a cluster of three: lives in one place, users everywhere, each beside his inbox."""
    users = [*(f"user-{number}" for number in range(30)), "ü {p07} %:*"]
    with RedisCluster(tmp_path / "c") as cluster:
        nodes = {node.port: Fleet(node) for node in cluster.nodes}
        home = nodes[cluster.owner(fleet.LIVES_KEY).port]
        for name in (counting.COUNT_KEY, counting.key("aa.1.1"), f"{counting.key('x')}:anew"):
            assert cluster.owner(name).port == cluster.owner(fleet.LIVES_KEY).port
        assert "aa.1.1" == home.renew("aa.1.1", 0, "aa.1.0").life
        used = set()
        for user in users:
            owner = cluster.owner(fleet.key(user)).port
            assert owner == cluster.owner(ledger.key("inbox", user)).port
            used.add(owner)
            node = nodes[owner]
            assert [[], []] == [node.enter(f"aa.1.1/{n}", 2, user=user) for n in range(2)]
            assert ["/0", "/1"] == node.enter("aa.1.1/2", 2, user=user)
            assert [] == node.enter("bb.1.1/2", 2, "aa.1.1", user=user)
            assert 1 == node.caller.run(fleet.leave(user, "bb.1.1/2"))
        assert 3 == len(used)
        for node in nodes.values():
            node.caller.close()
