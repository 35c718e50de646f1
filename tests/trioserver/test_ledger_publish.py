"""Publishing: what a notification leaves in Redis, and what happens only once."""

from typing import Any

import pytest

from tests.trioserver.ledger_stage import (
    ANN,
    PAYLOAD,
    TRACE,
    WEEK,
    Stage,
    epoch_in,
    life_key,
    new_id,
    place_in,
    point_of,
)
from trioserver import ledger
from trioserver.ledger import DAY_MS, Rules
from trioserver.position import order, seq_of

# --- what is stored


def test_the_keys_of_a_notification(stage: Stage) -> None:
    """A publish writes five keys, all in the slot of the user, and nothing else."""
    home = ledger.partition(ANN)

    one = stage.publish()

    slot = f"ts:{{{home}}}:"
    kinds = ("due", "events", "inbox:ann", "meta:ann", f"n:{one.id}")
    assert [slot + kind for kind in kinds] == stage.names()


def test_what_meta_says(stage: Stage) -> None:
    """The epoch, the seq and the place of the newest, what is unread, and a layout version."""
    before = stage.caller.now()
    one, two = stage.publish_many(2)

    meta = stage.meta()

    assert meta.items() >= {"v": "1", "seq": "2", "unread": "2", "last": place_in(two)}.items()
    assert meta["epoch"] == epoch_in(one) == epoch_in(two)
    assert before <= int(meta["since"]) <= stage.caller.now()
    assert 44 * DAY_MS < stage.lifetime(ledger.key("meta", ANN)) <= 45 * DAY_MS


def test_what_an_entry_says(stage: Stage) -> None:
    """An inbox has id, type, payload, expiry and trace context of a notification, at its place."""
    before = stage.caller.now()
    one = stage.publish(type="order.paid", ttl_ms=DAY_MS, traceparent=TRACE)
    two = stage.publish()

    (place, fields), (_, others) = stage.inbox()

    assert place == place_in(one)
    milliseconds, number = order(place)
    assert before <= milliseconds <= stage.caller.now()
    assert number == 4096
    assert fields == {
        "i": one.id,
        "t": "order.paid",
        "p": PAYLOAD.decode(),
        "x": str(milliseconds + DAY_MS),
        "c": TRACE,
    }
    assert others.keys() == {"i", "t", "p", "x"}
    assert others["i"] == two.id


def test_what_a_life_says(stage: Stage) -> None:
    """What can be asked about a notification outlives it by a day."""
    one = stage.publish(ttl_ms=DAY_MS)

    life = stage.life(one.id)

    at = order(place_in(one))[0]
    assert life == {
        "state": "accepted",
        "user": "ann",
        "seq": "1",
        "place": place_in(one),
        "type": "notification",
        "at": str(at),
        "expires": str(at + DAY_MS),
    }
    assert 45 * DAY_MS < stage.lifetime(life_key(one.id)) <= 46 * DAY_MS
    assert stage.schedule() == {f"x:{one.id}": at + DAY_MS}


def test_what_is_left_out(stage: Stage) -> None:
    """An id and a payload are enough; the rest is as it is documented."""
    stage.due()
    name = new_id(ANN)

    reply = stage.raw("publish", ledger.key("meta", ANN), "id", name, "payload", "1")

    assert reply[2:] == [1, b"accepted"]
    life = stage.life(name)
    assert life["type"] == "notification"
    assert int(life["expires"]) - int(life["at"]) == 7 * DAY_MS
    again = stage.raw(
        *("publish", ledger.key("meta", ANN), "id", new_id(ANN), "payload", "1"),
        *("idempotency_key", "k"),
    )
    assert again[2:] == [2, b"accepted"]
    memory = f"ts:{{{ledger.partition(ANN)}}}:idem:ann:k"
    assert 290_000 < stage.lifetime(memory) <= 300_000


def test_the_longest_of_everything(stage: Stage) -> None:
    """Thirty days are allowed, for whatever has a duration."""
    stage.rules = Rules(idempotency_ttl_ms=30 * DAY_MS)
    one = stage.publish(
        deliver_at_ms=stage.caller.now() + 30 * DAY_MS,
        ttl_ms=30 * DAY_MS,
        fallback_after_ms=30 * DAY_MS,
        idempotency_key="x" * 128,
        collapse_key="y" * 128,
        channel="z" * 1024,
        type="t" * 64,
    )

    assert one.outcome == "scheduled"
    assert 104 * DAY_MS < stage.lifetime(life_key(one.id)) <= 105 * DAY_MS


def test_an_inbox_lives_as_long_as_something_is_in_it(stage: Stage) -> None:
    """Short-lived ones do not shorten its life, longer ones prolong it."""
    inbox = ledger.key("inbox", ANN)

    stage.publish(ttl_ms=10 * DAY_MS)
    first = stage.lifetime(inbox)
    stage.publish(ttl_ms=DAY_MS)
    second = stage.lifetime(inbox)
    stage.publish(ttl_ms=20 * DAY_MS)

    assert 10 * DAY_MS < first <= 11 * DAY_MS
    assert first - DAY_MS < second <= first
    assert 20 * DAY_MS < stage.lifetime(inbox) <= 21 * DAY_MS


def test_an_inbox_that_was_lost_gets_its_lifetime_again(stage: Stage) -> None:
    """Nothing stays for ever because Redis has evicted what it belonged to."""
    inbox = ledger.key("inbox", ANN)
    stage.publish(ttl_ms=10 * DAY_MS)
    stage.caller.ask("DEL", inbox)

    stage.publish(ttl_ms=DAY_MS)

    assert DAY_MS < stage.lifetime(inbox) <= 11 * DAY_MS


def test_seqs_are_contiguous_per_user(stage: Stage) -> None:
    """Each user counts alone, from 1, and places are in the order of the seqs."""
    published = [stage.publish(user) for user in ("ann", "bob", "ann", None, "bob", "ann", None)]

    assert [one.seq for one in published] == [1, 1, 2, 1, 2, 3, 2]
    places = [place for place, _ in stage.inbox("ann")]
    assert places == sorted(places, key=order)
    assert [seq_of(place) for place in places] == [1, 2, 3]


def test_the_clock_may_go_back(stage: Stage) -> None:
    """A place is never before the one before it, whatever the clock says."""
    one = stage.publish()
    future = stage.caller.now() + 60_000
    stage.caller.ask("HSET", ledger.key("meta", ANN), "last", f"{future}-4096")

    two = stage.publish()

    assert one.seq + 1 == two.seq
    assert place_in(two) == f"{future}-8192"


@pytest.mark.parametrize("user", ["ü b:{%}*", "a b\n", "~" * 42, "{p00}", "x" * 128])
def test_strange_users(stage: Stage, user: str) -> None:
    """A user is found again, whatever the id consists of, and is named raw to others."""
    stage.ears.heard()
    one = stage.publish(user)

    assert stage.read(user).ids == [one.id]
    assert stage.life(one.id)["user"] == user
    assert stage.events(user)[0]["user"] == user
    [heard] = stage.ears.heard()
    assert heard.channel == f"user_noti:{user}"
    assert stage.cancel(one.id, user) == "cancelled"


def test_an_accepted_event(stage: Stage) -> None:
    """Whoever follows the events hears of each notification that was accepted."""
    one = stage.publish()

    [event] = stage.events()

    at = str(order(place_in(one))[0])
    assert event == {
        "event": "accepted",
        "id": one.id,
        "user": "ann",
        "device": "",
        "seq": "1",
        "at": at,
        "why": "",
    }


@pytest.mark.parametrize(("limit", "at_most"), [(10, 150), (0, 300)])
def test_events_are_bounded(stage: Stage, limit: int, at_most: int) -> None:
    """About as many events are kept as the operator wants; 0 keeps all."""
    stage.rules = Rules(events_max_length=limit)

    stage.publish_many(300)

    kept = len(stage.events())
    assert limit <= kept <= at_most
    assert limit > 0 or kept == 300


# --- what is announced


def test_the_envelope(stage: Stage) -> None:
    """Listeners hear all that they need, and what came before it, without asking Redis."""
    stage.ears.heard()
    one = stage.publish(type='a "b"', payload=b'{"x": [1, "\\u00e4\xc3\xa4"]}', traceparent=TRACE)
    two = stage.publish()

    first, second = stage.ears.heard()

    at = order(place_in(one))[0]
    assert first.channel == "user_noti:ann"
    assert (first.kind, first.prev) == ("n", f"{epoch_in(one)}.0-0")
    assert (first.point, first.unread) == (point_of(one), 1)
    assert first.rest == (one.id, 'a "b"', {"x": [1, "ää"]}, at + WEEK, TRACE)
    assert (second.prev, second.point, second.unread) == (point_of(one), point_of(two), 2)
    assert second.rest[-1] is None


def test_everyone_has_no_unread(stage: Stage) -> None:
    """What is published to everyone counts for nobody."""
    stage.ears.heard()
    one = stage.publish(None)

    [heard] = stage.ears.heard()

    assert (heard.channel, heard.unread) == ("channels:broadcast", 0)
    assert stage.meta(None)["unread"] == "0"
    assert stage.life(one.id)["user"] == "all"
    assert stage.events(None)[0]["user"] == "all"


def test_where_it_is_announced(stage: Stage) -> None:
    """The publisher's channel beats the one that a worker has left, that beats the usual one."""
    stage.ears.heard()
    stage.publish()
    stage.read(connect=True, channel="custom:ann")
    stage.publish()
    stage.publish(channel="mine")
    stage.publish()
    stage.read(connect=True, channel="user_noti:ann")
    stage.publish()

    channels = [heard.channel for heard in stage.ears.heard()]

    assert channels == ["user_noti:ann", "custom:ann", "mine", "custom:ann", "user_noti:ann"]
    assert "channel" not in stage.meta()


# --- once


def test_the_same_id_again(stage: Stage) -> None:
    """Publishing again after an unknown outcome changes nothing and gets the first answer."""
    name = new_id(ANN)
    first = stage.publish(id=name)
    before = stage.meta()
    stage.ears.heard()

    again = stage.publish(id=name, payload=b"2")

    assert again.outcome == "duplicate"
    assert (again.id, again.position, again.seq) == (first.id, first.position, first.seq)
    assert stage.meta() == before
    assert len(stage.inbox()) == len(stage.events()) == 1
    assert stage.ears.heard() == []


def test_an_id_of_somebody_else(stage: Stage) -> None:
    """An id belongs to one user; the other's notification is not told about."""
    home = ledger.partition(ANN)
    other = next(f"u{n}" for n in range(10_000) if ledger.partition(f"u{n}") == home)
    one = stage.publish()

    with pytest.raises(RuntimeError, match=r"^BADREQUEST this id belongs to another user"):
        stage.publish(other, id=one.id)


def test_an_idempotency_key(stage: Stage) -> None:
    """The same key with the same content publishes once, whatever the id."""
    first = stage.publish(idempotency_key="order 7")

    again = stage.publish(idempotency_key="order 7")

    assert again.outcome == "duplicate"
    assert (again.id, again.position, again.seq) == (first.id, first.position, first.seq)
    assert len(stage.inbox()) == 1
    assert stage.publish("bob", idempotency_key="order 7").outcome == "accepted"


@pytest.mark.parametrize("other", [{"payload": b"2"}, {"type": "other"}])
def test_an_idempotency_key_for_something_else(stage: Stage, other: dict[str, Any]) -> None:
    """The same key with other content is an error without effect."""
    stage.publish(idempotency_key="k")

    with pytest.raises(RuntimeError, match=r"^IDEMPOTENCY "):
        stage.publish(idempotency_key="k", **other)
    assert stage.unread() == len(stage.inbox()) == 1


def test_an_idempotency_key_is_forgotten(stage: Stage) -> None:
    """It lives as long as the operator wants, in a key of its own."""
    stage.rules = Rules(idempotency_ttl_ms=5000)
    stage.publish(idempotency_key="a:b/%")

    key = f"ts:{{{ledger.partition(ANN)}}}:idem:ann:a%3Ab%2F%25"

    assert 0 < stage.lifetime(key) <= 5000
    stage.caller.ask("DEL", key)
    assert stage.publish(idempotency_key="a:b/%").outcome == "accepted"


@pytest.mark.parametrize("garbage", ["", "x", "zz zz zz", "0 - -"])
def test_garbage_under_an_idempotency_key(stage: Stage, garbage: str) -> None:
    """What nobody can read is either nothing or another content, and never breaks the script."""
    stage.caller.ask("SET", f"ts:{{{ledger.partition(ANN)}}}:idem:ann:k", garbage)

    if garbage.startswith("0"):
        with pytest.raises(RuntimeError, match=r"^IDEMPOTENCY "):
            stage.publish(idempotency_key="k")
    else:
        assert stage.publish(idempotency_key="k").outcome == "accepted"


# --- instead of another one


def test_a_collapse_key_replaces(stage: Stage) -> None:
    """What nobody has received goes without a trace in the inbox, and is no gap."""
    older = stage.publish(collapse_key="score")
    middle = stage.publish()

    newer = stage.publish(collapse_key="score")

    assert stage.read().ids == [middle.id, newer.id]
    assert stage.read().gaps == []
    assert stage.unread() == 2
    assert stage.holes() == [(1, 1)]
    life = stage.life(older.id)
    assert (life["state"], life["why"]) == ("cancelled", f"collapsed by {newer.id}")
    assert stage.told(older.id) == ["accepted", "cancelled"]
    assert f"x:{older.id}" not in stage.schedule()


def test_what_was_received_is_not_replaced(stage: Stage) -> None:
    """Who has seen it keeps it."""
    older = stage.publish(collapse_key="score")
    stage.report(received=point_of(older))

    newer = stage.publish(collapse_key="score")

    assert stage.read(device="new", point=f"{epoch_in(older)}.0-0").ids == [older.id, newer.id]
    assert stage.unread() == 2


def test_a_collapse_tells_those_who_may_show_it(stage: Stage) -> None:
    """An update goes out only if somebody was given the older one."""
    stage.ears.heard()
    stage.publish(collapse_key="a")
    quiet = stage.publish("bob", collapse_key="a")
    assert stage.life(quiet.id)["live"] == "1"
    stage.ears.heard()

    newer = stage.publish("bob", collapse_key="a")

    update, notice = stage.ears.heard()
    assert (update.kind, update.rest, update.unread) == ("u", ("cancelled", [quiet.id], ""), 0)
    assert (notice.kind, notice.prev, notice.unread) == ("n", update.point, 1)
    assert stage.read("bob").changes == [("cancelled", [quiet.id])]
    assert stage.read("bob").ids == [newer.id]


def test_a_collapse_key_lives_as_long_as_its_notification(stage: Stage) -> None:
    """Nothing is left of it afterwards; users and keys cannot get into each other's way."""
    stage.publish(collapse_key="a:b", ttl_ms=5000)

    key = f"ts:{{{ledger.partition(ANN)}}}:collapse:ann:a%3Ab"

    assert 0 < stage.lifetime(key) <= 5000
    stage.publish("bob", collapse_key="a:b")
    assert stage.unread() == 1


@pytest.mark.parametrize("garbage", ["", "x", "p00-nothing"])
def test_garbage_under_a_collapse_key(stage: Stage, garbage: str) -> None:
    """A key that names nothing replaces nothing."""
    stage.caller.ask("SET", f"ts:{{{ledger.partition(ANN)}}}:collapse:ann:k", garbage)

    stage.publish(collapse_key="k")

    assert stage.unread() == 1


# --- how many


def test_an_inbox_is_trimmed_exactly(stage: Stage) -> None:
    """Of 1,500 the last 1,000 stay; the others have expired, and the gap says how many."""
    stage.rules = Rules(events_max_length=100_000)
    published = stage.publish_many(1500)

    found = stage.read(limit=1000, max_bytes=10_000_000)

    assert stage.caller.ask("XLEN", ledger.key("inbox", ANN)) == 1000
    assert found.gaps == [(1, 500, 500, "trimmed")]
    assert found.ids == [one.id for one in published[500:]]
    assert stage.unread() == 1000
    for one, kinds in ((published[0], ["accepted", "expired"]), (published[500], ["accepted"])):
        assert stage.told(one.id) == kinds
    life = stage.life(published[499].id)
    assert (life["state"], life["why"]) == ("expired", "trimmed")
    assert stage.lifetime(life_key(published[499].id)) <= DAY_MS
    expiries = [member for member in stage.schedule() if member.startswith("x:")]
    assert len(expiries) == 1000
    done, wait = stage.due()
    assert done == 0
    assert WEEK - 60_000 < wait <= WEEK


def test_what_was_read_is_trimmed_silently(stage: Stage) -> None:
    """A read notification stays read, and does not count again."""
    stage.rules = Rules(max_length=2)
    one, two, *_ = stage.publish_many(2)
    stage.mark(ids=[one.id])
    assert stage.unread() == 1

    stage.publish()

    assert stage.unread() == 1
    assert stage.life(one.id)["state"] == "read"
    assert stage.told(one.id) == ["accepted", "received", "read"]
    assert stage.life(two.id)["state"] == "expired"
    assert len(stage.inbox()) == 2


def test_a_lower_limit(stage: Stage) -> None:
    """When the operator lowers the limit, the next publish makes it true."""
    stage.publish_many(20)
    stage.rules = Rules(max_length=5)

    stage.publish()

    assert [seq_of(place) for place, _ in stage.inbox()] == [17, 18, 19, 20, 21]
    assert stage.unread() == 5
    assert stage.read().gaps == [(1, 16, 16, "trimmed")]


def test_a_full_redis_takes_nothing_and_forgets_nothing(stage: Stage) -> None:
    """The publish is refused as it is, and the user's history goes on afterwards."""
    one = stage.publish()
    stage.cancel(one.id)
    stage.caller.ask("DEL", ledger.key("inbox", ANN))
    stage.caller.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(RuntimeError, match=r"^OOM "):
            stage.publish()
    finally:
        stage.caller.ask("CONFIG", "SET", "maxmemory", "0")
    two = stage.publish()
    assert (2, epoch_in(one)) == (two.seq, epoch_in(two))
