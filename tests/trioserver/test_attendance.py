"""Attendances of several workers on a real Redis: outages, ends, reconnects, questions."""

import contextlib
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import trio

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.presence_stage import SECONDS, Ear, Guest, Worker, are, places
from trioserver import attendance, fleet, presence, presence_page, presence_sweeper, registry
from trioserver.attendance import BATCH, SPARE_LEAVES
from trioserver.endpoint import Endpoint
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.ledger import Command
from trioserver.messages import Error, Presence
from trioserver.redis_link import RedisLink, Reply, open_link

LIMIT = 60.0
"""Seconds after which a test is stuck."""


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
    monkeypatch.setattr(attendance, "SPREAD_SECONDS", 0.05)
    monkeypatch.setattr(attendance, "LEAVE_SECONDS", 0.3)
    monkeypatch.setattr(presence_sweeper, "GRACE_SECONDS", (0.3, 0.4))
    monkeypatch.setattr(presence_sweeper, "PATIENT_SECONDS", 0.4)
    monkeypatch.setattr(presence_sweeper, "RIPE_SECONDS", (0.0, 0.1))


@pytest.fixture(autouse=True)
async def bounded() -> AsyncIterator[None]:
    """No test waits for ever."""
    with trio.fail_after(LIMIT):
        yield


# ---- Coming and going


async def test_who_subscribes_is_there_until_he_leaves(redis: RedisServer) -> None:
    """Each connection under each of its topics, nobody's connections under none."""
    async with Worker(redis).running() as worker:
        one, two = worker.enter("quiet", "c1", "c2")
        worker.attendance.enter(one, "other")
        worker.enter("quiet", "c3", user=None)
        await are(redis, "quiet", "ann aa.1.1/c1", "ann aa.1.1/c2")
        await are(redis, "other", "ann aa.1.1/c1")
        worker.attendance.leave(one, "quiet")
        worker.attendance.leave(one, "quiet")
        worker.attendance.leave(one, "nothing")
        await are(redis, "quiet", "ann aa.1.1/c2")
        worker.attendance.leave(two, "quiet")
        await are(redis, "quiet")
        await are(redis, "other", "ann aa.1.1/c1")
        assert ([], []) == (worker.bugs, worker.troubles)


async def test_who_leaves_at_once_was_never_there(redis: RedisServer) -> None:
    """Neither is written, and nothing is kept."""
    async with Worker(redis).running() as worker:
        (guest,) = worker.enter("quiet", "c1")
        worker.attendance.leave(guest, "quiet")
        worker.enter("quiet", "c2")
        await are(redis, "quiet", "ann aa.1.1/c2")
        assert "1" == str(redis.command("ZCARD", presence.members_key("quiet")))


async def test_many_are_one_command(redis: RedisServer) -> None:
    """A crowd that comes at once costs a few round trips."""
    async with Worker(redis).running() as worker:
        before = worker.trips
        worker.enter("quiet", *(f"c{number}" for number in range(2 * BATCH)))
        await wait_until(lambda: len(places(redis, "quiet")) == 2 * BATCH, SECONDS)
        assert worker.trips - before <= 8


async def test_unsubscribing_and_subscribing_again_ends_up_there(redis: RedisServer) -> None:
    """Whatever is under way meanwhile, the last word counts."""
    async with Worker(redis).running() as worker:
        rng = random.Random(7)
        guests = worker.enter("quiet", *(f"c{number}" for number in range(20)))
        for turn in range(30):
            for number, guest in enumerate(guests):
                if (turn + number) % 3:
                    worker.attendance.leave(guest, "quiet")
                else:
                    worker.attendance.enter(guest, "quiet")
            # Any moment will do: before, while and after Redis is told.
            await trio.sleep(rng.choice((0, 0.005, 0.02)))
        for number, guest in enumerate(guests):
            (worker.attendance.enter if number % 2 else worker.attendance.leave)(guest, "quiet")
        await are(redis, "quiet", *(f"ann aa.1.1/c{number}" for number in range(1, 20, 2)))
        worker.enter("quiet", "last")
        await wait_until(lambda: "ann aa.1.1/last" in places(redis, "quiet"), SECONDS)
        assert 11 == len(places(redis, "quiet"))


async def test_subscribers_are_told(redis: RedisServer) -> None:
    """Of the first connection of a user, and of the end of the last, on whichever worker."""
    async with (
        Worker(redis).running() as one,
        Worker(redis, "bb.1.1").running() as two,
        Ear(redis, "loud.7").listening() as ear,
    ):
        (first,) = one.enter("loud.7", "c1")
        await ear.hears(("join", "ann"))
        (second,) = two.enter("loud.7", "c2")
        await are(redis, "loud.7", "ann aa.1.1/c1", "ann bb.1.1/c2")
        one.attendance.leave(first, "loud.7")
        await are(redis, "loud.7", "ann bb.1.1/c2")
        two.attendance.leave(second, "loud.7")
        await ear.hears(("join", "ann"), ("leave", "ann"))


async def test_a_reconnect_is_no_leave(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is back in time, on any worker, has never been away."""
    monkeypatch.setattr(attendance, "LEAVE_SECONDS", 1.5)
    async with (
        Worker(redis).running() as one,
        Worker(redis, "bb.1.1").running() as two,
        Ear(redis, "loud.7").listening() as ear,
    ):
        (first,) = one.enter("loud.7", "c1")
        await are(redis, "loud.7", "ann aa.1.1/c1")
        one.attendance.leave(first, "loud.7")
        two.enter("loud.7", "c2")
        await are(redis, "loud.7", "ann bb.1.1/c2")
        two.enter("loud.7", "c3", user="bob")
        await ear.hears(("join", "ann"), ("join", "bob"))


# ---- Trouble


async def test_nothing_is_written_before_there_is_a_lease(redis: RedisServer) -> None:
    """An entry of a life that nobody knows of would count as left behind."""
    worker = Worker(redis)
    guest = Guest("c1")
    worker.attendance.enter(guest, "quiet")
    async with worker.running():
        await are(redis, "quiet", "ann aa.1.1/c1")


async def test_all_are_entered_anew_when_redis_has_lost_its_memory(redis: RedisServer) -> None:
    """Under another life, and who has left meanwhile is not there."""
    async with Worker(redis).running() as worker:
        guests = worker.enter("quiet", "c1", "c2") + worker.enter("loud.7", "c3")
        await are(redis, "quiet", "ann aa.1.1/c1", "ann aa.1.1/c2")
        await are(redis, "loud.7", "ann aa.1.1/c3")
        redis.command("FLUSHALL")
        worker.attendance.leave(guests[0], "quiet")
        await worker.renewed()
        await are(redis, "quiet", "ann aa.1.1+1/c2")
        await are(redis, "loud.7", "ann aa.1.1+1/c3")


async def test_all_is_right_after_redis_was_killed(redis: RedisServer) -> None:
    """Who came and went during the outage, and those before it, with what its disk still knows."""
    async with Worker(redis).running() as worker:
        guests = worker.enter("quiet", "c1", "c2")
        await are(redis, "quiet", "ann aa.1.1/c1", "ann aa.1.1/c2")
        redis.kill()
        await wait_until(lambda: not worker.registry.holds, SECONDS)
        worker.attendance.leave(guests[0], "quiet")
        worker.enter("quiet", "c3")
        redis.start()
        await wait_until(lambda: worker.registry.holds, SECONDS)
        life = worker.registry.life
        assert "aa.1.1" != life
        await are(redis, "quiet", f"ann {life}/c2", f"ann {life}/c3")


async def test_who_replaces_his_entry_has_not_left(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost lease, with the entries still there, is nothing that subscribers hear of."""
    monkeypatch.setattr(presence_sweeper, "GRACE_SECONDS", (10.0, 10.0))
    async with (
        Worker(redis).running() as worker,
        Worker(redis, "bb.1.1").running() as other,
        Ear(redis, "loud.7").listening() as ear,
    ):
        worker.enter("loud.7", "c1")
        other.enter("loud.7", "c2", user="bob")
        await wait_until(lambda: len(ear.events) == 2, SECONDS)
        worker.registry.link_lost()
        await are(redis, "loud.7", "ann aa.1.1+1/c1", "bob bb.1.1/c2")
        other.enter("loud.7", "c3", user="cy")
        await wait_until(lambda: len(ear.events) == 3, SECONDS)
        assert ("join", "cy") == ear.events[-1]


async def test_a_silent_redis_is_told_later(redis: RedisServer) -> None:
    """What got no answer is said again until it gets one."""
    async with Worker(redis).running() as worker:
        guests = worker.enter("quiet", "c1", "c2")
        await are(redis, "quiet", "ann aa.1.1/c1", "ann aa.1.1/c2")
        redis.pause()
        try:
            worker.enter("quiet", "c3")
            worker.attendance.leave(guests[0], "quiet")
            await wait_until(lambda: worker.troubles, SECONDS)
        finally:
            redis.resume()
        await wait_until(
            lambda: ["c2", "c3"] == [one.rpartition("/")[2] for one in places(redis, "quiet")],
            SECONDS,
        )


async def test_what_is_refused_waits_for_the_next_renewal(redis: RedisServer) -> None:
    """One topic that Redis does not take holds up no other."""
    async with Worker(redis).running() as worker:
        worker.enter("quiet", "c1")
        await are(redis, "quiet", "ann aa.1.1/c1")
        redis.command("ACL", "SETUSER", "default", "resetkeys", "~ts:{fleet}*")
        redis.command("ACL", "SETUSER", "default", f"~{presence.members_key('fine')}")
        redis.command("ACL", "SETUSER", "default", f"~{presence.counts_key('fine')}")
        worker.enter("quiet", "c2")
        worker.enter("fine", "c3")
        await are(redis, "fine", "ann aa.1.1/c3")
        await wait_until(lambda: worker.troubles, SECONDS)
        redis.command("ACL", "SETUSER", "default", "allkeys")
        await worker.renewed()
        await are(redis, "quiet", "ann aa.1.1/c1", "ann aa.1.1/c2")


async def test_goings_are_bounded(redis: RedisServer) -> None:
    """If too many wait for Redis, the worker goes on under another life and says none of them."""
    async with Worker(redis).running() as worker:
        many = worker.enter("quiet", *(f"c{number}" for number in range(SPARE_LEAVES + 500)))
        await wait_until(lambda: len(places(redis, "quiet")) == len(many), SECONDS)
        worker.attendance.lost()
        worker.enter("quiet", "stays")
        for guest in many:
            worker.attendance.leave(guest, "quiet")
        await wait_until(lambda: worker.registry.holds, SECONDS)
        # They count until everybody else was entered anew, and they were swept away.
        await are(redis, "quiet", "ann aa.1.1+1/stays")
        page = await worker.ask("quiet")
        assert isinstance(page, Presence)
        assert 1 == page.connections


async def test_what_stays_is_refreshed(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that was lost without a trace is back after a while, and the keys do not expire."""
    monkeypatch.setattr(fleet, "REFRESH_SECONDS", 0.0)
    async with Worker(redis).running() as worker:
        worker.enter("quiet", "c1")
        await are(redis, "quiet", "ann aa.1.1/c1")
        redis.command("DEL", presence.members_key("quiet"))
        await worker.renewed()
        await are(redis, "quiet", "ann aa.1.1/c1")


class Lossy:
    """A link to a real Redis; what it takes next is not answered, and arrives when we say so."""

    def __init__(self, link: RedisLink) -> None:
        self.link = link
        self.loses = False
        self.lost: list[Command] = []

    async def pipeline(
        self, commands: Sequence[Command], **options: float
    ) -> list[Reply | RedisRefused]:
        """Run commands, or lose them."""
        if self.loses and commands[0][0] == "EVALSHA":
            self.loses, self.lost = False, list(commands)
            raise RedisUnavailable("no answer")
        return await self.link.pipeline(commands, **options)

    async def deliver(self) -> None:
        """Have what was lost arrive now."""
        await self.link.pipeline(self.lost)


@asynccontextmanager
async def lossy(worker: Worker) -> AsyncIterator[Lossy]:
    """Run a worker whose attendance speaks over such a link."""
    async with open_link(Endpoint(path=str(worker.redis.path))) as link:
        loser = Lossy(link)
        run = worker.attendance.run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker.attendance, "run", lambda _: run(cast("RedisLink", loser)))
            async with worker.running():
                yield loser


async def test_a_coming_that_arrives_late_leaves_no_ghost(redis: RedisServer) -> None:
    """Nobody who has left is there for ever, because what was unanswered came after his going."""
    worker = Worker(redis)
    async with lossy(worker) as loser:
        worker.enter("quiet", "c0", user="stays")
        await are(redis, "quiet", "stays aa.1.1/c0")
        loser.loses = True
        (guest,) = worker.enter("quiet", "c1")
        await wait_until(lambda: loser.lost, SECONDS)
        worker.attendance.leave(guest, "quiet")
        await are(redis, "quiet", "stays aa.1.1+1/c0")
        await wait_until(lambda: list(worker.attendance._rooms["quiet"].stays) == ["c0"], SECONDS)
        await loser.deliver()
        # The next who looks sees to it, as after any other death.
        assert isinstance(await worker.ask("quiet"), Presence)
        await are(redis, "quiet", "stays aa.1.1+1/c0")


async def test_a_going_that_arrives_late_removes_nobody(redis: RedisServer) -> None:
    """Who has left and come again stays, whenever his going arrives."""
    worker = Worker(redis)
    async with lossy(worker) as loser:
        (guest,) = worker.enter("quiet", "c1")
        await are(redis, "quiet", "ann aa.1.1/c1")
        loser.loses = True
        worker.attendance.leave(guest, "quiet")
        await wait_until(lambda: loser.lost, SECONDS)
        worker.attendance.enter(guest, "quiet")
        await are(redis, "quiet", "ann aa.1.1+1/c1")
        await loser.deliver()
        assert ["ann aa.1.1+1/c1"] == places(redis, "quiet")


async def test_no_earlier_entry_is_forgotten(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it was not known what became of an entry, those before make way for it."""
    # Nothing is swept.
    monkeypatch.setattr(presence_sweeper, "GRACE_SECONDS", (1000.0, 1000.0))
    monkeypatch.setattr(presence_sweeper, "TIDY_SECONDS", (1000.0, 1000.0))
    worker = Worker(redis)
    async with lossy(worker) as loser:
        (guest,) = worker.enter("quiet", "c1")
        await are(redis, "quiet", "ann aa.1.1/c1")
        loser.loses = True
        worker.registry.link_lost()
        await wait_until(lambda: loser.lost, SECONDS)
        stay = worker.attendance._rooms["quiet"].stays["c1"]
        assert "aa.1.1+1" == stay.life
        await loser.deliver()
        assert ["ann aa.1.1+1/c1"] == places(redis, "quiet")
        await are(redis, "quiet", "ann aa.1.1+2/c1")
        await wait_until(lambda: not stay.was, SECONDS)
        worker.attendance.leave(guest, "quiet")
        await are(redis, "quiet")


async def test_who_is_announced_is_entered_anew_first(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever came first: those of whom others are told are behind nobody else."""
    async with Worker(redis).running() as worker:
        worker.enter("quiet", "c1", "c2")
        worker.enter("loud.7", "c1")
        await are(redis, "loud.7", "ann aa.1.1/c1")
        monkeypatch.setattr(attendance, "GATHER_SECONDS", 3600.0)
        worker.registry.link_lost()
        await wait_until(lambda: worker.attendance._again, SECONDS)
        assert ["loud.7", "quiet", "quiet"] == [one.room.name for one in worker.attendance._again]


class Crowd:
    """People who come and go at random on several workers, and what should be known of them."""

    def __init__(self, workers: list[Worker], seed: int) -> None:
        self.workers = workers
        self.rng = random.Random(seed)
        self.there: dict[Guest, tuple[Worker, str]] = {}
        self.count = 0

    def move(self) -> None:
        """Have somebody come or go."""
        if self.there and self.rng.random() < len(self.there) / 60:
            guest = self.rng.choice(list(self.there))
            worker, topic = self.there.pop(guest)
            worker.attendance.leave(guest, topic)
            return
        self.count += 1
        guest = Guest(f"c{self.count}", f"u{self.rng.randrange(12)}")
        worker, topic = self.rng.choice(self.workers), self.rng.choice(("loud.7", "quiet"))
        worker.attendance.enter(guest, topic)
        self.there[guest] = (worker, topic)

    def expected(self, topic: str) -> list[str]:
        """Return the entries that there should be."""
        return sorted(
            f"{guest.user} {worker.registry.life}/{guest.connection_id}"
            for guest, (worker, where) in self.there.items()
            if where == topic
        )


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_happens_the_end_is_right(redis: RedisServer, seed: int) -> None:
    """Lost links, a silent Redis, tasks that are stopped: entries, answers and events are true."""
    workers = [Worker(redis, f"{name}.1.1") for name in ("aa", "bb", "cc")]
    crowd = Crowd(workers, seed)
    async with Ear(redis, "loud.7").listening() as ear:
        for _ in range(3):
            async with contextlib.AsyncExitStack() as running:
                for worker in workers:
                    await running.enter_async_context(worker.running())
                for step in range(120):
                    crowd.move()
                    if step % 40 == 20:
                        crowd.rng.choice(workers).registry.link_lost()
                    if step % 60 == 30:
                        redis.command("CLIENT", "PAUSE", 50)
                    await trio.sleep(crowd.rng.choice((0, 0, 0.005)))
        async with contextlib.AsyncExitStack() as running:
            for worker in workers:
                await running.enter_async_context(worker.running())
            for topic in ("loud.7", "quiet"):
                await wait_until(partial(is_right, redis, crowd, topic), SECONDS)
                page = await workers[0].ask(topic)
                assert isinstance(page, Presence)
                names = [place.split(" ")[0] for place in crowd.expected(topic)]
                assert names == [one.user for one in page.members]
                assert (len(names), len(set(names))) == (page.connections, page.users)
            there = {place.split(" ")[0] for place in crowd.expected("loud.7")}
            await wait_until(lambda: there == ear.told, SECONDS)
        assert [] == [bug for worker in workers for bug in worker.bugs]


def is_right(redis: RedisServer, crowd: Crowd, topic: str) -> bool:
    """Return whether the entries are those that there should be."""
    return crowd.expected(topic) == places(redis, topic)


# ---- The end


async def test_the_end_of_a_worker(redis: RedisServer) -> None:
    """Its entries are removed; those that are announced by the others, if nobody comes back."""
    async with (
        Worker(redis).running() as one,
        Worker(redis, "bb.1.1").running() as two,
        Ear(redis, "loud.7").listening() as ear,
    ):
        one.enter("quiet", "c1")
        one.enter("loud.7", "c1")
        one.enter("loud.7", "c2", user="bob")
        two.enter("loud.7", "c3", user="cy")
        await wait_until(lambda: len(ear.events) == 3, SECONDS)
        await one.attendance.finish(one.link)
        await are(redis, "quiet")
        assert 3 == len(places(redis, "loud.7"))
        two.enter("loud.7", "c4")
        await wait_until(lambda: len(places(redis, "loud.7")) == 4, SECONDS)
        await one.registry.finish(one.lease_link)
        await are(redis, "loud.7", "ann bb.1.1/c4", "cy bb.1.1/c3")
        await wait_until(lambda: len(ear.events) == 4, SECONDS)
        assert ("leave", "bob") == ear.events[-1]


async def test_what_was_not_told_is_told_by_another_run(redis: RedisServer) -> None:
    """Stopping the tasks in the middle forgets nobody."""
    worker = Worker(redis)
    async with worker.running():
        worker.enter("quiet", "c1")
    async with worker.running():
        await wait_until(lambda: len(places(redis, "quiet")) == 1, SECONDS)


# ---- Questions


async def test_who_asks_is_answered_once(redis: RedisServer) -> None:
    """Everybody with his own ref, however many ask the same."""
    async with Worker(redis).running() as worker:
        worker.enter("quiet", "c1", "c2")
        await are(redis, "quiet", "ann aa.1.1/c1", "ann aa.1.1/c2")
        before = worker.trips
        askers = [Guest(f"a{number}") for number in range(100)]
        for number, asker in enumerate(askers):
            worker.attendance.ask(asker, "quiet", None, f"r{number}" if number else None)
            assert [] == asker.answers
        await wait_until(lambda: all(asker.answers for asker in askers), SECONDS)
        answers = [answer for asker in askers for answer in asker.answers]
        assert [None, *(f"r{number}" for number in range(1, 100))] == [one.ref for one in answers]
        (page, *_) = answers
        assert isinstance(page, Presence)
        assert (2, 1, None) == (page.connections, page.users, page.next)
        assert [("ann", "web", None)] * 2 == [
            (one.user, one.client_type, one.device) for one in page.members
        ]
        assert worker.trips - before <= 2


async def test_without_redis_the_answer_is_unavailable(redis: RedisServer) -> None:
    """Nobody waits for a Redis that is away; later it is known again."""
    async with Worker(redis).running() as worker:
        worker.enter("quiet", "c1")
        await are(redis, "quiet", "ann aa.1.1/c1")
        redis.kill()
        answer = await worker.ask("quiet", ref="r")
        assert isinstance(answer, Error)
        assert ("unavailable", "r") == (answer.code, answer.ref)
        redis.start()
        await wait_until(lambda: worker.registry.holds, SECONDS)
        assert isinstance(await worker.ask("quiet"), Presence)


async def test_a_silent_redis_costs_everybody_the_same_time(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time runs from the question: nobody waits for those before him, and then for Redis."""
    monkeypatch.setattr(attendance, "ANSWER_SECONDS", 0.3)
    looked: list[str] = []
    look = presence_page.look

    async def counted(link: RedisLink, topic: str, after: str | None) -> tuple[Presence, bool]:
        looked.append(topic)
        return await look(link, topic, after)

    monkeypatch.setattr(attendance, "look", counted)
    async with Worker(redis).running() as worker:
        redis.pause()
        try:
            askers = [Guest(f"a{number}") for number in range(5 * attendance.ANSWERED)]
            for number, asker in enumerate(askers):
                worker.attendance.ask(asker, f"room.{number}", None, None)
            await wait_until(lambda: all(asker.answers for asker in askers), SECONDS)
            assert all(isinstance(asker.answers[0], Error) for asker in askers)
            assert attendance.ANSWERED == len(looked)
        finally:
            redis.resume()


async def test_nobody_waits_beyond_a_bound_or_after_the_end(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is too many, and who asks a worker that ends, is answered at once."""
    monkeypatch.setattr(attendance, "MOST_WAITING", 1)
    async with Worker(redis).running() as worker:
        first, second, third = Guest("a1"), Guest("a2"), Guest("a3")
        worker.attendance.ask(first, "quiet", None, None)
        worker.attendance.ask(second, "quiet", None, "r")
        assert ["r"] == [one.ref for one in second.answers]
        await worker.attendance.finish(worker.link)
        worker.attendance.ask(third, "quiet", None, None)
        assert [1, 1, 1] == [len(one.answers) for one in (first, second, third)]
        assert all(isinstance(one.answers[0], Error) for one in (second, third))


async def test_a_bug_of_one_asker_harms_no_other(redis: RedisServer) -> None:
    """It is logged, and the next one gets his answer."""

    class Broken(Guest):
        def attended(self, answer: Presence | Error) -> None:
            super().attended(answer)
            raise RuntimeError("broken")

    async with Worker(redis).running() as worker:
        broken, sound = Broken("a1"), Guest("a2")
        worker.attendance.ask(broken, "quiet", None, None)
        worker.attendance.ask(sound, "quiet", None, None)
        await wait_until(lambda: broken.answers and sound.answers, SECONDS)
        assert ["answering who is there"] == [what for what, _ in worker.bugs]
