"""The delivery: parsed and encoded once, in order, in turns."""

import json
import socket
from collections.abc import Awaitable, Iterator

import pytest
import trio

from tests.trioserver.test_outbox import Owner, drain
from tests.trioserver.wire import BROADCAST, LIMIT, Pair, split_frames, topic
from trioserver import envelope
from trioserver.delivery import OFFERS_PER_TURN, Delivery
from trioserver.envelope import Entry
from trioserver.hub import Hub
from trioserver.metrics import Tally
from trioserver.outbox import Outbox, OutboxLimits
from trioserver.position import SEQ_SPAN
from trioserver.track import Track


@pytest.fixture
def malformed() -> list[tuple[bytes, str]]:
    """Collect what is logged."""
    return []


@pytest.fixture
def delivery(malformed: list[tuple[bytes, str]]) -> Delivery:
    """Make a delivery with a small limit."""
    return Delivery(
        hub=Hub(),
        head=Track(),
        tally=Tally(),
        broadcast_topic=BROADCAST,
        max_payload=100,
        log_malformed=lambda where, why: malformed.append((where, why)),
    )


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Make a pair of sockets."""
    with Pair() as made:
        yield made


def subscribed(delivery: Delivery, where: bytes, sock: socket.socket) -> Outbox:
    """Return a new outbox under a topic."""
    outbox = Outbox(sock, OutboxLimits(turn=delivery.turn), Owner())
    delivery.hub.add(where, outbox)
    return outbox


def receive(delivery: Delivery, where: bytes, data: bytes) -> Awaitable[None] | None:
    """Do what the subscription does with one message that comes alone."""
    remaining = delivery.receive(where, data)
    delivery.turn_over()
    return remaining


def publication(payload: object, **more: object) -> bytes:
    """Return what a back end publishes."""
    return json.dumps({"payload": payload, **more}).encode()


def test_a_users_notification_is_delivered_before_receive_returns(
    delivery: Delivery, pair: Pair
) -> None:
    """To every outbox under the topic, with the time and without anything forged."""
    for _ in range(2):
        subscribed(delivery, topic("ann"), pair.server)
    assert receive(delivery, topic("ann"), publication(1, type="mail", id="forged")) is None
    frames, rest = split_frames(drain(pair.client))
    assert b"" == rest
    assert 2 == len(frames)
    assert frames[0] == frames[1]
    found = json.loads(frames[0][1])
    assert ["type", "payload", "timestamp"] == list(found)
    assert (2, 2, 0) == (
        delivery.tally.notifications_delivered["ephemeral"],
        delivery.tally.messages_out,
        delivery.tally.failed,
    )


def test_a_topic_that_nobody_wants_is_not_even_parsed(
    delivery: Delivery, malformed: list[tuple[bytes, str]]
) -> None:
    """A released topic may still be subscribed for a moment."""
    assert receive(delivery, topic("bob"), b"garbage") is None
    assert ([], 0) == (malformed, delivery.tally.notifications_malformed)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"{}", b'{"type":"goodbye","payload":1}', publication("x" * 99)]
)
@pytest.mark.parametrize("where", [topic("ann"), BROADCAST])
def test_malformed_publications_are_counted_and_logged(
    delivery: Delivery,
    pair: Pair,
    malformed: list[tuple[bytes, str]],
    where: bytes,
    data: bytes,
) -> None:
    """And nothing else happens."""
    subscribed(delivery, where, pair.server)
    assert receive(delivery, where, data) is None
    assert [where] == [one for one, _ in malformed]
    assert 1 == delivery.tally.notifications_malformed
    assert b"" == drain(pair.client)


def test_refused_offers_are_counted(delivery: Delivery, pair: Pair) -> None:
    """One closed outbox costs its own notification only."""
    subscribed(delivery, topic("ann"), pair.server).abandon()
    subscribed(delivery, topic("ann"), pair.server)
    receive(delivery, topic("ann"), publication(1))
    assert (1, 1) == (
        delivery.tally.notifications_delivered["ephemeral"],
        delivery.tally.failed,
    )


async def test_a_broadcast_reaches_all_and_lets_others_have_their_turn(
    delivery: Delivery, pair: Pair
) -> None:
    """A long fan-out yields; who ends meanwhile is refused, who comes meanwhile waits."""
    outboxes = [Outbox(pair.server, OutboxLimits(turn=delivery.turn), Owner()) for _ in range(1000)]
    for outbox in outboxes:
        outbox.cork()
        delivery.hub.add(BROADCAST, outbox)
    remaining = receive(delivery, BROADCAST, publication("all"))
    assert remaining is not None
    turns = 0
    late = Outbox(pair.server, OutboxLimits(turn=delivery.turn), Owner())

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            delivery.hub.add(BROADCAST, late)
            late.cork()
            await trio.lowlevel.checkpoint()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            await remaining
            nursery.cancel_scope.cancel()
    assert turns >= 1000 // OFFERS_PER_TURN
    assert all(outbox.waiting_bytes for outbox in outboxes)
    assert 0 == late.waiting_bytes
    assert 1000 == delivery.tally.notifications_delivered["ephemeral"]


async def test_an_empty_broadcast_topic_needs_no_turns(delivery: Delivery) -> None:
    """Nobody is connected."""
    assert receive(delivery, BROADCAST, publication(1)) is None
    await trio.lowlevel.checkpoint()


# Entries of the ledger.


def point(seq: int, epoch: str = "e0") -> str:
    """Return the point of a notification, or the beginning of an epoch."""
    return f"{epoch}.{1000 * bool(seq)}-{seq * SEQ_SPAN}"


def announced(seq: int, epoch: str = "e0") -> bytes:
    """Return what the ledger's script publishes for a notification."""
    values = [point(seq - 1, epoch), point(seq, epoch), 1, f"p07-{seq}", "mail", "x" * 200, 9, None]
    return b"\x01n" + json.dumps(values).encode()


def updated(seq: int) -> bytes:
    """Return what it publishes when a notification was read."""
    values = [point(seq), f"e0.1000-{seq * SEQ_SPAN + 1}", 0, "read", [f"p07-{seq}"], ""]
    return b"\x01u" + json.dumps(values).encode()


class Choosy(Owner):
    """Says of each entry what it was told to."""

    def __init__(self, answer: bool = True) -> None:  # noqa: FBT001, FBT002 - its whole purpose
        super().__init__()
        self.answer = answer

    def entered(self, entry: Entry, *, everyone: bool) -> bool:
        """Keep it."""
        super().entered(entry, everyone=everyone)
        return self.answer


def joined(delivery: Delivery, where: bytes, sock: socket.socket, owner: Owner) -> Owner:
    """Subscribe a new outbox of ``owner``."""
    delivery.hub.add(where, Outbox(sock, OutboxLimits(turn=delivery.turn), owner))
    return owner


def outcomes(delivery: Delivery) -> tuple[int, int, int]:
    """Return how many publications were delivered, wanted by nobody, and malformed."""
    published = delivery.tally.published
    return published["delivered"], published["nobody"], published["malformed"]


async def received(delivery: Delivery, where: bytes, data: bytes) -> None:
    """Do what the subscription does."""
    remaining = receive(delivery, where, data)
    if remaining is not None:
        await remaining


def test_an_entry_goes_to_those_who_know_what_is_next(delivery: Delivery, pair: Pair) -> None:
    """Each owner under the user's topic gets it parsed, at once; the delivery sends nothing."""
    owners = [joined(delivery, topic("ann"), pair.server, Owner()) for _ in range(3)]
    stranger = joined(delivery, topic("bob"), pair.server, Owner())
    for data in (announced(1), updated(1)):
        assert receive(delivery, topic("ann"), data) is None
    expected = [(envelope.decode(data), False) for data in (announced(1), updated(1))]
    assert [expected] * 3 == [owner.entries for owner in owners]
    assert len({id(owner.entries[0][0]) for owner in owners}) == 1, "parsed once"
    assert [] == stranger.entries
    assert b"" == drain(pair.client)
    assert (2, 0, 0) == outcomes(delivery)
    assert 2 == sum(delivery.tally.delivery.counts)
    assert (0, 0) == (delivery.tally.messages_out, delivery.tally.failed)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [((), (0, 1, 0)), ((False,), (0, 1, 0)), ((False, True), (1, 0, 0)), ((True,), (1, 0, 0))],
)
@pytest.mark.parametrize("where", [topic("ann"), BROADCAST])
async def test_what_became_of_an_entry_is_counted_once(
    delivery: Delivery,
    pair: Pair,
    where: bytes,
    answers: tuple[bool, ...],
    expected: tuple[int, int, int],
) -> None:
    """Delivered if anybody's client was sent it, nobody's if all have it or wait for a read."""
    for answer in answers:
        joined(delivery, where, pair.server, Choosy(answer))
    await received(delivery, where, announced(1))
    assert expected == outcomes(delivery)
    assert expected[0] == sum(delivery.tally.delivery.counts)


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        b"\x01n",
        b"\x01x[]",
        announced(2)[:-1],
        b"\x01n{}",
        b'\x01u["e0.0-0","e0.1-1",0,"read","p07-x",""]',
        b"\x01n" + b"[" * 200_000,
    ],
)
@pytest.mark.parametrize("where", [topic("ann"), BROADCAST, topic("nobody")])
def test_malformed_envelopes_are_counted_and_logged(
    delivery: Delivery,
    pair: Pair,
    malformed: list[tuple[bytes, str]],
    where: bytes,
    data: bytes,
) -> None:
    """Nobody hears of them, and the head stays where it is."""
    delivery.head.reached(point(1), more=False)
    owners = [joined(delivery, at, pair.server, Owner()) for at in (topic("ann"), BROADCAST)]
    assert receive(delivery, where, data) is None
    assert [where] == [one for one, _ in malformed]
    assert (0, 0, 1) == outcomes(delivery)
    assert 1 == delivery.tally.notifications_malformed
    assert [[], []] == [owner.entries for owner in owners]
    assert (point(1), True) == (delivery.head.point, delivery.head.live)
    assert b"" == drain(pair.client)


def test_a_users_entries_do_not_move_the_head(delivery: Delivery, pair: Pair) -> None:
    """The head is about the stream of everyone."""
    delivery.head.reached(point(0), more=False)
    joined(delivery, topic("ann"), pair.server, Owner())
    receive(delivery, topic("ann"), announced(1))
    receive(delivery, topic("ann"), announced(5))
    assert (point(0), True) == (delivery.head.point, delivery.head.live)


async def test_the_head_moves_with_everyones_stream(delivery: Delivery) -> None:
    """Also where nobody is connected: who comes next starts from there."""
    assert not delivery.head.live
    await received(delivery, BROADCAST, announced(2))
    assert ("", False) == (delivery.head.point, delivery.head.live)
    delivery.head.reached(point(1), more=False)
    assert (point(2), True) == (delivery.head.point, delivery.head.live), "held until it was read"
    await received(delivery, BROADCAST, announced(3))
    await received(delivery, BROADCAST, updated(3))
    assert (f"e0.1000-{3 * SEQ_SPAN + 1}", True) == (delivery.head.point, delivery.head.live)
    await received(delivery, BROADCAST, announced(2))
    assert delivery.head.live, "it had that one"


@pytest.mark.parametrize("coming", [announced(5), announced(1, "e1")])
async def test_a_head_that_has_missed_something_is_forgotten(
    delivery: Delivery, pair: Pair, coming: bytes
) -> None:
    """The next who comes has to read; all who are there are told of the entry nonetheless."""
    owner = joined(delivery, BROADCAST, pair.server, Owner())
    delivery.head.reached(point(3), more=False)
    await received(delivery, BROADCAST, coming)
    assert ("", False) == (delivery.head.point, delivery.head.live)
    assert [(envelope.decode(coming), True)] == owner.entries


async def test_an_entry_for_everyone_reaches_all_and_lets_others_have_their_turn(
    delivery: Delivery, pair: Pair
) -> None:
    """A long fan-out yields; it goes to those who were there, whatever happens meanwhile."""
    delivery.head.reached(point(0), more=False)
    owners = [joined(delivery, BROADCAST, pair.server, Owner()) for _ in range(1000)]
    remaining = receive(delivery, BROADCAST, announced(1))
    assert remaining is not None
    assert point(1) == delivery.head.point, "before the first turn: who comes now needs it not"
    late, turns = Owner(), 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            if turns == 2:
                joined(delivery, BROADCAST, pair.server, late)
            await trio.lowlevel.checkpoint()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            await remaining
            nursery.cancel_scope.cancel()
    assert turns >= 1000 // OFFERS_PER_TURN
    assert [(envelope.decode(announced(1)), True)] * 1000 == [
        entry for owner in owners for entry in owner.entries
    ]
    assert [] == late.entries
    assert (1, 0, 0) == outcomes(delivery)
    assert 1 == sum(delivery.tally.delivery.counts)


async def test_entries_and_ephemeral_publications_share_a_channel(
    delivery: Delivery, pair: Pair
) -> None:
    """Who publishes raw goes on as ever; each goes its own way."""
    owner = joined(delivery, topic("ann"), pair.server, Owner())
    for data in (announced(1), publication(1), announced(2)):
        await received(delivery, topic("ann"), data)
    assert [envelope.decode(announced(1)), envelope.decode(announced(2))] == [
        entry for entry, _ in owner.entries
    ]
    frames, rest = split_frames(drain(pair.client))
    assert (1, b"") == (len(frames), rest)
    assert 1 == json.loads(frames[0][1])["payload"]
