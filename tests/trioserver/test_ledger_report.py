"""Reports: how far devices are, and what that makes of notifications."""

import pytest

from tests.redis_server import RedisServer
from tests.trioserver.ledger_stage import (
    ANN,
    Stage,
    epoch_in,
    life_key,
    place_in,
    point_of,
)
from trioserver import ledger
from trioserver.position import order, seq_of

CURSORS = ledger.key("cursors", ANN)


def record(stage: Stage, device: str = "phone") -> list[str]:
    """Return what is kept of a device, without when it was seen."""
    return stage.fields(CURSORS)[f"d:{device}"].split(" ")[:-1]


# --- cursors


def test_reports_are_cumulative(stage: Stage) -> None:
    """Each cursor moves forward alone, whatever comes late."""
    published = stage.publish_many(5)
    places = [place_in(one) for one in published]
    points = [point_of(one) for one in published]
    stage.read(device="phone", connect=True)

    stage.report(sent=points[3])
    assert record(stage) == [places[3], "0-0", "0-0", "-"]
    stage.report(sent=points[1], received=points[2])
    assert record(stage) == [places[3], places[2], "0-0", "-"]
    stage.report(received=points[1], acked_seq=2)
    assert record(stage)[:2] == [places[3], places[2]]
    stage.report(sent=points[4])
    assert record(stage)[:2] == [places[4], places[2]]
    assert stage.report(acked_seq=1) == 2


def test_received_counts_as_sent(stage: Stage) -> None:
    """A position that a client brings along proves both."""
    one = stage.publish()

    stage.report(received=point_of(one))

    assert record(stage) == [place_in(one), place_in(one), "0-0", "-"]
    assert stage.life(one.id).keys() >= {"s:phone", "r:phone"}


def test_acknowledged_counts_as_received(stage: Stage) -> None:
    """Nobody handles what has not arrived."""
    one, two, _ = stage.publish_many(3)

    assert stage.report(sent=point_of(two), acked_seq=1) == 1

    sent, received, acked, _ = record(stage)
    assert sent == place_in(two)
    assert seq_of(received) == seq_of(acked) == 1
    assert stage.life(one.id).keys() >= {"s:phone", "r:phone", "a:phone"}
    assert stage.told(one.id) == ["accepted", "received", "acked"]
    assert stage.told(two.id) == ["accepted"]


def test_what_was_not_sent_cannot_be_acknowledged(stage: Stage) -> None:
    """An acknowledgement counts as far as was sent, and later ones count again."""
    published = stage.publish_many(4)

    assert stage.report(sent=point_of(published[1]), acked_seq=1 << 40) == 2
    assert stage.told(published[2].id) == ["accepted"]
    assert stage.report(sent=point_of(published[3]), acked_seq=3) == 3
    assert stage.report(acked_seq=4) == 4


def test_acknowledging_by_id(stage: Stage) -> None:
    """It means the same as the seq; unknown ids and those of others mean nothing."""
    published = stage.publish_many(4)
    home = ledger.partition(ANN)
    neighbour = next(f"u{n}" for n in range(10_000) if ledger.partition(f"u{n}") == home)
    other = stage.publish_many(5, neighbour)[4]
    sent = point_of(published[2])

    assert stage.report(sent=sent, acked_id=published[1].id) == 2
    assert stage.report(acked_id=published[0].id) == 2
    for name in (other.id, "", "x", "p00-none", "{x}:y z"):
        assert stage.report(acked_id=name) == 2
    assert stage.report(acked_id=published[3].id) == 3
    assert stage.told(published[3].id) == ["accepted"]


def test_acknowledging_what_is_gone(stage: Stage) -> None:
    """The seq is acknowledged though its notification was withdrawn meanwhile."""
    published = stage.publish_many(4)
    stage.read(device="phone", connect=True)
    stage.cancel(published[1].id)

    assert stage.report(sent=point_of(published[3]), acked_seq=2) == 2
    assert stage.read(device="phone", ack=True).seqs == [3, 4]


def test_the_stream_for_everyone(stage: Stage) -> None:
    """A device's point in it moves forward within an epoch, and to any place of another one."""
    for told, kept in (
        ("b7.10-8192", "b7.10-8192"),
        ("b7.5-4096", "b7.10-8192"),
        ("b7.11-8192", "b7.11-8192"),
        ("garbage", "b7.11-8192"),
        ("c8.1-4096", "c8.1-4096"),
    ):
        stage.report(all_point=told)
        assert stage.read(device="phone").page.all_point == kept
    stage.report(device="", all_point="b7.5-4096")
    assert stage.read().page.all_point == "b7.5-4096"


def test_other_epochs_are_ignored(stage: Stage) -> None:
    """A worker that has not yet heard of a new epoch tells nothing about it."""
    old = stage.publish()
    stage.caller.ask("FLUSHALL")
    new = stage.publish()

    stage.report(sent=point_of(old), received=point_of(old))
    for garbage in ("", "x", "x.y", f"{epoch_in(new)}.x", "a.1-99999999999999999"):
        stage.report(sent=garbage, received=garbage)

    assert record(stage) == ["0-0", "0-0", "0-0", "-"]
    assert stage.told(new.id) == ["accepted"]


def test_the_future_is_ignored(stage: Stage) -> None:
    """A place that a failover has undone moves no cursor."""
    one = stage.publish()
    milliseconds, number = order(place_in(one))

    stage.report(received=f"{epoch_in(one)}.{milliseconds + 1}-{number}")

    assert record(stage) == ["0-0", "0-0", "0-0", "-"]


def test_a_device_that_was_forgotten(stage: Stage) -> None:
    """It begins where all have received, so that it is told of nothing that others had."""
    published = stage.publish_many(3)
    stage.report(device="laptop", received=point_of(published[1]))

    stage.report(device="phone", sent=point_of(published[2]))

    assert "s:phone" not in stage.life(published[1].id)
    assert "s:phone" in stage.life(published[2].id)
    assert record(stage) == [
        *(place_in(published[2]), place_in(published[1]), place_in(published[1]), "-")
    ]


def test_a_device_without_a_name(stage: Stage) -> None:
    """All clients without a name are one device."""
    one = stage.publish()

    stage.report(device="", received=point_of(one))

    assert record(stage, "-") == [place_in(one), place_in(one), "0-0", "-"]
    assert "r:-" in stage.life(one.id)
    assert stage.events()[-1]["device"] == "-"


def test_reports_are_of_users(stage: Stage) -> None:
    """Nothing is kept per device of what everyone gets."""
    stage.due()
    with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
        stage.raw("report", ledger.key("meta", None), "device", "phone")
    for arguments in (("acked", "x"), ("events", "-1")):
        with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
            stage.raw("report", ledger.key("meta", ANN), "device", "phone", *arguments)
    with pytest.raises(RuntimeError, match=r"^BADREQUEST device "):
        stage.report(device="x" * 129)
    assert stage.report(device="x" * 128) == 0


def test_what_any_device_has_received(stage: Stage) -> None:
    """It is remembered even when the device is not."""
    published = stage.publish_many(2)
    stage.report(received=point_of(published[0]))
    stage.report(device="laptop", sent=point_of(published[1]))
    stage.caller.ask("DEL", CURSORS)

    assert stage.meta()["received"] == place_in(published[0])
    assert stage.read(device="tablet").ids == [published[1].id]


# --- lives


def test_the_life_on_a_device(stage: Stage) -> None:
    """When it was sent, received and acknowledged is kept per device, the first time each."""
    one, two = stage.publish_many(2)
    before = stage.caller.now()

    stage.report(sent=point_of(one))
    assert not stage.life(one.id).keys() & {"r:phone", "a:phone"}
    stage.report(device="laptop", received=point_of(two))
    assert "a:laptop" not in stage.life(one.id)
    after = stage.caller.now()
    stage.caller.wait_past(after)
    stage.report(received=point_of(one), acked_seq=1)
    stage.report(received=point_of(two), sent=point_of(two))

    life = stage.life(one.id)
    assert before <= int(life["s:phone"]) <= after < int(life["r:phone"])
    assert int(life["r:phone"]) == int(life["a:phone"])
    assert before <= int(life["r:laptop"]) <= after
    assert life["state"] == "acked"
    assert stage.life(two.id)["state"] == "received"
    assert stage.life(two.id).keys() >= {"s:phone", "r:phone", "s:laptop", "r:laptop"}


def test_the_first_time_counts(stage: Stage) -> None:
    """A device that was forgotten may get everything again; when it first had it stays."""
    one = stage.publish()
    stage.report(received=point_of(one), acked_seq=1)
    first = stage.life(one.id)
    stage.caller.wait_past(stage.caller.now())
    stage.caller.ask("DEL", CURSORS)
    stage.caller.ask("HDEL", ledger.key("meta", ANN), "received")

    stage.report(received=point_of(one), acked_seq=1)

    assert stage.life(one.id) == first


def test_a_cursor_that_was_left_behind(stage: Stage) -> None:
    """What was sent long ago is received, though nothing new was sent between."""
    published = stage.publish_many(4)
    stage.read(device="phone", connect=True)
    stage.report(sent=point_of(published[2]))

    stage.report(sent=point_of(published[3]), received=point_of(published[3]))

    assert all("r:phone" in stage.life(one.id) for one in published)


def test_states_go_forward(stage: Stage) -> None:
    """One device's slowness does not take back what another one has done."""
    one = stage.publish()
    seen = [stage.life(one.id)["state"]]
    for device, step in (
        ("phone", {"sent": point_of(one)}),
        ("laptop", {"received": point_of(one)}),
        ("tablet", {"sent": point_of(one)}),
        ("laptop", {"acked_seq": 1}),
        ("phone", {"received": point_of(one)}),
    ):
        stage.report(device=device, **step)
        seen.append(stage.life(one.id)["state"])
    stage.mark(device="phone", ids=[one.id])
    stage.report(device="tv", received=point_of(one), acked_seq=1)
    seen.append(stage.life(one.id)["state"])

    assert seen == ["accepted", "sent", "received", "received", "acked", "acked", "read"]


def test_each_event_is_told_once(stage: Stage) -> None:
    """Whoever is first causes it; others, and repetitions, do not."""
    one = stage.publish()
    for device in ("phone", "laptop"):
        for _ in range(2):
            stage.report(device=device, sent=point_of(one))
            stage.report(device=device, received=point_of(one))
            stage.report(device=device, acked_seq=1)
            stage.mark(device=device, ids=[one.id])

    assert stage.told(one.id) == ["accepted", "received", "acked", "read"]
    assert [event["device"] for event in stage.events()] == ["", "phone", "phone", "phone"]
    assert {event["seq"] for event in stage.events()} == {"1"}


def test_one_ack_costs_what_is_new_and_not_what_was_sent(stage: Stage) -> None:
    """A client acknowledges one by one; each looks at a few entries, not at the whole inbox."""
    published = stage.publish_many(200)
    stage.report(sent=point_of(published[-1]))
    stage.caller.ask("CONFIG", "RESETSTAT")
    stage.report(acked_seq=1)
    statistics = stage.caller.ask("INFO", "commandstats").decode()
    (line,) = [one for one in statistics.splitlines() if one.startswith("cmdstat_hmget:")]
    assert int(line.split("calls=")[1].split(",")[0]) < 20


def test_what_went_out_live_was_the_first_attempt(stage: Stage) -> None:
    """So that what is read later, and sent again, is the second."""
    one = stage.publish()
    stage.report(sent=point_of(one))
    assert stage.life(one.id)["t:phone"] == "1"
    (item,) = stage.read(device="phone").notices
    assert item.attempt == 2


def test_acknowledging_after_reading(stage: Stage) -> None:
    """Events go forward as states do: who has read needs no acknowledgement any more."""
    one = stage.publish()
    stage.mark(ids=[one.id])
    for device in ("phone", "laptop"):
        stage.report(device=device, received=point_of(one), acked_seq=1)

    assert stage.told(one.id) == ["accepted", "received", "read"]


def test_what_is_over_causes_no_events(stage: Stage) -> None:
    """It may still be noted where it had been."""
    one, two = stage.publish_many(2)
    stage.caller.ask("HSET", life_key(one.id), "state", "expired")

    stage.report(received=point_of(two), acked_seq=2)

    assert stage.told(one.id) == ["accepted"]
    assert stage.life(one.id)["state"] == "expired"
    assert "r:phone" in stage.life(one.id)
    assert stage.told(two.id) == ["accepted", "received", "acked"]


def test_many_at_once(stage: Stage) -> None:
    """A report covers everything between two places, however much that is."""
    published = stage.publish_many(250)

    assert stage.report(received=point_of(published[249]), acked_seq=120) == 120

    kinds = [event["event"] for event in stage.events()]
    assert kinds.count("received") == 250
    assert kinds.count("acked") == 120
    assert stage.life(published[119].id)["state"] == "acked"
    assert stage.life(published[120].id)["state"] == "received"


def test_a_report_costs_what_is_new(redis: RedisServer, stage: Stage) -> None:
    """What was told before is not looked at again."""
    published = stage.publish_many(100)
    stage.report(received=point_of(published[98]))
    redis.command("CONFIG", "RESETSTAT")

    stage.report(received=point_of(published[99]))

    assert redis.commands_seen("hset") == 3  # the life, the cursors, what any device has received


def test_lives_that_were_lost(stage: Stage) -> None:
    """Nothing comes of what nobody knows any more."""
    one, two = stage.publish_many(2)
    stage.caller.ask("DEL", life_key(one.id))

    stage.report(received=point_of(two))

    assert life_key(one.id) not in stage.names()
    assert stage.told(two.id) == ["accepted", "received"]


def test_a_life_is_bounded(stage: Stage) -> None:
    """Devices that come under ever new names do not let it grow without end."""
    one = stage.publish()
    for number in range(120):
        stage.read(device=f"d{number}", point=f"{epoch_in(one)}.0-0", connect=True)
        stage.report(device=f"d{number}", received=point_of(one))

    assert 150 < len(stage.life(one.id)) < 200
    assert stage.told(one.id) == ["accepted", "received"]
