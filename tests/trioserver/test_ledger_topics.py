"""Durable topics in the ledger: a stream that many read, of which nothing is kept per reader."""

import zlib
from typing import Final

import pytest

from tests.trioserver.ledger_stage import (
    PAYLOAD,
    TRACE,
    Stage,
    epoch_in,
    life_key,
    new_id,
    place_in,
    point_of,
)
from trioserver import ledger
from trioserver.ledger import DAY_MS, Topic, TopicRules
from trioserver.position import parse
from trioserver.settings import Settings
from trioserver.topics import Patterns

ROOM: Final = Topic("room.7")
ODD: Final = Topic("a:b/c~d@e_f-G.9")
HOUR: Final = 3_600_000
MINUTES: Final = 300_000
"""For which the life of a topic's notification is kept after its end."""

UNWRITTEN: Final = "new.0-0"
"""The point of a topic to which nothing was ever published."""


# --- what is stored


@pytest.mark.parametrize("topic", [ROOM, ODD])
def test_the_keys_of_a_notification(stage: Stage, topic: Topic) -> None:
    """A publish writes four keys, all in the slot of the topic; there are no events."""
    home = f"t{zlib.crc32(topic.name.encode()) % 16:02d}"

    one = stage.publish(topic)

    slot, name = f"ts:{{{home}}}:", topic.name.replace(":", "%3A").replace("/", "%2F")
    name = name.replace("~", "%7E")
    assert [slot + kind for kind in ("due", f"inbox:{name}", f"meta:{name}", f"n:{one.id}")] == (
        stage.names()
    )
    assert home == ledger.partition(topic) == ledger.partition_of(one.id)
    assert (topic.name, "1") == (stage.life(one.id)["user"], stage.life(one.id)["seq"])
    assert topic == ledger.owner_of(one.id, topic.name)
    place = parse(one.position)
    assert place is not None
    assert ("", point_of(one)) == (place.user, place.all)


def test_topics_are_in_sixteen_partitions() -> None:
    """All of them are used, and what is in them are ids; in the seventeenth there are none."""
    homes = {ledger.partition(Topic(f"room.{number}")) for number in range(500)}

    assert set(ledger.TOPIC_PARTITIONS) == homes
    assert {16} == {len(ledger.TOPIC_PARTITIONS)}
    for home in homes:
        assert home == ledger.partition_of(ledger.new_id(home, 1))
    assert ledger.partition_of(ledger.new_id("t16", 1)) is None


@pytest.mark.parametrize(
    ("key", "home"),
    [
        ("ts:{t09}:meta:room.7", "t09"),
        ("ts:{p09}:meta:room.7", "p09"),
        ("ts:{t16}:meta:room.7", "t16"),
        ("ts:{tx}:meta:room.7", "tx"),
        ("ts:{%s}:meta:a%%20b", ""),
        ("ts:{%s}:meta:a:b", ""),
        ("ts:{%s}:meta:%%C3%%A4", ""),
    ],
)
def test_another_key_than_everybody_uses_is_refused(stage: Stage, key: str, home: str) -> None:
    """Who gets the partition wrong, or a name that no topic has, would publish to nobody."""
    stage.publish(ROOM)
    kept = stage.names()
    for which in [home] if home else ledger.TOPIC_PARTITIONS:
        name = ledger.new_id(which, 1)
        with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
            stage.raw("publish", key % which if "%s" in key else key, "id", name, "payload", "1")
    assert kept == stage.names()


def test_what_the_settings_say() -> None:
    """Which topics are kept, how many, how long, how large."""
    rules = TopicRules.of(
        Settings(
            durable_topics=("news.**",),
            topic_history_length=7,
            topic_history_ttl=60.0,
            notification_max_size=99,
            idempotency_ttl=5.0,
        )
    )

    assert rules == TopicRules(
        durable=Patterns.of(("news.**",)),
        max_length=7,
        ttl_ms=60_000,
        max_payload=99,
        idempotency_ttl_ms=5000,
    )
    assert not TopicRules().durable.matches("news.eu")


def test_the_rules_are_kept(stage: Stage) -> None:
    """What is too large is refused; nothing is counted against a rate, whoever says one."""
    stage.topic_rules = TopicRules(max_payload=8)

    with pytest.raises(RuntimeError, match="more than 8 bytes"):
        stage.publish(ROOM, payload=b'"1234567"')
    for _ in range(3):
        name = new_id(ROOM, stage.caller.now())
        stage.raw("publish", ledger.key("meta", ROOM), "id", name, "payload", "1", "rate", 1)
    assert "3" == stage.meta(ROOM)["seq"]
    assert "pace" not in stage.meta(ROOM)


# --- reading


def test_from_now_and_from_the_start(stage: Stage) -> None:
    """Who has no place gets nothing, or all there is, without a gap for what is older."""
    stage.topic_rules = TopicRules(max_length=3)
    many = stage.publish_many(5, ROOM)

    head = stage.read(ROOM, head=True)
    start = stage.read(ROOM)

    assert ([], [], point_of(many[-1])) == (head.ids, head.gaps, head.reached)
    assert ([one.id for one in many[2:]], []) == (start.ids, start.gaps)
    assert ("new", "new", 0) == (head.page.why, start.page.why, start.page.unread)
    assert {(1, "accepted")} == {(one.attempt, one.state) for one in start.notices}


def test_from_a_point(stage: Stage) -> None:
    """What came behind it; of what is not there any more, exactly how many were missed."""
    stage.topic_rules = TopicRules(max_length=3)
    many = stage.publish_many(6, ROOM)

    near = stage.read(ROOM, point=point_of(many[4]))
    far = stage.read(ROOM, point=point_of(many[0]))

    assert ([many[5].id], [], "") == (near.ids, near.gaps, near.page.why)
    assert ([one.id for one in many[3:]], "trimmed") == (far.ids, far.page.why)
    assert [(2, 3, 2, "trimmed")] == far.gaps


def test_pages(stage: Stage) -> None:
    """A long topic is read in pages, each behind the one before."""
    many = stage.publish_many(7, ROOM)
    found, point, more = [], "", True
    while more:
        page = stage.read(ROOM, point=point, limit=3)
        found += page.ids
        point, more = page.reached, page.page.more
        assert [] == page.gaps

    assert [one.id for one in many] == found


def test_nothing_is_kept_of_readers(stage: Stage) -> None:
    """No cursor and no attempt, whatever a reader says; reports and marks are refused."""
    one = stage.publish(ROOM)
    kept, life = stage.names(), stage.life(one.id)

    for _ in range(2):
        found = stage.read(ROOM, device="phone", connect=True, ack=True)
        assert ([one.id], 1) == (found.ids, found.notices[0].attempt)
    for script in ("report", "mark"):
        with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
            stage.raw(script, ledger.key("meta", ROOM), "device", "phone")

    assert (kept, life) == (stage.names(), stage.life(one.id))


# --- topics without a history


def test_reading_what_was_never_written_leaves_nothing(stage: Stage) -> None:
    """Clients may ask for any number of topics; only those that are published to are kept."""
    for number in range(50):
        topic = Topic(f"room.{number}")
        for options in ({}, {"head": True}, {"connect": True, "channel": "stage:x"}):
            found = stage.read(topic, **options)
            assert (UNWRITTEN, [], "new") == (found.reached, found.page.items, found.page.why)
        assert [] == stage.read(topic, point=UNWRITTEN).gaps

    assert [] == stage.names()


def test_who_came_before_the_first_misses_nothing(stage: Stage) -> None:
    """From the place before any history one goes on in it, with exact gaps."""
    stage.topic_rules = TopicRules(max_length=3)
    point = stage.read(ROOM, head=True).reached

    first = stage.publish(ROOM)
    found = stage.read(ROOM, point=point)
    assert ([first.id], [], "") == (found.ids, found.gaps, found.page.why)
    many = stage.publish_many(5, ROOM)
    late = stage.read(ROOM, point=point)
    assert ([one.id for one in many[2:]], [(1, 3, 3, "trimmed")]) == (late.ids, late.gaps)


def test_a_lost_history_is_said(stage: Stage) -> None:
    """After Redis has lost everything a known place leads nowhere: one gap, and on from there."""
    point = point_of(stage.publish(ROOM))
    stage.caller.ask("FLUSHALL")

    lost = stage.read(ROOM, point=point)
    again = stage.read(ROOM, point=lost.reached)
    one = stage.publish(ROOM)
    garbage = stage.read(ROOM, garbage=True)

    assert ("epoch", [(0, 0, 0, "epoch")], UNWRITTEN) == (lost.page.why, lost.gaps, lost.reached)
    assert ("", []) == (again.page.why, again.gaps)
    assert ([one.id], []) == (stage.read(ROOM, point=lost.reached).ids, again.gaps)
    assert ([one.id], [(0, 0, 0, "epoch")]) == (garbage.ids, garbage.gaps)


def test_a_lost_meta_key(stage: Stage) -> None:
    """The stream goes on behind what is in it, in a new epoch."""
    one = stage.publish(ROOM)
    stage.caller.ask("DEL", ledger.key("meta", ROOM))

    two = stage.publish(ROOM)

    assert (2, True) == (two.seq, epoch_in(one) != epoch_in(two))
    assert [one.id, two.id] == stage.read(ROOM).ids


# --- who published


def test_the_sender(stage: Stage) -> None:
    """Who published comes with a page and with the envelope; nobody, if it was a back end."""
    _ = stage.ears
    stage.publish(ROOM, sender='an"n', traceparent=TRACE)
    stage.publish(ROOM, sender="bob")
    stage.publish(ROOM)

    notices = stage.read(ROOM).notices
    heard = stage.ears.heard()

    assert ['an"n', "bob", None] == [one.sender for one in notices]
    assert [TRACE, None, None] == [one.traceparent for one in notices]
    assert [(TRACE, 'an"n'), (None, "bob"), (None,)] == [one.rest[4:] for one in heard]
    assert {0} == {one.unread for one in heard}


def test_a_sender_that_cannot_be(stage: Stage) -> None:
    """1 to 128 bytes of UTF-8; what goes to a user or to everyone has none."""
    for sender in ("", "x" * 129, b"\xff"):
        with pytest.raises(RuntimeError, match="BADREQUEST sender is not"):
            stage.raw(
                "publish",
                *(ledger.key("meta", ROOM), "id", new_id(ROOM, 1), "payload", "1"),
                *("sender", sender),
            )
    for owner in ("ann", None):
        with pytest.raises(RuntimeError, match="BADREQUEST unknown argument sender"):
            stage.publish(owner, sender="ann")
    assert [] == stage.names()


# --- channels


def test_where_it_is_announced(stage: Stage) -> None:
    """On the topic's channel; behind a prefix, if the publisher has said so, also later."""
    prefixed = ledger.topic_channel("stage:", ROOM.name)
    _ = stage.ears
    stage.publish(ROOM)
    one = stage.publish(ROOM, channel=prefixed)
    stage.cancel(one.id, ROOM)
    stage.publish(ROOM)
    stage.publish(ROOM, channel=ledger.topic_channel("", ROOM.name))
    stage.publish(ROOM)

    assert [
        *("topic:room.7", "stage:topic:room.7", "stage:topic:room.7", "stage:topic:room.7"),
        *("topic:room.7", "topic:room.7"),
    ] == [one.channel for one in stage.ears.heard()]


# --- only once, instead of another, later


def test_repetitions(stage: Stage) -> None:
    """The same id, or the same idempotency key, is answered as the first time."""
    name = new_id(ROOM, stage.caller.now())
    one = stage.publish(ROOM, id=name, idempotency_key="k", sender="ann")

    by_id = stage.publish(ROOM, id=name)
    by_key = stage.publish(ROOM, idempotency_key="k")

    assert ("accepted", "duplicate", "duplicate") == (one.outcome, by_id.outcome, by_key.outcome)
    assert {(one.id, one.position, 1)} == {(b.id, b.position, b.seq) for b in (by_id, by_key)}
    assert [one.id] == stage.read(ROOM).ids


def test_a_newer_one_with_the_same_collapse_key(stage: Stage) -> None:
    """It takes the place of the one before, which those who show it are told; no gap."""
    before = stage.read(ROOM, head=True).reached
    one = stage.publish(ROOM, collapse_key="c")
    _ = stage.ears
    two = stage.publish(ROOM, collapse_key="c")

    late = stage.read(ROOM, point=before)
    assert ([two.id], [], [("cancelled", [one.id])]) == (late.ids, late.gaps, late.changes)
    assert [("cancelled", [one.id], ""), two.id] == [
        one.rest if one.kind == "u" else one.rest[0] for one in stage.ears.heard()
    ]


def test_later(stage: Stage) -> None:
    """What is due later comes with its sender and to its channel, and pushes out as it was told."""
    stage.topic_rules = TopicRules(max_length=2)
    many = stage.publish_many(2, ROOM)
    at = stage.caller.now() + HOUR
    one = stage.publish(ROOM, deliver_at_ms=at, sender="ann", channel="stage:topic:room.7")
    _ = stage.ears
    assert ("scheduled", "", 2) == (one.outcome, one.position, len(stage.read(ROOM).ids))

    stage.fall_due(f"d:{one.id}", ROOM)
    assert (1, True) == (stage.due(ROOM)[0], stage.due(ROOM)[1] > 0)

    found = stage.read(ROOM)
    assert [many[1].id, one.id] == found.ids
    assert "ann" == found.notices[1].sender
    [heard] = stage.ears.heard()
    assert ("stage:topic:room.7", "ann") == (heard.channel, heard.rest[5])
    assert {"sender", "max", "payload", "channel"}.isdisjoint(stage.life(one.id))


def test_not_at_all(stage: Stage) -> None:
    """What is withdrawn before it is due leaves its life, and nothing of what it said."""
    at = stage.caller.now() + HOUR
    one = stage.publish(ROOM, deliver_at_ms=at, sender="ann", channel="stage:topic:room.7")

    assert "cancelled" == stage.cancel(one.id, ROOM)

    life = stage.life(one.id)
    assert ("cancelled", {}) == (life["state"], stage.schedule(ROOM))
    assert {"sender", "max", "payload", "channel"}.isdisjoint(life)


def test_nobody_falls_back(stage: Stage) -> None:
    """Of a topic's notification nobody knows who should have received it."""
    with pytest.raises(RuntimeError, match="BADREQUEST fallback_after is not for topics"):
        stage.publish(ROOM, fallback_after_ms=1000)
    assert [] == stage.names()


# --- ends


def test_too_many(stage: Stage) -> None:
    """The oldest make room, silently; what became of them is known for some minutes."""
    stage.topic_rules = TopicRules(max_length=2)
    first = stage.publish(ROOM)
    _ = stage.ears
    many = stage.publish_many(3, ROOM)

    assert [one.id for one in many[1:]] == stage.read(ROOM).ids
    assert ["n"] * 3 == [one.kind for one in stage.ears.heard()]
    assert ("expired", "trimmed") == (stage.life(first.id)["state"], stage.life(first.id)["why"])
    assert 0 < stage.lifetime(life_key(first.id)) <= MINUTES
    assert {f"x:{one.id}" for one in many[1:]} == set(stage.schedule(ROOM))
    assert "duplicate" == stage.publish(ROOM, id=first.id).outcome


def test_expiry(stage: Stage) -> None:
    """It goes when its time is over, silently; who comes back hears how many were missed."""
    many = stage.publish_many(3, ROOM, ttl_ms=HOUR)
    _ = stage.ears
    stage.expire(many[1].id, user=ROOM)
    unswept = stage.read(ROOM, point=point_of(many[0]))

    assert 1 == stage.due(ROOM)[0]
    swept = stage.read(ROOM, point=point_of(many[0]))

    assert ([many[2].id], [(2, 2, 1, "expired")]) == (swept.ids, swept.gaps)
    assert (unswept.ids, unswept.gaps) == (swept.ids, swept.gaps)
    assert [] == stage.ears.heard()
    assert 2 == len(stage.inbox(ROOM))
    assert 0 < stage.lifetime(life_key(many[1].id)) <= MINUTES


def test_from_the_start_nothing_has_expired(stage: Stage) -> None:
    """Who begins misses nothing of what was over before; swept away or not."""
    many = stage.publish_many(3, ROOM)
    stage.expire(many[0].id, user=ROOM)

    for swept in (0, 1):
        found = stage.read(ROOM)
        assert ([one.id for one in many[1:]], []) == (found.ids, found.gaps)
        assert 1 - swept == stage.due(ROOM)[0]
    stage.sweep(*(one.id for one in many[1:]), user=ROOM)
    assert ([], []) == (stage.read(ROOM).ids, stage.read(ROOM).gaps)


def test_lifetimes(stage: Stage) -> None:
    """The stream lives a day longer than what is in it, and so does what is known of each."""
    one = stage.publish(ROOM, ttl_ms=HOUR)

    assert HOUR < stage.lifetime(ledger.key("inbox", ROOM)) <= HOUR + DAY_MS
    assert HOUR < stage.lifetime(life_key(one.id)) <= HOUR + DAY_MS
    assert 44 * DAY_MS < stage.lifetime(ledger.key("meta", ROOM)) <= 45 * DAY_MS


def test_withdrawn(stage: Stage) -> None:
    """Who shows it is told, who has not got it never will; nobody misses it."""
    one, two = stage.publish_many(2, ROOM, payload=PAYLOAD)
    _ = stage.ears

    assert "cancelled" == stage.cancel(one.id, ROOM)
    assert "too late" == stage.cancel(one.id, ROOM)

    found = stage.read(ROOM)
    assert ([two.id], [], [("cancelled", [one.id])]) == (found.ids, found.gaps, found.changes)
    [heard] = stage.ears.heard()
    assert ("u", ("cancelled", [one.id], "")) == (heard.kind, heard.rest)
    assert place_in(one) not in [place for place, _ in stage.inbox(ROOM)]


def test_topics_and_users_of_one_name(stage: Stage) -> None:
    """They have nothing to do with each other."""
    stage.publish(Topic("ann"))
    stage.publish("ann")

    assert (1, 1) == (len(stage.read("ann").ids), len(stage.read(Topic("ann")).ids))
    assert stage.read("ann").ids != stage.read(Topic("ann")).ids
    assert 1 == stage.unread("ann")
