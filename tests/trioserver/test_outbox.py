"""The outbox over real sockets with tiny buffers, against a list as its model."""

import contextlib
import json
import random
import socket
import zlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.trioserver.wire import Pair, split_frames
from trioserver import frames
from trioserver.deflate import Compressor
from trioserver.envelope import Change, Entry
from trioserver.outbox import (
    CROWD_BYTES,
    JOINED_BYTES,
    Budget,
    DeflatingOutbox,
    Outbox,
    OutboxLimits,
)
from trioserver.slow_policies import Policy
from trioserver.soft import Soft


class Owner:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.blocks = 0
        self.overflows = 0
        self.breaks = 0
        self.entries: list[tuple[Entry, bool]] = []
        self.of_topics: list[tuple[bytes, Entry, bytes]] = []

    def blocked(self) -> None:
        """Count."""
        self.blocks += 1

    def overflowed(self) -> None:
        """Count."""
        self.overflows += 1

    def broke(self) -> None:
        """Count."""
        self.breaks += 1

    def entered(self, entry: Entry, *, everyone: bool) -> bool:
        """Keep it."""
        self.entries.append((entry, everyone))
        return True

    def entered_topic(self, topic: bytes, entry: Entry, frame: bytes) -> bool:
        """Keep it."""
        self.of_topics.append((topic, entry, frame))
        return True


def drain(sock: socket.socket, most: int = 1 << 20) -> bytes:
    """Read what is there, up to ``most``."""
    found = b""
    with contextlib.suppress(BlockingIOError):
        while len(found) < most and (data := sock.recv(most - len(found))):
            found += data
    return found


def everything(outbox: Outbox, pair: Pair) -> bytes:
    """Flush and read until nothing waits."""
    found = b""
    while not outbox.empty:
        outbox.flush()
        found += drain(pair.client)
    return found + drain(pair.client)


class Overflowing(Owner):
    """Does what a connection does: a farewell that jumps the queue."""

    outbox: Outbox

    def overflowed(self) -> None:
        """Finish."""
        super().overflowed()
        self.outbox.finish(b"<farewell>", drop=True)


class OutboxMachine(RuleBasedStateMachine):
    """Any history of one outbox, with a reader that stops and goes on as it likes."""

    LIMITS = OutboxLimits(max_bytes=60_000, max_frames=12)

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(1)
        self.owner = Overflowing()
        self.outbox = self.owner.outbox = Outbox(self.pair.server, self.LIMITS, self.owner)
        self.accepted: list[bytes] = []
        """The model: what was accepted and not dropped, in order."""
        self.read = b""
        self.number = 0
        self.finished = False
        self.dropped = False

    def teardown(self) -> None:
        """In the end, whole frames in their order, then the farewell."""
        if self.outbox.corked:
            self.uncork()
        self.read += everything(self.outbox, self.pair)
        self.pair.__exit__()
        if self.dropped or self.owner.overflows:
            self.check_dropped()
        else:
            assert b"".join(self.accepted) == self.read

    def check_dropped(self) -> None:
        """Check that whole frames from the beginning came, then the farewell."""
        body, mark, rest = self.read.partition(b"<farewell>")
        assert (b"<farewell>", b"") == (mark, rest)
        count = 0
        while body:
            assert body.startswith(self.accepted[count])
            body = body[len(self.accepted[count]) :]
            count += 1

    @rule(size=st.sampled_from([1, 10, 1000, 5_000, 20_000, 59_000]))
    def offer(self, size: int) -> None:
        """Accepted or refused, never half."""
        self.number += 1
        frame = b"<%d:" % self.number + b"x" * size + b">"
        was_closed = self.outbox.closed
        taken = self.outbox.offer(frame)
        assert not (was_closed and taken)
        if taken:
            self.accepted.append(frame)
        elif not was_closed:
            assert self.owner.overflows == 1

    @rule(most=st.sampled_from([1, 100, 4_000, 50_000]))
    def reader_reads(self, most: int) -> None:
        """The client takes a little or a lot."""
        self.read += drain(self.pair.client, most)

    @rule()
    def flush(self) -> None:
        """The pump finds the socket writable."""
        self.outbox.flush()

    @precondition(lambda self: self.outbox.empty and not self.outbox.closed)
    @rule()
    def cork(self) -> None:
        """Hold back."""
        self.outbox.cork()
        self.corked_at = len(self.accepted)

    @precondition(lambda self: self.outbox.corked)
    @rule()
    def uncork(self) -> None:
        """The first message overtakes what was held back, and nothing else."""
        self.accepted.insert(self.corked_at, b"<first>")
        overflows = self.owner.overflows
        self.outbox.uncork(b"<first>")
        if self.owner.overflows > overflows:
            self.dropped = True

    @precondition(lambda self: not self.finished and not self.outbox.closed)
    @rule(drop=st.booleans())
    def finish(self, *, drop: bool) -> None:
        """The farewell is the last that is said."""
        if self.outbox.corked:
            del self.accepted[self.corked_at :]
        self.finished = True
        self.dropped = drop
        self.outbox.finish(b"<farewell>", drop=drop)
        self.accepted.append(b"<farewell>")
        assert self.outbox.closed

    @invariant()
    def bounded(self) -> None:
        """Bytes and frames stay within their bounds; only a farewell goes beyond."""
        room = len(b"<farewell>") if self.outbox.closed else 0
        assert 0 <= self.outbox.waiting_bytes <= self.LIMITS.max_bytes + room
        waiting = self.outbox._waiting
        if waiting is not None:
            held = sum(map(len, waiting)) - self.outbox._offset
            assert held == self.outbox.waiting_bytes
            assert len(waiting) <= self.LIMITS.max_frames + bool(room)

    @invariant()
    def told_once(self) -> None:
        """The owner hears of an overflow at most once, and of no failure."""
        assert self.owner.overflows <= 1
        assert self.owner.breaks == 0


OutboxMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestOutbox = OutboxMachine.TestCase


def made(pair: Pair, max_bytes: int = 0, max_frames: int = 0) -> tuple[Outbox, Owner]:
    """Return an outbox on one end."""
    owner = Owner()
    limits = OutboxLimits(max_bytes=max_bytes, max_frames=max_frames)
    return Outbox(pair.server, limits, owner), owner


def fill(outbox: Outbox, size: int = 1000) -> int:
    """Offer frames until one waits; return how many."""
    count = 0
    while outbox.empty:
        assert outbox.offer(b"%08d" % count + b"x" * (size - 8))
        count += 1
    return count


def test_an_empty_outbox_writes_at_once() -> None:
    """No pump is needed while the client reads."""
    with Pair() as pair:
        outbox, owner = made(pair)
        assert outbox.offer(b"hello")
        assert outbox.empty
        assert b"hello" == drain(pair.client)
        assert 0 == owner.blocks


def test_a_full_socket_blocks_once_and_loses_nothing() -> None:
    """Order in is order out over any number of partial writes."""
    with Pair() as pair:
        outbox, owner = made(pair)
        count = fill(outbox)
        for _ in range(200):
            outbox.offer(b"%08d" % count + b"x" * 992)
            count += 1
        assert 1 == owner.blocks
        found = everything(outbox, pair)
        assert b"".join(b"%08d" % i + b"x" * 992 for i in range(count)) == found
        assert (0, True) == (outbox.waiting_bytes, outbox.empty)


@pytest.mark.parametrize(("max_bytes", "max_frames"), [(10_000, 0), (0, 10), (10_000, 10)])
def test_overflow_is_told_once_and_ends_it(max_bytes: int, max_frames: int) -> None:
    """The frame that would pass a bound is refused, and so is every later one."""
    with Pair() as pair:
        outbox, owner = made(pair, max_bytes, max_frames)
        fill(outbox)
        while outbox.offer(b"x" * 1000):
            assert not max_bytes or outbox.waiting_bytes <= max_bytes
        for _ in range(5):
            assert not outbox.offer(b"")
        assert (1, 0, True) == (owner.overflows, owner.breaks, outbox.closed)


def test_a_frame_larger_than_the_bound_never_waits() -> None:
    """Bytes waiting are within the bound always, also those of the first frame that waits."""
    with Pair() as pair:
        outbox, owner = made(pair, max_bytes=1000)
        outbox.offer(b"x" * 4_000_000)
        assert outbox.waiting_bytes <= 1000
        assert 1 == owner.overflows


def test_a_broken_socket_is_told_once_by_offer() -> None:
    """Offering never raises; it returns False and says so once."""
    with Pair() as pair:
        outbox, owner = made(pair)
        pair.server.shutdown(socket.SHUT_WR)
        assert not outbox.offer(b"x")
        assert not outbox.offer(b"x")
        assert (1, 0, True) == (owner.breaks, owner.overflows, outbox.closed)


def test_a_broken_socket_is_told_once_by_flush() -> None:
    """Flushing never raises either."""
    with Pair() as pair:
        outbox, owner = made(pair)
        fill(outbox)
        pair.server.shutdown(socket.SHUT_WR)
        assert not outbox.flush()
        assert not outbox.flush()
        assert not outbox.offer(b"x")
        assert (1, True, 0) == (owner.breaks, outbox.empty, outbox.waiting_bytes)


def test_flush_tells_whether_anything_moved() -> None:
    """Progress is what the write deadline counts."""
    with Pair() as pair:
        outbox, _ = made(pair)
        assert not outbox.flush()
        fill(outbox)
        assert not outbox.flush()
        drain(pair.client)
        assert outbox.flush()


def test_a_corked_outbox_holds_everything_under_the_same_bounds() -> None:
    """Nothing overtakes the first message; too much is an overflow."""
    with Pair() as pair:
        outbox, owner = made(pair, max_bytes=100, max_frames=3)
        outbox.cork()
        assert not outbox.empty
        assert outbox.offer(b"b")
        assert outbox.offer(b"c")
        assert not outbox.flush()
        assert b"" == drain(pair.client)
        assert outbox.send_past_cork(b"101")
        outbox.uncork(b"a")
        assert outbox.offer(b"d")
        assert b"101abcd" == drain(pair.client)
        again, owner = made(pair, max_bytes=100, max_frames=3)
        again.cork()
        assert [True, True, True, False] == [again.offer(b"x") for _ in range(4)]
        assert 1 == owner.overflows


def test_a_farewell_while_corked_goes_alone() -> None:
    """What was held back would have to follow the farewell, and nothing may."""
    with Pair() as pair:
        outbox, _ = made(pair)
        outbox.cork()
        outbox.offer(b"held")
        outbox.finish(b"bye")
        assert not outbox.offer(b"more")
        assert b"bye" == drain(pair.client)


def test_a_dropped_backlog_leaves_the_frame_that_was_begun() -> None:
    """Half a frame would make every later byte garbage."""
    with Pair() as pair:
        outbox, _ = made(pair)
        count = fill(outbox, 5000)
        for _ in range(10):
            outbox.offer(b"never" * 100)
        begun = bool(outbox._offset)
        outbox.finish(b"bye", drop=True)
        found = everything(outbox, pair)
        assert found.endswith(b"bye")
        assert b"never" not in found
        assert (count if begun else count - 1) * 5000 + 3 == len(found)


def test_finish_again_does_nothing_and_abandon_forgets() -> None:
    """The first farewell counts; abandon may be called at any time, any number of times."""
    with Pair() as pair:
        outbox, _ = made(pair)
        fill(outbox)
        outbox.finish(b"one")
        outbox.finish(b"two")
        assert everything(outbox, pair).endswith(b"one")
        outbox, _ = made(pair)
        fill(outbox)
        outbox.abandon()
        outbox.abandon()
        assert (True, 0, True) == (outbox.empty, outbox.waiting_bytes, outbox.closed)
        assert not outbox.flush()
        silent, _ = made(pair)
        silent.finish(b"")
        assert silent.closed


@pytest.mark.parametrize("limits", [OutboxLimits(), OutboxLimits(max_bytes=0, max_frames=0)])
def test_crowded_comes_at_a_quarter(limits: OutboxLimits) -> None:
    """Also where there is no limit: reading on would be unbounded then."""
    with Pair() as pair:
        outbox = Outbox(pair.server, limits, Owner())
        assert [False] == [outbox.crowded]
        fill(outbox)
        frames = 0
        while not outbox.crowded:
            assert outbox.offer(b"x")
            frames += 1
        assert frames <= 64
        other = Outbox(pair.server, limits, Owner())
        other.cork()
        assert other.offer(b"x" * (CROWD_BYTES // 4 + 1))
        assert other.crowded


PING = b"\x89\x04here"
WORDS = frames.encode_text(b'{"type":"notification","payload":"%b"}' % (b"again " * 1000))


def made_deflating(pair: Pair, max_bytes: int = 0) -> tuple[DeflatingOutbox, Owner]:
    """Return an outbox that compresses, on one end."""
    owner = Owner()
    limits = OutboxLimits(max_bytes=max_bytes, max_frames=0)
    return DeflatingOutbox(pair.server, limits, owner, Compressor()), owner


def inflated(data: bytes) -> tuple[bytes, bytes]:
    """Return the text of the one compressed frame in ``data``, and what follows it."""
    assert 0xC1 == data[0], "final, compressed, text"
    assert 126 != data[1], "short enough for one byte of length"
    size = data[1]
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    text = inflate.decompress(data[2 : 2 + size] + b"\0\0\xff\xff")
    return text, data[2 + size :]


def deliver_with(outbox: Outbox, frame: bytes) -> bool:
    """Deliver a frame and a ping in one turn; return whether both will go out."""
    return outbox.deliver(frame) and outbox.hold(PING) and outbox.release()


def test_a_frame_leaves_together_with_its_ping() -> None:
    """In this order and in one write, so that the pong speaks of the frame before it."""
    with Pair() as pair:
        outbox, owner = made(pair)
        assert deliver_with(outbox, b"frame")
        assert b"frame" + PING == drain(pair.client)
        assert outbox.empty
        assert 0 == owner.blocks


def test_a_ping_behind_a_compressed_frame_is_not_compressed() -> None:
    """RFC 7692: a control frame never is."""
    with Pair(1 << 16) as pair:
        outbox, _ = made_deflating(pair)
        assert deliver_with(outbox, WORDS)
        data = drain(pair.client)
        assert len(data) < len(WORDS)
        assert (frames.payload_of(WORDS), PING) == inflated(data)
        assert deliver_with(outbox, frames.encode_text(b"{}"))
        assert frames.encode_text(b"{}") + PING == drain(pair.client)


def test_a_frame_is_compressed_once_with_and_without_a_ping() -> None:
    """Some connections of a user are due for a ping, others are not."""
    with Pair(1 << 16) as pair:
        outbox, _ = made_deflating(pair)
        assert outbox.deliver(WORDS)
        assert outbox.release()
        alone = drain(pair.client)
        packed = outbox._compressor._packed
        assert deliver_with(outbox, WORDS)
        assert alone + PING == drain(pair.client)
        assert packed is outbox._compressor._packed


@pytest.mark.parametrize("deflating", [False, True])
def test_a_frame_and_its_ping_wait_and_are_refused_together(*, deflating: bool) -> None:
    """Half of the two would be a ping for nothing, or a frame that is told to be lost."""
    maker = made_deflating if deflating else made
    noise = random.Random(1).randbytes(20_000)
    for too_much in (0, 1):
        with Pair() as pair:
            outbox, owner = maker(pair, 20_000)
            fill(outbox)
            head = frames.encode_text(noise)[:4]
            room = 20_000 - outbox.waiting_bytes - len(head) - len(PING)
            frame = frames.encode_text(noise[: room + too_much])
            assert bool(too_much) != deliver_with(outbox, frame)
            assert (too_much, bool(too_much)) == (owner.overflows, outbox.closed)
            assert too_much or 20_000 == outbox.waiting_bytes
            assert bool(too_much) != everything(outbox, pair).endswith(frame + PING)


@pytest.mark.parametrize("deflating", [False, True])
def test_a_frame_and_its_ping_are_held_while_corked(*, deflating: bool) -> None:
    """They are one of the frames that wait for the first message."""
    with Pair(1 << 16) as pair:
        outbox, _ = (made_deflating if deflating else made)(pair)
        outbox.cork()
        assert deliver_with(outbox, b"\x81\x05frame")
        assert b"" == drain(pair.client)
        outbox.uncork(b"first")
        assert b"first\x81\x05frame" + PING == drain(pair.client)


@pytest.mark.parametrize("deflating", [False, True])
def test_a_frame_and_its_ping_on_a_broken_socket(*, deflating: bool) -> None:
    """The owner is told once, as of any frame."""
    with Pair() as pair:
        outbox, owner = (made_deflating if deflating else made)(pair)
        pair.server.shutdown(socket.SHUT_WR)
        assert not deliver_with(outbox, WORDS)
        assert not deliver_with(outbox, WORDS)
        assert (1, 0) == (owner.breaks, owner.overflows)


class Hesitant(Owner):
    """Wants every second entry."""

    def entered(self, entry: Entry, *, everyone: bool) -> bool:
        """Keep it; say whether it is wanted."""
        super().entered(entry, everyone=everyone)
        return len(self.entries) % 2 == 1


@pytest.mark.parametrize("everyone", [False, True])
def test_entries_of_the_ledger_are_for_the_owner_to_judge(*, everyone: bool) -> None:
    """The outbox itself sends nothing, whatever its state, and hands back the answer."""
    entry = Change("e0.0-0", "e0.1-1", 0, "read", ["p07-x"])
    with Pair() as pair:
        owner = Hesitant()
        outbox = Outbox(pair.server, OutboxLimits(), owner)
        assert [True, False] == [outbox.enter(entry, everyone=everyone) for _ in range(2)]
        outbox.abandon()
        assert outbox.enter(entry, everyone=everyone)
        assert [(entry, everyone)] * 3 == owner.entries
        assert b"" == drain(pair.client)


def test_the_budget_knows_what_waits_everywhere() -> None:
    """However bytes come and go (held back, partly sent, flushed, dropped), the sum is right."""
    budget = Budget(0)
    limits = OutboxLimits(max_bytes=1 << 20, max_frames=1000, budget=budget)
    with Pair() as one, Pair() as two:
        boxes = [Outbox(pair.server, limits, Owner()) for pair in (one, two)]

        def settled() -> bool:
            return budget.used == sum(box.waiting_bytes for box in boxes)

        boxes[0].cork()
        for size in (10, 70_000, 5):
            for box in boxes:
                assert box.offer(b"x" * size)
                assert settled()
        assert budget.used > 70_000
        boxes[0].uncork(b"first")
        assert settled()
        for _ in range(3):
            drain(two.client)
            boxes[1].flush()
            assert settled()
        boxes[0].finish(b"bye", drop=True)
        assert settled()
        boxes[1].finish(b"bye")
        assert settled()
        boxes[0].abandon()
        boxes[1].abandon()
        assert 0 == budget.used


def test_beyond_the_budget_somebody_must_make_room() -> None:
    """Asked once for each excess, not again for what making room costs; then all goes on."""
    budget = Budget(100_000)
    limits = OutboxLimits(max_bytes=1 << 20, max_frames=1000, budget=budget)
    asked: list[int] = []
    with Pair() as one, Pair() as two:
        large, small = [Outbox(pair.server, limits, Owner()) for pair in (one, two)]

        def make_room() -> None:
            asked.append(budget.used)
            large.finish(b"farewell", drop=True)

        budget.on_exceeded = make_room
        small.cork()
        assert small.offer(b"y" * 1000)
        while not asked:
            assert large.offer(b"x" * 9000) or asked
        assert 1 == len(asked)
        assert asked[0] > 100_000
        assert not large.offer(b"x")
        assert budget.used < 20_000
        assert small.offer(b"y" * 1000)
        assert 1 == len(asked)


def test_a_frame_that_costs_its_own_outbox_is_not_accepted() -> None:
    """Whoever offered it is told that it will not come."""
    budget = Budget(50_000)
    limits = OutboxLimits(max_bytes=1 << 20, max_frames=1000, budget=budget)
    with Pair() as pair:
        outbox = Outbox(pair.server, limits, Owner())
        budget.on_exceeded = lambda: outbox.finish(b"", drop=True)
        while outbox.offer(b"x" * 9000):
            assert budget.used <= budget.limit
        assert outbox.closed


def test_who_finds_no_room_is_not_asked_for_every_byte() -> None:
    """If nothing can be given up, the question comes again only when much more waits."""
    asked: list[int] = []
    budget = Budget(1600)
    budget.on_exceeded = lambda: asked.append(budget.used)
    for _ in range(40):
        budget.take(50)
    assert [1650, 1800, 1950] == asked
    budget.take(-1000)
    budget.take(700)
    assert 4 == len(asked)


class Counted(socket.socket):
    """A socket that counts its writes."""

    writes = 0

    def send(self, data: object, flags: int = 0) -> int:
        """Count, and write."""
        self.writes += 1
        return super().send(data, flags)  # type: ignore[arg-type] # whatever the outbox gives

    def sendmsg(self, *arguments: object) -> int:
        """Count, and write."""
        self.writes += 1
        return super().sendmsg(*arguments)  # type: ignore[arg-type] # the same


TEXTS = [frames.encode_text(b'{"n":%d}' % number) for number in range(5)]


@pytest.mark.parametrize("deflating", [False, True])
def test_what_is_delivered_in_one_turn_leaves_in_one_write(*, deflating: bool) -> None:
    """Nothing goes out before the turn is over; then all of it, in order, at once."""
    with Pair(1 << 16) as pair:
        counted = Counted(fileno=pair.server.detach())
        with counted:
            limits = OutboxLimits()
            made_one = (
                DeflatingOutbox(counted, limits, Owner(), Compressor())
                if deflating
                else Outbox(counted, limits, Owner())
            )
            for text in TEXTS:
                assert made_one.deliver(text)
            assert (0, [made_one]) == (counted.writes, limits.turn.outboxes)
            assert 0 == limits.turn.over()
            assert (1, b"".join(TEXTS)) == (counted.writes, drain(pair.client))
            assert 0 == limits.turn.over()
            assert 1 == counted.writes


def test_who_takes_several_messages_in_one_frame_gets_an_array() -> None:
    """A client that has asked for it; what comes alone stays alone, pings stay pings."""
    with Pair(1 << 16) as pair:
        outbox, _ = made(pair)
        outbox.joins = True
        for text in TEXTS:
            outbox.deliver(text)
        outbox.hold(PING)
        outbox.release()
        array = b"[" + b",".join(frames.payload_of(text) for text in TEXTS) + b"]"
        assert frames.encode_text(array) + PING == drain(pair.client)
        outbox.deliver(TEXTS[0])
        outbox.release()
        assert TEXTS[0] == drain(pair.client)


def test_what_is_offered_meanwhile_comes_behind() -> None:
    """An answer does not overtake what was delivered before it; neither does the farewell."""
    with Pair(1 << 16) as pair:
        outbox, _ = made(pair)
        outbox.deliver(b"one")
        outbox.offer(b"two")
        outbox.deliver(b"three")
        outbox.finish(b"bye")
        assert outbox.release()
        assert b"onetwothreebye" == drain(pair.client)
        assert not outbox.deliver(b"late")


def test_what_is_held_is_given_up_with_the_rest() -> None:
    """Who is thrown out as too slow gets nothing more but the farewell."""
    with Pair(1 << 16) as pair:
        outbox, _ = made(pair)
        outbox.deliver(b"one")
        outbox.finish(b"bye", drop=True)
        assert outbox.release()
        assert b"bye" == drain(pair.client)


def test_what_is_held_while_corked_comes_behind_the_first() -> None:
    """The first message is the first, whatever comes in the turn in which it is sent."""
    with Pair(1 << 16) as pair:
        outbox, _ = made(pair)
        outbox.cork()
        outbox.deliver(b"held")
        outbox.uncork(b"first")
        outbox.release()
        assert b"firstheld" == drain(pair.client)


def test_a_fast_client_may_get_more_in_a_turn_than_may_wait() -> None:
    """The bounds are about what waits; what is put together must not pass them by itself."""
    with Pair(1 << 20) as pair:
        outbox, owner = made(pair, 1000)
        for _ in range(50):
            outbox.deliver(b"\x81" + b"x" * 99)
        assert outbox.release()
        assert 0 == owner.overflows
        assert 5000 == len(drain(pair.client))


def test_an_entry_of_a_topic_goes_to_the_owner_with_its_frame() -> None:
    """The frame is the same for all, so that it is made once."""
    entry = Change("e0.0-0", "e0.1-1", 0, "read", ["t07-x"])
    with Pair() as pair:
        outbox, owner = made(pair)
        assert outbox.enter_topic(b"topic:news", entry, b"frame")
        assert [(b"topic:news", entry, b"frame")] == owner.of_topics
        assert b"" == drain(pair.client)


def softs(count: int, size: int) -> list[Soft]:
    """Return frames of a ticker that may be given up."""
    return [
        Soft(
            frames.encode_text(b'{"n":%d,"x":"%b"}' % (number, b"x" * size)),
            Policy.DROP_OLDEST,
            "ticker",
            "t",
        )
        for number in range(count)
    ]


def test_what_is_held_behind_a_frame_that_is_given_up_goes_out() -> None:
    """A soft frame that finds no room costs itself, and nothing that came with it."""
    with Pair() as pair:
        outbox, owner = made(pair, 20_000, 4)
        fill(outbox)
        large = softs(1, 30_000)[0]
        for frame in (large, TEXTS[0], TEXTS[1]):
            assert outbox.deliver(frame)
        assert not outbox.release()
        assert 0 == owner.overflows
        assert everything(outbox, pair).endswith(TEXTS[0] + TEXTS[1])


def test_soft_frames_alone_never_end_a_connection_however_many_come_in_a_turn() -> None:
    """What is put together for a client that keeps up is not put together for one that does not."""
    with Pair() as pair:
        outbox, owner = made(pair, 200_000)
        for frame in softs(128, 10_000):
            outbox.deliver(frame)
        outbox.release()
        assert (0, False) == (owner.overflows, outbox.closed)
        found, rest = split_frames(everything(outbox, pair))
        assert b"" == rest
        messages = [json.loads(payload) for _, payload in found]
        missing = sum(one["missing"] for one in messages if one.get("type") == "gap")
        numbers = [one["n"] for one in messages if "n" in one]
        assert 128 == missing + len(numbers)
        assert numbers == sorted(numbers)
        assert 127 == numbers[-1]


def test_a_soft_frame_alone_in_a_turn_stays_soft() -> None:
    """Only what leaves with others is written as one with them."""
    with Pair() as pair:
        outbox, owner = made(pair, 20_000)
        outbox.deliver(softs(1, 30_000)[0])
        outbox.release()
        assert (0, False) == (owner.overflows, outbox.closed)


def test_much_in_one_turn_goes_out_before_it_is_over() -> None:
    """What is held is bounded as well."""
    with Pair(1 << 20) as pair:
        outbox, _ = made(pair)
        for _ in range(JOINED_BYTES // 10_000 + 1):
            outbox.deliver(b"\x81" + b"x" * 9_999)
        assert drain(pair.client)


def test_a_frame_is_accepted_whatever_becomes_of_the_others() -> None:
    """What is given up of the same turn is no verdict about this one."""
    with Pair() as pair:
        outbox, _ = made(pair, 1 << 20)
        fill(outbox)
        while outbox.waiting_bytes < (1 << 20) - 9000:
            outbox.offer(b"\x81" + b"h" * 4_999)
        for frame in softs(7, 9_000):
            assert outbox.deliver(frame)
        assert outbox.deliver(b"\x81" + b"k" * 2_999)
        assert outbox.hold(PING)
