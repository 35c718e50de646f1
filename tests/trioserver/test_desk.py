"""What the topics of a worker share: made once, and let go of when nobody wants it."""

import pytest

from tests.trioserver.topic_stage import (
    RULES,
    channel,
    decoded,
    notice,
    place,
    quiet,
    staged,
    subscribe,
    unsubscribe,
)
from tests.trioserver.wire import Attended, page
from trioserver import desk as module
from trioserver.desk import Desk
from trioserver.ledger import Gap
from trioserver.speaker import Speaker
from trioserver.topics import Patterns


def test_the_particulars_of_a_topic_are_shared_and_few_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten thousand subscribers of one topic have one name and one channel."""
    monkeypatch.setattr(module, "_REMEMBERED", 2)
    desk = Desk(
        prefix="app:",
        rules=RULES,
        public=Patterns.of(()),
        max_topics=0,
        presence=Patterns.of(["room.*"]),
        speaker=Speaker(RULES, log_bug=lambda _what, _bug: None, log_trouble=print),
        attendance=Attended(),
    )
    kept, room = desk.topic("kept.1"), desk.topic("room.1")
    assert kept is desk.topic("kept.1")
    assert (b"app:topic:kept.1", True, False) == (kept.channel, kept.durable, kept.attended)
    assert (b"app:topic:room.1", False, True) == (room.channel, room.durable, room.attended)
    desk.topic("third")
    assert (kept, 2) == (desk.topic("kept.1"), len(desk._known))


async def test_who_waits_for_a_topic_keeps_it_when_the_last_subscriber_leaves() -> None:
    """It is released when nobody is in the hub and nobody waits any more."""
    async with staged() as stage:
        first, second = await stage.subscribed("room.1"), await stage.come()
        third = await stage.come()
        stage.worker.follower.patient = True
        for client in (second, third):
            await client.send(subscribe("room.1", "r1"))
            await quiet(client)
        for client in (first, third):
            await client.send(unsubscribe("room.1"))
            await client.until("unsubscribed")
        assert channel("room.1") not in stage.worker.hub
        assert channel("room.1") not in stage.worker.follower.released
        stage.worker.follower.confirm(channel("room.1"))
        await second.until("subscribed")
        await second.send(unsubscribe("room.1"))
        await second.until("unsubscribed")
        assert [channel("room.1")] == stage.worker.follower.released


async def test_a_page_that_many_have_asked_for_is_made_into_frames_once() -> None:
    """As when the subscription comes back; each connection counts what it got."""
    async with staged() as stage:
        clients = [await stage.subscribed("kept.1") for _ in "123"]
        stage.worker.reading.patient = True
        for connection in stage.worker.shared.connections:
            connection.topics.catch_up()
        (question, *others) = stage.questions()
        assert [question, question] == others
        found = page(Gap(1, 1, 1, "trimmed"), notice(2), reached=place(2))
        renderings = set()
        for _ in clients:
            stage.worker.reading.answer(found)
            renderings.add(id(stage.desk.rendering(found, "kept.1", stage.worker.shared.stamp)))
        assert 1 == len(renderings)
        for client in clients:
            assert ["gap", "order"] == [(await client.message())["type"] for _ in "12"]
        tally = stage.worker.tally
        assert (3, 3) == (tally.notifications_delivered["backlog"], tally.gaps["trimmed"])
        other = stage.desk.rendering(page(notice(3)), "kept.1", stage.worker.shared.stamp)
        assert [3] == [message["seq"] for message in decoded(other.data)]
