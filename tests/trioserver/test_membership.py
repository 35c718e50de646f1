"""One topic of a connection: what it gets of it, from the first answer to the last."""

import json
from typing import Final

import attrs
import msgspec
import pytest
import trio
import trio.testing

from tests.trioserver.topic_stage import (
    ALL,
    RULES,
    channel,
    credential,
    entry,
    notice,
    place,
    point,
    quiet,
    seqs,
    staged,
    subscribe,
    told,
    unsubscribe,
    where,
)
from tests.trioserver.wire import (
    LIMIT,
    head,
    page,
    running,
    text,
    until,
)
from trioserver import frames, ledger, position
from trioserver.errors import CloseReason
from trioserver.ledger import Change, Gap, Notice
from trioserver.memberships import MAX_OWN
from trioserver.slow_policies import Policies
from trioserver.topics import Patterns
from trioserver.track import MAX_HELD

FILLING: Final = b"x" * 9000


def bulky(seq: int) -> bytes:
    """Return what is published for a notification of which a slow client can take few."""
    fields = [point(seq - 1), point(seq), 0, f"t00-{seq}", "order", FILLING.decode(), 0, None]
    return b"\x01n" + json.dumps(fields).encode()


async def test_nothing_comes_before_the_answer_and_nothing_is_missed_after_it() -> None:
    """A topic is in the hub from the moment on in which Redis has confirmed it."""
    async with staged() as stage:
        client = await stage.come()
        stage.worker.follower.patient = True
        await client.send(subscribe("room.1", "r1"))
        await until(lambda: channel("room.1") in stage.worker.follower.pending)
        assert channel("room.1") not in stage.worker.hub
        await stage.worker.publish(channel("room.1"), 1)
        stage.worker.follower.confirm(channel("room.1"))
        await stage.worker.publish(channel("room.1"), 2)
        assert {"type": "subscribed", "topic": "room.1", "ref": "r1"} == await client.message()
        message = await client.message()
        assert ("room.1", 2) == (message["topic"], message["payload"])


async def test_a_topic_that_is_subscribed_to_again_is_answered_again() -> None:
    """Also while the first answer is on its way; there is one membership."""
    async with staged() as stage:
        client = await stage.come()
        stage.worker.follower.patient = True
        await client.send(subscribe("room.1", "r1") + subscribe("room.1", "r2"))
        await until(lambda: channel("room.1") in stage.worker.follower.pending)
        await quiet(client)
        stage.worker.follower.confirm(channel("room.1"))
        stage.worker.follower.patient = False
        await client.send(subscribe("room.1", "r3"))
        assert ["r1", "r2", "r3"] == [(await client.message())["ref"] for _ in "123"]
        await stage.worker.publish(channel("room.1"), 1)
        assert 1 == (await client.message())["payload"]
        await quiet(client)
        assert [("ann", "room.1")] == stage.presences.entered


@pytest.mark.parametrize("name", ["room.1", "kept.1"])
async def test_who_asks_again_while_redis_is_away_is_answered_when_it_is_back(name: str) -> None:
    """What is published meanwhile does not come: that it would, must not be said."""
    async with staged() as stage:
        client = await stage.subscribed(name)
        follower = stage.worker.follower
        follower.patient = True  # nothing is confirmed: the link is down
        await client.send(subscribe(name, "r1") + subscribe(name, "r2"))
        await quiet(client)
        assert 1 == len(follower.pending[channel(name)].waiters)
        follower.confirm(channel(name))
        assert [["subscribed", "r1"], ["subscribed", "r2"]] == [
            await told(client, "type", "ref") for _ in "12"
        ]
        await client.send(subscribe(name, "r3") + unsubscribe(name, "r4"))
        assert ["r3", "r4"] == [(await client.message())["ref"] for _ in "12"]
        assert [] == follower.pending[channel(name)].waiters
        assert [channel(name)] == follower.released


async def test_what_was_left_does_not_come_any_more() -> None:
    """Whoever leaves is told so, also if there was nothing to leave."""
    async with staged() as stage:
        client = await stage.subscribed("room.1")
        await client.send(unsubscribe("room.1", "r1") + unsubscribe("room.2", "r2"))
        answers = [await client.message() for _ in "12"]
        assert [("room.1", "r1"), ("room.2", "r2")] == [
            (one["topic"], one["ref"]) for one in answers
        ]
        await stage.worker.publish(channel("room.1"), 1)
        await quiet(client)
        assert [("ann", "room.1")] == stage.presences.left


async def test_who_leaves_before_it_is_there_gets_an_answer_to_both() -> None:
    """And the channel is released."""
    async with staged() as stage:
        client = await stage.come()
        stage.worker.follower.patient = True
        await client.send(subscribe("room.1", "r1") + unsubscribe("room.1", "r2"))
        answers = [await client.message() for _ in "12"]
        assert [("unsubscribed", "r1"), ("unsubscribed", "r2")] == [
            (one["type"], one["ref"]) for one in answers
        ]
        assert [] == stage.worker.follower.pending[channel("room.1")].waiters
        assert [channel("room.1")] == stage.worker.follower.released


# Durable topics.


@pytest.mark.parametrize(
    ("since", "asked", "is_resumed", "reason"),
    [
        (None, {"head": 1}, False, None),
        ("start", {}, False, None),
        (where(3), {"point": point(3)}, True, None),
        ("nonsense", {"garbage": 1}, False, "epoch"),
        (position.join(point(3), ""), {"garbage": 1}, False, "epoch"),
    ],
)
async def test_a_durable_topic_is_read_from_where_the_client_says(
    since: str | None,
    asked: dict[str, object],
    is_resumed: bool,  # noqa: FBT001 - a row of the table
    reason: str | None,
) -> None:
    """And it is told from where it is served, and why from nowhere else."""
    async with staged() as stage:
        client = await stage.come()
        stage.worker.reading.patient = True
        more = {} if since is None else {"since": since}
        await client.send(subscribe("kept.1", "r1", **more))
        await until(lambda: bool(stage.worker.reading.wanted))
        ((question),) = stage.questions()
        assert ledger.key("meta", ledger.Topic("kept.1")) == question["key"]
        given = {name: question[name] for name in ("head", "point", "garbage") if name in question}
        assert asked == given
        why = "" if is_resumed else reason or "new"
        stage.worker.reading.answer(page(start=place(3), reached=place(3), why=why))
        answer = await client.message()
        assert ("subscribed", where(3), is_resumed, reason) == (
            answer["type"],
            answer["position"],
            answer.get("resumed", False),
            answer.get("reason"),
        )


async def test_what_was_missed_comes_first_then_what_came_meanwhile() -> None:
    """In order, nothing twice, gaps where they are; counted as what it is."""
    async with staged() as stage:
        client = await stage.come()
        stage.worker.reading.patient = True
        await client.send(subscribe("kept.1", since=where(0)))
        await until(lambda: bool(stage.worker.reading.wanted))
        for seq in (3, 4):
            await stage.enter("kept.1", entry(seq))
        gap = Gap(1, 1, 1, "trimmed")
        stage.worker.reading.answer(
            page(gap, notice(2), notice(3), reached=place(3), why="trimmed")
        )
        assert "subscribed" == (await client.message())["type"]
        assert {
            "type": "gap",
            "from_seq": 1,
            "to_seq": 1,
            "missing": 1,
            "reason": "trimmed",
            "topic": "kept.1",
        } == await client.message()
        assert {
            "type": "order",
            "id": "t00-2",
            "seq": 2,
            "payload": "x",
            "timestamp": "2025-11-20T09:13:20.002Z",
            "position": where(2),
            "attempt": 1,
            "topic": "kept.1",
            "from": "bob",
        } == await client.message()
        assert [3, 4] == await seqs(client, 2)
        await stage.enter("kept.1", entry(5))
        assert [5] == await seqs(client, 1)
        delivered = stage.worker.tally.notifications_delivered
        assert (2, 2, 1) == (
            delivered["backlog"],
            delivered["live"],
            stage.worker.tally.gaps["trimmed"],
        )
        assert [] == stage.worker.reading.wanted
        assert (("kept.1", point(5)),) == stage.worker.only().topics.names()


async def test_all_who_are_live_get_the_same_frame() -> None:
    """The position in it is the topic's own; whoever reads it gets the very same."""
    async with staged() as stage:
        clients = [await stage.subscribed("kept.1") for _ in "12"]
        await stage.enter("kept.1", entry(1))
        first, second = [await client.frame() for client in clients]
        assert first == second
        late = await stage.come()
        stage.worker.reading.patient = True
        await late.send(subscribe("kept.1", since="start"))
        await until(lambda: bool(stage.worker.reading.wanted))
        same = Notice(place(1), "t00-1", "order", b'{"n": 1}', 0, 1, "accepted", None, "bob")
        stage.worker.reading.answer(page(same, reached=place(1)))
        await late.until("subscribed")
        assert first == await late.frame()


async def test_a_hole_is_filled_and_what_came_already_is_not_sent_again() -> None:
    """The topic is read from the last point."""
    async with staged() as stage:
        client = await stage.subscribed("kept.1")
        stage.worker.reading.patient = True
        for seq in (1, 1, 3):
            await stage.enter("kept.1", entry(seq))
        assert [point(1)] == [one["point"] for one in stage.questions()]
        await stage.enter("kept.1", entry(4))
        stage.worker.reading.answer(
            page(notice(2), notice(3), start=place(1), reached=place(3), why="")
        )
        assert [1, 2, 3, 4] == await seqs(client, 4)
        assert [] == stage.worker.reading.wanted


async def test_when_the_subscription_comes_back_durable_topics_are_read() -> None:
    """What was published meanwhile is there; of live topics it is nowhere."""
    async with staged() as stage:
        client = await stage.subscribed("kept.1")
        await client.send(subscribe("room.1"))
        await client.until("subscribed")
        stage.worker.reading.patient = True
        topics = stage.worker.only().topics
        topics.read_on()
        assert [] == stage.worker.reading.wanted
        topics.catch_up()
        topics.catch_up()  # the page that is under way may be too old
        assert 1 == len(stage.questions())
        stage.worker.reading.answer(page(notice(1), reached=place(1)))
        assert [1] == await seqs(client, 1)
        stage.worker.reading.answer(page(start=place(1), reached=place(1)))
        assert [] == stage.worker.reading.wanted


async def test_who_says_since_again_is_served_from_there_again() -> None:
    """Also while a page is under way, which is thrown away."""
    async with staged() as stage:
        client = await stage.subscribed("kept.1")
        await stage.enter("kept.1", entry(1))
        await client.send(subscribe("kept.1", "r1"))
        assert [1] == await seqs(client, 1)
        assert where(1) == (await client.message())["position"]
        stage.worker.reading.patient = True
        await client.send(subscribe("kept.1", "r2", since="start"))
        await until(lambda: bool(stage.worker.reading.wanted))
        assert ["point" in one for one in stage.questions()] == [False]
        await client.send(subscribe("kept.1", "r3", since=where(5)))
        await quiet(client)
        stage.worker.reading.answer(page(notice(1), reached=place(1)))
        assert [point(5)] == [one["point"] for one in stage.questions()]
        stage.worker.reading.answer(page(start=place(5), reached=place(5), why=""))
        answers = [await client.message() for _ in "12"]
        assert [("r2", where(5)), ("r3", where(5))] == [
            (one["ref"], one["position"]) for one in answers
        ]
        await quiet(client)


async def test_changes_are_told_to_those_who_are_there_and_to_those_who_come() -> None:
    """One update for each notification that they are about."""
    async with staged() as stage:
        client = await stage.subscribed("kept.1")
        fields = [point(0), point(1), 0, "cancelled", ["t00-1", "t00-2"], ""]
        await stage.enter("kept.1", b"\x01u" + json.dumps(fields).encode())
        stage.worker.reading.patient = True
        stage.worker.only().topics.catch_up()
        change = Change(place(2), "expired", ["t00-3"])
        stage.worker.reading.answer(page(change, start=place(1), reached=place(2)))
        said = [await client.message() for _ in "123"]
        assert [
            ("update", "t00-1", "cancelled", where(1)),
            ("update", "t00-2", "cancelled", where(1)),
            ("update", "t00-3", "expired", where(2)),
        ] == [(one["type"], one["id"], one["state"], one["position"]) for one in said]


async def test_what_is_kept_for_others_is_live_where_nobody_keeps_it() -> None:
    """A publisher may have other rules: its notifications go out as they come."""
    async with staged() as stage:
        client = await stage.subscribed("room.1")
        for seq in (1, 5):
            await stage.enter("room.1", entry(seq))
        assert [1, 5] == await seqs(client, 2)


async def test_what_a_slow_client_does_not_take_stays_in_the_ledger() -> None:
    """If that is the policy: it is told, and gets everything in order when it reads on."""
    policies = Policies.of(["topic:kept.**=spill"])
    async with staged(send_buffer=4096, policies=policies) as stage:
        client = await stage.come(small=True)
        await client.send(subscribe("kept.1"))
        await client.until("subscribed")
        stage.worker.reading.patient = True
        seq = 0
        while not stage.worker.reading.wanted and seq < 300:
            # Nothing is asked of the ledger before the client has taken what it got.
            seq += 1
            await stage.enter("kept.1", bulky(seq))
            if stage.worker.only().outbox.half_full and seq > 40:
                break
        assert [] == stage.worker.reading.wanted
        (name, last), *_ = stage.worker.only().topics.names()
        assert ("kept.1", True) == (name, position.order(last)[0] < position.order(point(seq))[0])
        got: list[object] = []
        while (message := await client.message())["type"] != "lagging":
            got.append(message["seq"])
        assert list(range(1, len(got) + 1)) == got
        assert {"type": "lagging", "topic": "kept.1", "position": where(len(got))} == message
        await until(lambda: bool(stage.worker.reading.wanted))
        assert [point(len(got))] == [one["point"] for one in stage.questions()]
        rest = [notice(number) for number in range(len(got) + 1, seq + 1)]
        stage.worker.reading.answer(page(*rest, start=place(len(got)), reached=place(seq)))
        assert list(range(len(got) + 1, seq + 1)) == await seqs(client, len(rest))
        assert [] == stage.worker.ends


@pytest.mark.parametrize("is_filled", [False, True])
async def test_what_came_during_a_read_stays_in_the_ledger_as_well(*, is_filled: bool) -> None:
    """Entries that were held for the end of a page may be too many for a slow client."""
    policies = Policies.of(["topic:kept.**=spill"])
    async with staged(send_buffer=4096, policies=policies) as stage:
        client = await stage.come(small=True)
        await client.send(subscribe("kept.1"))
        await client.until("subscribed")
        stage.worker.reading.patient = True
        connection = stage.worker.only()
        connection.topics.catch_up()
        for seq in range(2, MAX_HELD + 1):
            await stage.enter("kept.1", bulky(seq))
        while is_filled and not connection.outbox.half_full:
            connection.outbox.offer(frames.encode_text(b'{"type":"other","x":"%s"}' % FILLING))
        stage.worker.reading.answer(page(notice(1), reached=place(1)))
        assert (None, []) == (connection.reason, stage.worker.reading.wanted)
        ((_, last),) = connection.topics.names()
        got: list[object] = []
        while (message := await client.message())["type"] != "lagging":
            got += [message["seq"]] if "seq" in message else []
        assert list(range(1, len(got) + 1)) == got
        assert (is_filled, True) == (len(got) == 1, len(got) < MAX_HELD)
        assert {"type": "lagging", "topic": "kept.1", "position": where(len(got))} == message
        assert point(len(got)) == last
        await until(lambda: bool(stage.worker.reading.wanted))
        assert [last] == [one["point"] for one in stage.questions()]
        rest = [notice(seq) for seq in range(len(got) + 1, MAX_HELD + 1)]
        stage.worker.reading.answer(page(*rest, start=place(len(got)), reached=place(MAX_HELD)))
        assert list(range(len(got) + 1, MAX_HELD + 1)) == await seqs(client, len(rest))
        await stage.enter("kept.1", entry(MAX_HELD + 1))
        assert [MAX_HELD + 1] == await seqs(client, 1)
        assert ([], []) == (stage.worker.reading.wanted, stage.worker.ends)


async def test_a_client_that_takes_nothing_of_what_is_read_is_too_slow() -> None:
    """And nothing more is read for it."""
    async with staged(send_buffer=4096) as stage:
        client = await stage.come(small=True)
        stage.worker.reading.patient = True
        await client.send(subscribe("kept.1", since="start"))
        await until(lambda: bool(stage.worker.reading.wanted))
        bulky = [notice(seq, 9000) for seq in range(1, 41)]
        stage.worker.reading.answer(page(*bulky, reached=place(40), more=True))
        assert CloseReason.TOO_SLOW is stage.worker.only().reason
        assert [] == stage.worker.reading.wanted


async def test_what_a_closed_outbox_does_not_take_has_failed() -> None:
    """It is counted, and not as delivered."""
    async with staged() as stage:
        await stage.subscribed("kept.1")
        stage.worker.only().outbox.closed = True
        await stage.enter("kept.1", entry(1))
        tally = stage.worker.tally
        assert (1, 0) == (tally.failed, tally.notifications_delivered["live"])


async def test_a_page_that_makes_no_sense_ends_the_connection_only() -> None:
    """A bug of ours must not leave a client waiting, nor harm those who get the same page."""
    with trio.fail_after(LIMIT):
        async with running(bugs_expected=True) as worker:
            worker.shared.desk.rules = RULES
            client = await worker.dial()
            await client.send(head(credential=credential(ALL)))
            await client.response()
            await client.until("connection_established")
            worker.reading.patient = True
            await client.send(subscribe("kept.1"))
            await until(lambda: bool(worker.reading.wanted))
            broken = msgspec.structs.replace(notice(1), place="?")
            worker.reading.answer(page(broken))
            assert "internal_error" == (await client.until("goodbye"))["reason"]
            await client.aclose()
            assert 1 == len(worker.bugs)


async def test_who_does_not_want_his_own_gets_those_of_the_others() -> None:
    """Of a durable topic they are left out by their ids, live and in what is read."""
    async with staged() as stage:
        client, other = await stage.subscribed("kept.1"), await stage.subscribed("kept.1")
        say = {"type": "publish", "topic": "kept.1", "exclude_self": True}
        for _ in range(3):
            await client.send(text(say))
        await until(lambda: len(stage.desk.speaker) == 3)
        ids = [str(one.command[one.command.index("id") + 1]) for one in stage.desk.speaker._waiting]
        stage.worker.reading.patient = True
        for seq in (1, 2):
            which = ids[0] if seq == 1 else f"t00-{seq}"
            fields = [point(seq - 1), point(seq), 0, which, "order", seq, 0, None]
            await stage.enter("kept.1", b"\x01n" + json.dumps(fields).encode())
        assert [1, 2] == await seqs(other, 2)
        assert [2] == await seqs(client, 1)
        (topics,) = [
            one.topics for one in stage.worker.shared.connections if one.topics.own is not None
        ]
        topics.catch_up()
        for seq in (5, 6):
            which = ids[2] if seq == 5 else f"t00-{seq}"
            fields = [point(seq - 1), point(seq), 0, which, "order", seq, 0, None]
            await stage.enter("kept.1", b"\x01n" + json.dumps(fields).encode())
        own = msgspec.structs.replace(notice(3), id=ids[1])
        stage.worker.reading.answer(page(own, notice(4), start=place(2), reached=place(4)))
        assert [4, 6] == await seqs(client, 2)
        assert (("kept.1", point(6)),) == topics.names()


async def test_what_is_its_own_does_not_come_by_another_way_either() -> None:
    """It may leave the topic and come back, and ask for what it has had."""
    async with staged() as stage:
        client = await stage.come()
        say = {"type": "publish", "topic": "kept.1", "exclude_self": True}
        await client.send(text(say) + subscribe("kept.1", "r1") + unsubscribe("kept.1", "r2"))
        await client.send(subscribe("kept.1", "r3"))
        assert ["r1", "r2", "r3"] == [(await client.message())["ref"] for _ in "123"]
        ((said),) = stage.desk.speaker._waiting
        which = str(said.command[said.command.index("id") + 1])
        for seq in (1, 2):
            fields = [point(seq - 1), point(seq), 0, f"t00-{seq}", "order", seq, 0, None]
            fields[3] = which if seq == 1 else fields[3]
            await stage.enter("kept.1", b"\x01n" + json.dumps(fields).encode())
        assert [2] == await seqs(client, 1)
        stage.worker.reading.patient = True
        await client.send(subscribe("kept.1", "r4", since="start"))
        await until(lambda: bool(stage.worker.reading.wanted))
        own = msgspec.structs.replace(notice(1), id=which)
        stage.worker.reading.answer(page(own, notice(2), reached=place(2)))
        assert "r4" == (await client.message())["ref"]
        assert [2] == await seqs(client, 1)
        await quiet(client)


async def test_few_of_what_a_client_has_published_are_remembered() -> None:
    """It may publish and never get to the topic's end."""
    async with staged() as stage:
        await stage.subscribed("kept.1")
        topics = stage.worker.only().topics
        for number in range(MAX_OWN + 1):
            topics.exclude(f"t00-{number}")
        for seq in (1, 2):
            fields = [point(seq - 1), point(seq), 0, f"t00-{seq - 1}", "order", seq, 0, None]
            await stage.enter("kept.1", b"\x01n" + json.dumps(fields).encode())
        assert 1 == stage.worker.tally.notifications_delivered["live"]


async def test_what_one_turn_brings_is_not_too_much_for_who_spills() -> None:
    """What is held until the turn is over counts as well; less may wait than is joined."""
    policies = Policies.of(["topic:kept.**=spill"])
    async with staged(send_buffer=4096, policies=policies, max_bytes=40_000) as stage:
        client = await stage.come(small=True)
        await client.send(subscribe("kept.1"))
        await client.until("subscribed")
        stage.worker.reading.patient = True
        for seq in range(1, 61):
            assert stage.worker.delivery.receive(channel("kept.1"), bulky(seq)) is None
        stage.worker.delivery.turn_over()
        assert stage.worker.only().reason is None
        ((_, last),) = stage.worker.only().topics.names()
        got: list[object] = []
        while (message := await client.message())["type"] != "lagging":
            got.append(message["seq"])
        assert list(range(1, len(got) + 1)) == got
        assert point(len(got)) == last


@pytest.mark.parametrize("again", [False, True])
async def test_who_lags_is_told_so_before_he_is_read_for_again(*, again: bool) -> None:
    """After an interruption, and where one page was not enough to know all."""
    policies = Policies.of(["topic:kept.**=spill"])
    async with staged(send_buffer=4096, policies=policies) as stage:
        client = await stage.come(small=True)
        await client.send(subscribe("kept.1"))
        await client.until("subscribed")
        connection, reading = stage.worker.only(), stage.worker.reading
        reading.patient = True
        if again:
            connection.topics.catch_up()  # it is read...
            connection.topics.catch_up()  # ... and this may be behind its page
        while not connection.outbox.half_full:
            connection.outbox.offer(frames.encode_text(b'{"type":"other","x":"%s"}' % FILLING))
        if again:
            reading.answer(page())
        else:
            connection.topics.catch_up()
        assert [] == reading.wanted, "nothing is read while it takes nothing"
        lagging = await client.until("lagging")
        assert {"type": "lagging", "topic": "kept.1", "position": where(0)} == lagging
        await until(lambda: bool(reading.wanted))
        reading.answer(page(notice(1), reached=place(1)))
        assert [1] == await seqs(client, 1)
        await stage.enter("kept.1", entry(2))
        assert [2] == await seqs(client, 1)


async def test_a_since_that_was_answered_unavailable_is_not_read() -> None:
    """The client was told to ask again; what it has goes on where it stood."""
    with trio.fail_after(LIMIT):
        async with running() as worker:
            desk = worker.shared.desk
            desk.rules = attrs.evolve(desk.rules, durable=Patterns.of(("news",)))
            desk.public = Patterns.of(("**",))
            client = await worker.join()
            await client.send(text({"type": "subscribe", "topic": "news", "ref": "1"}))
            assert "subscribed" == (await client.message())["type"]
            (kept,) = worker.only().topics._all.values()
            worker.follower.patient = True
            again = {"type": "subscribe", "topic": "news", "ref": "2", "since": "start"}
            await client.send(text(again))
            await until(lambda: bool(kept.asked))
            worker.only().topics.due(worker.pump.now + 6)
            assert "unavailable" == (await client.message())["code"]
            stood = kept.point
            worker.follower.confirm(kept.topic.channel)
            assert stood == kept.point != ""
