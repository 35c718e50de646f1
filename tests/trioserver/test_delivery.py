"""The delivery: parsed and encoded once, in order, in turns."""

import json
import socket
from collections.abc import Iterator

import pytest
import trio

from tests.trioserver.test_outbox import Owner, drain
from tests.trioserver.wire import BROADCAST, LIMIT, Pair, split_frames, topic
from trioserver.delivery import OFFERS_PER_TURN, Delivery
from trioserver.hub import Hub
from trioserver.metrics import Tally
from trioserver.outbox import Outbox, OutboxLimits


@pytest.fixture
def malformed() -> list[tuple[bytes, str]]:
    """Collect what is logged."""
    return []


@pytest.fixture
def delivery(malformed: list[tuple[bytes, str]]) -> Delivery:
    """Make a delivery with a small limit."""
    return Delivery(
        hub=Hub(),
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
    outbox = Outbox(sock, OutboxLimits(), Owner())
    delivery.hub.add(where, outbox)
    return outbox


def publication(payload: object, **more: object) -> bytes:
    """Return what a back end publishes."""
    return json.dumps({"payload": payload, **more}).encode()


def test_a_users_notification_is_delivered_before_receive_returns(
    delivery: Delivery, pair: Pair
) -> None:
    """To every outbox under the topic, with the time and without anything forged."""
    for _ in range(2):
        subscribed(delivery, topic("ann"), pair.server)
    assert delivery.receive(topic("ann"), publication(1, type="mail", id="forged")) is None
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
    assert delivery.receive(topic("bob"), b"garbage") is None
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
    assert delivery.receive(where, data) is None
    assert [where] == [one for one, _ in malformed]
    assert 1 == delivery.tally.notifications_malformed
    assert b"" == drain(pair.client)


def test_refused_offers_are_counted(delivery: Delivery, pair: Pair) -> None:
    """One closed outbox costs its own notification only."""
    subscribed(delivery, topic("ann"), pair.server).abandon()
    subscribed(delivery, topic("ann"), pair.server)
    delivery.receive(topic("ann"), publication(1))
    assert (1, 1) == (
        delivery.tally.notifications_delivered["ephemeral"],
        delivery.tally.failed,
    )


async def test_a_broadcast_reaches_all_and_lets_others_have_their_turn(
    delivery: Delivery, pair: Pair
) -> None:
    """A long fan-out yields; who ends meanwhile is refused, who comes meanwhile waits."""
    outboxes = [Outbox(pair.server, OutboxLimits(), Owner()) for _ in range(1000)]
    for outbox in outboxes:
        outbox.cork()
        delivery.hub.add(BROADCAST, outbox)
    remaining = delivery.receive(BROADCAST, publication("all"))
    assert remaining is not None
    turns = 0
    late = Outbox(pair.server, OutboxLimits(), Owner())

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
    assert delivery.receive(BROADCAST, publication(1)) is None
    await trio.lowlevel.checkpoint()
