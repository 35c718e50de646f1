"""Registries of several workers on a real Redis: limits, outages, lost leases, ends."""

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.fleet_stage import SECONDS, Broken, Guest, Worker
from trioserver import fleet, registry
from trioserver.endpoint import Endpoint
from trioserver.errors import CloseReason, RedisRefused, RedisUnavailable
from trioserver.redis_link import open_link
from trioserver.registry import BATCH, SPARE_LEAVES

LIMIT = 40.0
"""Seconds after which a test is stuck."""


def fields(redis: RedisServer, user: str = "ann") -> set[str]:
    """Return the entries of a user."""
    reply = redis.command("HKEYS", fleet.key(user))
    assert isinstance(reply, list)
    return {field.decode() for field in reply}


def connections(redis: RedisServer, user: str = "ann") -> set[str]:
    """Return the connections that count."""
    replies: list[object] = []
    *others, page = fleet.whereabouts_reads(user)
    for command in (*others, (*page[:-1], 100_000)):
        try:
            replies.append(redis.command(*(str(part) for part in command)))
        except RuntimeError as refused:
            replies.append(refused)
    return {one.connection_id for one in fleet.whereabouts(replies).connections}


async def are(redis: RedisServer, *names: str, user: str = "ann") -> None:
    """Wait until exactly these connections count."""
    await wait_until(lambda: set(names) == connections(redis, user), SECONDS)


def lapse(redis: RedisServer, life: str) -> None:
    """Have a lease end now, as if its owner had not renewed it."""
    clock = redis.command("TIME")
    assert isinstance(clock, list)
    redis.command("ZADD", fleet.LIVES_KEY, int(clock[0]) * 1000 - 1, life)


async def ticked(redis: RedisServer) -> None:
    """Wait until what comes now is later than what was, by Redis' clock in milliseconds."""

    def now_ms() -> int:
        clock = redis.command("TIME")
        assert isinstance(clock, list)
        return int(clock[0]) * 1000 + int(clock[1]) // 1000

    started = now_ms()
    await wait_until(lambda: now_ms() > started)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are few workers here, and one Redis for them alone."""
    monkeypatch.setattr(registry, "SPREAD_SECONDS", 0.05)
    monkeypatch.setattr(registry, "HINT_SECONDS", 0.05)


@pytest.fixture(autouse=True)
async def bounded() -> AsyncIterator[None]:
    """No test waits for ever."""
    with trio.fail_after(LIMIT):
        yield


# ---- Coming and going


async def test_who_comes_is_written_down_until_he_goes(redis: RedisServer) -> None:
    """With what is known of him, under the life of his worker."""
    async with Worker(redis).running() as worker:
        one, _ = worker.enter("c1", "c2", device="phone")
        worker.enter("c3", user="bob")
        await are(redis, "c1", "c2")
        await are(redis, "c3", user="bob")
        assert {"aa.1.1/c1", "aa.1.1/c2"} == fields(redis)
        assert worker.link is not None
        found = (await registry.connections(worker.link, "ann")).connections[0]
        assert ("aa.1.1", "phone", "web", "Firefox", "::1", 1_763_630_000) == (
            found.life,
            found.device,
            found.client_type,
            found.agent,
            found.ip,
            found.since,
        )
        worker.registry.leave(one)
        await are(redis, "c2")
        assert ([], []) == (worker.bugs, worker.troubles)


async def test_who_goes_at_once_was_never_there(redis: RedisServer) -> None:
    """Neither he nor who belongs to no user costs a command."""
    async with Worker(redis).running() as worker:
        await worker.leased()
        redis.command("CONFIG", "RESETSTAT")
        (guest,) = worker.enter("c1")
        worker.registry.leave(guest)
        (nobody,) = worker.enter("c2", user=None)
        worker.registry.leave(nobody)
        worker.enter("c3")
        await are(redis, "c3")
        assert (1, 0) == (redis.commands_seen("hset"), redis.commands_seen("hdel"))


async def test_order_per_connection(redis: RedisServer) -> None:
    """However often it comes and goes, at whatever moment, the last thing said holds."""
    rng = random.Random(7)
    async with Worker(redis, limit=0).running() as worker:
        guests = [Guest(f"c{number}") for number in range(40)]
        inside: set[Guest] = set()
        for _ in range(60):
            for guest in rng.sample(guests, 15):
                if guest in inside:
                    inside.remove(guest)
                    worker.registry.leave(guest)
                else:
                    inside.add(guest)
                    worker.let_in(guest)
            await trio.sleep(rng.choice((0, 0.005, 0.02)))
        await are(redis, *(guest.connection_id for guest in inside))


async def test_what_comes_together_goes_together(redis: RedisServer) -> None:
    """A thousand comings are a few round trips."""
    async with Worker(redis, limit=0).running() as worker:
        (first,) = worker.enter("c")
        await are(redis, "c")
        worker.trips = 0
        guests = worker.enter(*(f"c{number}" for number in range(2 * BATCH)))
        await wait_until(lambda: len(fields(redis)) == 2 * BATCH + 1, SECONDS)
        assert worker.trips <= 2 + 2, "and renewals"
        for guest in (first, *guests):
            worker.registry.leave(guest)
        await are(redis)


# ---- The limit


async def test_the_newcomer_is_the_one_who_is_closed(redis: RedisServer) -> None:
    """Over all workers; those who were there stay, and who leaves makes room."""
    async with (
        Worker(redis, "aa.1.1").running() as here,
        Worker(redis, "bb.1.1").running() as there,
    ):
        (one,) = here.enter("c1")
        await are(redis, "c1")
        (two,) = there.enter("c2")
        await are(redis, "c1", "c2")
        (three,) = here.enter("c3")
        await wait_until(lambda: three.ended, SECONDS)
        assert [[CloseReason.SUPERSEDED], [], []] == [three.ended, one.ended, two.ended]
        assert {"aa.1.1/c1", "bb.1.1/c2"} == fields(redis)
        there.registry.leave(two)
        await are(redis, "c1")
        here.enter("c4")
        await are(redis, "c1", "c4")


async def test_the_limit_is_exact_when_all_come_at_once(redis: RedisServer) -> None:
    """Two workers, many users, ten times too many: each user has as many as he may, none less."""
    users = [f"u{number}" for number in range(20)]
    async with (
        Worker(redis, "aa.1.1").running() as here,
        Worker(redis, "bb.1.1").running() as there,
    ):
        guests = [
            guest
            for worker in (here, there)
            for user in users
            for guest in worker.enter(
                *(f"{worker.registry.life}-{number}" for number in range(10)), user=user
            )
        ]
        await wait_until(lambda: sum(map(bool, (one.ended for one in guests))) == 360, SECONDS)
        for user in users:
            inside = {one.connection_id for one in guests if one.user == user and not one.ended}
            assert (2, inside) == (len(inside), connections(redis, user))


async def test_a_bug_in_one_connection_is_not_the_others_trouble(redis: RedisServer) -> None:
    """Be it when it is written down or when it is ended."""
    async with Worker(redis).running() as worker:
        odd = Guest("odd")
        odd.device = "\udc80"
        worker.let_in(odd)
        worker.enter("c1", "c2")
        await are(redis, "c1", "c2")
        broken = Broken("c3")
        worker.let_in(broken)
        (four,) = worker.enter("c4")
        await wait_until(lambda: four.ended, SECONDS)
        assert ["entering a connection", "ending a connection"] == [what for what, _ in worker.bugs]
        worker.registry.leave(odd)
        worker.enter("c5", user="bob")
        await are(redis, "c5", user="bob")


async def test_who_leaves_before_the_verdict(redis: RedisServer) -> None:
    """He is too many, but that does not matter any more."""
    async with Worker(redis, "aa.1.1").running() as here:
        here.enter("c1", "c2")
        await are(redis, "c1", "c2")
        there = Worker(redis, "bb.1.1")
        kept = there.registry
        async with there.linked() as link:
            for rounds in range(3):
                (three,) = there.enter(f"c3-{rounds}")
                await kept._flush(link)
                for _ in range(rounds):
                    assert await kept._renew(link)
                there.registry.leave(three)
                assert {} == kept._surprised == kept._doubted == kept._new
                assert [] == three.ended
        await are(redis, "c1", "c2")


async def test_who_has_gone_before_is_in_nobodys_way(redis: RedisServer) -> None:
    """However many go at once and come back, in whatever order: all goings are said before."""
    worker = Worker(redis, limit=1)
    kept = worker.registry
    users = [f"u{number}" for number in range(BATCH + 100)]
    async with worker.linked() as link:
        before = [worker.enter(f"a-{user}", user=user)[0] for user in users]
        while kept._new:
            await kept._flush(link)
        for guest in before:
            kept.leave(guest)
        after = [worker.enter(f"b-{user}", user=user)[0] for user in reversed(users)]
        while kept._new:
            await kept._flush(link)
            assert {} == kept._surprised
        assert not any(guest.ended for guest in (*before, *after))
        assert {"aa.1.1/b-u0"} == fields(redis, "u0")


@pytest.mark.parametrize("where", ["here", "there"])
async def test_who_comes_back_takes_his_own_place(redis: RedisServer, where: str) -> None:
    """His device's earlier connection, not yet known to be dead, is ended instead of the new."""
    async with (
        Worker(redis, "aa.1.1").running() as here,
        Worker(redis, "bb.1.1").running() as there,
    ):
        await there.leased()
        (phone,) = here.enter("c1", device="phone")
        await are(redis, "c1")
        (laptop,) = here.enter("c2", device="laptop")
        await are(redis, "c1", "c2")
        worker = here if where == "here" else there
        (again,) = worker.enter("c3", device="phone")
        (other,) = worker.enter("c4", device="tablet")
        await wait_until(lambda: other.ended and phone.ended, SECONDS)
        await are(redis, "c2", "c3")
        assert ([], [], [CloseReason.SUPERSEDED]) == (laptop.ended, again.ended, phone.ended)


async def test_words_on_the_channel_that_are_not_for_us(redis: RedisServer) -> None:
    """Entries of other workers, those who have gone, and junk."""
    async with Worker(redis).running() as worker:
        (guest,) = worker.enter("c1")
        await are(redis, "c1")
        for payload in (
            b"bb.1.1/c1",
            b"aa.1.1/c2",
            b"/c1",
            b"aa.1.1",
            b"\xff/\xff",
            b"aa.1.1+1/c1",
        ):
            worker.registry.hinted(payload)
        assert [] == guest.ended
        worker.registry.hinted(b"aa.1.1/c1")
        assert [CloseReason.SUPERSEDED] == guest.ended


# ---- The dead


@pytest.mark.parametrize("news", ["told", "lapsed"])
async def test_nobody_is_ended_for_one_who_was_killed(redis: RedisServer, news: str) -> None:
    """Before anybody knows of the death he waits, however often it is looked."""
    async with Worker(redis, "aa.1.1").running() as killed:
        killed.enter("c1", "c2")
        await are(redis, "c1", "c2")
    async with Worker(redis, "bb.1.1").running() as here:
        await here.leased()
        (three,) = here.enter("c3")
        await wait_until(lambda: here.registry._doubted, SECONDS)
        for _ in range(5):
            await here.renewed()
        assert ([], [three]) == (three.ended, list(here.registry._doubted))
        if news == "lapsed":
            lapse(redis, "aa.1.1")
            await are(redis, "c3")
        else:
            async with Worker(redis, "aa.1.2", "aa.1.1").running():
                await are(redis, "c3")
        assert [] == three.ended


async def test_nobody_is_ended_for_a_worker_that_does_not_answer(redis: RedisServer) -> None:
    """It has its lease still, but has not said that it lives since he came."""
    there = Worker(redis, "aa.1.1", limit=1)
    async with Worker(redis, "bb.1.1", limit=1).running() as here, there.linked() as link:
        (one,) = there.enter("c1")
        await there.registry._flush(link)
        await here.leased()
        await ticked(redis)
        (two,) = here.enter("c2")
        await wait_until(lambda: here.registry._doubted, SECONDS)
        there.registry.leave(one)
        for _ in range(3):
            await here.renewed()
        assert [] == two.ended
        await there.registry._flush(link)
        assert await there.registry._renew(link)
        await are(redis, "c2")
        assert [] == two.ended


async def test_a_rival_who_comes_late_is_looked_at_as_well(redis: RedisServer) -> None:
    """Who was not in the way the first time may be dead, too."""
    late, there = Worker(redis, "cc.1.1", limit=1), Worker(redis, "aa.1.1", limit=1)
    here = Worker(redis, "bb.1.1", limit=1)
    async with here.linked() as link, there.linked(), late.linked():
        (one,) = there.enter("c1")
        await there.registry._flush(link)
        await ticked(redis)
        (two,) = here.enter("c2")
        await here.registry._flush(link)
        assert await here.registry._renew(link)
        assert await there.registry._renew(link)
        there.registry.leave(one)
        await there.registry._flush(link)
        late.enter("c3")
        await late.registry._flush(link)
        assert await here.registry._renew(link)
        await here.registry._flush(link)
        assert [] == two.ended
        assert await here.registry._renew(link)
        await here.registry._flush(link)
        assert [] == two.ended
        lapse(redis, "cc.1.1")
        assert await here.registry._renew(link)
        await here.registry._flush(link)
        assert {"c2"} == connections(redis)


async def test_a_life_without_a_lease_is_in_nobodys_way(redis: RedisServer) -> None:
    """Whatever has become of it: entries are never written before there is a lease."""
    async with Worker(redis).running() as worker:
        await worker.leased()
        card = fleet.encode(fleet.Card("", "", "", "", 0, 1 << 40))
        for life in (b"dd.1.1", b"dd.1.\xff", b"\xff"):
            redis.command("HSET", fleet.key("ann"), life + b"/old", card)
        guests = worker.enter("c1", "c2")
        await are(redis, "c1", "c2")
        assert {"aa.1.1/c1", "aa.1.1/c2"} == fields(redis)
        assert not any(guest.ended for guest in guests)


async def test_who_is_not_here_is_not_in_the_way_here(redis: RedisServer) -> None:
    """Entries of our own that Redis should not have are removed when they matter."""
    async with Worker(redis, limit=2).running() as worker:
        (one,) = worker.enter("c1")
        await are(redis, "c1")
        card = fleet.encode(fleet.Card("", "", "", "", 0, 1 << 40))
        redis.command("HSET", fleet.key("ann"), "aa.1.1/lost", card)
        (two,) = worker.enter("c2")
        await are(redis, "c1", "c2")
        (three,) = worker.enter("c3")
        await wait_until(lambda: three.ended, SECONDS)
        assert ([], []) == (one.ended, two.ended)
        assert "aa.1.1" == worker.registry.life


async def test_a_going_that_is_refused_is_said_again(redis: RedisServer) -> None:
    """And nobody is ended for those who could not be removed."""
    async with Worker(redis).running() as worker:
        guests = worker.enter("c1", "c2")
        await are(redis, "c1", "c2")
        redis.command("ACL", "SETUSER", "default", "-hdel")
        for guest in guests:
            worker.registry.leave(guest)
        await wait_until(lambda: worker.registry._stuck, SECONDS)
        assert worker.troubles
        (three,) = worker.enter("c3")
        for _ in range(5):
            await worker.renewed()
        assert [] == three.ended
        redis.command("ACL", "SETUSER", "default", "+hdel")
        worker.registry.hinted()
        await are(redis, "c3")
        assert ([], "aa.1.1") == (three.ended, worker.registry.life)


async def test_refused_goings_do_not_pile_up(redis: RedisServer) -> None:
    """Too many of them, and the worker goes on under another life."""
    async with Worker(redis, limit=0).running() as worker:
        await worker.leased()
        redis.command("ACL", "SETUSER", "default", "-hdel")
        guests = worker.enter(*(f"c{number}" for number in range(SPARE_LEAVES + 10)))
        await wait_until(lambda: len(fields(redis)) == len(guests), SECONDS)
        for guest in guests:
            worker.registry.leave(guest)
        await wait_until(lambda: worker.registry.life == "aa.1.1+1", SECONDS)
        worker.enter("d")
        await are(redis, "d")
        assert len(worker.registry._stuck) <= SPARE_LEAVES + 1


async def test_entries_of_the_dead_do_not_count(redis: RedisServer) -> None:
    """Whoever is about to be refused for the dead is not, though nobody has been told of them."""
    async with Worker(redis, "bb.1.1").running() as here:
        for number, death in enumerate(("lapsed", "told", "booted")):
            user, life = f"u{number}", f"a{number}.1.1"
            async with Worker(redis, life).running() as killed:
                killed.enter("c1", "c2", user=user)
                await are(redis, "c1", "c2", user=user)
            if death == "lapsed":
                lapse(redis, life)
            else:
                after = (life,) if death == "told" else ()
                successor = "1.2" if death == "told" else "2.1"
                async with Worker(redis, f"a{number}.{successor}", *after).running() as heir:
                    await heir.leased()
            assert set() == connections(redis, user)
            guests = here.enter("c3", "c4", "c5", user=user)
            await wait_until(lambda guests=guests: any(one.ended for one in guests), SECONDS)  # type: ignore[misc] # bound now
            assert 1 == sum(bool(one.ended) for one in guests)
            assert all(field.startswith("bb.") for field in fields(redis, user))


async def test_a_newcomer_tells_who_is_gone_and_gives_a_hint(redis: RedisServer) -> None:
    """Once; empty names are nobody's."""
    async with Worker(redis, "aa.1.2", "aa.1.1", "").running() as worker:
        await worker.leased()
        assert b"test:fleet" == worker.registry.channel
        assert {"aa.1.2"} == set(worker.registry.lives.scores)
        await worker.renewed()
        assert 1 == redis.commands_seen("publish")


async def test_the_end_of_a_worker(redis: RedisServer) -> None:
    """Its lease and its entries go, and what comes late is of no consequence."""
    async with (
        Worker(redis, "aa.1.1").running() as ending,
        Worker(redis, "bb.1.1").running() as other,
    ):
        one, _ = ending.enter("c1", "c2")
        await are(redis, "c1", "c2")
        await other.leased()
        await ending.finish()
        assert set() == fields(redis)
        await other.renewed()
        assert other.registry.lives.is_over("aa.1.1")
        ending.registry.leave(one)
        ending.enter("c3")
        other.enter("c4", "c5")
        await are(redis, "c4", "c5")
        assert {"bb.1.1/c4", "bb.1.1/c5"} == fields(redis)


async def test_the_end_of_a_worker_without_redis(redis: RedisServer) -> None:
    """It says so, and does not wait for long."""
    async with Worker(redis).running() as worker:
        worker.enter("c1")
        await are(redis, "c1")
        redis.kill()
        started = trio.current_time()
        await worker.finish()
        assert trio.current_time() - started < 5
        assert worker.troubles


async def test_nothing_revives_a_life_that_has_ended(redis: RedisServer) -> None:
    """A renewal that was on its way says nothing any more, and there is no other."""
    worker = Worker(redis)
    kept = worker.registry
    async with worker.linked() as link:
        worker.enter("c1")
        await kept._flush(link)
        await kept.finish(link)
        kept._renewed(fleet.Lease(life="aa.1.1+1", lives=fleet.Lives()))
        assert not await kept._renew(link)
        assert ("aa.1.1", []) == (kept.life, worker.troubles)
        assert 0 == redis.command("EXISTS", fleet.LIVES_KEY)
        assert set() == fields(redis)


# ---- What happens while an answer is on its way


async def test_who_leaves_while_he_is_being_refused(redis: RedisServer) -> None:
    """He is not ended a second time, and takes nobody's place."""
    worker = Worker(redis, limit=1)
    kept = worker.registry
    async with worker.linked() as link:
        one, two = worker.enter("c1", "c2")
        redis.pause()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept._flush, link)
            await wait_until(lambda: not kept._new, SECONDS)
            kept.leave(two)
            redis.resume()
        assert ([], []) == (one.ended, two.ended)
        await kept._flush(link)
        assert {"aa.1.1/c1"} == fields(redis)


async def test_a_life_that_ends_while_its_entries_are_written(redis: RedisServer) -> None:
    """They are written again under the next, without a limit; the old entries are removed."""
    worker = Worker(redis, limit=1)
    kept = worker.registry
    async with worker.linked() as link:
        (one,), (other,) = worker.enter("c1"), worker.enter("c1", user="bob")
        await kept._flush(link)
        kept.leave(one)
        (two,) = worker.enter("c2")
        redis.pause()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept._flush, link)
            await wait_until(lambda: not kept._new, SECONDS)
            kept.leave(other)
            kept._begin_anew("aa.1.1+1")
            kept._again_at = 0.0
        assert {two: None} == kept._again
        redis.resume()
        await kept._flush(link)
        assert ({"aa.1.1+1/c2"}, set()) == (fields(redis), fields(redis, "bob"))


async def test_a_life_that_is_given_up_while_its_lease_is_renewed(redis: RedisServer) -> None:
    """It stays given up: the next renewal begins another one."""
    worker = Worker(redis)
    kept = worker.registry
    async with worker.linked() as link:
        before = kept.lives
        redis.pause()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept._renew, link)
            await trio.testing.wait_all_tasks_blocked()
            kept._ends_ms = fleet.LOST
            redis.resume()
        assert kept.lives is not before
        assert "aa.1.1" == kept.life
        assert await kept._renew(link)
        assert "aa.1.1+1" == kept.life


# ---- Outages


async def test_without_redis_everybody_is_let_in(redis: RedisServer) -> None:
    """When it is there, all are entered, and nobody is closed for what he could not know."""
    redis.kill()
    async with Worker(redis, limit=1).running() as worker:
        guests = worker.enter(*(f"c{number}" for number in range(5)))
        await wait_until(lambda: worker.troubles, SECONDS)
        redis.start()
        await are(redis, *(f"c{number}" for number in range(5)))
        assert not any(guest.ended for guest in guests)
        (six,) = worker.enter("c6")
        await wait_until(lambda: six.ended, SECONDS)


async def test_nothing_piles_up_without_redis(redis: RedisServer) -> None:
    """Whoever came and went meanwhile: who is there is what Redis hears of, under a new life."""
    async with Worker(redis, limit=0).running() as worker:
        stays, *_ = before = worker.enter(*(f"c{number}" for number in range(2 * SPARE_LEAVES)))
        await wait_until(lambda: len(fields(redis)) == len(before), SECONDS)
        redis.kill()
        worker.enter("d")
        await wait_until(lambda: worker.troubles, SECONDS)
        for guest in before[1:]:
            worker.registry.leave(guest)
        for number in range(100):
            (guest,) = worker.enter(f"e{number}")
            worker.registry.leave(guest)
        kept = worker.registry
        assert len(kept._gone) <= 2 * len(kept._present) + SPARE_LEAVES
        assert len(kept._new) + len(kept._again) <= 2
        redis.start()
        await are(redis, stays.connection_id, "d")
        assert "aa.1.1+1" == worker.registry.life


@pytest.mark.parametrize("loss", ["flushed", "lapsed", "rewound"])
async def test_a_lost_lease(redis: RedisServer, loss: str) -> None:
    """All are entered anew under another life, whatever the limit; the old entries do not count."""
    async with Worker(redis, limit=1).running() as worker:
        (one,) = worker.enter("c1")
        await are(redis, "c1")
        ghost = fleet.encode(fleet.Card("", "", "", "", 0, 1 << 40))
        if loss == "flushed":
            redis.command("FLUSHALL")
        elif loss == "lapsed":
            lapse(redis, "aa.1.1")
        else:
            ends = int(worker.registry.lives.scores["aa.1.1"])
            redis.command("ZADD", fleet.LIVES_KEY, ends - 1, "aa.1.1")
        redis.command("HSET", fleet.key("ann"), "aa.1.1/gone", ghost)
        await worker.renewed()
        await are(redis, "c1")
        assert "aa.1.1+1/c1" in fields(redis)
        assert ["the lease of aa.1.1 was lost"] == worker.troubles
        (two,) = worker.enter("c2")
        await wait_until(lambda: two.ended, SECONDS)
        assert [] == one.ended
        assert {"aa.1.1+1/c1"} == fields(redis)
        worker.registry.leave(one)
        await are(redis)


async def test_a_link_that_was_cut_leads_perhaps_to_another_redis(redis: RedisServer) -> None:
    """Which may lack what was written last: everybody is entered under a new life."""
    async with Worker(redis, limit=1).running() as worker:
        (one,) = worker.enter("c1")
        await are(redis, "c1")
        await worker.leased()
        (two,) = worker.enter("c2", user="bob")
        await are(redis, "c2", user="bob")
        redis.command("DEL", fleet.key("ann"))
        redis.command("CLIENT", "KILL", "TYPE", "pubsub")
        await are(redis, "c1")
        await wait_until(lambda: {"aa.1.1+1/c2"} == fields(redis, "bob"), SECONDS)
        assert ({"aa.1.1+1/c1"}, [], []) == (fields(redis), one.ended, two.ended)


async def test_whoever_dies_a_second_time_is_dead(redis: RedisServer) -> None:
    """The next in his place knows his first name only; his later lives are over with it."""
    async with Worker(redis).running() as worker:
        await worker.leased()
        redis.command("FLUSHALL")
        await worker.renewed()
        worker.enter("c1")
        await are(redis, "c1")
    async with Worker(redis, "aa.1.2", "aa.1.1").running() as heir:
        await heir.leased()
        assert set() == connections(redis)


async def test_those_who_stay_are_written_down_again(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A little at a time, so that what Redis forgets by itself is those who are gone."""
    monkeypatch.setattr(fleet, "REFRESH_SECONDS", 0.0)
    async with Worker(redis, limit=1).running() as worker:
        worker.enter("c1")
        await are(redis, "c1")
        redis.command("EXPIRE", fleet.key("ann"), 5)
        await worker.renewed()

        def ttl() -> int:
            reply = redis.command("TTL", fleet.key("ann"))
            assert isinstance(reply, int)
            return reply

        await wait_until(lambda: ttl() > 5, SECONDS)
        assert "aa.1.1" == worker.registry.life


@pytest.mark.parametrize("rule", ["-hset", "-zadd", "-evalsha"])
async def test_what_redis_refuses_is_no_reason_to_close_anybody(
    redis: RedisServer, rule: str
) -> None:
    """It is said, it is tried again, and when Redis takes it, it is done."""
    redis.command("ACL", "SETUSER", "default", rule)
    async with Worker(redis, limit=1).running() as worker:
        guests = worker.enter("c1", "c2")
        await wait_until(lambda: worker.troubles, SECONDS)
        worker.enter("c3", user="bob")
        redis.command("ACL", "SETUSER", "default", f"+{rule[1:]}")
        await wait_until(lambda: "c3" in connections(redis, "bob"), SECONDS)
        worker.registry.hinted()
        await are(redis, "c1", "c2")
        assert not any(guest.ended for guest in guests)
        assert [] == worker.bugs


async def test_a_full_redis(redis: RedisServer) -> None:
    """Everybody is let in; when there is room again, they are entered."""
    async with Worker(redis, limit=1).running() as worker:
        await worker.leased()
        redis.command("CONFIG", "SET", "maxmemory", 1)
        guests = worker.enter("c1", "c2")
        await wait_until(lambda: worker.troubles, SECONDS)
        redis.command("CONFIG", "SET", "maxmemory", 0)
        worker.registry.hinted()
        await are(redis, "c1", "c2")
        assert not any(guest.ended for guest in guests)


async def test_junk_under_our_names(redis: RedisServer) -> None:
    """Keys of another type are replaced, and strange words end no worker."""
    redis.command("SET", fleet.LIVES_KEY, "x")
    redis.command("SET", fleet.key("ann"), "x")
    async with Worker(redis).running() as worker:
        await worker.leased()
        redis.command("ZADD", fleet.LIVES_KEY, "inf", b"\xff\x00")
        await worker.renewed()
        worker.enter("c1")
        await are(redis, "c1")
        assert ([], []) == (worker.bugs, worker.troubles)
        redis.command("SET", fleet.key("bob"), "x")
        assert worker.link is not None
        assert [] == (await registry.connections(worker.link, "bob")).connections


async def test_where_a_user_is_among_the_dead(redis: RedisServer) -> None:
    """Pages of those who were killed are turned until the living are found."""
    async with Worker(redis, limit=0).running() as worker:
        worker.enter("c1", "c2")
        await are(redis, "c1", "c2")
        card = fleet.encode(fleet.Card("", "", "", "", 0, 1 << 40))
        entries = [part for number in range(5000) for part in (f"dd.1.1/{number}", card)]
        redis.command("HSET", fleet.key("ann"), *entries)
        assert worker.link is not None
        where = await registry.connections(worker.link, "ann")
        assert {"c1", "c2"} == {one.connection_id for one in where.connections}
        assert not where.more


async def test_asking_where_a_user_is_without_an_answer(redis: RedisServer) -> None:
    """Not allowed or not there: it is said, not guessed."""
    async with open_link(Endpoint(path=str(redis.path))) as link:
        redis.command("ACL", "SETUSER", "default", "-hscan")
        with pytest.raises(RedisRefused, match="NOPERM"):
            await registry.connections(link, "ann")
        redis.kill()
        with pytest.raises(RedisUnavailable):
            await registry.connections(link, "ann")


async def test_a_registry_that_is_stopped_and_run_again(redis: RedisServer) -> None:
    """What was not said is said then."""
    worker = Worker(redis, limit=0)
    async with worker.running():
        (one,) = worker.enter("c1")
        await are(redis, "c1")
        redis.pause()
        worker.enter("c2")
        worker.registry.leave(one)
        await wait_until(lambda: not worker.registry._new, SECONDS)
    redis.resume()
    async with worker.running():
        await are(redis, "c2")


async def test_whatever_happens_redis_hears_of_who_is_there(redis: RedisServer) -> None:
    """Comings and goings while Redis is killed, stopped, emptied, and the lease is lost."""
    rng = random.Random(11)
    async with Worker(redis, limit=0).running() as worker:
        inside: dict[Guest, None] = {}
        number = 0
        for trouble in ("kill", "flush", "pause", "lapse", "scripts"):
            for step in range(12):
                for _ in range(10):
                    if inside and rng.random() < 0.5:
                        guest = rng.choice(list(inside))
                        del inside[guest]
                        worker.registry.leave(guest)
                    else:
                        number += 1
                        (guest,) = worker.enter(f"c{number}")
                        inside[guest] = None
                await trio.sleep(rng.choice((0, 0.01, 0.03)))
                if step == 6:
                    _trouble(worker, trouble)
            if trouble == "kill":
                redis.start()
            elif trouble == "pause":
                redis.resume()
            worker.registry.hinted()
            await are(redis, *(guest.connection_id for guest in inside))
            assert not any(guest.ended for guest in inside)
        assert [] == worker.bugs


def _trouble(worker: Worker, what: str) -> None:
    redis = worker.redis
    if what == "kill":
        redis.kill()
    elif what == "pause":
        redis.pause()
    elif what == "lapse":
        lapse(redis, worker.registry.life)
    elif what == "flush":
        redis.command("FLUSHALL")
    else:
        redis.command("SCRIPT", "FLUSH")


# ---- Who else keeps entries


class Onlooker:
    """Keeps what it was told."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.lives: list[str] = []
        self.living: list[frozenset[str]] = []
        self.changed: list[bool] = []
        self.losses = 0

    def renewed(self, life: str, lives: fleet.Lives, *, changed: bool) -> None:
        """Take note."""
        self.lives.append(life)
        self.living.append(lives.living)
        self.changed.append(changed)
        if self.broken:
            raise RuntimeError("a bug")

    def lost(self) -> None:
        """Take note."""
        self.losses += 1
        if self.broken:
            raise RuntimeError("a bug")


async def test_others_hear_of_each_renewal(redis: RedisServer) -> None:
    """And whether others live now than before, be it that somebody came or that he ended."""
    here, there = Worker(redis, "aa.1.1"), Worker(redis, "bb.1.1")
    onlooker = Onlooker()
    here.registry.watch(onlooker)
    async with here.running():
        held = [here.registry.holds]
        await here.leased()
        held.append(here.registry.holds)
        await here.renewed()
        assert [False, True] == held
        assert ([True, False], {"aa.1.1"}) == (onlooker.changed[:2], set(onlooker.lives))
        assert frozenset({"aa.1.1"}) == onlooker.living[0]
        async with there.running():
            await there.leased()
            await here.renewed()
            assert frozenset({"aa.1.1", "bb.1.1"}) == onlooker.living[-1]
            await there.finish()
        await wait_until(lambda: onlooker.living[-1] == {"aa.1.1"}, SECONDS)
        assert 3 == sum(onlooker.changed)
        assert (0, []) == (onlooker.losses, here.bugs)


async def test_others_hear_that_redis_may_have_forgotten(redis: RedisServer) -> None:
    """Nothing may be written from then until the next renewal, which is another life's."""
    worker, onlooker = Worker(redis), Onlooker()
    worker.registry.watch(onlooker)
    async with worker.running():
        await worker.leased()
        worker.registry.link_lost()
        assert (1, False) == (onlooker.losses, worker.registry.holds)
        await wait_until(lambda: onlooker.lives[-1] == "aa.1.1+1", SECONDS)
        assert worker.registry.holds
        redis.kill()
        await wait_until(lambda: onlooker.losses > 1, SECONDS)
        redis.start()
        await wait_until(lambda: onlooker.lives[-1] == "aa.1.1+2", SECONDS)


async def test_the_bugs_of_others_are_logged(redis: RedisServer) -> None:
    """The lease goes on, and so do they."""
    worker, onlooker, second = Worker(redis), Onlooker(broken=True), Onlooker()
    worker.registry.watch(onlooker)
    worker.registry.watch(second)
    async with worker.running():
        await worker.leased()
        await worker.renewed()
        worker.registry.link_lost()
        await wait_until(lambda: second.lives[-1] == "aa.1.1+1", SECONDS)
    assert {"telling of leases"} == {what for what, _ in worker.bugs}
    assert len(worker.bugs) == len(onlooker.lives) + onlooker.losses
