"""The outbox over real sockets with tiny buffers, against a list as its model."""

import contextlib
import random
import socket
import zlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.trioserver.wire import Pair
from trioserver import frames
from trioserver.deflate import Compressor
from trioserver.envelope import Change, Entry
from trioserver.outbox import CROWD_BYTES, Budget, DeflatingOutbox, Outbox, OutboxLimits


class Owner:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.blocks = 0
        self.overflows = 0
        self.breaks = 0
        self.entries: list[tuple[Entry, bool]] = []

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


def test_a_frame_leaves_together_with_its_ping() -> None:
    """In this order and in one write, so that the pong speaks of the frame before it."""
    with Pair() as pair:
        outbox, owner = made(pair)
        assert outbox.deliver_with(b"frame", PING)
        assert b"frame" + PING == drain(pair.client)
        assert outbox.empty
        assert 0 == owner.blocks


def test_a_ping_behind_a_compressed_frame_is_not_compressed() -> None:
    """RFC 7692: a control frame never is."""
    with Pair(1 << 16) as pair:
        outbox, _ = made_deflating(pair)
        assert outbox.deliver_with(WORDS, PING)
        data = drain(pair.client)
        assert len(data) < len(WORDS)
        assert (frames.payload_of(WORDS), PING) == inflated(data)
        assert outbox.deliver_with(frames.encode_text(b"{}"), PING)
        assert frames.encode_text(b"{}") + PING == drain(pair.client)


def test_a_frame_is_compressed_once_with_and_without_a_ping() -> None:
    """Some connections of a user are due for a ping, others are not."""
    with Pair(1 << 16) as pair:
        outbox, _ = made_deflating(pair)
        assert outbox.deliver(WORDS)
        alone = drain(pair.client)
        packed = outbox._compressor._packed
        assert outbox.deliver_with(WORDS, PING)
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
            assert bool(too_much) != outbox.deliver_with(frame, PING)
            assert (too_much, bool(too_much)) == (owner.overflows, outbox.closed)
            assert too_much or 20_000 == outbox.waiting_bytes
            assert bool(too_much) != everything(outbox, pair).endswith(frame + PING)


@pytest.mark.parametrize("deflating", [False, True])
def test_a_frame_and_its_ping_are_held_while_corked(*, deflating: bool) -> None:
    """They are one of the frames that wait for the first message."""
    with Pair(1 << 16) as pair:
        outbox, _ = (made_deflating if deflating else made)(pair)
        outbox.cork()
        assert outbox.deliver_with(b"\x81\x05frame", PING)
        assert b"" == drain(pair.client)
        outbox.uncork(b"first")
        assert b"first\x81\x05frame" + PING == drain(pair.client)


@pytest.mark.parametrize("deflating", [False, True])
def test_a_frame_and_its_ping_on_a_broken_socket(*, deflating: bool) -> None:
    """The owner is told once, as of any frame."""
    with Pair() as pair:
        outbox, owner = (made_deflating if deflating else made)(pair)
        pair.server.shutdown(socket.SHUT_WR)
        assert not outbox.deliver_with(WORDS, PING)
        assert not outbox.deliver_with(WORDS, PING)
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
