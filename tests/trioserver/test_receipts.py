"""The receipts on a real Redis: late, together, and never forgotten without being counted."""

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from tests.redis_server import RedisServer, free_port, wait_until
from tests.trioserver.ledger_calls import Caller
from trioserver import ledger, position, receipts
from trioserver.endpoint import Endpoint
from trioserver.feed import MAX_ASKS
from trioserver.ledger import Command, Notification, Rules
from trioserver.receipts import MAX_ACKED_IDS, Asker, Progress, Receipts, Urgency
from trioserver.redis_link import open_link
from trioserver.tally import Tally

LIMIT = 40.0
"""Seconds after which a test is stuck."""

PATIENCE = 15.0
"""Seconds in which everything is told, also after an outage."""

RULES = Rules()


@attrs.frozen
class Published:
    """A notification that is in the ledger."""

    id: str
    point: str
    seq: int


@attrs.frozen
class Record:
    """What the ledger knows of a device: seqs, and the point in everyone's stream."""

    sent: int
    received: int
    acked: int
    everyone: str


NOTHING = Record(0, 0, 0, "-")


class Client(Asker):
    """Keeps its answers."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, int, str | None]] = []

    def acked(self, seq: int, ref: str | None) -> None:
        """Keep it."""
        self.answers.append(("acked", seq, ref))

    def marked(self, unread: int, ref: str | None) -> None:
        """Keep it."""
        self.answers.append(("marked", unread, ref))

    def untold(self, ref: str | None) -> None:
        """Keep it."""
        self.answers.append(("untold", 0, ref))

    def has(self, count: int) -> bool:
        """Return whether it has so many answers."""
        return len(self.answers) == count


class Desk:
    """Receipts, a link to a Redis of their own, and what they complain of."""

    def __init__(self, redis: RedisServer, caller: Caller) -> None:
        self.redis = redis
        self.caller = caller
        self.bugs: list[tuple[str, BaseException]] = []
        self.troubles: list[str] = []
        self.tally = Tally()
        self.receipts = Receipts(
            RULES, self.tally, lambda what, bug: self.bugs.append((what, bug)), self.troubles.append
        )
        self.trips = 0

    async def run(self) -> None:
        """Run them on a link of its own."""
        async with open_link(Endpoint(path=str(self.redis.path)), observe=self._observe) as link:
            await self.receipts.run(link)

    async def finish(self) -> None:
        """Tell what is left."""
        async with open_link(Endpoint(path=str(self.redis.path)), observe=self._observe) as link:
            await self.receipts.finish(link)

    def _observe(self, _seconds: float) -> None:
        self.trips += 1

    def published(self, user: str = "ann", count: int = 1) -> list[Published]:
        """Publish so many to a user."""
        found = []
        for number in range(count):
            home = ledger.partition(user)
            one = Notification(
                user=user,
                payload=b"%d" % number,
                ttl_ms=600_000,
                id=ledger.new_id(home, self.caller.now()),
            )
            accepted = ledger.accepted(self.caller.run(ledger.publish(one, rules=RULES)))
            where = position.parse(accepted.position)
            assert where is not None
            found.append(Published(accepted.id, where.user, accepted.seq))
        return found

    def record(self, user: str = "ann", device: str = "phone") -> Record:
        """Return what the ledger knows of a device."""
        found = self.redis.command("HGET", ledger.key("cursors", user), f"d:{device or '-'}")
        if found is None:
            return NOTHING
        assert isinstance(found, bytes)
        sent, received, acked, everyone, _ = found.decode().split()
        seq = position.seq_of
        return Record(seq(sent), seq(received), seq(acked), everyone)

    def knows(self, expected: Record, user: str = "ann", device: str = "phone") -> bool:
        """Return whether the ledger knows just this of a device."""
        return expected == self.record(user, device)

    def state(self, one: Published) -> bytes:
        """Return the state of a notification."""
        key = ledger.notification_key(one.id)
        assert key is not None
        found = self.redis.command("HGET", key, "state")
        assert isinstance(found, bytes)
        return found

    def warm(self) -> None:
        """Let Redis have the scripts; then count anew."""
        for command in ledger.loads():
            self.caller.run(command)
        self.redis.command("CONFIG", "RESETSTAT")
        self.trips = 0


@pytest.fixture(autouse=True)
def sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is late in these tests is so after a second."""
    monkeypatch.setattr(receipts, "LATE_SECONDS", 1.0)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
async def idle(redis: RedisServer) -> AsyncIterator[Desk]:
    """Receipts that do not run."""
    with trio.fail_after(LIMIT), Caller(redis.path) as caller:
        yield Desk(redis, caller)


@pytest.fixture
async def desk(idle: Desk) -> AsyncIterator[Desk]:
    """Receipts that run."""
    idle.warm()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        yield idle
        nursery.cancel_scope.cancel()


def progress(
    sent: Sequence[Published], user: str = "ann", device: str = "phone", *, received: bool = False
) -> Progress:
    """Return the progress of a client that was sent these."""
    found = Progress(user, device)
    found.sent = sent[-1].point
    found.received = sent[-1].point if received else ""
    return found


def crowd(desk: Desk, count: int) -> list[Progress]:
    """Return the progress of as many users, each of whom was sent one and has received it."""
    found = []
    for number in range(count):
        user = f"user{number}"
        found.append(progress(desk.published(user), user, received=True))
    return found


def unreported(desk: Desk, crowd: Sequence[Progress]) -> list[str]:
    """Return those of whom the ledger does not know that they have received theirs."""
    return [one.user for one in crowd if desk.record(one.user).received != 1]


# When.


async def test_what_was_sent_is_told_late(desk: Desk) -> None:
    """Not at once, for the pong may still come; but soon enough."""
    [published] = desk.published()
    started = trio.current_time()
    desk.receipts.late(progress([published]))
    await wait_until(partial(desk.knows, Record(1, 0, 0, "-")), PATIENCE)
    assert receipts.LATE_SECONDS <= trio.current_time() - started < 3 * receipts.LATE_SECONDS
    assert b"sent" == desk.state(published)


async def test_what_was_received_is_told_soon(desk: Desk) -> None:
    """What a pong proves is known a moment later."""
    [published] = desk.published()
    one = progress([published], received=True)
    started = trio.current_time()
    desk.receipts.soon(one)
    await wait_until(partial(desk.knows, Record(1, 1, 0, "-")), PATIENCE)
    assert trio.current_time() - started < receipts.LATE_SECONDS / 2
    assert b"received" == desk.state(published)


async def test_the_later_and_the_sooner_are_one_report(desk: Desk) -> None:
    """Only the latest counts, and what changes until it goes is in it."""
    published = desk.published(count=3)
    one = progress(published[:1])
    for _ in range(100):
        desk.receipts.late(one)
    desk.receipts.soon(one)
    desk.receipts.late(one)
    desk.receipts.soon(one)
    assert [Urgency.SOON] == [one.urgency]
    one.sent, one.received = published[2].point, published[1].point
    one.everyone_received = "b0.1000-4096"
    await wait_until(partial(desk.knows, Record(3, 2, 0, "b0.1000-4096")), PATIENCE)
    assert [Urgency.NONE] == [one.urgency]
    other = progress(desk.published("bob"), "bob")
    desk.receipts.late(other)
    await wait_until(partial(desk.knows, Record(1, 0, 0, "-"), "bob"), PATIENCE)
    assert 2 == desk.redis.commands_seen("evalsha") - 4, "four were published"


async def test_what_is_told_soon_does_not_make_others_later(desk: Desk) -> None:
    """One is hurried away from those who wait; the others go at their time all the same."""
    one, other = progress(desk.published("ann")), progress(desk.published("bob"), "bob")
    started = trio.current_time()
    for waiting in (one, other):
        desk.receipts.late(waiting)
    desk.receipts.soon(one)
    await wait_until(partial(desk.knows, Record(1, 0, 0, "-")), PATIENCE)
    assert NOTHING == desk.record("bob")
    desk.receipts.late(one)
    await wait_until(partial(desk.knows, Record(1, 0, 0, "-"), "bob"), PATIENCE)
    assert trio.current_time() - started < 2 * receipts.LATE_SECONDS


async def test_a_progress_is_told_again_whenever_it_has_changed(desk: Desk) -> None:
    """Reported once is not reported for ever."""
    one = progress(desk.published())
    for seq, published in enumerate(desk.published(count=3), start=2):
        one.sent = one.received = published.point
        desk.receipts.soon(one)
        await wait_until(partial(desk.knows, Record(seq, seq, 0, "-")), PATIENCE)


async def test_a_thousand_reports_are_a_few_round_trips(desk: Desk) -> None:
    """Each of them arrives."""
    everybody = crowd(desk, 1000)
    desk.redis.command("CONFIG", "RESETSTAT")
    for one in everybody[::2]:
        desk.receipts.late(one)
    for one in everybody[1::2]:
        desk.receipts.soon(one)
    await wait_until(lambda: desk.redis.commands_seen("evalsha") >= 1000, PATIENCE)
    assert [] == unreported(desk, everybody)
    assert desk.trips <= 4
    assert 1000 == desk.redis.commands_seen("evalsha")


async def test_a_device_without_a_name_and_with_one_are_two(desk: Desk) -> None:
    """Each has its own record."""
    published = desk.published(count=2)
    desk.receipts.soon(progress(published[:1], device="", received=True))
    desk.receipts.soon(progress(published, device="phone", received=True))
    await wait_until(lambda: desk.record().received, PATIENCE)
    assert [1, 2] == [desk.record(device=name).received for name in ("", "phone")]


# What clients ask for.


async def test_an_ack_is_told_and_answered(desk: Desk) -> None:
    """By seq or by id; the answer says up to where the ledger knows of it."""
    published = desk.published(count=5)
    one, client = progress(published), Client()
    desk.receipts.acked(one, client, 2, "", "by seq")
    await wait_until(lambda: client.answers, PATIENCE)
    assert [("acked", 2, "by seq")] == client.answers
    desk.receipts.acked(one, client, 0, published[3].id, "by id")
    await wait_until(lambda: len(client.answers) == 2, PATIENCE)
    assert ("acked", 4, "by id") == client.answers[1]
    assert Record(5, 4, 4, "-") == desk.record()
    assert [b"acked"] * 4 + [b"sent"] == [desk.state(each) for each in published]


async def test_acks_that_come_together_are_one_report(desk: Desk) -> None:
    """Each is answered, in order, with the same truth; also those without a ref."""
    published = desk.published(count=9)
    one, first, second = progress(published), Client(), Client()
    desk.redis.command("CONFIG", "RESETSTAT")
    desk.receipts.acked(one, first, 3, "", "a")
    desk.receipts.acked(one, second, 7, "", None)
    desk.receipts.acked(one, first, 5, "", "b")
    await wait_until(lambda: second.answers, PATIENCE)
    assert [("acked", 7, "a"), ("acked", 7, "b")] == first.answers
    assert [("acked", 7, None)] == second.answers
    assert 1 == desk.redis.commands_seen("evalsha")


@pytest.mark.parametrize("count", [1, 2, MAX_ACKED_IDS, MAX_ACKED_IDS + 1, 3 * MAX_ACKED_IDS])
async def test_acks_by_id_that_come_together(desk: Desk, count: int) -> None:
    """However many: the newest counts, and they cost a bounded number of commands."""
    published = desk.published(count=count)
    one, client = progress(published), Client()
    desk.redis.command("CONFIG", "RESETSTAT")
    for number, each in enumerate(published):
        desk.receipts.acked(one, client, 0, each.id, str(number))
    await wait_until(lambda: len(client.answers) == count, PATIENCE)
    assert [("acked", count, str(number)) for number in range(count)] == client.answers
    assert Record(count, count, count, "-") == desk.record()
    assert desk.redis.commands_seen("evalsha") <= MAX_ACKED_IDS
    before = desk.redis.commands_seen("evalsha")
    desk.receipts.acked(one, client, count, "", "again")
    await wait_until(partial(client.has, count + 1), PATIENCE)
    assert 1 == desk.redis.commands_seen("evalsha") - before, "what was told is not told again"


async def test_each_hears_its_own_answer(desk: Desk) -> None:
    """However many commands those before it have needed."""
    anns, bobs = desk.published("ann", 8), desk.published("bob", 3)
    ann, bob, marker = Client(), Client(), Client()
    one, other = progress(anns), progress(bobs, "bob")
    for published in anns[4:7]:
        desk.receipts.acked(one, ann, 0, published.id, "r")
    desk.receipts.acked(other, bob, 2, "", "r")
    desk.receipts.mark(mark(bobs[0].id, user="bob"), marker, "r")
    await wait_until(lambda: marker.answers, PATIENCE)
    assert [("acked", 7, "r")] * 3 == ann.answers
    assert [("acked", 2, "r")] == bob.answers
    assert [("marked", 2, "r")] == marker.answers


@pytest.mark.parametrize("first", [1, 5, MAX_ASKS // 2, MAX_ASKS - 1])
async def test_acks_by_id_need_not_come_in_order(desk: Desk, first: int) -> None:
    """A client may handle things side by side; the newest of what it has acknowledged counts."""
    published = desk.published(count=MAX_ASKS)
    one, client = progress(published), Client()
    for each in published[first:] + published[:first]:
        desk.receipts.acked(one, client, 0, each.id, "r")
    await wait_until(partial(client.has, MAX_ASKS), PATIENCE)
    assert {("acked", MAX_ASKS, "r")} == set(client.answers)


async def test_an_ack_counts_as_far_as_was_sent(desk: Desk) -> None:
    """The answer tells a client that is ahead of the truth what the truth is."""
    published = desk.published(count=3)
    one, client = progress(published[:2]), Client()
    desk.receipts.acked(one, client, 1_000_000, "", "r")
    await wait_until(lambda: client.answers, PATIENCE)
    assert [("acked", 2, "r")] == client.answers


async def test_an_ack_of_what_nobody_knows(desk: Desk) -> None:
    """It changes nothing, and is answered."""
    published = desk.published(count=2)
    one, client = progress(published), Client()
    desk.receipts.acked(one, client, 0, "p07-nonsense", "r")
    desk.receipts.acked(one, client, 0, desk.published("bob")[0].id, "s")
    await wait_until(lambda: len(client.answers) == 2, PATIENCE)
    assert [("acked", 0, "r"), ("acked", 0, "s")] == client.answers


def mark(*ids: str, user: str = "ann") -> Command:
    """Return the command that marks these as read."""
    return ledger.mark(user, device="phone", by="w0-1", ids=ids, rules=RULES)


async def test_a_mark_is_made_and_answered(desk: Desk) -> None:
    """Soon, with what is unread now; others in the same round have their own answers."""
    published = desk.published(count=3)
    client = Client()
    started = trio.current_time()
    desk.receipts.mark(mark(published[0].id), client, "a")
    desk.receipts.mark(mark(published[0].id, published[1].id), client, None)
    desk.receipts.acked(progress(published), client, 1, "", "c")
    await wait_until(lambda: len(client.answers) == 3, PATIENCE)
    assert trio.current_time() - started < receipts.LATE_SECONDS / 2
    assert [("acked", 1, "c"), ("marked", 2, "a"), ("marked", 1, None)] == client.answers
    assert [b"read", b"read", b"sent"] == [desk.state(each) for each in published]


class Broken(Client):
    """Cannot take an answer."""

    def acked(self, seq: int, ref: str | None) -> None:
        """Raise what nobody expects."""
        raise ZeroDivisionError

    def marked(self, unread: int, ref: str | None) -> None:
        """Raise what nobody expects."""
        raise ZeroDivisionError


async def test_an_asker_that_raises_disturbs_nobody(desk: Desk) -> None:
    """It is logged; the others hear what they have asked for."""
    published = desk.published(count=3)
    broken, client = Broken(), Client()
    desk.receipts.mark(mark(published[0].id), broken, "a")
    desk.receipts.mark(mark(published[1].id), client, "b")
    desk.receipts.acked(progress(published, device="a"), broken, 1, "", "c")
    desk.receipts.acked(progress(published, device="b"), client, 1, "", "d")
    await wait_until(lambda: len(client.answers) == 2, PATIENCE)
    assert {("marked", 1, "b"), ("acked", 1, "d")} == set(client.answers)
    assert [ZeroDivisionError] * 2 == [type(bug) for _, bug in desk.bugs]


# When Redis is not well.


async def test_scripts_that_were_forgotten(desk: Desk) -> None:
    """Nobody notices."""
    published = desk.published(count=3)
    one, client = progress(published), Client()
    for seq in (1, 2, 3):
        desk.redis.command("SCRIPT", "FLUSH")
        desk.receipts.acked(one, client, seq, "", None)
        await wait_until(partial(client.has, seq), PATIENCE)
    assert [("acked", seq, None) for seq in (1, 2, 3)] == client.answers
    assert ([], []) == (desk.bugs, desk.troubles)


@pytest.mark.parametrize("silent", [False, True])
async def test_what_redis_was_not_told_while_it_was_away_is_told_later(
    desk: Desk, *, silent: bool
) -> None:
    """Clients hear at once that it did not work; the rest is made good without anybody's help."""
    everybody, published = crowd(desk, 20), desk.published(count=9)
    client, one = Client(), progress(published)
    desk.receipts.soon(everybody[0])
    await wait_until(lambda: desk.record("user0").received, PATIENCE)
    take_away(desk.redis, silent=silent)
    for each in everybody:
        desk.receipts.late(each)
    for each in everybody[::2]:
        desk.receipts.soon(each)
    desk.receipts.acked(one, client, 4, "", "by seq")
    desk.receipts.acked(one, client, 0, published[5].id, "by id")
    await wait_until(lambda: len(client.answers) == 2, PATIENCE)
    assert [("untold", 0, "by seq"), ("untold", 0, "by id")] == client.answers
    await wait_until(lambda: len(desk.troubles) >= 2, PATIENCE)
    give_back(desk.redis, silent=silent)
    await wait_until(lambda: not unreported(desk, everybody), PATIENCE)
    await wait_until(partial(desk.knows, Record(9, 6, 6, "-")), PATIENCE)
    assert 2 == len(client.answers)
    assert (0, []) == (desk.tally.receipts_dropped, desk.bugs)


def take_away(redis: RedisServer, *, silent: bool) -> None:
    """Make Redis silent, or kill it."""
    if silent:
        redis.pause()
    else:
        redis.kill()


def give_back(redis: RedisServer, *, silent: bool) -> None:
    """Undo `take_away`."""
    if silent:
        redis.resume()
    else:
        redis.start()


async def test_pauses_grow_while_redis_is_away(desk: Desk) -> None:
    """However often something new is to be told; and then they are short again."""
    published = desk.published(count=2)
    one = progress(published[:1], received=True)
    desk.redis.kill()
    started = trio.current_time()
    for count in range(5):
        desk.receipts.soon(one)
        await wait_until(partial(more_than, desk.troubles, count), PATIENCE)
    # At least half of 0.1, 0.2, 0.4 and 0.8 s.
    assert trio.current_time() - started >= 0.75
    desk.redis.start()
    await wait_until(lambda: desk.record().received == 1, PATIENCE)
    desk.redis.kill()
    one.sent = one.received = published[1].point
    desk.receipts.soon(one)
    seen = len(desk.troubles)
    await wait_until(partial(more_than, desk.troubles, seen), PATIENCE)
    desk.receipts.soon(one)
    started = trio.current_time()
    desk.redis.start()
    await wait_until(lambda: desk.record().received == 2, PATIENCE)
    assert trio.current_time() - started < receipts.PAUSE_CAP / 2


async def test_a_mark_is_tried_again_for_a_while(desk: Desk) -> None:
    """A Redis that comes back at once is no reason to bother the client."""
    [published], client = desk.published(), Client()
    desk.published()
    desk.redis.kill()
    desk.receipts.mark(mark(published.id), client, "r")
    await wait_until(lambda: desk.troubles, PATIENCE)
    desk.redis.start()
    await wait_until(lambda: client.answers, PATIENCE)
    assert [("marked", 1, "r")] == client.answers


@pytest.mark.parametrize("silent", [False, True])
async def test_a_mark_is_not_tried_for_ever(desk: Desk, *, silent: bool) -> None:
    """The client is told within a few seconds, and not twice."""
    [published], client = desk.published(), Client()
    take_away(desk.redis, silent=silent)
    desk.receipts.mark(mark(published.id), client, "r")
    await wait_until(lambda: client.answers, PATIENCE)
    give_back(desk.redis, silent=silent)
    other = Client()
    desk.receipts.mark(mark("p07-nonsense"), other, "s")
    await wait_until(lambda: other.answers, PATIENCE)
    assert ([("untold", 0, "r")], "marked") == (client.answers, other.answers[0][0])


async def test_nobody_waits_for_a_silent_redis_once_per_batch(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch that fails speaks for all: a client's answer does not wait for each."""
    monkeypatch.setattr(receipts, "BATCH", 4)
    everybody, client = crowd(desk, 60), Client()
    desk.redis.pause()
    for one in everybody:
        desk.receipts.soon(one)
    desk.receipts.mark(mark("p07-nonsense"), client, "r")
    await wait_until(lambda: client.answers, 10)
    assert [("untold", 0, "r")] == client.answers
    desk.redis.resume()
    await wait_until(lambda: not unreported(desk, everybody), PATIENCE)


async def test_what_redis_refuses_for_good_is_given_up(desk: Desk) -> None:
    """A user whose keys are broken: who asked is told, and nobody else is disturbed."""
    everybody = crowd(desk, 5)
    desk.redis.command("SET", ledger.key("cursors", "broken"), "no hash")
    client, one = Client(), progress(desk.published("broken"), "broken")
    desk.receipts.acked(one, client, 1, "", "a")
    desk.receipts.mark((*mark(), "nonsense", "1"), client, "b")
    for each in everybody:
        desk.receipts.soon(each)
    await wait_until(lambda: len(client.answers) == 2, PATIENCE)
    await wait_until(lambda: not unreported(desk, everybody), PATIENCE)
    assert {("untold", 0, "a"), ("untold", 0, "b")} == set(client.answers)
    assert [True] == [
        any(trouble.startswith(code) for code in ("WRONGTYPE", "BADREQUEST"))
        for trouble in desk.troubles
    ]
    assert Urgency.NONE is one.urgency


WORSE_AND_BETTER = [
    (("REPLICAOF", "127.0.0.1", str(free_port())), ("REPLICAOF", "NO", "ONE")),
    (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
    (
        ("CONFIG", "SET", "min-replicas-to-write", "1"),
        ("CONFIG", "SET", "min-replicas-to-write", "0"),
    ),
]


@pytest.mark.parametrize(("worse", "better"), WORSE_AND_BETTER)
async def test_what_redis_refuses_for_a_while_is_told_later(
    desk: Desk, worse: tuple[str, ...], better: tuple[str, ...]
) -> None:
    """In a failover, short of memory: clients hear that it did not work, the rest is made good."""
    published = desk.published(count=3)
    [other] = desk.published("bob")
    one, two = progress(published), progress([other], "bob", received=True)
    client = Client()
    desk.redis.command(*worse)
    desk.receipts.acked(one, client, 2, "", "r")
    desk.receipts.soon(two)
    await wait_until(lambda: client.answers and desk.troubles, PATIENCE)
    assert [("untold", 0, "r")] == client.answers
    desk.redis.command(*better)
    await wait_until(partial(desk.knows, Record(3, 2, 2, "-")), PATIENCE)
    await wait_until(partial(desk.knows, Record(1, 1, 0, "-"), "bob"), PATIENCE)


# Bounds.


async def test_the_oldest_are_dropped_and_counted(
    idle: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound what was only sent goes first; who is dropped may be reported again."""
    monkeypatch.setattr(receipts, "MAX_PENDING", 10)
    everybody = crowd(idle, 25)
    for one in everybody:
        idle.receipts.late(one)
    assert 15 == idle.tally.receipts_dropped
    assert [Urgency.NONE] * 15 + [Urgency.LATE] * 10 == [one.urgency for one in everybody]
    idle.receipts.soon(everybody[0])
    assert 16 == idle.tally.receipts_dropped
    idle.receipts.soon(everybody[24])
    assert 16 == idle.tally.receipts_dropped, "it was among them already"
    await idle.finish()
    assert [f"user{number}" for number in range(1, 16)] == unreported(idle, everybody)


async def test_who_waits_for_an_answer_is_told_when_it_is_dropped(
    idle: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ack that has no room is not acknowledged in silence."""
    monkeypatch.setattr(receipts, "MAX_PENDING", 3)
    everybody = crowd(idle, 5)
    clients = [Client() for _ in everybody]
    for one, client in zip(everybody, clients, strict=True):
        idle.receipts.acked(one, client, 1, "", "a")
        idle.receipts.acked(one, client, 1, "", "b")
    assert [[("untold", 0, "a"), ("untold", 0, "b")]] * 2 == [one.answers for one in clients[:2]]
    assert 2 == idle.tally.receipts_dropped
    await idle.finish()
    assert [[("acked", 1, "a"), ("acked", 1, "b")]] * 3 == [one.answers for one in clients[2:]]
    assert 2 == idle.tally.receipts_dropped


def more_than(found: list[str], count: int) -> bool:
    """Return whether there are more than so many."""
    return len(found) > count


async def test_an_outage_collects_no_more_than_the_bound(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever could not be told and what comes meanwhile share it."""
    monkeypatch.setattr(receipts, "MAX_PENDING", 10)
    everybody = crowd(desk, 30)
    desk.published()
    desk.redis.kill()
    for first in range(0, 30, 10):
        for one in everybody[first : first + 10]:
            desk.receipts.soon(one)
        seen = len(desk.troubles)
        await wait_until(partial(more_than, desk.troubles, seen), PATIENCE)
    assert len([one for one in everybody if one.urgency]) <= 10
    dropped = desk.tally.receipts_dropped
    assert dropped == len([one for one in everybody if not one.urgency])
    desk.redis.start()
    await wait_until(lambda: len(unreported(desk, everybody)) == dropped, PATIENCE)
    assert dropped == desk.tally.receipts_dropped


# The end.


async def test_what_is_left_is_told_at_the_end(idle: Desk) -> None:
    """At once, whether it was to be told late or soon; and clients are answered."""
    everybody, client = crowd(idle, 9), Client()
    for one in everybody[:4]:
        idle.receipts.late(one)
    for one in everybody[4:8]:
        idle.receipts.soon(one)
    idle.receipts.acked(everybody[8], client, 1, "", "a")
    idle.receipts.mark(mark("p07-nonsense"), client, "b")
    await idle.finish()
    assert [] == unreported(idle, everybody)
    assert [("acked", 1, "a"), ("marked", 0, "b")] == client.answers
    idle.redis.command("CONFIG", "RESETSTAT")
    await idle.finish()
    assert 0 == idle.redis.commands_seen("evalsha"), "there was nothing left"


async def test_the_end_without_redis(idle: Desk) -> None:
    """It ends all the same; what could not be told still waits."""
    everybody = crowd(idle, 3)
    for one in everybody:
        idle.receipts.soon(one)
    idle.redis.pause()
    await idle.finish()
    assert [Urgency.LATE] * 3 == [one.urgency for one in everybody]
    idle.redis.resume()
    await idle.finish()
    assert [] == unreported(idle, everybody)


async def test_the_end_while_they_run(desk: Desk) -> None:
    """What was waiting is told by one of the two, once."""
    everybody = crowd(desk, 50)
    desk.redis.command("CONFIG", "RESETSTAT")
    for one in everybody:
        desk.receipts.late(one)
    await desk.finish()
    assert [] == unreported(desk, everybody)
    assert 50 == desk.redis.commands_seen("evalsha")


async def test_nothing_is_forgotten_when_a_run_is_cancelled(
    idle: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the batch under way nor those behind it: acks by id and marks included."""
    monkeypatch.setattr(receipts, "BATCH", 5)
    everybody, published = crowd(idle, 23), idle.published(count=3)
    acker, marker = Client(), Client()
    one = progress(published)
    idle.redis.pause()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        for each in everybody:
            idle.receipts.soon(each)
        idle.receipts.acked(one, acker, 0, published[1].id, "a")
        idle.receipts.mark(mark(published[0].id), marker, "b")
        await wait_until(lambda: not one.urgency, PATIENCE)
        nursery.cancel_scope.cancel()
    idle.redis.resume()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        await wait_until(lambda: not unreported(idle, everybody), PATIENCE)
        await wait_until(partial(idle.knows, Record(3, 2, 2, "-")), PATIENCE)
        await wait_until(lambda: marker.answers, PATIENCE)
        nursery.cancel_scope.cancel()
    assert [("untold", 0, "a")] == acker.answers
    assert [("marked", 2, "b")] == marker.answers


async def test_a_link_that_is_closed_is_as_if_redis_were_away(idle: Desk) -> None:
    """It is no bug."""
    everybody = crowd(idle, 3)
    async with open_link(Endpoint(path=str(idle.redis.path))) as closed:
        pass
    for one in everybody:
        idle.receipts.soon(one)
    await idle.receipts.finish(closed)
    assert (1, []) == (len(idle.troubles), idle.bugs)
    await idle.finish()
    assert [] == unreported(idle, everybody)


# One client's progress.


@pytest.mark.parametrize(
    ("sent", "received", "everyone_sent", "everyone_received", "expected"),
    [
        ("", "", "", "", False),
        ("a", "", "", "", True),
        ("a", "a", "", "", False),
        ("b", "a", "", "", True),
        ("a", "a", "c", "", True),
        ("a", "a", "c", "c", False),
    ],
)
def test_what_nothing_proves_received(
    sent: str, received: str, everyone_sent: str, everyone_received: str, *, expected: bool
) -> None:
    """Of either stream."""
    one = Progress("ann", "phone")
    one.sent, one.received = sent, received
    one.everyone_sent, one.everyone_received = everyone_sent, everyone_received
    assert expected == one.unconfirmed
