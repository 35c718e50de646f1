"""The feed: what a client gets of the ledger, in order, and what is known of it afterwards.

The pages that the ledger would give are made here; the way from Redis is in test_reader.
"""

import json
import math
from collections.abc import Sequence

import attrs
import msgspec
import trio

from tests.trioserver.wire import (
    BROADCAST,
    CALM,
    LIMIT,
    PING,
    PONG,
    TEXT,
    Client,
    Worker,
    close,
    frame,
    head,
    page,
    running,
    text,
    token,
    topic,
    until,
)
from trioserver import position
from trioserver.connection import FOLLOW_SECONDS
from trioserver.errors import CloseReason
from trioserver.feed import MAX_ASKS, PAGE_ENTRIES
from trioserver.ledger import Change, Gap, Notice
from trioserver.receipts import Progress

PINGING = attrs.evolve(CALM, ping_interval=1000.0)
"""Pings only where receipts are wanted."""


def place(seq: int, after: int = 0) -> str:
    """Return the place of a notification, or of an update after it."""
    return f"{1_763_630_000_000 + seq}-{seq * position.SEQ_SPAN + after}"


def point(seq: int, after: int = 0, epoch: str = "e0") -> str:
    """Return the point of a notification, or of an update after it."""
    return f"{epoch}.{place(seq, after)}" if seq or after else f"{epoch}.0-0"


def notice(seq: int, *, state: str = "accepted", attempt: int = 1) -> Notice:
    """Return a notification as a page has it."""
    return Notice(place(seq), f"p00-{seq}", "order", b'{"n":%d}' % seq, 0, attempt, state, None)


def envelope(seq: int, previous: str | None = None, unread: int = 1) -> bytes:
    """Return what is published for a notification."""
    before = point(seq - 1) if previous is None else previous
    fields = [before, point(seq), unread, f"p00-{seq}", "order", {"n": seq}, 0, None]
    return b"\x01n" + json.dumps(fields).encode()


def change(
    previous: str, now: str, state: str, ids: Sequence[str], unread: int, by: str = ""
) -> bytes:
    """Return what is published when notifications were read or withdrawn."""
    return b"\x01u" + json.dumps([previous, now, unread, state, list(ids), by]).encode()


async def enter(worker: Worker, where: bytes, data: bytes) -> None:
    """Do what the subscription does with an envelope."""
    remaining = worker.receive(where, data)
    if remaining is not None:
        await remaining


async def come(worker: Worker, query: str = "") -> Client:
    """Connect as ann; return after the 101."""
    client = await worker.dial()
    await client.send(head(f"/ws{query}", credential=token()))
    status, _ = await client.response()
    assert 101 == status
    return client


def the_progress(worker: Worker) -> Progress:
    """Return what is known of the only client."""
    feed = worker.only()._feed
    assert feed is not None
    assert feed._progress is not None
    return feed._progress


async def test_what_was_missed_comes_right_behind_the_first_message_and_in_order() -> None:
    """The position in the first message is the one before the backlog; each frame has its own."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            worker.reading.patient = True
            client = await come(worker)
            worker.reading.answer(
                page(notice(1), notice(2, attempt=3), reached=place(2), unread=2, why="")
            )
            worker.reading.answer(page())  # the head of everyone's stream
            established = await client.message()
            assert ("e0.0-0", True) == (
                str(established["position"])[2:].rpartition(".e0.")[0],
                established["resumed"],
            )
            first, second = await client.message(), await client.message()
            assert {
                "type": "order",
                "id": "p00-1",
                "seq": 1,
                "payload": {"n": 1},
                "timestamp": "2025-11-20T09:13:20.001Z",
                "position": f"1.{point(1)}.e0.0-0",
                "attempt": 1,
                "unread": 2,
            } == first
            assert (2, 3, f"1.{point(2)}.e0.0-0") == (
                second["seq"],
                second["attempt"],
                second["position"],
            )


async def test_what_is_published_meanwhile_follows_what_was_missed() -> None:
    """Held until the page is there; what the page has already does not come twice."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            await enter(worker, BROADCAST, envelope(1))
            worker.reading.patient = True
            client = await come(worker)
            for seq in (1, 2, 3):
                await enter(worker, topic("ann"), envelope(seq))
            worker.reading.answer(page(notice(1), notice(2), reached=place(2)))
            worker.reading.answer(page(reached=place(1)))
            await client.until("connection_established")
            seqs = [(await client.message())["seq"] for _ in range(3)]
            assert [1, 2, 3] == seqs
            assert [] == worker.reading.wanted


async def test_a_hole_is_filled_before_anything_goes_on() -> None:
    """The stream is read from the last point; what came meanwhile comes after it."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            client = await worker.join()
            await enter(worker, topic("ann"), envelope(1))
            worker.reading.patient = True
            await enter(worker, topic("ann"), envelope(3))
            await enter(worker, topic("ann"), envelope(4))
            ((waiter, _),) = worker.reading.wanted
            question = waiter.question(everyone=False)
            assert question is not None
            assert point(1) in question
            worker.reading.answer(page(notice(2), notice(3), reached=place(3)))
            seqs = [(await client.message())["seq"] for _ in range(4)]
            assert [1, 2, 3, 4] == seqs


async def test_a_notification_that_came_already_is_not_sent_again() -> None:
    """As happens when a link to Redis is replaced."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            client = await worker.join()
            for seq in (1, 2, 1, 2, 3):
                await enter(worker, topic("ann"), envelope(seq))
            seqs = [(await client.message())["seq"] for _ in range(3)]
            assert [1, 2, 3] == seqs
            assert 3 == worker.tally.notifications_delivered["live"]


async def test_the_pong_of_a_ping_in_the_same_write_is_the_receipt() -> None:
    """The ping names the position; a pong with anything else in it proves nothing."""
    with trio.fail_after(LIMIT):
        async with running(pace=PINGING) as worker:
            client = await worker.join()
            await enter(worker, topic("ann"), envelope(1))
            assert 1 == (await client.message())["seq"]
            opcode, payload = await client.frame()
            assert (PING, f"1.{point(1)}.e0.0-0") == (opcode, payload.decode())
            await enter(worker, topic("ann"), envelope(2))
            assert 2 == (await client.message())["seq"]
            progress = the_progress(worker)
            await client.send(frame(PONG, b"something else"))
            await client.send(text({"type": "ping"}))
            await client.until("pong")
            assert "" == progress.received
            await client.send(frame(PONG, payload))
            await until(lambda: progress.received == point(1))
            assert 1 == sum(worker.tally.notification_age.counts)
            # The second is asked for a second later, by a ping of its own.
            opcode, payload = await client.frame()
            await client.send(frame(PONG, payload))
            await until(lambda: progress.received == point(2))


async def test_without_pings_there_are_none_for_receipts() -> None:
    """WS_PING_INTERVAL=0 means none at all."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            client = await worker.join()
            await enter(worker, topic("ann"), envelope(1))
            await client.send(text({"type": "ping"}))
            assert [TEXT, TEXT] == [(await client.frame())[0], (await client.frame())[0]]


async def test_everyones_stream_has_its_own_numbers_and_the_position_covers_both() -> None:
    """A durable broadcast says that it is one, and has no count of the unread."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            client = await worker.join()
            await enter(worker, topic("ann"), envelope(1))
            await client.message()
            await enter(worker, BROADCAST, envelope(1))
            got = await client.message()
            assert ("all", 1, f"1.{point(1)}.{point(1)}") == (
                got["stream"],
                got["seq"],
                got["position"],
            )
            assert "unread" not in got


async def test_a_device_goes_on_in_everyones_stream_where_it_stopped() -> None:
    """Even if its own stream has nothing new; those who are new begin at the head."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            first = await worker.join()
            for seq in (1, 2):
                await enter(worker, BROADCAST, envelope(seq))
                await first.message()
            worker.reading.patient = True
            client = await come(worker, "?device=phone")
            worker.reading.answer(page(why="", all_point=point(1)))
            ((waiter, everyone),) = worker.reading.wanted
            assert everyone
            assert point(1) in (waiter.question(everyone=True) or ())
            worker.reading.answer(page(notice(2), start=place(1), reached=place(2), why=""))
            await client.until("connection_established")
            got = await client.message()
            assert ("all", 2) == (got["stream"], got["seq"])
            assert 1 == worker.tally.notifications_delivered["backlog"]


async def test_the_position_of_the_client_is_asked_for() -> None:
    """It beats what is stored of its device; one that says nothing to us is said to be garbage."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            worker.reading.patient = True
            await come(worker, f"?position=1.{point(7)}.{point(3)}&device=phone&ack=1")
            question = worker.reading.wanted[0][0].question(everyone=False) or ()
            assert {point(7), "phone", "ack", "connect"} <= set(question)
            await come(worker, "?position=nonsense")
            question = worker.reading.wanted[1][0].question(everyone=False) or ()
            assert "garbage" in question
            assert "point" not in question


async def test_what_another_device_has_read_is_an_update_and_not_for_the_one_that_asked() -> None:
    """The connection that marked it has its answer already, and still knows where it stands."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            reader, other = await worker.join(), await worker.join()
            await enter(worker, topic("ann"), envelope(1))
            for client in (reader, other):
                await client.message()
            who = next(
                one.connection_id
                for one in worker.listener.connections
                if one._sock.getpeername() == reader.stream.socket.getsockname()
            )
            now = point(1, after=1)
            await enter(worker, topic("ann"), change(point(1), now, "read", ["p00-1"], 0, who))
            await enter(worker, topic("ann"), envelope(2, previous=now))
            assert {
                "type": "update",
                "id": "p00-1",
                "state": "read",
                "unread": 0,
                "position": f"1.{now}.e0.0-0",
            } == await other.message()
            assert [2, 2] == [(await client.message())["seq"] for client in (other, reader)]


async def test_what_was_read_elsewhere_meanwhile_is_sent_and_said_to_be_read() -> None:
    """A device that comes back gets what it missed, and its badge is right."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            worker.reading.patient = True
            client = await come(worker)
            worker.reading.answer(
                page(
                    notice(1, state="read"),
                    Change(place(1, 1), "read", ["p00-1"]),
                    Gap(2, 4, 3, "trimmed"),
                    notice(5),
                    reached=place(5),
                    unread=1,
                )
            )
            worker.reading.answer(page())
            await client.until("connection_established")
            kinds = [await client.message() for _ in range(5)]
            assert ["order", "update", "update", "gap", "order"] == [one["type"] for one in kinds]
            assert {
                "type": "gap",
                "from_seq": 2,
                "to_seq": 4,
                "missing": 3,
                "reason": "trimmed",
            } == kinds[3]
            assert 1 == worker.tally.gaps["trimmed"]


async def test_the_next_page_waits_until_the_client_has_taken_the_last() -> None:
    """A client that reads slowly is not flooded with a thousand notifications."""
    with trio.fail_after(LIMIT):
        async with running(send_buffer=4096) as worker:
            worker.reading.patient = True
            client = await worker.dial(receive_buffer=4096)
            await client.send(head("/ws", credential=token()))
            await until(lambda: len(worker.reading.wanted) == 1)
            bulky = [
                Notice(
                    place(seq), f"p00-{seq}", "order", b'"%s"' % (b"x" * 9000), 0, 1, "sent", None
                )
                for seq in range(1, PAGE_ENTRIES + 1)
            ]
            worker.reading.answer(page(*bulky, reached=place(PAGE_ENTRIES), more=True))
            worker.reading.answer(page())
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert [] == worker.reading.wanted
            assert worker.only().waiting_bytes > 100_000
            status, _ = await client.response()
            assert 101 == status
            for _ in range(PAGE_ENTRIES + 1):
                await client.message()
            await until(lambda: len(worker.reading.wanted) == 1)
            question = worker.reading.wanted[0][0].question(everyone=False) or ()
            assert point(PAGE_ENTRIES) in question
            assert "connect" not in question


async def test_without_the_ledger_the_first_message_says_so_and_the_backlog_follows() -> None:
    """No position then; what comes later says where it is."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            worker.reading.patient = True
            client = await come(worker)
            worker.only().due(worker.pump.now + FOLLOW_SECONDS + 1)
            established = await client.message()
            assert ("unavailable", False) == (established["reason"], established["resumed"])
            assert "position" not in established
            await enter(worker, topic("ann"), envelope(1))
            worker.reading.answer(page(notice(1), reached=place(1)))
            worker.reading.answer(page())
            got = await client.message()
            assert (1, f"1.{point(1)}.e0.0-0") == (got["seq"], got["position"])


async def test_after_an_interruption_both_streams_are_read_from_where_the_client_is() -> None:
    """Once, however often it is asked for."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            client = await worker.join()
            await enter(worker, topic("ann"), envelope(1))
            await client.message()
            worker.reading.patient = True
            worker.only().catch_up()
            worker.only().catch_up()
            questions = [
                waiter.question(everyone=everyone) or ()
                for waiter, everyone in worker.reading.wanted
            ]
            assert [True, True] == [point(1) in questions[0], "e0.0-0" in questions[1]]
            assert 2 == len(questions)


async def test_what_is_not_acknowledged_is_sent_again_so_often_and_no_more() -> None:
    """Read anew from where the acknowledged ends; the rest is for the next connection."""
    pace = attrs.evolve(CALM, ack_wait=30.0, max_redeliveries=2)
    with trio.fail_after(LIMIT):
        async with running(pace=pace) as worker:
            client = await come(worker, "?ack=1&device=phone")
            await client.until("connection_established")
            await enter(worker, topic("ann"), envelope(1))
            await client.message()
            worker.reading.patient = True
            connection, progress = worker.only(), the_progress(worker)
            for attempt in (2, 3):
                connection.due(progress.redeliver_at)
                ((waiter, _),) = worker.reading.wanted
                question = waiter.question(everyone=False) or ()
                assert "point" not in question
                assert {"ack", "phone"} <= set(question)
                worker.reading.answer(page(notice(1, attempt=attempt), reached=place(1)))
                assert attempt == (await client.message())["attempt"]
            connection.due(progress.redeliver_at)
            assert [] == worker.reading.wanted
            assert math.inf == progress.redeliver_at
            assert 2 == worker.tally.redeliveries


async def test_what_is_acknowledged_is_not_sent_again() -> None:
    """As soon as the ledger knows; an ack of a part of it gives time for the rest."""
    pace = attrs.evolve(CALM, ack_wait=30.0, max_redeliveries=5)
    with trio.fail_after(LIMIT):
        async with running(pace=pace) as worker:
            client = await come(worker, "?ack=1")
            await client.until("connection_established")
            for seq in (1, 2):
                await enter(worker, topic("ann"), envelope(seq))
                await client.message()
            progress = the_progress(worker)
            await client.send(text({"type": "ack", "seq": 1}))
            await until(lambda: progress.acked_seq == 1)
            assert math.inf > progress.redeliver_at
            await client.send(text({"type": "ack", "seq": 2}))
            await until(lambda: progress.redeliver_at == math.inf)


async def test_who_asks_the_ledger_for_too_much_is_not_read_until_it_is_answered() -> None:
    """None of its requests is refused or lost; those of others are answered meanwhile."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            client = await worker.join()
            connection = worker.only()
            sibling = await worker.join("bob")
            asked = [text({"type": "read", "up_to": 1, "ref": f"r{n}"}) for n in range(MAX_ASKS)]
            await client.send(b"".join(asked))
            feed = connection._feed
            assert feed is not None
            await until(lambda: feed.asks_too_much)
            await client.send(text({"type": "ping", "ref": "late"}))
            for _ in range(3):
                await sibling.send(text({"type": "ping"}))
                assert "pong" == (await sibling.message())["type"]
            before = worker.tally.messages_in
            feed.marked(0, "r0")
            assert {"type": "read", "unread": 0, "ref": "r0"} == await client.message()
            assert {"type": "pong", "ref": "late"} == await client.message()
            assert before + 1 == worker.tally.messages_in


async def test_what_the_query_cannot_mean_is_refused_before_the_upgrade() -> None:
    """A device that is no name, and an ack that is neither yes nor no."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            for query in ("?device=a%20b", "?device=" + "x" * 65, "?ack=maybe"):
                client = await worker.dial()
                await client.send(head(f"/ws{query}", credential=token()))
                status, _ = await client.response()
                assert 400 == status


async def test_a_planned_close_asks_for_a_last_receipt() -> None:
    """What was sent in the last second would come twice, if nobody knew that it has arrived."""
    with trio.fail_after(LIMIT):
        async with running(pace=PINGING) as worker:
            client = await worker.join()
            await enter(worker, topic("ann"), envelope(1))
            await client.message()
            _, first = await client.frame()
            await client.send(frame(PONG, first))
            progress = the_progress(worker)
            await until(lambda: progress.received == point(1))
            await enter(worker, topic("ann"), envelope(2))
            await client.message()
            worker.only().end(CloseReason.GOING_AWAY)
            opcode, last = await client.frame()
            assert (PING, f"1.{point(2)}.e0.0-0") == (opcode, last.decode())
            assert "goodbye" == (await client.message())["type"]
            await client.send(frame(PONG, last) + close(1001))
            await until(lambda: progress.received == point(2))


async def test_where_a_new_client_stands_in_everyones_stream_is_stored() -> None:
    """Also if it gets nothing: a broadcast while it is away must reach it when it comes back."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            await worker.join()
            await enter(worker, BROADCAST, envelope(1))
            worker.reading.patient = True
            await come(worker)
            question = worker.reading.wanted[0][0].question(everyone=False) or ()
            assert point(1) == question[question.index("all") + 1]


async def test_a_page_of_nothing_but_gaps_is_confirmed_too() -> None:
    """Else the same gap would come with every connection of this device, for ever."""
    with trio.fail_after(LIMIT):
        async with running(pace=PINGING) as worker:
            worker.reading.patient = True
            client = await come(worker, "?device=phone&ack=1")
            worker.reading.answer(page(Gap(1, 4, 4, "expired"), reached=place(4), why="expired"))
            worker.reading.answer(page())
            await client.until("gap")
            opcode, payload = await client.frame()
            assert PING == opcode
            progress = the_progress(worker)
            assert (4, math.inf) == (progress.acked_seq, progress.redeliver_at)
            await client.send(frame(PONG, payload))
            await until(lambda: progress.received == point(4))


async def test_who_does_not_acknowledge_is_not_said_to_have() -> None:
    """The same page, for a client that has not asked for it."""
    with trio.fail_after(LIMIT):
        async with running(pace=PINGING) as worker:
            worker.reading.patient = True
            client = await come(worker, "?device=phone")
            worker.reading.answer(page(Gap(1, 4, 4, "expired"), reached=place(4), why="expired"))
            worker.reading.answer(page())
            await client.until("gap")
            assert 0 == the_progress(worker).acked_seq


async def test_an_update_is_confirmed_too() -> None:
    """A device must not be told of it again when it comes back."""
    with trio.fail_after(LIMIT):
        async with running(pace=PINGING) as worker:
            client = await worker.join()
            now = point(1, after=1)
            await enter(worker, topic("ann"), change("e0.0-0", now, "read", ["p00-1"], 0))
            await client.until("update")
            assert (PING, f"1.{now}.e0.0-0") == tuple(
                part if isinstance(part, int) else part.decode() for part in await client.frame()
            )


async def test_acknowledgements_end_with_their_epoch() -> None:
    """The same numbers are given to others then."""
    pace = attrs.evolve(CALM, ack_wait=30.0, max_redeliveries=5)
    with trio.fail_after(LIMIT):
        async with running(pace=pace) as worker:
            client = await come(worker, "?ack=1")
            await client.until("connection_established")
            await enter(worker, topic("ann"), envelope(1))
            await client.message()
            await client.send(text({"type": "ack", "seq": 1}))
            progress = the_progress(worker)
            await until(lambda: progress.acked_seq == 1)
            worker.reading.patient = True
            worker.only().catch_up()
            found = page(Gap(0, 0, 0, "epoch"), notice(1), reached=place(1), why="epoch")
            worker.reading.answer(msgspec.structs.replace(found, epoch="e1"))
            await client.until("order")
            assert (0, []) == (progress.acked_seq, progress.acked_ids)
            assert math.inf > progress.redeliver_at


async def test_what_nobody_has_asked_about_is_not_answered() -> None:
    """An ack without a ref that could not be told is told later; the client hears nothing."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            client = await worker.join()
            feed = worker.only()._feed
            assert feed is not None
            for ref in (None, "r"):
                feed._asks += 1
                feed.untold(ref)
            error = await client.message()
            assert ("error", "unavailable", "r") == (error["type"], error["code"], error["ref"])
            assert 1 == worker.tally.errors["unavailable"]


async def test_a_broadcast_waits_for_no_acknowledgement() -> None:
    """Published just now or read later: nothing is to be sent again for want of one."""
    pace = attrs.evolve(CALM, ack_wait=30.0, max_redeliveries=5)
    with trio.fail_after(LIMIT):
        async with running(pace=pace) as worker:
            client = await come(worker, "?ack=1")
            await client.until("connection_established")
            await enter(worker, BROADCAST, envelope(1))
            await client.message()
            assert math.inf == the_progress(worker).redeliver_at


async def test_updates_for_who_takes_arrays_are_messages_of_their_own() -> None:
    """What is read elsewhere in one go comes as so many updates, whatever else comes with it."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            client = await come(worker, "?batch=1")
            ids = [f"p00-{number}" for number in range(66)]
            worker.delivery.receive(topic("ann"), envelope(1))
            for seq, some in ((1, ids[:64]), (2, ids[64:])):
                fields = [point(1, seq - 1), point(1, seq), 0, "read", some, "another"]
                worker.delivery.receive(topic("ann"), b"\x01u" + json.dumps(fields).encode())
            worker.delivery.turn_over()
            got: list[dict[str, object]] = []
            while not got or got[-1].get("id") != ids[-1]:
                opcode, payload = await client.frame()
                if opcode == TEXT:
                    found = json.loads(payload)
                    got.extend(found if isinstance(found, list) else [found])
            assert ids == [one["id"] for one in got if one["type"] == "update"]
