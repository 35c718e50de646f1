"""Sweepers of several workers on a real Redis: who died, when that is told, and by whom."""

from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.presence_stage import SECONDS, Ear, Worker, are, call, end, places
from trioserver import attendance, fleet, presence, presence_sweeper, registry
from trioserver.fleet import Lives
from trioserver.messages import Presence
from trioserver.presence_sweeper import (
    GRACE_SECONDS,
    MOST_REMEMBERED,
    PATIENT_SECONDS,
    REWRITE_SECONDS,
    Deaths,
    Sweeper,
)

LIMIT = 60.0
"""Seconds after which a test is stuck."""

DEAD = "dd.1.1"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        for load in presence.LOADS:
            call(server, load)
        yield server


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are few workers here, and one Redis for them alone."""
    monkeypatch.setattr(registry, "HINT_SECONDS", 0.05)
    monkeypatch.setattr(attendance, "SPREAD_SECONDS", 0.05)
    monkeypatch.setattr(presence_sweeper, "GRACE_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(presence_sweeper, "PATIENT_SECONDS", 0.1)
    monkeypatch.setattr(presence_sweeper, "RIPE_SECONDS", (0.0, 0.05))
    monkeypatch.setattr(presence_sweeper, "RETRY_SECONDS", (0.05, 0.1))


@pytest.fixture(autouse=True)
async def bounded() -> AsyncIterator[None]:
    """No test waits for ever."""
    with trio.fail_after(LIMIT):
        yield


def leave_behind(redis: RedisServer, topic: str, *users: str, life: str = DEAD) -> None:
    """Write entries of a worker that is not there."""
    what = presence.about("", "web", 1_763_630_000)
    entries = [
        (presence.entry(presence.who(user), life, f"{life}-{user}", what), "") for user in users
    ]
    call(redis, presence.come(topic, "", entries))


def live(redis: RedisServer, life: str = DEAD) -> None:
    """Give it a lease."""
    clock = redis.command("TIME")
    assert isinstance(clock, list)
    redis.command("ZADD", fleet.LIVES_KEY, int(clock[0]) * 1000 + 15_000, life)


def has(redis: RedisServer, place: str) -> bool:
    """Return whether this entry is there."""
    return place in places(redis, "loud.7")


async def test_who_died_has_left(redis: RedisServer) -> None:
    """When his worker is over, those who go on tell it once; who is back has never been away."""
    live(redis)
    leave_behind(redis, "loud.7", "ann", "bob", "cy")
    async with (
        Worker(redis).running() as one,
        Worker(redis, "bb.1.1").running() as two,
        Ear(redis, "loud.7").listening() as ear,
    ):
        one.enter("loud.7", "c1", user="di")
        two.enter("loud.7", "c2", user="di")
        await wait_until(lambda: len(places(redis, "loud.7")) == 5, SECONDS)
        await one.renewed()
        await two.renewed()
        two.enter("loud.7", "c3", user="bob")
        await wait_until(lambda: len(places(redis, "loud.7")) == 6, SECONDS)
        end(redis, DEAD)
        await one.renewed()
        await two.renewed()
        await are(redis, "loud.7", "bob bb.1.1/c3", "di aa.1.1/c1", "di bb.1.1/c2")
        one.enter("loud.7", "c4", user="eve")
        await ear.hears(("join", "di"), ("leave", "ann"), ("leave", "cy"), ("join", "eve"))
        assert ([], []) == (one.troubles, two.troubles)


async def test_who_died_before(redis: RedisServer) -> None:
    """A worker that is the first to come to a topic finds what was left behind there."""
    leave_behind(redis, "loud.7", "ann")
    async with Worker(redis).running() as worker, Ear(redis, "loud.7").listening() as ear:
        worker.enter("loud.7", "c1", user="bob")
        await ear.hears(("join", "bob"), ("leave", "ann"))
        await are(redis, "loud.7", "bob aa.1.1/c1")


async def test_where_nobody_is_told_there_is_time(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other topics are swept, too, some time later; meanwhile the answers are right."""
    leave_behind(redis, "quiet", "ann")
    async with Worker(redis).running() as worker:
        worker.enter("quiet", "c1", user="bob")
        worker.enter("loud.7", "c1", user="bob")
        leave_behind(redis, "loud.7", "cy")
        await are(redis, "loud.7", "bob aa.1.1/c1")
        assert 2 == len(places(redis, "quiet"))
    monkeypatch.setattr(presence_sweeper, "TIDY_SECONDS", (0.05, 0.1))
    async with Worker(redis, "bb.1.1").running() as worker:
        worker.enter("quiet", "c2", user="bob")
        await wait_until(
            lambda: not any(place.startswith("ann") for place in places(redis, "quiet")), SECONDS
        )


async def test_who_asks_has_it_swept(redis: RedisServer) -> None:
    """Also where no worker has anybody; the answer itself does not wait for it."""
    async with Worker(redis).running() as worker:
        leave_behind(redis, "quiet", "ann")
        page = await worker.ask("quiet")
        assert isinstance(page, Presence)
        assert (0, 0) == (page.connections, page.users)
        await are(redis, "quiet")


async def test_a_life_that_begins_is_not_over(redis: RedisServer) -> None:
    """Whoever enters while others look is left alone."""
    async with Worker(redis).running() as worker:
        worker.enter("loud.7", "c1")
        for number in range(5):
            async with Worker(redis, f"b{number}.1.1").running() as other:
                other.enter("loud.7", "c1")
                place = f"ann b{number}.1.1/c1"
                await wait_until(partial(has, redis, place), SECONDS)
                await worker.renewed()
                await worker.renewed()
                assert has(redis, place)


async def test_a_redis_that_refuses_is_asked_again(redis: RedisServer) -> None:
    """What was not swept is swept later."""
    async with Worker(redis).running() as worker:
        leave_behind(redis, "loud.7", "ann")
        redis.command("ACL", "SETUSER", "default", "-hgetall")
        worker.enter("loud.7", "c1", user="bob")
        await wait_until(lambda: worker.troubles, SECONDS)
        redis.command("ACL", "SETUSER", "default", "+@all")
        await are(redis, "loud.7", "bob aa.1.1/c1")


async def test_many_topics_and_many_entries(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are swept, in portions."""
    monkeypatch.setattr(presence_sweeper, "CHECKED", 7)
    monkeypatch.setattr(presence_sweeper, "PACE_SECONDS", 0.001)
    monkeypatch.setattr(presence, "SWEPT", 10)
    topics = [f"loud.{number}" for number in range(30)]
    for topic in topics:
        leave_behind(redis, topic, *(f"u{number}" for number in range(25)))
    async with Worker(redis).running() as worker:
        for topic in topics:
            worker.enter(topic, "c1")
        for topic in topics:
            await are(redis, topic, "ann aa.1.1/c1")


async def test_what_is_not_ripe_is_left_alone(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep for one of the dead does not take who was cut off later from another worker."""
    monkeypatch.setattr(presence_sweeper, "PATIENT_SECONDS", 1000.0)
    live(redis)
    leave_behind(redis, "loud.7", "ann")
    async with Worker(redis).running() as worker, Ear(redis, "loud.7").listening() as ear:
        worker.enter("loud.7", "c1", user="cy")
        await wait_until(lambda: len(ear.events) == 1, SECONDS)
        await worker.renewed()
        # Nobody has ever heard of this one: it may have died only now.
        leave_behind(redis, "loud.7", "bob", life="ee.1.1")
        end(redis, DEAD)
        await worker.renewed()
        await are(redis, "loud.7", "bob ee.1.1/ee.1.1-bob", "cy aa.1.1/c1")
        await ear.hears(("join", "cy"), ("leave", "ann"))


async def test_who_writes_anew_is_there(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that goes on under another life has time to enter its users anew: none has left."""
    monkeypatch.setattr(attendance, "SPREAD_SECONDS", 0.0)
    live(redis)
    leave_behind(redis, "loud.7", "ann")
    async with (
        Worker(redis).running() as one,
        Worker(redis, "bb.1.1").running() as two,
        Ear(redis, "loud.7").listening() as ear,
    ):
        one.enter("loud.7", "c1", user="bob")
        two.enter("loud.7", "c2", user="cy")
        await wait_until(lambda: len(ear.events) == 2, SECONDS)
        await two.renewed()
        # Its entries are written anew in an hour.
        monkeypatch.setattr(attendance, "GATHER_SECONDS", 3600.0)
        one.registry.link_lost()
        await wait_until(lambda: one.registry.life == "aa.1.1+1", SECONDS)
        end(redis, DEAD)
        await two.renewed()
        # Who has swept the one has seen the other.
        await are(redis, "loud.7", "bob aa.1.1/c1", "cy bb.1.1/c2")
        page = await two.ask("loud.7")
        assert isinstance(page, Presence)
        assert (2, 2, ["bob", "cy"]) == (
            page.connections,
            page.users,
            [one.user for one in page.members],
        )
        assert [("leave", "ann")] == [one for one in ear.events if one[0] == "leave"]


async def test_who_is_not_known_judges_nobody(redis: RedisServer) -> None:
    """Redis without its leases has them back in a moment; nothing is swept until it has ours."""
    async with Worker(redis).running() as worker:
        leave_behind(redis, "loud.7", "ann")
        redis.command("DEL", fleet.LIVES_KEY)
        sweeper = worker.attendance._sweeper
        assert [] == await sweeper._left_behind(worker.link, ["loud.7"])
        assert ["loud.7"] == list(sweeper._again.names)


async def test_a_death_costs_no_match(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many topics a worker has, their names are not matched for each life that ends."""
    live(redis)
    async with Worker(redis).running() as worker:
        worker.enter("loud.7", "c1")
        worker.enter("quiet", "c1")
        await worker.renewed()
        asked: list[str] = []
        monkeypatch.setattr(Sweeper, "channel", lambda _, topic: asked.append(topic))
        end(redis, DEAD)
        await worker.renewed()
        sweeper = worker.attendance._sweeper
        await wait_until(lambda: not sweeper._over.names and sweeper._tidy.names, SECONDS)
        assert [] == asked


# ---- What is ripe, and when; times are those of the product


GRACE, PATIENT, REWRITE = GRACE_SECONDS[0], PATIENT_SECONDS, REWRITE_SECONDS
LEASE_MS = 10_000


def known(now: float, **ends: float) -> Lives:
    """Return who lives: one life each of the workers `aa`, `bb`...; when the leases end."""
    return Lives(
        int(now * 1000), {f"{name[:2]}.1.1{name[2:]}": end * 1000 for name, end in ends.items()}
    )


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are those of the product."""
    monkeypatch.setattr(presence_sweeper, "GRACE_SECONDS", GRACE_SECONDS)
    monkeypatch.setattr(presence_sweeper, "PATIENT_SECONDS", PATIENT_SECONDS)


@pytest.mark.usefixtures("real")
async def test_each_life_has_its_own_grace() -> None:
    """It begins when the life was first seen over, whenever others were."""
    deaths = Deaths()
    deaths.see(known(100, aa=110, bb=110, cc=110), 100.0)
    deaths.see(known(101, bb=111, cc=111), 101.0)
    deaths.see(known(103, cc=113), 103.0)
    deaths.see(known(104, cc=114), 104.0)
    assert 101.0 + GRACE == deaths.ripe_at("aa.1.1", 104.0)
    assert 103.0 + GRACE == deaths.ripe_at("bb.1.1", 104.0)


@pytest.mark.usefixtures("real")
async def test_who_may_come_back_is_waited_for() -> None:
    """A lease that has ended by itself may be one of a worker that could not reach Redis."""
    deaths = Deaths()
    deaths.see(known(100, aa=105, bb=110, cc=110), 100.0)
    deaths.see(known(106, bb=110, cc=110), 106.0)
    assert 106.0 + PATIENT == deaths.ripe_at("aa.1.1", 106.0)
    assert 106.0 + PATIENT == deaths.ripe_at("never.heard", 106.0)
    # Redis was away for us.
    deaths.see(known(107, cc=117), 107.0, doubtful=True)
    assert 107.0 + PATIENT == deaths.ripe_at("aa.1.1", 107.0)
    assert 107.0 + PATIENT == deaths.ripe_at("bb.1.1", 107.0)


@pytest.mark.usefixtures("real")
async def test_a_worker_that_goes_on_has_not_died() -> None:
    """It has time to write anew; its grace begins when its last life has ended."""
    deaths = Deaths()
    deaths.see(known(100, aa=110, cc=110), 100.0)
    deaths.see(Lives(101_000, {"aa.1.1+1": 111_000.0, "cc.1.1": 111_000.0}), 101.0)
    assert 101.0 + REWRITE == deaths.ripe_at("aa.1.1", 102.0)
    deaths.see(known(105, cc=115), 105.0)
    assert 105.0 + GRACE == deaths.ripe_at("aa.1.1", 106.0)
    assert 105.0 + GRACE == deaths.ripe_at("aa.1.1+1", 106.0)
    deaths.see(Lives(107_000, {"aa.1.1+2": 117_000.0}), 107.0)
    assert 105.0 + REWRITE == deaths.ripe_at("aa.1.1+1", 107.0)


async def test_who_has_written_anew_sweeps_its_own() -> None:
    """Only the worker itself knows; for others it may still be writing."""
    deaths = Deaths()
    deaths.see(known(100, aa=110, bb=110), 100.0)
    deaths.see(Lives(101_000, {"aa.1.1+1": 111_000.0, "bb.1.1+1": 111_000.0}), 101.0)
    deaths.mine("aa.1.1", written=True)
    assert 101.0 == deaths.ripe_at("aa.1.1", 102.0)
    assert 101.0 + REWRITE == deaths.ripe_at("bb.1.1", 102.0)
    deaths.mine("aa.1.1", written=False)
    assert 101.0 + REWRITE == deaths.ripe_at("aa.1.1", 102.0)


async def test_what_is_remembered_is_bounded() -> None:
    """Of very many deaths only the latest; the others are seen as if they were new."""
    deaths = Deaths()
    many = {f"a{number}.1.1": 110_000.0 for number in range(MOST_REMEMBERED + 10)}
    deaths.see(Lives(100_000, many), 100.0)
    deaths.see(Lives(101_000, {}), 101.0)
    deaths.see(Lives(102_000, {}), 102.0)
    assert (MOST_REMEMBERED, MOST_REMEMBERED) == (len(deaths._over), len(deaths._gone))
