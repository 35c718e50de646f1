"""What the clock asks for: expiry, fallbacks, scheduled notifications; each once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.redis_server import RedisServer
from tests.trioserver.ledger_calls import Caller
from tests.trioserver.ledger_stage import (
    ANN,
    PAYLOAD,
    TRACE,
    WEEK,
    Stage,
    home_of,
    life_key,
    new_id,
    place_in,
    point_of,
)
from trioserver import ledger
from trioserver.ledger import DAY_MS, Accepted, Rules
from trioserver.position import order


def test_nothing_is_due(stage: Stage) -> None:
    """A scheduler learns when to come again."""
    assert stage.due() == (0, -1)
    stage.publish(ttl_ms=60_000)

    done, wait = stage.due()

    assert done == 0
    assert 50_000 < wait <= 60_000


# --- expiry


def test_one_expires(stage: Stage) -> None:
    """It goes, does not count any more, leaves a gap, and is told once."""
    one, two = stage.publish_many(2)

    stage.sweep(one.id)

    assert stage.life(one.id)["state"] == "expired"
    assert "why" not in stage.life(one.id)
    found = stage.read()
    assert (found.ids, found.page.unread) == ([two.id], 1)
    assert found.gaps == [(1, 1, 1, "expired")]
    assert stage.told(one.id) == ["accepted", "expired"]
    assert stage.schedule().keys() == {f"x:{two.id}"}
    assert stage.due()[0] == 0


def test_who_may_show_it_is_told(stage: Stage) -> None:
    """Devices that have it take it off; of what nobody has, nobody hears."""
    one = stage.publish()
    stage.read(device="phone", connect=True)
    two = stage.publish()
    stage.ears.heard()

    stage.sweep(one.id, two.id)

    [heard] = stage.ears.heard()
    assert (heard.kind, heard.rest) == ("u", ("expired", [one.id], ""))
    assert stage.read(point=point_of(two)).changes == [("expired", [one.id])]
    assert stage.unread() == 0


def test_what_was_read_expires_silently(stage: Stage) -> None:
    """It stays read."""
    one, _ = stage.publish_many(2)
    stage.mark(ids=[one.id])
    stage.ears.heard()

    stage.sweep(one.id)

    assert stage.life(one.id)["state"] == "read"
    assert stage.told(one.id)[-1] == "read"
    assert stage.unread() == 1
    assert stage.ears.heard() == []
    assert stage.read().seqs == [2]


def test_what_was_received_expires(stage: Stage) -> None:
    """Time goes by for everything that nobody has read."""
    one = stage.publish()
    stage.report(received=point_of(one))

    stage.sweep(one.id)

    assert stage.told(one.id) == ["accepted", "received", "expired"]


def test_several_at_once(stage: Stage) -> None:
    """What expires together is one update, whoever's it is."""
    mine, theirs = stage.publish_many(3), stage.publish_many(2, None)
    stage.read(connect=True)
    stage.read(None, connect=True)

    stage.sweep(*(one.id for one in mine))
    stage.sweep(*(one.id for one in theirs), user=None)

    [(state, ids)] = stage.read(point=point_of(mine[2])).changes
    assert (state, sorted(ids)) == ("expired", sorted(one.id for one in mine))
    assert len(stage.read(None, point=point_of(theirs[1])).changes) == 1
    assert stage.unread() == 0


def test_so_many_at_most(stage: Stage) -> None:
    """A call does what it was asked for, and says that there is more at once."""
    published = stage.publish_many(5)
    stage.expire(*(one.id for one in published))

    assert stage.due(limit=2) == (2, 0)
    assert stage.due(limit=2) == (2, 0)
    assert stage.due(limit=2) == (1, -1)
    assert stage.unread() == 0


def test_several_schedulers(stage: Stage, redis: RedisServer) -> None:
    """However many call at the same time, everything is done once."""
    published = stage.publish_many(40, fallback_after_ms=1000)
    for one in published:
        stage.fall_due(f"f:{one.id}")

    def work() -> int:
        with Caller(redis.path) as caller:
            command = ledger.due(home_of(ANN), rules=stage.rules, limit=3)
            return sum(ledger.settled(caller.run(command))[0] for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        done = [future.result(10) for future in [pool.submit(work) for _ in range(4)]]

    assert sum(done) == 40
    kinds = [event["event"] for event in stage.events()]
    assert kinds.count("undelivered") == 40


# --- fallbacks


def test_nobody_has_received_it(stage: Stage) -> None:
    """One event says so, whether it was sent or not; it can still be received."""
    one, two = stage.publish_many(2, fallback_after_ms=60_000)
    stage.report(sent=point_of(one))
    for name in (one.id, two.id):
        stage.fall_due(f"f:{name}")

    assert stage.due()[0] == 2

    for name in (one.id, two.id):
        assert stage.told(name) == ["accepted", "undelivered"]
    stage.report(received=point_of(two))
    assert stage.told(two.id) == ["accepted", "undelivered", "received"]


def receive(stage: Stage, one: Accepted) -> None:
    """A device has it."""
    stage.report(received=point_of(one))


def acknowledge(stage: Stage, one: Accepted) -> None:
    """A client has handled it."""
    stage.report(sent=point_of(one), acked_seq=one.seq)


def read(stage: Stage, one: Accepted) -> None:
    """Somebody has read it."""
    stage.mark(ids=[one.id])


def cancel(stage: Stage, one: Accepted) -> None:
    """It was withdrawn; somebody has put it on the schedule again."""
    stage.cancel(one.id)


def expire(stage: Stage, one: Accepted) -> None:
    """Its time is over."""
    stage.sweep(one.id)


@pytest.mark.parametrize("settle", [receive, acknowledge, read, cancel, expire])
def test_no_fallback_is_wanted(stage: Stage, settle: Callable[[Stage, Accepted], None]) -> None:
    """What has arrived, or is over, is not undelivered."""
    one = stage.publish(fallback_after_ms=60_000)
    settle(stage, one)
    due = ledger.due_key(home_of(ANN))
    stage.caller.ask("ZADD", due, stage.caller.now() - 1, f"f:{one.id}")

    stage.due()

    assert "undelivered" not in stage.told(one.id)
    assert f"f:{one.id}" not in stage.schedule()


def test_one_undelivered_event(stage: Stage) -> None:
    """There is one per notification, even if something puts it on the schedule again."""
    one = stage.publish(fallback_after_ms=60_000)
    for _ in range(3):
        due = ledger.due_key(home_of(ANN))
        stage.caller.ask("ZADD", due, stage.caller.now() - 1, f"f:{one.id}")
        stage.due()

    assert stage.told(one.id) == ["accepted", "undelivered"]


# --- what was scheduled


def test_a_scheduled_one(stage: Stage) -> None:
    """It is kept, with all it takes, without a seq; nobody hears of it."""
    stage.ears.heard()
    at = stage.caller.now() + 60_000
    one = stage.publish(
        deliver_at_ms=at,
        ttl_ms=DAY_MS,
        type="t",
        collapse_key="c",
        fallback_after_ms=5000,
        traceparent=TRACE,
        channel="mine",
    )

    life = stage.life(one.id)

    assert (one.position, one.seq, one.outcome) == ("", 0, "scheduled")
    assert life.pop("at")
    assert life == {
        "state": "accepted",
        "user": "ann",
        "type": "t",
        "expires": str(at + DAY_MS),
        "due": str(at),
        "payload": PAYLOAD.decode(),
        "trace": TRACE,
        "collapse": "c",
        "fallback": str(at + 5000),
        "channel": "mine",
    }
    assert stage.schedule() == {f"d:{one.id}": at}
    assert (stage.inbox(), stage.unread()) == ([], 0)
    assert stage.told(one.id) == ["accepted"]
    assert stage.ears.heard() == []
    assert 46 * DAY_MS < stage.lifetime(life_key(one.id)) <= 46 * DAY_MS + 60_000


def test_a_scheduled_one_again(stage: Stage) -> None:
    """A repetition is answered as the first was, by id and by key."""
    name, at = new_id(ANN), stage.caller.now() + 60_000
    stage.publish(id=name, deliver_at_ms=at, idempotency_key="k")

    by_id = stage.publish(id=name, deliver_at_ms=at)
    by_key = stage.publish(deliver_at_ms=at + 1, idempotency_key="k")

    for again in (by_id, by_key):
        assert (again.id, again.position, again.seq) == (name, "", 0)
        assert again.outcome == "duplicate"
    assert len(stage.schedule()) == 1


def test_what_was_due_long_ago(stage: Stage) -> None:
    """A moment that has passed means now."""
    one = stage.publish(deliver_at_ms=stage.caller.now() - 5000, ttl_ms=DAY_MS)

    assert (one.seq, one.outcome) == (1, "accepted")
    assert stage.schedule() == {f"x:{one.id}": order(place_in(one))[0] + DAY_MS}


def test_a_fallback_is_scheduled(stage: Stage) -> None:
    """If nobody has received it by then, somebody wants to know."""
    one = stage.publish(fallback_after_ms=5000)

    at = order(place_in(one))[0]
    assert stage.schedule() == {f"x:{one.id}": at + WEEK, f"f:{one.id}": at + 5000}
    assert stage.life(one.id)["fallback"] == str(at + 5000)


def test_its_moment_comes(stage: Stage) -> None:
    """It is published as if it were published now, with all that was asked for."""
    older = stage.publish(collapse_key="c")
    at = stage.caller.now() + 60_000
    one = stage.publish(
        deliver_at_ms=at,
        ttl_ms=DAY_MS,
        type="t",
        collapse_key="c",
        fallback_after_ms=5000,
        traceparent=TRACE,
        channel="mine",
    )
    accepted_at = stage.life(one.id)["at"]
    stage.ears.heard()
    stage.caller.wait_past(stage.caller.now())
    stage.fall_due(f"d:{one.id}")

    assert stage.due()[0] == 1

    [heard] = stage.ears.heard()
    assert (heard.channel, heard.kind, heard.unread) == ("mine", "n", 1)
    assert heard.rest == (one.id, "t", {"n": 1}, at + DAY_MS, TRACE)
    [notice] = stage.read().notices
    assert (notice.id, notice.seq, notice.expires) == (one.id, 2, at + DAY_MS)
    assert (notice.type, notice.payload, notice.traceparent) == ("t", PAYLOAD, TRACE)
    life = stage.life(one.id)
    assert (life["at"], life["seq"], life["place"]) == (accepted_at, "2", notice.place)
    assert not life.keys() & {"payload", "trace", "collapse", "channel"}
    assert stage.schedule() == {f"x:{one.id}": at + DAY_MS, f"f:{one.id}": at + 5000}
    assert stage.life(older.id)["state"] == "cancelled"
    assert stage.told(one.id) == ["accepted"]
    assert stage.publish(id=one.id).seq == 2


def test_for_somebody_who_was_never_there(stage: Stage) -> None:
    """Nothing but its life has to be known of a user."""
    at = stage.caller.now() + 60_000
    one = stage.publish("ü b", deliver_at_ms=at)
    stage.caller.ask("DEL", ledger.key("meta", "ü b"))
    stage.fall_due(f"d:{one.id}", "ü b")

    stage.due("ü b")

    assert stage.read("ü b").ids == [one.id]
    everyone = stage.publish(None, deliver_at_ms=at)
    stage.fall_due(f"d:{everyone.id}", None)
    stage.due(None)
    assert stage.read(None).ids == [everyone.id]


def test_its_moment_and_its_time_are_over(stage: Stage) -> None:
    """If no scheduler came by for so long, it expires, and was never in the inbox."""
    one = stage.publish(deliver_at_ms=stage.caller.now() + 60_000)
    stage.caller.ask("HSET", life_key(one.id), "expires", stage.caller.now() - 1)
    stage.fall_due(f"d:{one.id}")

    stage.due()

    assert stage.life(one.id)["state"] == "expired"
    assert stage.told(one.id) == ["accepted", "expired"]
    assert (stage.inbox(), stage.unread()) == ([], 0)


def test_scheduled_ones_keep_the_limit(stage: Stage) -> None:
    """They push out the oldest as others do."""
    stage.rules = Rules(max_length=2)
    one = stage.publish(deliver_at_ms=stage.caller.now() + 60_000)
    stage.publish_many(2)
    stage.fall_due(f"d:{one.id}")

    stage.due()

    assert stage.read().gaps == [(1, 1, 1, "trimmed")]
    assert stage.read().seqs == [2, 3]


# --- what is found broken


@pytest.mark.parametrize("kind", ["x", "f", "d", "y", ""])
@pytest.mark.parametrize("name", ["p00-none", "", "x y"])
def test_garbage_on_the_schedule(stage: Stage, kind: str, name: str) -> None:
    """What means nothing is taken off."""
    stage.caller.ask("ZADD", ledger.due_key(home_of(ANN)), 1, f"{kind}:{name}")

    assert stage.due() == (1, -1)
    assert stage.names() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("state", "gone"), ("state", "read"), ("place", "x"), ("expires", "soon")),
        *(("user", ""), ("user", "bob"), ("seq", "x"), ("payload", "")),
    ],
)
@pytest.mark.parametrize("kind", ["x", "f", "d"])
def test_garbage_in_a_life(stage: Stage, kind: str, field: str, value: str) -> None:
    """Whatever a life says, the scheduler goes on with the next."""
    soon = stage.caller.now() + 60_000 if kind == "d" else None
    one = stage.publish(fallback_after_ms=60_000, deliver_at_ms=soon)
    stage.caller.ask("HSET", life_key(one.id), field, value)
    stage.fall_due(f"{kind}:{one.id}")

    assert stage.due()[0] == 1
    assert stage.unread() in {0, 1}
    assert stage.publish().outcome == "accepted"


def test_bad_calls(stage: Stage) -> None:
    """Impossible limits are refused, and so is a key that is no schedule."""
    stage.due()
    for arguments in (("limit", 0), ("max", 0), ("events", "x"), ("limit", "1001")):
        with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
            stage.raw("due", ledger.due_key("p00"), *arguments)
