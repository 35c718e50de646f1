"""Chat sessions of one and of several workers on a real Redis: what is answered is stored."""

import functools
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
import trio

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.chat_stage import ANY, NOW, SECONDS, Answer, Guest, Worker, stored
from trioserver import chat_store, chats
from trioserver.chat import CROWDED_MESSAGES, MOST_MESSAGES
from trioserver.errors import CloseReason
from trioserver.redis_link import RedisLink

LIMIT = 40.0
"""Seconds after which a test is stuck."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all; it answers when what it was told is on disk, so a kill loses nothing."""
    # With "everysec" it does not wait for the file while an earlier part is being synchronised.
    config = {"appendfsync": "always"}
    with RedisServer(tmp_path_factory.mktemp("redis"), config=config) as server:
        yield server


@pytest.fixture
def redis(server: RedisServer) -> Iterator[RedisServer]:
    """It runs, is empty, and allows everything when a test begins."""
    yield server
    with suppress(AssertionError):
        server.start()
    server.resume()
    server.command("REPLICAOF", "NO", "ONE")
    server.command("ACL", "SETUSER", "default", "allkeys")
    server.command("FLUSHALL")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one Redis for few sessions, and it does not help to wait for it."""
    monkeypatch.setattr(chats, "RETRIES", (0.02, 0.04, 0.08))
    monkeypatch.setattr(chats, "PAUSE_CAP", 0.2)
    monkeypatch.setattr(chats, "SPREAD_SECONDS", 0.05)


@pytest.fixture(autouse=True)
async def bounded() -> AsyncIterator[None]:
    """No test waits for ever."""
    with trio.fail_after(LIMIT):
        yield


# ---- Counting


async def test_messages_are_counted_and_answered(redis: RedisServer) -> None:
    """In order, each with what it brought."""
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        assert (["new"], 0, False) == (guest.seats, guest.chat.count, guest.chat.resumed)
        guest.say("a")
        guest.say("b", which="m1")
        await guest.told(2)
        assert [
            Answer("message_response", 1, "a", NOW, "a"),
            Answer("message_response", 2, "b", NOW, "b", "m1"),
        ] == guest.answers
        assert (2, 2) == (guest.chat.count, worker.chats.counted)
        assert ([], []) == (worker.bugs, worker.troubles)


@pytest.mark.parametrize("together", [True, False])
async def test_nothing_is_answered_before_redis_has_it(
    redis: RedisServer, *, together: bool
) -> None:
    """At the moment of each answer its count is stored; also where one command writes one."""
    async with Worker(redis, together=together).running() as worker:
        guests = [await worker.seat() for _ in range(5)]
        early: list[Answer] = []

        def check(guest: Guest, one: Answer) -> None:
            if int(stored(redis, guest.chat.session_id) or 0) < one.count:
                early.append(one)
            if one.count < 40:
                guest.say("x")

        for guest in guests:
            guest.on_answer = functools.partial(check, guest)
            guest.say("x", "y")
        for guest in guests:
            await guest.told(41)
            assert list(range(1, 42)) == guest.counts
        assert [] == early


async def test_what_comes_together_goes_together(redis: RedisServer) -> None:
    """A thousand messages of hundreds of sessions are a few commands, and one write each."""
    async with Worker(redis).running() as worker:
        guests = [worker.open() for _ in range(300)]
        await wait_until(lambda: all(guest.seats for guest in guests), SECONDS)
        redis.command("CONFIG", "RESETSTAT")
        worker.trips = 0
        for guest in guests:
            guest.say("a", "b", "c")
        for guest in guests:
            await guest.told(3)
        assert {(3,)} == {tuple(guest.batches) for guest in guests}
        assert 3 == redis.commands_seen("evalsha")
        assert 1 <= worker.trips <= 2, "maybe to load the script"


async def test_messages_before_the_session_is_there(redis: RedisServer) -> None:
    """They are counted when it is, behind its first message."""
    async with Worker(redis).running() as worker:
        guest = worker.open()
        assert None is guest.chat.count
        guest.say("a", "b")
        await guest.told(2)
        assert ([1, 2], ["a", "b"]) == (guest.counts, [one.payload for one in guest.answers])


# ---- Coming back


async def test_a_session_is_resumed_anywhere(redis: RedisServer) -> None:
    """Its count goes on, by the same worker and by another."""
    async with Worker(redis).running() as here, Worker(redis, "bb.1.1").running() as there:
        first = await here.seat()
        first.say("a", "b")
        await first.told(2)
        first.chat.leave()
        session = first.chat.session_id
        await wait_until(lambda: stored(redis, session, "h") == "", SECONDS)
        for count, worker in ((2, there), (3, here)):
            guest = await worker.seat(session)
            assert ([""], True, count) == (guest.seats, guest.chat.resumed, guest.chat.count)
            guest.say("c")
            await guest.told(1)
            assert [count + 1] == guest.counts
            guest.chat.leave()


async def test_a_session_that_is_gone(redis: RedisServer) -> None:
    """A user gets one under its id, who is nobody one under another."""
    async with Worker(redis).running() as worker:
        nobody = await worker.seat(ANY)
        assert (["expired"], False) == (nobody.seats, nobody.chat.resumed)
        assert nobody.chat.session_id != ANY
        somebody = await worker.seat(ANY, "ann")
        assert (["expired"], ANY) == (somebody.seats, somebody.chat.session_id)
        for guest in (nobody, somebody):
            guest.say("a")
            await guest.told(1)
            assert "1" == stored(redis, guest.chat.session_id)


async def test_somebody_elses_session(redis: RedisServer) -> None:
    """Who asks for it is sent away, and its holder does not notice."""
    async with Worker(redis).running() as worker:
        holder = await worker.seat(ANY, "ann")
        thief = worker.open(ANY, "bob")
        thief.say("x")
        await thief.ended()
        assert (CloseReason.FORBIDDEN, []) == (thief.reason, thief.answers)
        holder.say("a")
        await holder.told(1)
        assert [1] == holder.counts


async def test_messages_that_come_again(redis: RedisServer) -> None:
    """Their answers are the old ones: at once, before they are stored, and after a return."""
    async with Worker(redis).running() as here, Worker(redis, "bb.1.1").running() as there:
        guest = await here.seat()
        guest.say("a", which="m1")
        guest.say("b")
        guest.say("a", which="m1")
        guest.say("c", which="m2")
        await guest.told(4)
        assert [(1, False), (2, False), (1, True), (3, False)] == [
            (one.count, one.repeated) for one in guest.answers
        ]
        guest.say("a", which="m1")
        assert Answer("message_response", 1, "a", NOW, "a", "m1", repeated=True) == guest.answers[4]
        guest.chat.leave()
        later = await there.seat(guest.chat.session_id)
        later.say("c", which="m2")
        later.say("d")
        await later.told(2)
        assert [(3, True), (4, False)] == [(one.count, one.repeated) for one in later.answers]


async def test_messages_that_were_counted_but_not_answered(redis: RedisServer) -> None:
    """Who leaves before the answer, and asks again, gets it: nothing is counted twice."""
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        guest.say("a", which="m1")
        guest.chat.leave()
        assert [] == guest.answers
        later = await worker.seat(guest.chat.session_id)
        later.say("a", which="m1")
        await later.told(1)
        assert (1, True) == (later.answers[0].count, later.answers[0].repeated)
        assert [] == guest.answers


# ---- Two connections, one session


@pytest.mark.parametrize("order", ["here first", "there first"])
async def test_who_comes_last_has_the_session(redis: RedisServer, order: str) -> None:
    """The other one is ended wherever it is, and nothing is counted twice or skipped."""
    async with Worker(redis).running() as here, Worker(redis, "bb.1.1").running() as there:
        one, two = (here, there) if order == "here first" else (there, here)
        first = await one.seat(ANY, "ann")
        first.say("a", "b")
        await first.told(2)
        second = await two.seat(ANY, "ann")
        await first.ended()
        assert (CloseReason.SUPERSEDED, 1) == (first.reason, one.chats.superseded)
        first.say("x")
        second.say("c")
        await second.told(1)
        assert ([1, 2], [3], "3") == (first.counts, second.counts, stored(redis, ANY))


async def test_a_predecessor_in_the_same_worker(redis: RedisServer) -> None:
    """What has been counted for it is answered first; then it is ended without a word in Redis."""
    async with Worker(redis).running() as worker:
        first = await worker.seat(ANY, "ann")
        redis.command("CONFIG", "RESETSTAT")
        first.say("a")
        second = worker.open(ANY, "ann")
        await wait_until(lambda: second.seats, SECONDS)
        assert ([1], CloseReason.SUPERSEDED, 1) == (first.counts, first.reason, second.chat.count)
        assert 0 == redis.commands_seen("publish")


async def test_who_was_not_told_finds_out(redis: RedisServer) -> None:
    """A holder whose session was taken is ended with its next message, which is not counted."""
    deaf = Worker(redis)
    async with (
        Worker(redis, "bb.1.1").running() as there,
        deaf.linked() as link,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(deaf.chats.run, link)
        first = await deaf.seat(ANY, "ann")
        second = await there.seat(ANY, "ann")
        first.say("x")
        await first.ended()
        assert (CloseReason.SUPERSEDED, []) == (first.reason, first.answers)
        second.say("a")
        await second.told(1)
        assert [1] == second.counts
        nursery.cancel_scope.cancel()


async def test_words_on_the_channel_that_are_not_for_us(redis: RedisServer) -> None:
    """Connections that have gone, and junk."""
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        for payload in (b"aa.1.1-ffff", b"", b"\xff", b"-"):
            worker.chats.hinted(payload)
        guest.say("a")
        await guest.told(1)
        assert (None, []) == (guest.reason, worker.bugs)


# ---- Logging in


async def test_who_logs_in_keeps_the_session(redis: RedisServer) -> None:
    """It is his when he is told so, and its count goes on."""
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        guest.say("a")
        guest.chat.adopt("ann")
        await wait_until(lambda: len(guest.seats) == 2, SECONDS)
        assert (["new", ""], "ann") == (guest.seats, stored(redis, guest.chat.session_id, "o"))
        guest.say("b")
        await guest.told(2)
        assert [1, 2] == guest.counts


@pytest.mark.parametrize("moment", ["before", "while asking"])
async def test_who_logs_in_before_he_has_a_session(redis: RedisServer, moment: str) -> None:
    """He is told once, when it is his; also if somebody else was not to have it."""
    async with Worker(redis).running() as worker:
        (await worker.seat(ANY, "ann")).chat.leave()
        for session in ("", ANY):
            guest = worker.open(session)
            if moment == "while asking":
                redis.pause()
                await wait_until(lambda: not worker.chats._arrivals, SECONDS)
            guest.say("a")
            guest.chat.adopt("ann")
            redis.resume()
            await guest.told(1)
            assert (1, None) == (len(guest.seats), guest.reason)
            assert "ann" == stored(redis, guest.chat.session_id, "o")
            guest.chat.leave()


async def test_who_turns_out_to_be_its_user_gets_the_session(redis: RedisServer) -> None:
    """The same connection asks once more, as soon as it has said who it is."""
    async with Worker(redis).running() as worker:
        first = await worker.seat(ANY, "ann")
        first.say("a")
        await first.told(1)
        first.chat.leave()
        guest = worker.open(ANY)
        await wait_until(lambda: guest.denials, SECONDS)
        guest.chat.leave()
        guest.chat = worker.chats.open(guest, ANY, "ann")
        await wait_until(lambda: guest.seats, SECONDS)
        guest.say("b")
        await guest.told(1)
        assert ([""], [2], None) == (guest.seats, guest.counts, guest.reason)


@pytest.mark.parametrize("sessions", ["another", "the same"])
async def test_a_connection_goes_on_with_another_session(redis: RedisServer, sessions: str) -> None:
    """It lets go of one and takes the other, which may be one that it has held before."""
    async with Worker(redis).running() as worker:
        (await worker.seat(ANY, "ann")).chat.leave()
        guest = await worker.seat()
        guest.say("a")
        await guest.told(1)
        before = guest.chat.session_id
        guest.say("b")
        guest.chat.depart()
        assert [1, 0] == guest.counts
        after = ANY if sessions == "another" else before
        guest.chat = worker.chats.open(guest, after, "ann")
        await wait_until(lambda: len(guest.seats) == 2, SECONDS)
        guest.say("c")
        await guest.told(3)
        count = 1 if sessions == "another" else 2
        assert ([1, 0, count], after) == (guest.counts, guest.chat.session_id)
        await wait_until(lambda: stored(redis, after) == str(count), SECONDS)
        assert (None, "ann") == (guest.reason, stored(redis, after, "o"))
        if sessions == "another":
            assert ("1", "", "") == tuple(stored(redis, before, field) for field in "nho")


async def test_a_login_is_told_when_it_is_stored(redis: RedisServer) -> None:
    """Also if a count was under way, whose answer does not say whose the session is."""
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        owners: list[str | None] = []
        guest.on_seat = lambda: owners.append(stored(redis, guest.chat.session_id, "o"))
        redis.pause()
        guest.say("a")
        await wait_until(lambda: guest.chat.version == 1, SECONDS)
        guest.chat.adopt("ann")
        redis.resume()
        await wait_until(lambda: len(guest.seats) == 2, SECONDS)
        assert ["ann"] == owners


# ---- Without Redis


async def test_without_redis_messages_are_refused(redis: RedisServer) -> None:
    """In order, and then at once; they are not counted. When it is back all goes on."""
    async with Worker(redis).running() as worker:
        guest, silent = await worker.seat(), await worker.seat()
        guest.say("a")
        await guest.told(1)
        redis.kill()
        guest.say("b", "c")
        await guest.told(3)
        assert worker.chats.away
        assert [("unavailable", "b"), ("unavailable", "c")] == [
            (one.code, one.ref) for one in guest.answers[1:]
        ]
        silent.say("x")
        assert ["unavailable"] == [one.code for one in silent.answers]
        assert (1, 3) == (guest.chat.count, worker.chats.refused)
        redis.start()
        await wait_until(lambda: not worker.chats.away, SECONDS)
        guest.say("d")
        silent.say("y")
        await guest.told(4)
        await silent.told(2)
        assert ([1, 0, 0, 2], [0, 1]) == (guest.counts, silent.counts)
        assert "2" == stored(redis, guest.chat.session_id)


async def test_a_write_that_has_arrived_but_was_not_answered(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose connection lives can rely on it that what was refused is not counted."""
    monkeypatch.setattr(chats, "ATTEMPT_SECONDS", 0.1)
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        guest.say("a")
        await guest.told(1)
        # So nothing is void that Redis reads only now: it is as if it had done it in time.
        assert worker.chats._ahead is not None
        worker.chats._ahead += 3_600_000
        redis.pause()
        guest.say("b", which="m2")
        await guest.told(2)
        redis.resume()
        await wait_until(lambda: not worker.chats.away, SECONDS)
        # What had been in its buffers came first, or is of no use any more.
        session = guest.chat.session_id
        assert ["1", "\n"] == [stored(redis, session, field) for field in "ni"]
        guest.say("b", which="m2")
        await guest.told(3)
        assert [(1, False), (0, False), (2, False)] == [
            (one.count, one.repeated) for one in guest.answers
        ]


@pytest.mark.parametrize("stays", [True, False])
async def test_what_redis_has_not_read_in_time_is_not_counted(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, *, stays: bool
) -> None:
    """Who was told so can come back anywhere: what stands in its buffers is void."""
    monkeypatch.setattr(chats, "ATTEMPT_SECONDS", 0.1)
    here, there = Worker(redis), Worker(redis, "bb.1.1")
    async with here.running(), there.running():
        guest = await here.seat()
        guest.say("a")
        await guest.told(1)
        redis.pause()
        guest.say("b")
        await guest.told(2)
        if not stays:
            guest.chat.leave()
        # What is read last cannot be taken back in time; nobody else can say that now.
        monkeypatch.setattr(here.chats, "_ask", nobody_answers)
        other = there.open(guest.chat.session_id)
        redis.resume()
        await wait_until(lambda: other.seats, SECONDS)
        other.say("c")
        await other.told(1)
        assert ([1, 0], [2]) == (guest.counts, other.counts)


async def nobody_answers(_link: RedisLink, _round: object) -> None:
    """Be without Redis."""


async def test_what_is_to_be_taken_back_is_not_forgotten(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if its client goes, with many others whose sessions need no more than an end."""
    monkeypatch.setattr(chats, "ATTEMPT_SECONDS", 0.1)
    monkeypatch.setattr(chats, "SPARE_LEAVES", 3)
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        others = [await worker.seat() for _ in range(10)]
        redis.pause()
        guest.say("a")
        await guest.told(1)
        for one in (guest, *others):
            one.chat.leave()
        waiting = [one.chat in worker.chats._pending for one in (guest, *others)]
        assert (True, 0 < sum(waiting) < 11) == (waiting[0], True)
        redis.resume()
        await wait_until(lambda: stored(redis, guest.chat.session_id, "h") == "", SECONDS)
        assert "0" == stored(redis, guest.chat.session_id)


async def test_who_has_gone_does_not_take_the_session(redis: RedisServer) -> None:
    """His coming is not said again, however long it waits for Redis."""
    async with Worker(redis).running() as here, Worker(redis, "bb.1.1").running() as there:
        guest = await here.seat()
        session = guest.chat.session_id
        guest.chat.leave()
        await wait_until(lambda: stored(redis, session, "h") == "", SECONDS)
        redis.kill()
        ghost = here.open(session)
        await wait_until(lambda: not here.chats._arrivals, SECONDS)
        ghost.chat.leave()
        redis.start()
        living = await there.seat(session)
        # Whatever the other one had to say is said when it is answered.
        last = await here.seat()
        last.say("a")
        await last.told(1)
        assert (None, living.chat.holder) == (living.reason, stored(redis, session, "h"))


async def test_the_clock_of_redis_may_jump(redis: RedisServer) -> None:
    """What was void for that is said again with the right time; nobody is refused."""
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        assert worker.chats._ahead is not None
        worker.chats._ahead -= 3_600_000
        guest.say("a")
        await guest.told(1)
        other = await worker.seat()
        worker.chats._ahead += 3_600_000
        other.say("b")
        await other.told(1)
        assert ([1], [1]) == (guest.counts, other.counts)
        assert 1 == len(worker.troubles)


async def test_a_short_pause_is_not_noticed(redis: RedisServer) -> None:
    """What was not answered the first time is sent once more, and counted once."""
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        redis.pause()
        guest.say("a")
        await wait_until(lambda: worker.troubles, SECONDS)
        redis.resume()
        await guest.told(1)
        assert ([1], "1") == (guest.counts, stored(redis, guest.chat.session_id))


async def test_a_redis_that_cannot_write_now(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as good as away: nothing is refused before it had time to become a master again."""
    monkeypatch.setattr(chats, "RETRIES", (0.1, 0.2, 0.4))
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        redis.command("REPLICAOF", "127.0.0.1", "1")
        guest.say("a")
        await wait_until(lambda: worker.troubles, SECONDS)
        redis.command("REPLICAOF", "NO", "ONE")
        await guest.told(1)
        assert ([1], False) == (guest.counts, guest.chat.apart)
        assert "READONLY" in worker.troubles[0]


async def test_who_comes_without_redis(redis: RedisServer) -> None:
    """His messages do not wait for ever; his session comes when Redis is back."""
    worker = Worker(redis)
    async with worker.running():
        redis.kill()
        guest = worker.open()
        guest.early = True
        guest.say("a")
        await guest.told(1)
        guest.say("b")
        assert ["unavailable"] * 2 == [one.code for one in guest.answers]
        redis.start()
        await wait_until(lambda: guest.seats, SECONDS)
        guest.say("c")
        await guest.told(3)
        assert [0, 0, 1] == guest.counts


async def test_redis_is_frozen_when_somebody_comes(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """His first message is refused while it is still being tried."""
    monkeypatch.setattr(chats, "ATTEMPT_SECONDS", 0.1)
    monkeypatch.setattr(chats, "EARLY_SECONDS", 0.3)
    monkeypatch.setattr(chats, "RETRIES", (0.02, 0.5))
    async with Worker(redis).running() as worker:
        redis.pause()
        guest = worker.open()
        guest.early = True
        guest.say("a")
        await guest.told(1)
        assert (["unavailable"], False) == (
            [one.code for one in guest.answers],
            worker.chats.away,
        )
        redis.resume()
        await wait_until(lambda: guest.chat.count == 0, SECONDS)


async def test_redis_has_lost_everything(redis: RedisServer) -> None:
    """Who counts brings his session back, who is silent too when a link was cut."""
    async with Worker(redis).running() as worker:
        busy, silent = await worker.seat("", "ann"), await worker.seat("", "bob")
        for guest in (busy, silent):
            guest.say("a", "b", which=f"of {guest.connection_id}".replace(" ", "-"))
            guest.say("c")
            await guest.told(3)
        redis.command("FLUSHALL")
        busy.say("d")
        await busy.told(4)
        assert [1, 1, 2, 3] == busy.counts
        assert ("3", "ann") == (
            stored(redis, busy.chat.session_id),
            stored(redis, busy.chat.session_id, "o"),
        )
        worker.chats.link_lost()
        session = silent.chat.session_id
        await wait_until(lambda: stored(redis, session) == "2", SECONDS)
        assert "bob" == stored(redis, session, "o")
        assert f"\nof-{silent.connection_id} 1" == stored(redis, session, "i")


async def test_redis_has_lost_the_latest(redis: RedisServer) -> None:
    """Who has just gone finds his session as he left it, when he comes back."""
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        guest.say("a", which="m1")
        await guest.told(1)
        key = chat_store.key(guest.chat.session_id)
        before = redis.command("DUMP", key)
        assert isinstance(before, bytes)
        guest.say("b", which="m2")
        await guest.told(2)
        guest.chat.leave()
        await wait_until(lambda: stored(redis, guest.chat.session_id, "h") == "", SECONDS)
        await wait_until(lambda: worker.chats._lately, SECONDS)
        redis.command("RESTORE", key, 0, before, "REPLACE")
        worker.chats.link_lost()
        later = await worker.seat(guest.chat.session_id)
        later.say("b", which="m2")
        later.say("c")
        await later.told(2)
        assert [(2, True), (3, False)] == [(one.count, one.repeated) for one in later.answers]


async def test_those_who_have_gone_are_forgotten(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few are remembered, and not for long."""
    monkeypatch.setattr(chats, "MOST_LATELY", 3)
    async with Worker(redis).running() as worker:
        guests = [await worker.seat() for _ in range(10)]
        for guest in guests:
            guest.chat.leave()
        last = guests[-1].chat
        await wait_until(lambda: last in worker.chats._lately, SECONDS)
        assert [one.chat for one in guests[-3:]] == list(worker.chats._lately)
        monkeypatch.setattr(chats, "LATELY_SECONDS", -1.0)
        worker.chats.link_lost()
        assert ([], {}) == (worker.chats._pending, worker.chats._lately)


async def test_silent_sessions_live_on(redis: RedisServer) -> None:
    """They are written again long before they end; those that were left are not."""
    async with Worker(redis, ttl=2.0).running() as worker:
        guest, gone = await worker.seat(), await worker.seat()
        gone.chat.leave()

        def lives(one: Guest) -> int:
            reply = redis.command("PTTL", chat_store.key(one.chat.session_id))
            assert isinstance(reply, int)
            return reply

        await wait_until(lambda: lives(guest) < 1750, SECONDS)
        await wait_until(lambda: lives(guest) > 1750, SECONDS)
        assert lives(gone) < 1750


async def test_what_redis_refuses(redis: RedisServer) -> None:
    """It is refused for those whom it concerns; they go on when it is over, the others go on."""
    async with Worker(redis).running() as worker:
        good, bad = await worker.seat(), await worker.seat()
        good.say("a")
        await good.told(1)
        redis.command(
            *("ACL", "SETUSER", "default", "resetkeys"),
            f"~{chat_store.key(good.chat.session_id)}",
        )
        bad.say("x")
        await bad.told(1)
        assert ["unavailable"] == [one.code for one in bad.answers]
        good.say("b")
        await good.told(2)
        assert (False, [1, 2]) == (worker.chats.away, good.counts)
        bad.say("y")
        assert 2 == len(bad.answers), "at once"
        redis.command("ACL", "SETUSER", "default", "allkeys")
        await wait_until(lambda: not bad.chat.apart, SECONDS)
        bad.say("z")
        await bad.told(3)
        assert [0, 0, 1] == bad.counts


async def test_sessions_that_redis_refuses_are_apart(redis: RedisServer) -> None:
    """Of those in one command one is to blame, and only that one has to wait."""
    async with Worker(redis).running() as worker:
        guests = [await worker.seat() for _ in range(5)]
        allowed = [f"~{chat_store.key(one.chat.session_id)}" for one in guests[:-1]]
        redis.command("ACL", "SETUSER", "default", "resetkeys", *allowed)
        for guest in guests:
            guest.say("a")
        for guest in guests:
            await guest.told(1)
        await wait_until(lambda: not any(one.chat.apart for one in guests[:-1]), SECONDS)
        assert guests[-1].chat.apart
        for guest in guests[:-1]:
            guest.say("b")
            await guest.told(2)
            assert [0, 1] == guest.counts


async def test_who_is_refused_does_not_delay_who_comes(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He is tried again by himself, and comes in when he may; till then he is told at once."""
    async with Worker(redis).running() as worker:
        redis.command("ACL", "SETUSER", "default", "resetkeys", "~ts:session:{0*")
        monkeypatch.setattr(chats, "ASIDE_SECONDS", 3600.0)
        monkeypatch.setattr(chats, "ATTEMPT_SECONDS", 0.1)
        bad = worker.open(ANY, "ann")
        bad.early = True
        bad.say("x")
        await bad.told(1)
        bad.say("y")
        assert ["unavailable"] * 2 == [one.code for one in bad.answers]
        good = await worker.seat(f"0{ANY[1:]}", "ann")
        good.say("a")
        await good.told(1)
        assert ([1], [], 1) == (good.counts, bad.seats, len(worker.troubles))
        # Nor is he forgotten if Redis is away when it is his turn.
        redis.command("ACL", "SETUSER", "default", "allkeys")
        redis.pause()
        worker.chats._aside_at = 0.0
        worker.open()
        await wait_until(lambda: worker.chats.away, SECONDS)
        redis.resume()
        await wait_until(lambda: bad.seats, SECONDS)
        bad.say("z")
        await bad.told(3)
        assert [0, 0, 1] == bad.counts


async def test_what_is_under_way_when_it_is_stopped(redis: RedisServer) -> None:
    """It is kept: whoever runs next says it, and it counts once."""
    worker = Worker(redis)
    async with worker.linked() as link:
        guest = worker.open()
        redis.pause()
        with trio.move_on_after(0.05):
            await worker.chats.run(link)
        redis.resume()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.chats.run, link)
            await wait_until(lambda: guest.seats, SECONDS)
            nursery.cancel_scope.cancel()
        redis.pause()
        guest.say("a")
        with trio.move_on_after(0.05):
            await worker.chats.run(link)
        redis.resume()
        guest.say("b")
        await worker.chats.finish(link)
    assert [1, 2] == guest.counts
    assert ("2", "") == (
        stored(redis, guest.chat.session_id),
        stored(redis, guest.chat.session_id, "h"),
    )


async def test_the_end_of_a_worker(redis: RedisServer) -> None:
    """All that is pending is written and answered, and every session is let go."""
    worker = Worker(redis)
    async with worker.running():
        guests = [worker.open() for _ in range(600)]
        await wait_until(lambda: all(guest.seats for guest in guests), SECONDS)
        for guest in guests:
            guest.say("a")
    assert all([1] == guest.counts for guest in guests)
    for guest in guests[::100]:
        assert ("", "1") == (
            stored(redis, guest.chat.session_id, "h"),
            stored(redis, guest.chat.session_id),
        )


async def test_the_end_of_a_worker_without_redis(redis: RedisServer) -> None:
    """It does not wait for it."""
    worker = Worker(redis)
    async with worker.running():
        guest = await worker.seat()
        redis.kill()
        guest.say("a")
    assert worker.troubles


# ---- Too much


async def test_who_says_too_much_is_not_read(redis: RedisServer) -> None:
    """Until he has been answered; what was read with it is taken, up to a bound."""
    async with Worker(redis).running() as worker:
        guest = await worker.seat()
        guest.say(*["x"] * (CROWDED_MESSAGES - 1))
        states = [guest.chat.crowded]
        guest.say("x")
        states.append(guest.chat.crowded)
        assert [False, True] == states
        guest.say(*["x"] * (MOST_MESSAGES - CROWDED_MESSAGES))
        assert [] == guest.answers
        guest.say("one more")
        assert ["one more"] == [one.ref for one in guest.answers]
        await guest.told(MOST_MESSAGES + 1)
        assert (1, False) == (guest.resumed, guest.chat.crowded)
        assert list(range(1, MOST_MESSAGES + 1)) == guest.counts[1:]


@pytest.mark.parametrize("moment", ["before there is a session", "after"])
async def test_large_messages_crowd_as_well(redis: RedisServer, moment: str) -> None:
    """Bytes are bounded: by one bound for what is read, by another for what has been read."""
    async with Worker(redis).running() as worker:
        guest = worker.open()
        if moment == "after":
            await wait_until(lambda: guest.seats, SECONDS)
        else:
            guest.early = True
        large, number = "x" * 16_000, 0
        while not guest.chat.crowded:
            guest.say(large)
            number += 1
        assert 10 < number < CROWDED_MESSAGES
        while not guest.answers:
            guest.say(large)
            number += 1
        assert CROWDED_MESSAGES < number < MOST_MESSAGES
        await guest.told(number)
        assert (False, 1) == (guest.chat.crowded, guest.resumed)
        assert [0, *range(1, number)] == guest.counts


async def test_a_bug_in_one_connection_is_not_the_others_trouble(redis: RedisServer) -> None:
    """Whatever it does with an answer."""

    def fail(_answer: Answer) -> None:
        raise RuntimeError("broken")

    async with Worker(redis).running() as worker:
        broken, guest = await worker.seat(), await worker.seat()
        broken.on_answer = fail
        for one in (broken, guest):
            one.say("a")
        await guest.told(1)
        assert ["a chat session"] == [what for what, _ in worker.bugs]
        worker.bugs.clear()


# ---- A ledger of replies


class Talker:
    """A client with ids that never gives up: what is not answered is said again."""

    def __init__(
        self, workers: list[Worker], rng: random.Random, messages: int, *, steady: bool
    ) -> None:
        self.session = ""
        self.counts: dict[str, int] = {}
        self.faults: list[str] = []
        self._workers = workers
        self._rng = rng
        self._goal = messages
        self._steady = steady

    async def talk(self) -> None:
        """Send all messages, on one connection after the other."""
        while len(self.counts) < self._goal:
            guest = self._rng.choice(self._workers).open(self.session, "ann")
            guest.on_answer = self._take
            patience = LIMIT if self._steady else self._rng.uniform(0.05, 0.8)
            with trio.move_on_after(patience):
                await self._converse(guest)
            # Sometimes nobody notices that the client has gone.
            if self._steady or self._rng.random() < 0.7:
                guest.end(CloseReason.PEER_LOST)
            else:
                guest.on_answer = None

    async def _converse(self, guest: Guest) -> None:
        await wait_until(lambda: guest.seats or guest.reason, LIMIT)
        self.session = guest.chat.session_id
        while len(self.counts) < self._goal and guest.reason is None:
            said = len(self.counts)
            burst = range(said, min(self._goal, said + self._rng.randint(1, 4)))
            guest.answers.clear()
            guest.awaited = len(burst)
            for number in burst:
                guest.say("x", which=f"m{number}")
            await wait_until(lambda: guest.complete or guest.reason, LIMIT)
            if any(one.code for one in guest.answers):
                await trio.sleep(0.02)

    def _take(self, one: Answer) -> None:
        if one.code or one.id is None:
            return
        if self.counts.setdefault(one.id, one.count) != one.count:
            self.faults.append(f"{one.id} is {self.counts[one.id]} and {one.count}")

    def check(self, redis: RedisServer) -> None:
        """Compare what was answered with what is stored."""
        assert [] == self.faults
        assert list(range(1, self._goal + 1)) == sorted(self.counts.values()), self.counts
        assert str(self._goal) == stored(redis, self.session)


@pytest.mark.parametrize("trouble", ["kill", "pause", "client pause", "flush"])
async def test_no_count_is_skipped_or_doubled(
    redis: RedisServer, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever befalls Redis while clients come, talk, are cut off and come back elsewhere.

    Where it loses everything, they do not come and go: what nobody holds is lost then.
    """
    monkeypatch.setattr(chats, "ATTEMPT_SECONDS", 0.1)
    rng = random.Random(trouble)
    async with (
        Worker(redis).running() as here,
        Worker(redis, "bb.1.1").running() as there,
    ):
        steady = trouble == "flush"
        talkers = [Talker([here, there], rng, 30, steady=steady) for _ in range(12)]

        async def reached(goal: int) -> None:
            await wait_until(lambda: sum(len(one.counts) for one in talkers) >= goal, SECONDS)

        async with trio.open_nursery() as nursery:
            for talker in talkers:
                nursery.start_soon(talker.talk)
            for goal in (80, 220):
                await reached(goal)
                await befall(redis, trouble)
        for talker in talkers:
            talker.check(redis)
        assert ([], []) == (here.bugs, there.bugs)


async def befall(redis: RedisServer, trouble: str) -> None:
    """Do something to Redis."""
    match trouble:
        case "kill":
            redis.kill()
            await trio.sleep(0.1)
            redis.start()
        case "pause":
            redis.pause()
            await trio.sleep(0.7)
            redis.resume()
        case "client pause":
            redis.command("CLIENT", "PAUSE", 300, "ALL")
        case _:
            redis.command("FLUSHALL")
