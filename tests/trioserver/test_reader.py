"""The reader on a real Redis: together, late, again and again until it is answered."""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.redis_server import RedisServer, free_port, wait_until
from tests.trioserver.ledger_calls import Caller
from trioserver import ledger, reader
from trioserver.endpoint import Endpoint
from trioserver.ledger import Command, Notice, Notification, Page, Rules
from trioserver.reader import BATCH, PAGES_PER_TURN, Reader
from trioserver.redis_link import RedisLink, open_link

LIMIT = 30.0
"""Seconds after which a test is stuck."""

RULES = Rules()


class Waiter:
    """Waits for pages of one user's stream, or of everyone's."""

    def __init__(self, user: str = "ann", point: str = "") -> None:
        self.user = user
        self.point = point
        """Changes as a connection's does: a page moves it on."""
        self.device = ""
        """Who has a name is written down when it asks."""
        self.gone = False
        self.asked = 0
        self.pages: list[Page] = []
        self.everyone: list[bool] = []
        self.then: Callable[[], None] = lambda: None
        """Called with each page."""

    def question(self, *, everyone: bool) -> Command | None:
        """Ask from where it stands."""
        self.asked += 1
        if self.gone:
            return None
        return ledger.read(
            None if everyone else self.user,
            device=self.device,
            point=self.point,
            connect=bool(self.device),
            nonce="epoch001",
        )

    def answered(self, page: Page, *, everyone: bool) -> None:
        """Keep the page."""
        self.pages.append(page)
        self.everyone.append(everyone)
        self.point = f"{page.epoch}.{page.reached}"
        self.then()

    @property
    def numbers(self) -> list[bytes]:
        """What it was given, all pages together."""
        return [
            item.payload for page in self.pages for item in page.items if isinstance(item, Notice)
        ]


class Asking(Waiter):
    """Asks something else."""

    def __init__(self, command: Command) -> None:
        super().__init__()
        self._command = command

    def question(self, *, everyone: bool) -> Command | None:
        """Ask that."""
        self.asked += 1
        return self._command


class Desk:
    """A reader, a link to a Redis of its own, and what they complain of."""

    def __init__(self, redis: RedisServer) -> None:
        self.redis = redis
        self.bugs: list[tuple[str, BaseException]] = []
        self.troubles: list[str] = []
        self.reader = Reader(lambda what, bug: self.bugs.append((what, bug)), self.troubles.append)
        self.trips = 0

    async def run(self) -> None:
        """Run the reader on a link of its own."""
        async with open_link(Endpoint(path=str(self.redis.path)), observe=self._observe) as link:
            await self.reader.run(link)

    def _observe(self, _seconds: float) -> None:
        self.trips += 1

    def want(self, *waiters: Waiter, everyone: bool = False) -> None:
        """Let them all want a page."""
        for waiter in waiters:
            self.reader.want(waiter, everyone=everyone)

    async def read(self, waiter: Waiter, seconds: float = 5.0) -> float:
        """Let it want a page and wait for that; return how long it took."""
        started, pages = trio.current_time(), len(waiter.pages)
        self.want(waiter)
        await wait_until(lambda: len(waiter.pages) > pages, seconds)
        return trio.current_time() - started

    async def warm(self) -> None:
        """Let Redis have the scripts and the link a connection; then count anew."""
        await self.read(Waiter("warm"))
        self.redis.command("CONFIG", "RESETSTAT")
        self.trips = 0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
async def idle(redis: RedisServer) -> AsyncIterator[Desk]:
    """A reader that does not run."""
    desk = Desk(redis)
    with trio.fail_after(LIMIT):
        yield desk


@pytest.fixture
async def desk(idle: Desk) -> AsyncIterator[Desk]:
    """A reader that runs."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        yield idle
        nursery.cancel_scope.cancel()


@pytest.fixture
def caller(redis: RedisServer) -> Iterator[Caller]:
    """Somebody who publishes."""
    with Caller(redis.path) as caller:
        yield caller


def publish(caller: Caller, user: str | None, *payloads: bytes) -> None:
    """Publish to one user or to everyone."""
    home = ledger.EVERYONE if user is None else ledger.partition(user)
    for payload in payloads:
        one = Notification(
            user=user, payload=payload, ttl_ms=60_000, id=ledger.new_id(home, caller.now())
        )
        caller.run(ledger.publish(one, rules=RULES))


def users(count: int) -> list[Waiter]:
    """Return waiters of as many users."""
    return [Waiter(f"user{number}") for number in range(count)]


def all_answered(waiters: list[Waiter], times: int = 1) -> Callable[[], bool]:
    """Return a condition: each has so many pages."""
    return lambda: all(len(waiter.pages) >= times for waiter in waiters)


async def test_a_page_comes_to_who_wants_it(desk: Desk, caller: Caller) -> None:
    """What the ledger has, once, of the stream that was asked for."""
    publish(caller, "ann", b"1", b"2")
    publish(caller, None, b"3")
    ann, everyone = Waiter("ann"), Waiter()
    desk.want(ann)
    desk.want(everyone, everyone=True)
    await wait_until(all_answered([ann, everyone]))
    assert ([b"1", b"2"], [False]) == (ann.numbers, ann.everyone)
    assert ([b"3"], [True]) == (everyone.numbers, everyone.everyone)
    assert (1, 1) == (ann.asked, everyone.asked)
    assert ([], []) == (desk.bugs, desk.troubles)


async def test_a_thousand_at_once_are_a_few_round_trips(desk: Desk, caller: Caller) -> None:
    """All of them ask in full batches, each gets its own page, and just one."""
    waiters = users(1000)
    for number in range(0, 1000, 100):
        publish(caller, f"user{number}", b"%d" % number)
    await desk.warm()
    desk.want(*waiters)
    await wait_until(all_answered(waiters))
    assert 1000 // BATCH == desk.trips
    assert 1000 == desk.redis.commands_seen("evalsha")
    assert [1] * 1000 == [len(waiter.pages) for waiter in waiters]
    for number, waiter in enumerate(waiters):
        assert ([b"%d" % number] if number % 100 == 0 else []) == waiter.numbers


async def test_who_asks_the_same_is_told_the_same(desk: Desk, caller: Caller) -> None:
    """Everyone's stream from one point is read once for all who come with one batch."""
    publish(caller, None, b"1", b"2")
    await desk.warm()
    waiters = [Waiter() for _ in range(BATCH)]
    others = [Waiter() for _ in range(BATCH // 2)]
    for number, waiter in enumerate(others):
        waiter.point = f"x.0-{number % 5}"
    desk.want(*waiters, *others, everyone=True)
    await wait_until(all_answered(waiters + others))
    assert 1 + 5 == desk.redis.commands_seen("evalsha")
    assert [[b"1", b"2"]] * (BATCH + BATCH // 2) == [one.numbers for one in waiters + others]


async def test_the_question_is_asked_when_its_turn_comes(idle: Desk, caller: Caller) -> None:
    """Whatever has changed since it was wanted is in it; who is gone is not asked for."""
    publish(caller, "ann", b"1", b"2", b"3")
    first, moved, gone = Waiter(), Waiter(), Waiter()
    first.then = lambda: setattr(moved, "point", first.point)
    async with trio.open_nursery() as nursery:
        idle.want(first, gone)
        gone.gone = True
        nursery.start_soon(idle.run)
        await wait_until(all_answered([first]))
        idle.want(moved)
        await wait_until(all_answered([moved]))
        nursery.cancel_scope.cancel()
    assert [b"1", b"2", b"3"] == first.numbers
    assert [] == moved.numbers
    assert (1, []) == (gone.asked, gone.pages)


async def test_nobody_is_left_in_a_batch(desk: Desk) -> None:
    """Those who are gone cost no round trip, and who comes after them is served."""
    await desk.warm()
    waiters = users(BATCH + 1)
    for waiter in waiters:
        waiter.gone = True
    desk.want(*waiters)
    await wait_until(lambda: all(waiter.asked for waiter in waiters))
    assert (0, []) == (desk.trips, [waiter for waiter in waiters if waiter.pages])
    assert await desk.read(Waiter()) < 1.0


async def test_who_wants_more_gets_more(desk: Desk, caller: Caller) -> None:
    """From within an answer the next page may be asked for, until the end."""
    publish(caller, "ann", *[b"%d" % number for number in range(200)])
    waiter = Waiter()

    def go_on() -> None:
        if waiter.pages[-1].more:
            desk.want(waiter)

    waiter.then = go_on
    desk.want(waiter)
    await wait_until(lambda: waiter.pages and not waiter.pages[-1].more)
    assert 4 == len(waiter.pages)
    assert [b"%d" % number for number in range(200)] == waiter.numbers


async def test_handing_out_lets_others_have_their_turn(desk: Desk) -> None:
    """A page may be a lot to send: after some of them the rest of the worker goes on."""
    await desk.warm()
    waiters = users(BATCH)
    turns: list[int] = []

    def look() -> None:
        turns.append(len([waiter for waiter in waiters if waiter.pages]))

    async def others() -> None:
        while True:
            look()
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        desk.want(*waiters)
        await wait_until(all_answered(waiters))
        nursery.cancel_scope.cancel()
    steps = [later - earlier for earlier, later in itertools.pairwise(turns)]
    assert 0 < max(steps) <= 2 * PAGES_PER_TURN, "a turn may come first or last in its round"


# Bugs of ours.


def blow_up() -> None:
    """Raise what nobody expects."""
    raise ZeroDivisionError


async def test_a_waiter_that_raises_spoils_nobodys_page(desk: Desk) -> None:
    """Neither of those who asked something else, nor of those who asked the same."""
    alike = [Waiter("ann") for _ in range(9)]
    others = users(9)
    for waiter in (alike[0], alike[4], others[0], others[4]):
        waiter.then = blow_up
    desk.want(*[waiter for both in zip(alike, others, strict=True) for waiter in both])
    await wait_until(all_answered(others))
    assert [1] * 9 == [len(waiter.pages) for waiter in others]
    assert [1] * 9 == [len(waiter.pages) for waiter in alike]
    assert [ZeroDivisionError] * 4 == [type(bug) for _, bug in desk.bugs]
    assert await desk.read(Waiter()) < 1.0


class Broken(Waiter):
    """Cannot even ask."""

    def question(self, *, everyone: bool) -> Command | None:
        """Raise what nobody expects."""
        super().question(everyone=everyone)
        raise ZeroDivisionError


async def test_a_waiter_that_cannot_ask_spoils_nobodys_page(desk: Desk) -> None:
    """It is logged and left out; those before and behind it are answered."""
    waiters = users(9)
    broken = Broken()
    desk.want(*waiters[:4], broken, *waiters[4:])
    await wait_until(all_answered(waiters))
    assert [ZeroDivisionError] == [type(bug) for _, bug in desk.bugs]
    assert (1, 1) == (broken.asked, len(waiters[0].pages))


async def test_an_answer_that_is_no_page_spoils_nobodys(desk: Desk) -> None:
    """It is logged; nobody else is kept waiting."""
    waiters = users(4)
    desk.want(waiters[0], waiters[1], Asking(("PING",)), Asking(("TIME",)), *waiters[2:])
    await wait_until(all_answered(waiters))
    assert 2 == len(desk.bugs)
    assert await desk.read(Waiter()) < 1.0


# When Redis is not well.


async def test_redis_is_killed_and_comes_back(desk: Desk, caller: Caller) -> None:
    """Everybody who has asked meanwhile is answered, once, by a Redis that knows no scripts."""
    publish(caller, "user3", b"3")
    await desk.warm()
    desk.redis.command("BGREWRITEAOF")
    waiters = users(BATCH + 50)
    desk.redis.kill()
    desk.want(*waiters)
    await wait_until(lambda: len(desk.troubles) >= 3)
    assert [] == [waiter for waiter in waiters if waiter.pages]
    desk.redis.start()
    await wait_until(all_answered(waiters), 10)
    assert [1] * len(waiters) == [len(waiter.pages) for waiter in waiters]
    assert await desk.read(Waiter()) < 0.5, "the pauses are over"
    assert [] == desk.bugs


async def test_pauses_grow_while_redis_is_away(desk: Desk) -> None:
    """One waiter does not make a storm."""
    await desk.warm()
    desk.redis.kill()
    waiter = Waiter()
    started = trio.current_time()
    desk.want(waiter)
    await wait_until(lambda: len(desk.troubles) >= 8, 15)
    assert trio.current_time() - started >= 0.2
    assert [] == waiter.pages
    desk.redis.start()
    await wait_until(all_answered([waiter]))
    # The next outage begins with a short pause again.
    desk.redis.kill()
    desk.want(waiter)
    seen = len(desk.troubles)
    await wait_until(lambda: len(desk.troubles) > seen)
    started = trio.current_time()
    desk.redis.start()
    await wait_until(all_answered([waiter], 2))
    assert trio.current_time() - started < reader.PAUSE_CAP / 2


async def test_redis_is_silent_and_comes_back(desk: Desk) -> None:
    """Who asked while it was silent is answered when it speaks again."""
    await desk.warm()
    waiters = users(20)
    desk.redis.pause()
    desk.want(*waiters)
    await wait_until(lambda: desk.troubles)
    desk.redis.resume()
    await wait_until(all_answered(waiters), 10)
    assert [1] * 20 == [len(waiter.pages) for waiter in waiters]
    assert [] == desk.bugs


async def test_redis_forgets_its_scripts(desk: Desk) -> None:
    """Nobody notices, and nothing is logged."""
    waiter = Waiter()
    for count in range(1, 6):
        desk.redis.command("SCRIPT", "FLUSH")
        assert await desk.read(waiter) < 1.0
        assert count == len(waiter.pages)
    assert ([], []) == (desk.bugs, desk.troubles)


@pytest.mark.parametrize(
    ("worse", "better", "says"),
    [
        (
            ("REPLICAOF", "127.0.0.1", str(free_port())),
            ("REPLICAOF", "NO", "ONE"),
            "READONLY",
        ),
        (
            ("ACL", "SETUSER", "default", "-evalsha"),
            ("ACL", "SETUSER", "default", "+evalsha"),
            "NOPERM",
        ),
        (
            ("ACL", "SETUSER", "default", "-script"),
            ("ACL", "SETUSER", "default", "+script"),
            "NOSCRIPT",
        ),
    ],
)
async def test_redis_refuses_for_a_while(
    desk: Desk, worse: tuple[str, ...], better: tuple[str, ...], says: str
) -> None:
    """It is asked again until it does not; what it says is logged."""
    await desk.warm()
    waiters = users(5)
    for waiter in waiters:
        waiter.device = "phone"
    desk.want(*waiters)
    await wait_until(all_answered(waiters))
    desk.redis.command("SCRIPT", "FLUSH")
    desk.redis.command(*worse)
    desk.want(*waiters)
    await wait_until(lambda: len(desk.troubles) >= 3)
    assert {says} == {trouble.split(" ")[0] for trouble in desk.troubles}
    assert [1] * 5 == [len(waiter.pages) for waiter in waiters]
    desk.redis.command(*better)
    await wait_until(all_answered(waiters, 2), 10)
    assert [2] * 5 == [len(waiter.pages) for waiter in waiters]


async def test_a_user_whose_keys_are_broken_costs_nobody_else(desk: Desk) -> None:
    """Redis refuses one, for good; the others are not slower for it."""
    await desk.warm()
    broken = [Waiter(f"broken{number}") for number in range(5)]
    for waiter in broken:
        desk.redis.command("SET", ledger.key("meta", waiter.user), "no hash")
    desk.want(*broken)
    await wait_until(lambda: len(desk.troubles) >= 2)
    slowest = 0.0
    for waiter in users(30):
        slowest = max(slowest, await desk.read(waiter))
    assert slowest < 0.8
    assert {"WRONGTYPE"} == {trouble.split(" ")[0] for trouble in desk.troubles}
    for waiter in broken:
        desk.redis.command("DEL", ledger.key("meta", waiter.user))
    await wait_until(all_answered(broken), 10)


async def test_what_takes_long_does_not_hold_up_the_rest(desk: Desk) -> None:
    """While one batch is under way the next one goes."""
    await desk.warm()
    for count in range(1, reader.LANES):
        desk.want(Asking(("BLPOP", "nothing", 0.8)))
        await wait_until(partial(blocking, desk.redis, count))
        assert await desk.read(Waiter()) < 0.6
    await wait_until(lambda: len(desk.bugs) == reader.LANES - 1)


def blocking(redis: RedisServer, count: int) -> bool:
    """Return whether so many clients wait for something."""
    reply = redis.command("INFO", "clients")
    assert isinstance(reply, bytes)
    (line,) = [line for line in reply.decode().split() if line.startswith("blocked_clients:")]
    return count == int(line.split(":")[1])


async def test_more_than_redis_can_say_in_time(desk: Desk, caller: Caller) -> None:
    """Pages that cannot all come within one time limit come in smaller portions, in the end."""
    await desk.warm()
    waiters = users(40)
    # Each blocks for 50 ms: together longer than a pipeline may take.
    slow = [Asking(("BLPOP", f"nothing{number}", 0.05)) for number in range(40)]
    desk.want(*[one for both in zip(waiters, slow, strict=True) for one in both])
    await wait_until(all_answered(waiters), 20)
    assert [1] * 40 == [len(waiter.pages) for waiter in waiters]


# Cancellation.


async def test_nothing_is_lost_when_a_run_is_cancelled(idle: Desk) -> None:
    """Before, during and after the question: another run answers all, nobody twice."""
    waiters = users(BATCH * 2)
    async with trio.open_nursery() as nursery:
        idle.want(*waiters[:10])
        nursery.start_soon(idle.run)
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        await wait_until(all_answered(waiters[:10]))
        idle.redis.pause()
        idle.want(*waiters)
        await wait_until(lambda: waiters[BATCH - 1].asked)
        nursery.cancel_scope.cancel()
    idle.redis.resume()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        await wait_until(all_answered(waiters[10:]), 10)
        await wait_until(all_answered(waiters[:10], 2), 10)
        nursery.cancel_scope.cancel()
    assert [2] * 10 + [1] * (BATCH * 2 - 10) == [len(waiter.pages) for waiter in waiters]
    assert [] == idle.bugs


async def test_nothing_is_lost_when_handing_out_is_cancelled(idle: Desk) -> None:
    """Who has its page does not get it again, the others get theirs from the next run."""
    waiters = users(BATCH)
    async with trio.open_nursery() as nursery:
        waiters[PAGES_PER_TURN // 2].then = nursery.cancel_scope.cancel
        nursery.start_soon(idle.run)
        idle.want(*waiters)
        await trio.Event().wait()
    answered = [len(waiter.pages) for waiter in waiters]
    assert 1 == answered[0]
    assert 0 == answered[-1]
    waiters[PAGES_PER_TURN // 2].then = lambda: None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        await wait_until(all_answered(waiters))
        nursery.cancel_scope.cancel()
    assert [1] * BATCH == [len(waiter.pages) for waiter in waiters]


async def test_nothing_is_lost_when_a_pause_is_cancelled(idle: Desk) -> None:
    """Redis was away, and the worker opens another link."""
    waiters = users(5)
    idle.redis.kill()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        idle.want(*waiters)
        await wait_until(lambda: len(idle.troubles) >= 2)
        nursery.cancel_scope.cancel()
    idle.redis.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        await wait_until(all_answered(waiters), 10)
        nursery.cancel_scope.cancel()
    assert [1] * 5 == [len(waiter.pages) for waiter in waiters]


async def test_a_link_that_is_closed_is_as_if_redis_were_away(idle: Desk) -> None:
    """It is no bug, and nothing is lost."""
    waiter = Waiter()
    async with open_link(Endpoint(path=str(idle.redis.path))) as closed:
        pass
    await stays_unanswered(idle, closed, waiter)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        await wait_until(all_answered([waiter]))
        nursery.cancel_scope.cancel()
    assert [] == idle.bugs


async def stays_unanswered(desk: Desk, closed: RedisLink, waiter: Waiter) -> None:
    """Run the reader on a link that is closed until it has complained."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.reader.run, closed)
        desk.want(waiter)
        await wait_until(lambda: desk.troubles)
        nursery.cancel_scope.cancel()
    assert [] == waiter.pages
