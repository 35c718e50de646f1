"""How a user stands, and lives of notifications, as read from what the scripts have written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from tests.redis_server import RedisServer
from tests.trioserver.ledger_calls import Caller
from trioserver import ledger, life
from trioserver.ledger import Accepted, Notification, Owner, Rules, Topic
from trioserver.life import Device, DeviceLife, Look, Standing, Trace

RULES: Final = Rules()
HOUR: Final = 3_600_000


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Caller]:
    """A connection to a Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as redis, Caller(redis.path) as caller:
        yield caller


def publish(caller: Caller, user: Owner = "ann", **options: Any) -> Accepted:
    """Publish something."""
    name = ledger.new_id(ledger.partition(user), caller.now())
    options = {"payload": b"1", "ttl_ms": HOUR, **options}
    notification = Notification(user=user, id=name, **options)
    return ledger.accepted(caller.run(ledger.publish(notification, rules=RULES)))


def connect(caller: Caller, device: str, user: str = "ann") -> ledger.Page:
    """Come as a device and read what it has missed."""
    return ledger.page(caller.run(ledger.read(user, device=device, connect=True)))


def report(caller: Caller, device: str, **progress: Any) -> None:
    """Say how far a device is."""
    caller.run(ledger.report("ann", rules=RULES, device=device, **progress))


def look(caller: Caller, user: str = "ann") -> Standing:
    """Return how a user stands."""
    asked = Look(user)
    while questions := asked.questions():
        asked.answered([caller.run(question) for question in questions])
    return asked.standing()


def traced(caller: Caller, name: str) -> Trace:
    """Return the explained life of a notification of ann's."""
    key = ledger.notification_key(name)
    assert key is not None
    found = life.trace(name, caller.ask("HGETALL", key))
    assert found is not None
    return life.explained(found, look(caller))


def point(accepted: Accepted) -> str:
    """Return the point in a user's position."""
    return accepted.position.removeprefix("1.")


def devices(standing: Standing) -> dict[str, Device]:
    """Return the devices by name."""
    return {device.name: device for device in standing.devices}


def test_an_unknown_user(caller: Caller) -> None:
    """Of a stranger nothing is known, and looking makes no keys."""
    standing = look(caller, "nobody")

    assert (False, "", 0, 0) == (
        standing.known,
        standing.position,
        standing.unread,
        standing.retained,
    )
    assert abs(standing.now - caller.now()) < 5000
    assert 0 == caller.ask("DBSIZE")


def test_how_far_devices_are(caller: Caller) -> None:
    """Each device has its own numbers, and what is kept for it and not received is outstanding."""
    connect(caller, "laptop")
    first, second, third = (publish(caller) for _ in range(3))
    connect(caller, "phone")
    connect(caller, "")
    report(caller, "phone", sent=point(third), received=point(second), acked_seq=first.seq)
    standing = look(caller)

    assert (True, third.position, 3, 3, 3, True) == (
        standing.known,
        standing.position,
        standing.seq,
        standing.unread,
        standing.retained,
        standing.all_counted,
    )
    known = devices(standing)
    phone, laptop = known["phone"], known["laptop"]
    assert (3, 2, 1, 1) == (phone.sent, phone.received, phone.acked, phone.outstanding)
    assert (0, 0, 0, 3) == (laptop.sent, laptop.received, laptop.acked, laptop.outstanding)
    assert [phone.name, laptop.name] == [device.name for device in standing.devices if device.name]
    assert standing.now - 5000 < phone.seen <= standing.now


def test_the_stream_for_everyone(caller: Caller) -> None:
    """How far a device is in it is told apart."""
    publish(caller)
    connect(caller, "phone")
    everyone = publish(caller, None)
    report(caller, "phone", all_point=everyone.position.removeprefix("1.0.0-0."))

    assert 1 == devices(look(caller))["phone"].all_received


def test_withdrawn_and_pushed_out(caller: Caller) -> None:
    """What was cancelled or trimmed is not kept any more, so it is not outstanding."""
    connect(caller, "phone")
    first, second = publish(caller), publish(caller)
    caller.run(ledger.cancel("ann", second.id, rules=RULES))
    assert (1, 1) == (look(caller).retained, devices(look(caller))["phone"].outstanding)

    small = Rules(max_length=1)
    name = ledger.new_id(ledger.partition("ann"), caller.now())
    notification = Notification(user="ann", id=name, payload=b"1", ttl_ms=HOUR)
    caller.run(ledger.publish(notification, rules=small))
    standing = look(caller)
    assert (1, 1, 3) == (standing.retained, standing.trimmed, standing.seq)
    assert ("expired", "trimmed") == (
        traced(caller, first.id).state,
        traced(caller, first.id).why,
    )


def test_another_epoch(caller: Caller) -> None:
    """Places of a history that was lost say nothing: everything is outstanding."""
    connect(caller, "phone")
    report(caller, "phone", received=point(publish(caller)))
    for kind in ("meta", "inbox"):
        caller.ask("DEL", ledger.key(kind, "ann"))
    publish(caller)
    phone = devices(look(caller))["phone"]

    assert (0, 0, 1) == (phone.sent, phone.received, phone.outstanding)


def test_a_long_inbox(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read in pages, and up to a bound, which is said."""
    monkeypatch.setattr(life, "PAGE_ENTRIES", 7)
    connect(caller, "phone")
    for _ in range(20):
        publish(caller)
    standing = look(caller)
    assert (20, True, 20) == (
        standing.retained,
        standing.all_counted,
        standing.devices[0].outstanding,
    )

    monkeypatch.setattr(life, "MAX_ENTRIES", 14)
    standing = look(caller)
    assert (14, False) == (standing.retained, standing.all_counted)
    assert 20 == standing.seq


def test_what_has_expired_is_not_kept() -> None:
    """An entry whose time is over does not count, though it has not been swept yet."""
    entries = [
        [b"1-4096", [b"i", b"a", b"x", b"999"]],
        [b"1-8192", [b"i", b"b", b"x", b"1001"]],
        [b"1-8193", [b"u", b"read", b"i", b"a"]],
        [b"1-9999", [b"x", b"5000"]],
    ]
    asked = Look("ann")
    asked.answered([[b"1", b"0"], [], [], entries])

    assert [] == asked.questions()
    assert 1 == asked.standing().retained


def test_a_life(caller: Caller) -> None:
    """When it was accepted, sent, received, acknowledged and read, on each device."""
    connect(caller, "phone")
    connect(caller, "laptop")
    accepted = publish(caller, type="order", fallback_after_ms=60_000)
    report(caller, "phone", sent=point(accepted))
    assert "sent" == traced(caller, accepted.id).state
    report(caller, "phone", received=point(accepted), acked_seq=1)
    caller.run(ledger.mark("ann", rules=RULES, device="phone", by="x", ids=[accepted.id]))
    found = traced(caller, accepted.id)

    assert ("ann", "order", "read", "", 1) == (
        found.user,
        found.type,
        found.state,
        found.why,
        found.seq,
    )
    assert ["received", "acked", "read"] == [event.kind for event in found.events]
    assert found.accepted is not None
    assert found.fallback == found.accepted + 60_000
    assert found.expires == found.accepted + HOUR
    by_name = {device.name: device for device in found.devices}
    phone = by_name["phone"]
    moments = [phone.sent, phone.received, phone.acked, phone.read]
    assert all(moment is not None for moment in moments)
    assert sorted(moments, key=lambda moment: moment or 0) == moments
    assert "" == phone.why
    # Which of the two depends on whether it came in the same millisecond.
    assert by_name["laptop"].why in {"it has not been sent yet", "the device has not come since"}


def test_attempts_are_counted(caller: Caller) -> None:
    """How often a device was handed it by a reading is part of its life."""
    accepted = publish(caller)
    connect(caller, "phone")
    connect(caller, "phone")
    [phone] = traced(caller, accepted.id).devices

    assert ("phone", 2) == (phone.name, phone.attempts)


LIFE: Final = DeviceLife(name="phone")
DEVICE: Final = Device(
    name="phone", seen=2000, sent=0, received=0, acked=0, all_received=0, outstanding=1
)
TRACE: Final = Trace(
    id="p00-x",
    user="ann",
    type="t",
    state="accepted",
    why="",
    seq=5,
    place="1-20480",
    accepted=1000,
    expires=9000,
    due=None,
    fallback=None,
    events=(),
    devices=(),
)


@pytest.mark.parametrize(
    ("trace", "known", "device", "why"),
    [
        ({}, {"received": 1500}, {}, ""),
        ({"seq": 0}, {}, {}, "it is not due yet"),
        ({}, {"sent": 1500}, {}, "it was written to the connection, which has not confirmed it"),
        ({}, {}, {"seen": 999}, "the device has not come since"),
        ({"state": "expired"}, {}, {"seen": 999}, "the device has not come since"),
        ({}, {}, {"received": 5}, "the device went on from a later place"),
        ({"state": "cancelled"}, {}, {}, "it was cancelled first"),
        ({"accepted": None}, {}, {}, "it has not been sent yet"),
    ],
)
def test_why_not(
    trace: dict[str, Any], known: dict[str, Any], device: dict[str, Any], why: str
) -> None:
    """A device that has not received it has a reason, the first that explains it."""
    told = attrs.evolve(TRACE, devices=(attrs.evolve(LIFE, **known),), **trace)
    standing = Standing(
        user="ann",
        now=3000,
        known=True,
        position="",
        seq=5,
        unread=1,
        retained=1,
        all_counted=True,
        trimmed=0,
        devices=(attrs.evolve(DEVICE, **device),),
    )
    [explained] = life.explained(told, standing).devices

    assert why == explained.why


def test_a_device_that_was_forgotten_is_told_of(caller: Caller) -> None:
    """What a device has received stays in the life of a notification when its record is gone."""
    connect(caller, "phone")
    accepted = publish(caller)
    report(caller, "phone", received=point(accepted))
    caller.ask("DEL", ledger.key("cursors", "ann"))
    [phone] = traced(caller, accepted.id).devices

    assert phone.received is not None


def test_whose_it_is(caller: Caller) -> None:
    """A user's, everyone's or a topic's, also if they have the same name."""
    owners: list[Owner] = ["all", None, Topic("all")]
    lives = [traced(caller, publish(caller, owner).id) for owner in owners]

    assert owners == [one.owner for one in lives]
    assert ["all", None, None] == [one.user for one in lives]
    assert [None, None, "all"] == [one.topic for one in lives]


def test_everyone_and_what_is_not_due(caller: Caller) -> None:
    """A broadcast has no user; what is scheduled has no seq yet."""
    everyone = publish(caller, None)
    later = publish(caller, deliver_at_ms=caller.now() + HOUR)

    assert traced(caller, everyone.id).user is None
    scheduled = traced(caller, later.id)
    assert ("accepted", 0, "") == (scheduled.state, scheduled.seq, scheduled.place)
    assert scheduled.due is not None
    assert life.trace(ledger.new_id("p07", 1), caller.ask("HGETALL", "none")) is None


def test_nonsense_in_the_keys_is_nothing(caller: Caller) -> None:
    """Whatever strangers have written: no exception, and what makes sense is told."""
    publish(caller)
    caller.ask("HSET", ledger.key("meta", "ann"), "unread", "many", "trimmed", "x", "last", "-")
    caller.ask(
        *("HSET", ledger.key("cursors", "ann"), "d:a", "1 2", "d:b", "x y z - w", "d:c", b"\xff"),
        *("x", "1-1 1-1 1-1 - 5"),
    )
    caller.ask("XADD", ledger.key("inbox", "ann"), "*", "i", "x")
    standing = look(caller)
    assert (0, 0) == (standing.unread, standing.trimmed)
    assert [("b", 0, 0)] == [(one.name, one.seen, one.received) for one in standing.devices]

    home = "ts:{p07}:n:"
    name = ledger.new_id("p07", 1)
    caller.ask("HSET", home + name, "state", b"\xff", "at", "9" * 30, "r:x", "soon", "e:read", "²")
    found = life.trace(name, caller.ask("HGETALL", home + name))
    assert found is not None
    assert (None, 0, "") == (found.accepted, found.seq, found.user)
    assert 0 == found.devices[0].received
