"""Frames that may be given up: which of them go, and that none is lost without a word."""

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Final, Self

import attrs
import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.trioserver.wire import CALM, LIMIT, Pair, running, topic
from trioserver import frames
from trioserver.deflate import MIN_BYTES, Compressor
from trioserver.errors import CloseReason
from trioserver.outbox import Budget, DeflatingOutbox, Outbox, OutboxLimits
from trioserver.slow_policies import Policies, Policy
from trioserver.soft import COMPACT_AT, EVERYONE, Line, Marker, Soft

DROP, CONFLATE = Policy.DROP_OLDEST, Policy.CONFLATE

GROUPS: Final = (
    (DROP, "room.a", "said"),
    (DROP, "room.b", "said"),
    (DROP, "", "cursor"),
    (CONFLATE, "ticker", "price"),
    (CONFLATE, EVERYONE, "load"),
)

Read = dict[str, object]


def text(number: int, size: int = 0, **more: object) -> bytes:
    """Return a text frame with a number in it."""
    return frames.encode_text(json.dumps({"n": number, **more, "x": "x" * size}).encode())


def soft(number: int, *, subject: str = "a", key: str | None = None, size: int = 0) -> Soft:
    """Return a frame that may be given up; conflated if it has a key."""
    policy = DROP if key is None else CONFLATE
    return Soft(text(number, size, s=subject, k=key), policy, subject, "t", key)


def messages_in(data: bytes) -> Iterator[Read]:
    """Yield the messages in the bytes on a wire: whole text frames, or it fails."""
    while data:
        assert data[0] == 0x81
        size, start = data[1], 2
        if size >= 126:
            start = 4 if size == 126 else 10
            size = int.from_bytes(data[2:start])
        assert len(data) >= start + size, "half a frame"
        yield json.loads(data[start : start + size])
        data = data[start + size :]


def number_of(message: Read) -> int:
    """Return the number of a message; of a gap how many are missing, negative."""
    return -int(str(message["missing"])) if "missing" in message else int(str(message["n"]))


class Owner:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.overflows = 0

    def blocked(self) -> None:
        """The pump's business."""

    def overflowed(self) -> None:
        """Count."""
        self.overflows += 1

    def broke(self) -> None:
        """No socket fails here."""
        raise AssertionError

    def entered(self, *_: object, **__: object) -> bool:
        """There is no ledger here."""
        raise AssertionError

    def entered_topic(self, *_: object, **__: object) -> bool:
        """There is no ledger here."""
        raise AssertionError


def last_waiting(outbox: Outbox) -> bytes:
    """Return the last frame that waits."""
    assert outbox._waiting is not None
    return outbox._waiting[-1]


def rest_of(outbox: Outbox, pair: Pair) -> bytes:
    """Read all that waits, until the last byte of it has come."""
    found = b""
    while not outbox.empty:
        outbox.flush()
        with contextlib.suppress(BlockingIOError):
            found += pair.client.recv(1 << 20)
    pair.server.shutdown(socket.SHUT_WR)
    pair.client.setblocking(True)
    pair.client.settimeout(LIMIT)
    while data := pair.client.recv(1 << 20):
        found += data
    return found


class Local(Pair):
    """A pair that does without TCP, whose timers decide how fast a tiny window is read."""

    def __init__(self) -> None:
        self.client, self.server = socket.socketpair()
        for sock in (self.client, self.server):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            sock.setblocking(False)


class SlowReader(RuleBasedStateMachine):
    """Any history of a client that reads as it likes, under all policies at once."""

    MAX_BYTES, MAX_FRAMES = 20_000, 12

    def __init__(self) -> None:
        super().__init__()
        self.pair = Local()
        self.owner = Owner()
        self.given_up: Counter[Policy] = Counter()
        self.budget = Budget()
        limits = OutboxLimits(
            max_bytes=self.MAX_BYTES,
            max_frames=self.MAX_FRAMES,
            budget=self.budget,
            on_given_up=self.gave_up,
        )
        self.outbox = Outbox(self.pair.server, limits, self.owner)
        self.number = 0
        self.hard: list[int] = []
        """What may not be given up and was accepted."""
        self.offered: Counter[str] = Counter()
        """How many of each group."""
        self.newest: dict[tuple[str, str], int] = {}
        self.read = b""

    def gave_up(self, policy: Policy, count: int) -> None:
        """Count, and see that there was something to count."""
        assert count > 0
        self.given_up[policy] += count

    @rule(
        group=st.integers(0, len(GROUPS) - 1),
        key=st.sampled_from(["k1", "k2", "k3"]),
        size=st.sampled_from([0, 0, 100, 3_000, 18_000, 25_000]),
        times=st.integers(1, 8),
    )
    def offer_soft(self, group: int, key: str, size: int, times: int) -> None:
        """What may be given up never ends the connection."""
        policy, subject, of_type = GROUPS[group]
        for _ in range(times):
            name = subject or of_type
            self.offered[name] += 1
            self.newest[name, key] = number = self.offered[name]
            data = text(number, size, g=name, k=key)
            self.outbox.offer(Soft(data, policy, subject, of_type, key))
        assert self.owner.overflows == 0 or self.outbox.closed

    @rule(size=st.sampled_from([0, 100, 5_000]))
    def offer_hard(self, size: int) -> None:
        """Others make place first; only what cannot be given up ends it."""
        was_closed = self.outbox.closed
        self.number += 1
        frame = text(self.number, size, g="hard")
        if self.outbox.offer(frame):
            self.hard.append(self.number)
        elif not was_closed:
            assert self.owner.overflows == 1
            assert not self.can_give_up()

    def can_give_up(self) -> bool:
        """Return whether a frame waits that may be given up and was not begun."""
        waiting = list(self.outbox._waiting or ())[self.outbox._offset > 0 :]
        return any(isinstance(frame, Soft) for frame in waiting)

    @rule(most=st.sampled_from([1, 100, 4_000, 50_000]))
    def reader_reads(self, most: int) -> None:
        """The client takes a little or a lot."""
        with contextlib.suppress(BlockingIOError):
            self.read += self.pair.client.recv(most)

    @rule()
    def flush(self) -> None:
        """The pump finds the socket writable."""
        self.outbox.flush()

    @invariant()
    def accounts_are_right(self) -> None:
        """What waits is counted to the byte, and bounded but for the markers."""
        waiting = list(self.outbox._waiting or ())
        held = sum(map(len, waiting)) - self.outbox._offset
        assert held == self.outbox.waiting_bytes == self.budget.used
        markers = [frame for frame in waiting if isinstance(frame, Marker)]
        told = Counter(marker.group for marker in markers)
        others = Counter(frame.group for frame in waiting if isinstance(frame, Soft))
        assert all(number <= others[group] + 2 for group, number in told.items())
        assert held - sum(map(len, markers)) <= self.MAX_BYTES
        frames_left = [frame for frame in waiting if frame and not isinstance(frame, Marker)]
        assert len(frames_left) <= self.MAX_FRAMES
        line = self.outbox._waiting
        if isinstance(line, Line):
            softs = [frame for frame in waiting if isinstance(frame, Soft)]
            assert sum(map(len, softs)) == line.soft_bytes
            assert len(frames_left) - len(softs) <= line.hard + 1

    def teardown(self) -> None:
        """In the end everything was read, or a gap stands where it would have stood."""
        self.read += rest_of(self.outbox, self.pair)
        self.pair.__exit__()
        reached: Counter[str] = Counter()
        missing: Counter[str] = Counter()
        hard: list[object] = []
        newest: dict[tuple[str, str], int] = {}
        received: Counter[str] = Counter()
        conflated = {
            subject or of_type for policy, subject, of_type in GROUPS if policy is CONFLATE
        }
        for message in messages_in(self.read):
            if message.get("type") == "gap":
                assert message["reason"] == "slow"
                name = message.get("topic") or message.get("of_type") or EVERYONE
                assert (name == EVERYONE) == (message.get("stream") == "all")
                count = message["missing"]
                assert isinstance(name, str)
                assert isinstance(count, int)
                missing[name] += count
                reached[name] += count
                continue
            name, number = message["g"], message["n"]
            assert isinstance(name, str)
            assert isinstance(number, int)
            if name == "hard":
                hard.append(number)
                continue
            received[name] += 1
            key = str(message["k"])
            if name in conflated:
                assert newest.get((name, key), 0) < number
                newest[name, key] = number
            else:
                assert reached[name] + 1 == number, "a gap stands where something is missing"
                reached[name] = number
        assert self.hard == hard
        self.check_all_is_said(reached, missing, received, newest)

    def check_all_is_said(
        self,
        reached: Counter[str],
        missing: Counter[str],
        received: Counter[str],
        newest: dict[tuple[str, str], int],
    ) -> None:
        """Check that what did not come is accounted for."""
        if self.outbox.closed:
            return  # what came after that was refused without a word
        assert self.given_up[DROP] == missing.total()
        assert self.offered.total() == (
            received.total() + missing.total() + self.given_up[CONFLATE]
        )
        for policy, subject, of_type in GROUPS:
            name = subject or of_type
            if policy is DROP:
                assert self.offered[name] == reached[name]
            elif not missing[name]:
                expected = {key: n for key, n in self.newest.items() if key[0] == name}
                assert expected == {key: n for key, n in newest.items() if key[0] == name}


SlowReader.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSlowReader = SlowReader.TestCase


class Stopped:
    """An outbox whose client reads nothing, and something waits already.

    Args:
        most: Frames that may wait, beside the one that has been begun.
    """

    def __init__(self, most: int = 4, max_bytes: int = 0, *, compressed: bool = False) -> None:
        self.pair = Pair(1)
        self.owner = Owner()
        self.given_up: list[tuple[Policy, int]] = []
        limits = OutboxLimits(
            max_bytes=max_bytes,
            max_frames=most and most + 1,
            on_given_up=lambda policy, count: self.given_up.append((policy, count)),
        )
        self.outbox = (
            DeflatingOutbox(self.pair.server, limits, self.owner, Compressor())
            if compressed
            else Outbox(self.pair.server, limits, self.owner)
        )

    def __enter__(self) -> Self:
        while self.outbox.empty:
            self.outbox.offer(text(0, 1000, s="filler"))
        return self

    def __exit__(self, *_: object) -> None:
        self.pair.__exit__()

    def read(self) -> list[Read]:
        """Read everything; return what came behind what filled the socket."""
        found = list(messages_in(rest_of(self.outbox, self.pair)))
        return [message for message in found if message.get("s") != "filler"]

    def numbers(self) -> list[int]:
        """Read everything; return what `number_of` says of each."""
        return [number_of(message) for message in self.read()]


def test_the_oldest_makes_place() -> None:
    """And a gap stands in its place, which counts all that went."""
    with Stopped(3) as stopped:
        for number in range(1, 11):
            assert stopped.outbox.offer(soft(number))
        assert [(DROP, 1)] * 7 == stopped.given_up
        assert [-7, 8, 9, 10] == stopped.numbers()


def test_a_gap_stands_where_the_first_was() -> None:
    """What else waits keeps its place before it or behind it."""
    with Stopped(4) as stopped:
        stopped.outbox.offer(text(100))
        stopped.outbox.offer(soft(1))
        stopped.outbox.offer(text(101))
        stopped.outbox.offer(soft(2))
        stopped.outbox.offer(soft(3))
        stopped.outbox.offer(soft(4))
        assert [100, -2, 101, 3, 4] == stopped.numbers()


def test_topics_do_not_make_place_for_one_another() -> None:
    """One that finds nothing of its own that could go is given up itself, with a word."""
    with Stopped(2) as stopped:
        stopped.outbox.offer(soft(1, subject="a"))
        stopped.outbox.offer(soft(2, subject="a"))
        assert not stopped.outbox.offer(soft(3, subject="b"))
        assert not stopped.outbox.offer(soft(4, subject="b"))
        assert stopped.owner.overflows == 0
        one, two, gap = stopped.read()
        assert [1, 2] == [one["n"], two["n"]]
        assert {"type": "gap", "missing": 2, "reason": "slow", "topic": "b"} == gap


def test_types_make_place_for_themselves_only() -> None:
    """Without a subject, the type says who belongs together."""
    with Stopped(2) as stopped:
        stopped.outbox.offer(Soft(text(1), DROP, "", "cursor"))
        stopped.outbox.offer(Soft(text(2), DROP, "", "typing"))
        stopped.outbox.offer(Soft(text(3), DROP, "", "cursor"))
        gap, two, three = stopped.read()
        assert {"type": "gap", "missing": 1, "reason": "slow", "of_type": "cursor"} == gap
        assert [2, 3] == [two["n"], three["n"]]


def test_the_newest_of_a_key_takes_the_place_of_the_older() -> None:
    """One per key waits, in the order in which the keys came; nothing is missing."""
    with Stopped(3) as stopped:
        for number, key in enumerate("abcabcabcb", 1):
            assert stopped.outbox.offer(soft(number, key=key))
        assert [(CONFLATE, 1)] * 7 == stopped.given_up
        assert [7, 10, 9] == stopped.numbers()


def test_what_has_no_key_is_all_about_the_same() -> None:
    """Then only the newest of a type in a topic waits."""
    with Stopped() as stopped:
        for number in (1, 2):
            stopped.outbox.offer(Soft(text(number), CONFLATE, "a", "t"))
            stopped.outbox.offer(Soft(text(number + 10), CONFLATE, "a", "u"))
        assert [2, 12] == stopped.numbers()


def test_a_key_too_many_makes_the_oldest_go() -> None:
    """Conflating alone does not bound anything: then it is as with dropping."""
    with Stopped(2) as stopped:
        for number, key in enumerate("abc", 1):
            assert stopped.outbox.offer(soft(number, key=key))
        assert [(DROP, 1)] == stopped.given_up
        assert [-1, 2, 3] == stopped.numbers()


def test_a_newer_one_that_is_too_large_for_the_place_waits_behind() -> None:
    """The older one is needless all the same; if there is no room at all, a gap says so."""
    with Stopped(max_bytes=3_000) as stopped:
        stopped.outbox.offer(soft(1, key="a"))
        room = 3_000 - stopped.outbox.waiting_bytes
        stopped.outbox.offer(soft(2, key="b", size=100))
        stopped.outbox.offer(soft(3, key="a", size=room - 100))
        assert [(CONFLATE, 1), (DROP, 1)] == stopped.given_up
        assert not stopped.outbox.offer(soft(4, key="a", size=4_000))
        assert [(CONFLATE, 1), (DROP, 1)] == stopped.given_up[2:]
        assert [-2] == stopped.numbers()


@pytest.mark.parametrize("begun", [False, True])
def test_one_that_has_no_room_whatever_goes_is_given_up_alone(*, begun: bool) -> None:
    """The others of its group would go for nothing; a gap stands behind them."""
    line = Line([soft(1, size=100), soft(2, size=100), soft(3, size=100)])
    spare, marker = 200, len(Marker(("a", ""), 1))
    told: list[tuple[Policy, int]] = []
    least = sum(map(len, list(line)[begun:])) + spare - marker + 1

    def take(size: int) -> bool:
        nonlocal spare
        frame, before = Soft(b"x" * size, DROP, "a", "t"), sum(map(len, line))
        change, waits = line.take(frame, spare, 4, lambda *what: told.append(what), begun=begun)
        assert before + change == sum(map(len, line))
        spare -= change
        assert spare >= 0
        return waits

    def numbers() -> list[int]:
        return [number_of(message) for message in messages_in(b"".join(line))]

    assert [False, False] == [take(least), take(5_000)]
    assert ([(DROP, 1), (DROP, 1)], [1, 2, 3, -2]) == (told, numbers())
    assert take(len(soft(4)))
    assert take(least - marker - 1)
    assert [(DROP, 4 - begun)] == told[2:]
    kept = [frame.missing for frame in line if isinstance(frame, Marker)]
    assert [6 - begun] == kept, "nothing is left between the gaps"


def test_who_has_no_room_for_a_gap_gives_up_another() -> None:
    """Bytes that wait stay within their bound whatever is said to be missing."""
    line = Line([soft(1, size=100), soft(2, size=100)])
    told: list[tuple[Policy, int]] = []
    frame = Soft(b"x" * 5_000, DROP, "a", "t")
    change, waits = line.take(frame, 10, 9, lambda *what: told.append(what), begun=False)
    assert (False, [(DROP, 2)]) == (waits, told)
    assert change <= 10
    assert [-1, 2, -1] == [number_of(message) for message in messages_in(b"".join(line))]


def test_gaps_fold_where_a_newer_value_leaves_nothing_between_them() -> None:
    """There are never more of them than of what stands between, and one."""
    line = Line([soft(1, key="a"), soft(2, key="b")])
    for key in ("c", "b", "a"):
        large = soft(9, key=key, size=5_000)
        assert not line.take(large, 1_000, 9, lambda *_: None, begun=False)[1]
        assert line.take(soft(5, key=key + "x"), 1_000, 9, lambda *_: None, begun=False)[1]
    missing = [frame.missing for frame in line if isinstance(frame, Marker)]
    assert [1, 1, 1] == missing
    for key in ("cx", "bx"):
        line.take(soft(9, key=key, size=5_000), 1_000, 9, lambda *_: None, begun=False)
    missing = [frame.missing for frame in line if isinstance(frame, Marker)]
    assert [3, 2] == missing


def test_what_has_been_begun_is_finished() -> None:
    """Half of it is on the wire: neither a newer one nor a gap may stand in its place."""
    for key in (None, "k"):
        with Stopped(3) as stopped:
            outbox = stopped.outbox
            read = b""
            outbox.offer(soft(1, key=key, size=30_000))
            while not (outbox._offset and isinstance((outbox._waiting or b"")[0], Soft)):
                read += stopped.pair.client.recv(1000)
                outbox.flush()
            for number in range(2, 7):
                outbox.offer(soft(number, key=key))
            read += rest_of(outbox, stopped.pair)
            found = [m for m in messages_in(read) if m.get("s") != "filler"]
            first, *others = map(number_of, found)
            assert first == 1
            assert others == ([-2, 4, 5, 6] if key is None else [6])


def test_a_gap_on_the_wire_is_followed_by_another() -> None:
    """It cannot count on any more, but what goes then is told as well."""
    with Stopped(2) as stopped:
        outbox = stopped.outbox
        for number in range(1, 5):
            outbox.offer(soft(number))
        line = outbox._waiting
        assert isinstance(line, Line)
        while not isinstance(line[0], Marker):
            line.popleft()
        change, waits = line.take(soft(5), 1000, 2, lambda *_: None, begun=True)
        assert waits
        assert change == len(Marker(("a", ""), 1)) - len(soft(3)) + len(soft(5))
        assert [2, 1] == [frame.missing for frame in line if isinstance(frame, Marker)]
        line.popleft()
        line.take(soft(6), 1000, 2, lambda *_: None, begun=False)
        assert [2] == [frame.missing for frame in line if isinstance(frame, Marker)]


def test_what_may_not_be_given_up_makes_others_go() -> None:
    """The topic with most waiting is the first; nobody is disconnected for what can go."""
    with Stopped(3) as stopped:
        stopped.outbox.offer(soft(1, subject="a"))
        stopped.outbox.offer(soft(2, subject="b"))
        stopped.outbox.offer(soft(3, subject="b"))
        for number in (100, 101, 102):
            assert stopped.outbox.offer(text(number))
        assert not stopped.outbox.offer(text(103))
        assert stopped.owner.overflows == 1
        assert [-1, -2, 100, 101, 102] == sorted(stopped.numbers(), key=abs)


def test_one_that_never_has_room_is_told_at_once() -> None:
    """It is larger than all that may wait: a gap goes out instead, and the client stays."""
    with Pair() as pair:
        given_up: list[tuple[Policy, int]] = []
        owner = Owner()
        limits = OutboxLimits(max_bytes=500, on_given_up=lambda *told: given_up.append(told))
        outbox = Outbox(pair.server, limits, owner)
        assert not outbox.offer(soft(1, size=1_000))
        assert outbox.offer(soft(2))
        assert [(DROP, 1)] == given_up
        assert owner.overflows == 0
        gap, two = messages_in(rest_of(outbox, pair))
        assert [1, 2] == [gap["missing"], two["n"]]


def test_a_marker_that_is_larger_than_all_that_may_wait_ends_it() -> None:
    """Nobody can be told anything within such bounds."""
    with Pair() as pair:
        owner = Owner()
        outbox = Outbox(pair.server, OutboxLimits(max_bytes=10), owner)
        assert not outbox.offer(soft(1))
        assert owner.overflows == 1
    with Pair() as pair:
        owner = Owner()
        assert not Outbox(pair.server, OutboxLimits(max_bytes=10), owner).offer(
            Marker(("a", ""), 1)
        )
        assert owner.overflows == 1


@pytest.mark.parametrize("frame", [text(100), soft(2), soft(2, key="k")])
def test_whom_the_budget_of_all_ends_meanwhile_accepts_nothing(frame: bytes) -> None:
    """A gap may be larger than what it stands for, and one byte too many for all together."""
    with Stopped(1) as stopped:
        outbox = stopped.outbox
        outbox.offer(soft(1, key=getattr(frame, "key", None)))
        budget = outbox._limits.budget
        budget.limit = budget.used
        budget.take(0)
        budget.on_exceeded = lambda: outbox.finish(b"<farewell>", drop=True)
        larger = Soft(frame + b"x", CONFLATE, "a", "t", "k") if getattr(frame, "key", "") else frame
        assert not outbox.offer(larger)
        assert stopped.owner.overflows == 0
        assert outbox.closed
        assert rest_of(outbox, stopped.pair).endswith(b"<farewell>")


def test_a_frame_larger_than_the_bounds_does_not_make_others_go() -> None:
    """It would find no room by that either."""
    with Stopped(max_bytes=5_000) as stopped:
        stopped.outbox.offer(soft(1))
        assert not stopped.outbox.offer(text(100, 6_000))
        assert [] == stopped.given_up
        assert stopped.owner.overflows == 1


def test_policies_hold_while_the_first_message_is_not_ready() -> None:
    """What is held back for it is bounded in the same way, and gaps keep their places."""
    with Pair() as pair:
        outbox = Outbox(pair.server, OutboxLimits(max_frames=3), Owner())
        outbox.cork()
        outbox.offer(text(100))
        for number in range(1, 6):
            assert outbox.offer(soft(number))
        outbox.uncork(text(99))
        found = list(messages_in(rest_of(outbox, pair)))
        assert [99, 100, -3, 4, 5] == list(map(number_of, found))


def test_markers_count_on_after_the_first_message() -> None:
    """When it is ready and the client does not read, the same marker goes on counting."""
    with Pair(1) as pair:
        outbox = Outbox(pair.server, OutboxLimits(max_frames=3), Owner())
        outbox.cork()
        for number in range(1, 6):
            outbox.offer(soft(number))
        outbox.uncork(text(99, 500_000))
        for number in range(6, 9):
            outbox.offer(soft(number))
        # The first message fills a place as well, for it has been begun.
        assert [99, -6, 7, 8] == list(map(number_of, messages_in(rest_of(outbox, pair))))


def test_what_can_be_given_up_crowds_nobody() -> None:
    """A client is read, and what is kept is not spilled, as long as others make place."""
    with Stopped(100) as stopped:
        for number in range(100):
            stopped.outbox.offer(soft(number))
        outbox = stopped.outbox
        assert (False, False) == (outbox.crowded, outbox.half_full)
        for number in range(30):
            outbox.offer(text(number))
        assert (True, False) == (outbox.crowded, outbox.half_full)
        for number in range(30):
            outbox.offer(text(number))
        assert (True, True) == (outbox.crowded, outbox.half_full)


def test_an_idle_outbox_is_not_half_full() -> None:
    """Nothing waits in it."""
    with Pair() as pair:
        outbox = Outbox(pair.server, OutboxLimits(), Owner())
        assert not outbox.half_full


def test_compressed_it_may_still_be_given_up() -> None:
    """And is compressed once for all."""
    with Stopped(2, compressed=True) as stopped:
        large = soft(1, size=2 * MIN_BYTES)
        outbox = stopped.outbox
        assert outbox.deliver_now(large)
        waiting = last_waiting(outbox)
        assert isinstance(waiting, Soft)
        assert len(waiting) < len(large)
        assert ("a", "t", None, DROP) == (
            waiting.subject,
            waiting.of_type,
            waiting.key,
            waiting.policy,
        )
        assert outbox.deliver_now(large)
        assert waiting is last_waiting(outbox)
        assert outbox.deliver_now(large)
        assert [(DROP, 1)] == stopped.given_up


def test_places_of_those_that_went_are_not_kept() -> None:
    """However many go while the client reads nothing: what waits stays as small as its bounds."""
    with Stopped(10) as stopped:
        for number in range(20 * COMPACT_AT):
            stopped.outbox.offer(soft(number))
            assert len(stopped.outbox._waiting or ()) < 2 * COMPACT_AT + 20
        first, *others = stopped.numbers()
        assert [*range(20 * COMPACT_AT - 10, 20 * COMPACT_AT)] == others
        assert first == -(20 * COMPACT_AT - 10)


@pytest.mark.parametrize("policy", [DROP, CONFLATE])
def test_nothing_is_remembered_of_what_has_gone(policy: Policy) -> None:
    """A client that keeps taking some must not leave traces of every key there ever was."""
    line = Line([text(0)])
    for number in range(1, 1_000):
        frame = Soft(text(number), policy, f"s{number % 7}", "t", f"k{number}")
        line.take(frame, 1 << 20, 10, lambda *_: None, begun=False)
        if number % 3 == 0:
            line.popleft()
    while line:
        line.popleft()
    assert 0 == line.soft_bytes
    assert 0 == line.hard == line.standing
    assert ({}, {}, {}) == (line._groups, line._identities, line._markers)


async def test_who_reads_nothing_at_all_is_ended_all_the_same() -> None:
    """However many are given up, that ends nobody; to take nothing for too long does."""
    given_up: list[tuple[Policy, int]] = []
    limits = OutboxLimits(max_frames=8, on_given_up=lambda *told: given_up.append(told))
    pace = attrs.evolve(CALM, write_wait=60.0)
    with trio.fail_after(LIMIT):
        async with running(limits=limits, pace=pace, send_buffer=4096) as worker:
            policies = Policies.of(["type:cursor=drop_oldest"])
            worker.delivery = attrs.evolve(worker.delivery, policies=policies)
            await worker.join(receive_buffer=4096)
            connection = worker.only()
            for number in range(200):
                await worker.publish(topic("ann"), {"n": number, "x": "x" * 1_000}, kind="cursor")
            assert given_up
            assert connection.reason is None
            connection.due(worker.pump.now + 61.0)
            assert CloseReason.TOO_SLOW is connection.reason
