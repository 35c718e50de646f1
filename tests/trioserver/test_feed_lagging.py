"""Kept notifications of a client that does not keep up: they stay in the ledger until it does."""

import json

import pytest
import trio

from tests.trioserver.test_feed import enter, place, point
from tests.trioserver.wire import BROADCAST, LIMIT, Client, Worker, page, running, topic
from trioserver import frames, position
from trioserver.errors import CloseReason
from trioserver.ledger import Notice
from trioserver.outbox import JOINED_BYTES, OutboxLimits
from trioserver.shared import Waiting
from trioserver.slow_policies import Policies, Policy

FILLING = "x" * 2_000

PAGE = 8


class Stream:
    """Stands where the reader stands: a stream of bulky notifications, read page by page.

    Args:
        everyone: Whether it is that of everyone.
    """

    def __init__(self, *, everyone: bool) -> None:
        self.everyone = everyone
        self.newest = 0
        self.reads: list[int] = []
        """After which notification each read began."""

    def want(self, waiter: Waiting, *, everyone: bool) -> None:
        """Answer at once."""
        question = waiter.question(everyone=everyone)
        if question is None:
            return
        if everyone is not self.everyone:
            waiter.answered(page(), everyone=everyone)
            return
        where = str(question[question.index("point") + 1]) if "point" in question else "e0.0-0"
        first = position.seq_of(where)
        self.reads.append(first)
        last = min(self.newest, first + PAGE)
        notices = [
            Notice(place(seq), f"p00-{seq}", "order", payload(seq), 0, 1, "accepted", None)
            for seq in range(first + 1, last + 1)
        ]
        found = page(
            *notices,
            start=place(first) if first else "0-0",
            reached=place(last) if last else "0-0",
            more=last < self.newest,
        )
        waiter.answered(found, everyone=everyone)

    async def publish(self, worker: Worker, count: int) -> None:
        """Keep so many more, and publish each."""
        where = BROADCAST if self.everyone else topic("ann")
        for _ in range(count):
            await enter(worker, where, self.envelope())

    def envelope(self) -> bytes:
        """Keep one more; return what is published for it."""
        self.newest += 1
        seq = self.newest
        fields = [point(seq - 1), point(seq), 1, f"p00-{seq}", "order", json.loads(payload(seq))]
        return b"\x01n" + json.dumps([*fields, 0, None]).encode()


def payload(seq: int) -> bytes:
    """Return the payload of a notification."""
    return json.dumps({"n": seq, "filling": FILLING}).encode()


async def read(client: Client, last: int) -> tuple[list[object], list[dict[str, object]]]:
    """Read up to a notification; return the seqs that came, and what else did."""
    seqs: list[object] = []
    others: list[dict[str, object]] = []
    while last not in seqs:
        message = await client.message()
        if "seq" in message:
            seqs.append(message["seq"])
        else:
            others.append({**message, "behind": seqs[-1] if seqs else 0})
    return seqs, others


@pytest.mark.parametrize("everyone", [False, True])
async def test_what_a_slow_client_does_not_take_stays_in_the_ledger(*, everyone: bool) -> None:
    """It is told up to where it was sent, and gets all the rest, in order, as it reads on."""
    spilled: list[tuple[Policy, int]] = []
    limits = OutboxLimits(max_bytes=64 << 10, on_given_up=lambda *told: spilled.append(told))
    with trio.fail_after(LIMIT):
        async with running(limits=limits, send_buffer=4096) as worker:
            stream = Stream(everyone=everyone)
            worker.shared.reader = stream
            worker.shared.policies = Policies.of(["broadcast=spill" if everyone else "inbox=spill"])
            client = await worker.join(receive_buffer=4096)
            before = len(stream.reads)
            await stream.publish(worker, 200)
            waiting = worker.only().outbox.waiting_bytes
            assert 0 < waiting < (64 << 10) * 3 / 4
            assert before == len(stream.reads), "nothing is read while it takes nothing"
            assert [(Policy.SPILL, 1)] == spilled
            seqs, (lagging,) = await read(client, 200)
            assert list(range(1, 201)) == seqs
            behind = lagging["behind"]
            assert isinstance(behind, int)
            own, all_ = ("e0.0-0", point(behind)) if everyone else (point(behind), "e0.0-0")
            expected = {"type": "lagging", "position": f"1.{own}.{all_}", "behind": behind}
            assert expected | ({"stream": "all"} if everyone else {}) == lagging
            assert list(range(behind, 200, PAGE)) == stream.reads[before:]
            await stream.publish(worker, 1)
            assert 201 == (await client.message())["seq"]
            assert [] == worker.ends


async def test_the_other_stream_goes_on_alone() -> None:
    """A policy for what goes to everyone says nothing of the user's own notifications."""
    limits = OutboxLimits(max_bytes=64 << 10)
    with trio.fail_after(LIMIT):
        async with running(limits=limits, send_buffer=4096) as worker:
            stream = Stream(everyone=False)
            worker.shared.reader = stream
            worker.shared.policies = Policies.of(["broadcast=spill"])
            await worker.join(receive_buffer=4096)
            connection = worker.only()
            await stream.publish(worker, 200)
            assert CloseReason.TOO_SLOW is connection.reason


async def test_what_is_looked_for_again_waits_for_a_slow_client() -> None:
    """After an interruption the streams are read; not for whom much waits already."""
    limits = OutboxLimits(max_bytes=64 << 10)
    with trio.fail_after(LIMIT):
        async with running(limits=limits, send_buffer=4096) as worker:
            stream = Stream(everyone=False)
            worker.shared.reader = stream
            worker.shared.policies = Policies.of(["inbox=spill"])
            client = await worker.join(receive_buffer=4096)
            outbox = worker.only().outbox
            while not outbox.half_full:
                await stream.publish(worker, 1)
            before = len(stream.reads)
            stream.newest += 50  # and the link to Redis was lost
            feed = worker.only()._feed
            assert feed is not None
            feed.catch_up()
            assert before == len(stream.reads)
            seqs, (lagging,) = await read(client, stream.newest)
            assert list(range(1, stream.newest + 1)) == seqs
            assert "lagging" == lagging["type"]


async def test_what_one_turn_brings_is_not_too_much() -> None:
    """What is held until the turn is over counts as well; less may wait than is joined."""
    limits = OutboxLimits(max_bytes=JOINED_BYTES // 2)
    with trio.fail_after(LIMIT):
        async with running(limits=limits, send_buffer=4096) as worker:
            stream = Stream(everyone=False)
            worker.shared.reader = stream
            worker.shared.policies = Policies.of(["inbox=spill"])
            client = await worker.join(receive_buffer=4096)
            for _ in range(100):
                assert worker.delivery.receive(topic("ann"), stream.envelope()) is None
            worker.delivery.turn_over()
            assert worker.only().reason is None
            seqs, others = await read(client, 100)
            assert list(range(1, 101)) == seqs
            assert "lagging" in [other["type"] for other in others]


@pytest.mark.parametrize("filled", [False, True])
async def test_what_came_during_a_read_is_left_as_well(*, filled: bool) -> None:
    """Entries that were held for the end of a page may be too many for a slow client."""
    limits = OutboxLimits(max_bytes=64 << 10)
    with trio.fail_after(LIMIT):
        async with running(limits=limits, send_buffer=4096) as worker:
            worker.shared.policies = Policies.of(["inbox=spill"])
            client = await worker.join(receive_buffer=4096)
            worker.reading.patient = True
            feed, outbox = worker.only()._feed, worker.only().outbox
            assert feed is not None
            stream = Stream(everyone=False)
            feed.catch_up()
            await stream.publish(worker, 30)
            while filled and not outbox.half_full:
                outbox.offer(frames.encode_text(b'{"type":"other","x":"%s"}' % FILLING.encode()))
            worker.reading.answer(page())
            worker.reading.answer(page())
            assert [] == worker.reading.wanted
            worker.shared.reader = stream
            seqs, others = await read(client, 30)
            assert list(range(1, 31)) == seqs
            (lagging,) = [other for other in others if other["type"] == "lagging"]
            assert lagging["behind"] == stream.reads[0]
            assert filled == (stream.reads[0] == 0)
            assert str(lagging["position"]).startswith(f"1.{point(stream.reads[0])}.")
