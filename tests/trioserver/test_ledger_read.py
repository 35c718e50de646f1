"""Reading: where a reader begins, what is on a page, and which devices are remembered."""

import pytest

from tests.redis_server import RedisServer
from tests.trioserver.ledger_stage import (
    ANN,
    PAYLOAD,
    WEEK,
    Stage,
    epoch_in,
    life_key,
    place_in,
    point_of,
)
from trioserver import ledger
from trioserver.ledger import DAY_MS, Notice
from trioserver.position import order, seq_of

CURSORS = ledger.key("cursors", ANN)
META = ledger.key("meta", ANN)


# --- what is on a page


def test_a_notification_as_it_was_published(stage: Stage) -> None:
    """All that a client is told, and where it lies."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    one = stage.publish(type="order.paid", payload=b'"\xc3\xa4"', ttl_ms=DAY_MS, traceparent=trace)
    two = stage.publish()

    found = stage.read()

    expires = order(place_in(one))[0] + DAY_MS
    first, second = found.notices
    assert first == Notice(
        place_in(one), one.id, "order.paid", b'"\xc3\xa4"', expires, 1, "accepted", trace
    )
    assert (second.type, second.payload, second.traceparent) == ("notification", PAYLOAD, None)
    assert (found.page.unread, found.page.more) == (2, False)
    assert found.start == f"{epoch_in(one)}.0-0"
    assert found.reached == point_of(two)


def test_updates_are_on_the_page(stage: Stage) -> None:
    """Who was away hears what became of notifications that it has, in the order of events."""
    one, two = stage.publish_many(2)
    stage.read(device="away", connect=True)
    stage.report(device="away", received=point_of(two))
    stage.mark(ids=[one.id])
    three = stage.publish()
    stage.cancel(two.id)

    found = stage.read(device="away")

    assert found.ids == [three.id]
    assert found.changes == [("read", [one.id]), ("cancelled", [two.id])]
    assert found.gaps == []
    assert found.page.unread == 1
    assert seq_of(found.page.reached) == 3


def test_a_reader_that_missed_nothing(redis: RedisServer, stage: Stage) -> None:
    """It gets an empty page, and its inbox is not even looked at."""
    one = stage.publish()
    stage.read(device="phone", connect=True)
    stage.report(received=point_of(one))
    redis.command("CONFIG", "RESETSTAT")

    by_device = stage.read(device="phone", connect=True)
    by_point = stage.read(point=point_of(one))
    nameless = stage.read(connect=True)

    for found in (by_device, by_point, nameless):
        assert (found.page.items, found.page.why, found.page.more) == ([], "", False)
        assert found.start == found.reached == point_of(one)
        assert found.page.unread == 1
    assert redis.commands_seen("xrange") == 0


def test_a_page_has_at_most_so_many_entries(stage: Stage) -> None:
    """The rest is on the next pages, without a hole, and the last one says so."""
    published = stage.publish_many(7)
    ids: list[str] = []
    point, more, pages = f"{epoch_in(published[0])}.0-0", True, 0
    while more:
        found = stage.read(point=point, limit=3)
        assert found.gaps == []
        ids += found.ids
        point, more, pages = found.reached, found.page.more, pages + 1

    assert ids == [one.id for one in published]
    assert pages == 3


def test_a_page_that_is_just_full(stage: Stage) -> None:
    """There is more only if there is."""
    stage.publish_many(3)

    assert not stage.read(limit=3).page.more
    assert stage.read(limit=2).page.more


def test_a_page_has_at_most_so_many_bytes(stage: Stage) -> None:
    """Payloads, and 400 for what a frame adds; only a single one may be larger than a page."""
    large, small = b'"' + b"x" * 98 + b'"', b"1"
    published = [stage.publish(payload=payload) for payload in (large, small, large, large, small)]
    pages, point = [], f"{epoch_in(published[0])}.0-0"
    for _ in range(4):
        found = stage.read(point=point, max_bytes=901)
        pages.append(found.seqs)
        point = found.reached
        if not found.page.more:
            break

    assert pages == [[1, 2], [3], [4, 5]]
    assert stage.read(max_bytes=1, limit=1).seqs == [1]


def test_limits_of_a_page(stage: Stage) -> None:
    """Impossible limits are refused."""
    for arguments in (("limit", 0), ("limit", 1001), ("bytes", 0), ("limit", "all")):
        stage.due()
        with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
            stage.raw("read", META, *arguments)


@pytest.mark.parametrize("user", [ANN, None])
def test_a_stream_without_anything(stage: Stage, user: str | None) -> None:
    """The first reader of a stream begins it."""
    found = stage.read(user, nonce="abc123xy")

    assert found.page.epoch == "abc123xy"
    assert (found.page.items, found.page.why, found.page.unread) == ([], "new", 0)
    assert found.start == found.reached == "abc123xy.0-0"
    assert stage.publish(user).seq == 1
    assert stage.meta(user)["epoch"] == "abc123xy"


def test_a_bad_nonce(stage: Stage) -> None:
    """An epoch can be part of a position."""
    stage.due()
    for nonce in ("A", "a.b", "x" * 17, ""):
        with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
            stage.raw("read", META, "nonce", nonce)
    assert stage.read(nonce="x" * 16).page.epoch == "x" * 16
    assert stage.read().page.epoch == "x" * 16


def test_an_epoch_without_a_nonce(stage: Stage) -> None:
    """The script finds a name by itself, another one each time."""
    epochs = set()
    for _ in range(5):
        stage.caller.ask("DEL", META)
        epochs.add(stage.read().page.epoch)

    assert len(epochs) == 5
    assert all(len(epoch) == 8 for epoch in epochs)


# --- attempts


def test_attempts_are_counted_per_device(stage: Stage) -> None:
    """Each device knows how often it was handed a notification; the nameless one, too."""
    stage.publish()
    start = stage.read(device="phone").start

    attempts = [stage.read(device="phone", point=start).notices[0].attempt for _ in range(2)]

    assert attempts == [2, 3]
    assert stage.read(device="laptop").notices[0].attempt == 1
    assert stage.read(point=start).notices[0].attempt == 1


def test_the_state_of_what_is_read(stage: Stage) -> None:
    """A notification comes with what has become of it."""
    one = stage.publish()
    stage.mark(ids=[one.id], device="laptop")

    assert stage.read(device="phone").notices[0].state == "read"


def test_a_notification_whose_life_was_lost(stage: Stage) -> None:
    """It is delivered all the same, and nothing is left behind that lives for ever."""
    one = stage.publish()
    stage.caller.ask("DEL", life_key(one.id))

    [notice] = stage.read(device="phone").notices

    assert (notice.id, notice.attempt, notice.state) == (one.id, 1, "accepted")
    assert life_key(one.id) not in stage.names()


def test_a_life_is_bounded(stage: Stage) -> None:
    """Devices that come under ever new names do not let it grow without end."""
    one = stage.publish()
    for number in range(300):
        stage.read(device=f"d{number}", point=f"{epoch_in(one)}.0-0")

    assert 150 < len(stage.life(one.id)) < 200


def test_everyones_are_not_counted(stage: Stage) -> None:
    """Of what is published to everyone nothing is kept per device."""
    one = stage.publish(None)
    before = stage.names()

    [notice] = stage.read(None, device="phone", connect=True).notices

    assert notice.attempt == 1
    assert stage.names() == before
    assert stage.life(one.id).keys() - {"live"} == {
        *("state", "user", "seq", "place", "type", "at", "expires")
    }


# --- where a reader begins


def test_a_new_device_gets_what_nobody_has_received(stage: Stage) -> None:
    """If no device was ever there, that is everything."""
    one, two = stage.publish_many(2)

    first = stage.read(device="phone", connect=True)
    assert (first.ids, first.page.why) == ([one.id, two.id], "new")
    stage.report(received=point_of(one))

    other = stage.read(device="laptop", connect=True)
    assert (other.ids, other.page.why) == ([two.id], "new")
    assert other.start == point_of(one)


def test_a_device_continues_where_it_was(stage: Stage) -> None:
    """Each device has what it has received, whatever others have."""
    published = stage.publish_many(3)
    for device, seen in (("phone", 0), ("laptop", 2)):
        stage.read(device=device, connect=True)
        stage.report(device=device, received=point_of(published[seen]))

    found = stage.read(device="phone", connect=True)

    assert found.ids == [one.id for one in published[1:]]
    assert found.page.why == ""
    assert stage.read(device="laptop").ids == []


def test_a_device_that_acknowledges(stage: Stage) -> None:
    """It gets again what it has not acknowledged, though it has received it."""
    published = stage.publish_many(3)
    stage.read(device="phone", connect=True)
    stage.report(received=point_of(published[2]), acked_seq=1)

    assert stage.read(device="phone", ack=True).ids == [one.id for one in published[1:]]
    assert stage.read(device="phone").ids == []


def test_readers_without_a_name(stage: Stage) -> None:
    """For them the promise is per user: what any connection has received, is received."""
    published = stage.publish_many(3)
    assert stage.read().ids == [one.id for one in published]
    stage.report(device="phone", received=point_of(published[0]))
    assert stage.read().ids == [one.id for one in published[1:]]
    stage.report(device="", received=point_of(published[1]))

    found = stage.read()

    assert (found.ids, found.page.why) == ([published[2].id], "")
    assert stage.read(device="new").ids == [published[2].id]
    assert stage.read(device="phone").ids == [one.id for one in published[1:]]


def test_a_reader_without_a_name_that_acknowledges(stage: Stage) -> None:
    """All readers without a name share one cursor of their own for it."""
    published = stage.publish_many(3)
    stage.report(device="", received=point_of(published[2]), acked_seq=2)

    assert stage.read(ack=True).ids == [published[2].id]
    assert stage.read().ids == []


def test_a_point_beats_the_cursor(stage: Stage) -> None:
    """A client knows best what it has."""
    published = stage.publish_many(3)
    stage.read(device="phone", connect=True)
    stage.report(received=point_of(published[2]))

    found = stage.read(device="phone", point=point_of(published[0]), connect=True)

    assert (found.ids, found.page.why) == ([one.id for one in published[1:]], "")
    assert found.start == point_of(published[0])
    assert stage.read(device="phone").ids == []


def test_a_new_device_with_a_point(stage: Stage) -> None:
    """It is remembered where it says it is."""
    published = stage.publish_many(3)

    stage.read(device="phone", point=point_of(published[1]), connect=True)

    assert stage.read(device="phone").ids == [published[2].id]


def test_head(stage: Stage) -> None:
    """Who has no place and wants none begins at the end; it holds for nobody else."""
    published = stage.publish_many(2, None)

    found = stage.read(None, head=True)
    assert (found.ids, found.gaps, found.page.why) == ([], [], "new")
    assert found.start == found.reached == point_of(published[1])
    again = stage.read(None, head=True, point=point_of(published[0]))
    assert again.ids == [published[1].id]
    assert stage.read(None).ids == [one.id for one in published]


def test_what_expired_before_it_was_swept(stage: Stage) -> None:
    """Time is over when it is over, whether somebody has noticed or not."""
    published = stage.publish_many(3)
    stage.expire(published[1].id)

    found = stage.read()

    assert found.seqs == [1, 3]
    assert found.gaps == [(2, 2, 1, "expired")]


# --- what is remembered when a client comes


def test_a_device_is_recorded(stage: Stage) -> None:
    """Where it begins, and when it was seen; its stream for everyone is not known yet."""
    one = stage.publish()
    before = stage.caller.now()

    stage.read(device="phone", point=point_of(one), connect=True)

    fields = stage.fields(CURSORS)
    assert fields.keys() == {"epoch", "d:phone"}
    assert fields["epoch"] == epoch_in(one)
    *record, seen = fields["d:phone"].split(" ")
    assert record == [place_in(one)] * 3 + ["-"]
    assert before <= int(seen) <= stage.caller.now()
    assert 44 * DAY_MS < stage.lifetime(CURSORS) <= 45 * DAY_MS


def test_coming_changes_no_cursor(stage: Stage) -> None:
    """Only when it was seen, and how long everything lives."""
    one = stage.publish()
    stage.read(device="phone", connect=True)
    stage.report(received=point_of(one), all_point="b7.5-4096")
    stage.publish()
    for key in (META, CURSORS):
        stage.caller.ask("PEXPIRE", key, 5000)
    before = stage.fields(CURSORS)["d:phone"].split(" ")
    stage.caller.wait_past(int(before[-1]))

    found = stage.read(device="phone", connect=True)

    after = stage.fields(CURSORS)["d:phone"].split(" ")
    assert before[:-1] == after[:-1]
    assert int(before[-1]) < int(after[-1])
    assert found.page.all_point == "b7.5-4096"
    for key in (META, CURSORS):
        assert 44 * DAY_MS < stage.lifetime(key) <= 45 * DAY_MS


@pytest.mark.parametrize("device", ["phone", ""])
def test_where_a_device_is_in_the_stream_for_everyone(stage: Stage, device: str) -> None:
    """What it is told at first is kept until it reports; it needs no name for that."""
    stage.publish()
    first = stage.read(device=device, connect=True, all_point="b7.5-4096")
    again = stage.read(device=device, connect=True, all_point="b7.9-8192")
    looked = stage.read(device="other", all_point="b7.5-4096")

    assert first.page.all_point == again.page.all_point == "b7.5-4096"
    assert looked.page.all_point == ""
    stage.report(device=device, all_point="b7.9-8192")
    assert stage.read(device=device).page.all_point == "b7.9-8192"
    with pytest.raises(RuntimeError, match=r"^BADREQUEST all "):
        stage.read(connect=True, all_point="garbage")


def test_looking_records_nobody(stage: Stage) -> None:
    """Neither repairs nor clients without a name leave a record."""
    stage.read(device="phone")
    stage.read(connect=True)

    assert stage.fields(CURSORS) == {}


def test_devices_are_bounded(stage: Stage) -> None:
    """The 33rd device takes the place of the one that was seen longest ago."""
    for number in range(32):
        stage.read(device=f"d{number}", connect=True)
    stage.caller.wait_past(stage.caller.now())
    stage.read(device="d0", connect=True)
    # The others were all seen within the same few ms; make one of them the oldest for sure.
    record = stage.fields(CURSORS)["d:d7"].rpartition(" ")
    stage.caller.ask("HSET", CURSORS, "d:d7", f"{record[0]} {int(record[2]) - 1000}")

    stage.read(device="new", connect=True)

    kept = stage.fields(CURSORS).keys() - {"epoch"}
    assert len(kept) == 32
    assert {"d:new", "d:d0"} <= kept
    assert "d:d7" not in kept


def test_many_devices_at_once(stage: Stage) -> None:
    """Of far more than there is room for, the newest is always among those that are kept."""
    for number in range(100):
        stage.read(device=f"device-{number}", connect=True)
        fields = stage.fields(CURSORS)
        assert f"d:device-{number}" in fields
        assert len(fields) <= 33


def test_a_device_that_was_away_too_long(stage: Stage) -> None:
    """After 30 days it is a new one, and its record makes room."""
    published = stage.publish_many(2)
    stage.read(device="phone", connect=True)
    stage.report(device="laptop", received=point_of(published[0]))
    for days, why in ((29, ""), (31, "new")):
        seen = stage.caller.now() - days * DAY_MS
        stage.caller.ask("HSET", CURSORS, "d:phone", f"0-0 0-0 0-0 - {seen}")
        assert stage.read(device="phone").page.why == why

    assert stage.read(device="phone").ids == [published[1].id]
    stage.read(device="tablet", connect=True)
    assert stage.fields(CURSORS).keys() == {"epoch", "d:laptop", "d:tablet"}


@pytest.mark.parametrize(
    "record",
    [
        *("", "x", "1-1 1-1 1-1 - x", "x-1 y z - {now}", "1 2 3 4 5 6"),
        *("y 1-1 1-1 - {now}", "1-1 y 1-1 - {now}", "1-1 1-1 y - {now}"),
    ],
)
def test_garbage_in_a_record(stage: Stage, record: str) -> None:
    """A record that cannot be read is that of a new device, or of one that has lost its place."""
    one = stage.publish()
    text = record.format(now=stage.caller.now())
    stage.caller.ask("HSET", CURSORS, "epoch", epoch_in(one), "d:phone", text)

    found = stage.read(device="phone", connect=True)

    assert found.ids == [one.id]
    assert found.page.why == ("epoch" if "{now}" in record else "new")
    assert stage.fields(CURSORS)["d:phone"].startswith("0-0 0-0 0-0 - ")


def test_a_device_without_an_end(stage: Stage) -> None:
    """A name has a limit."""
    with pytest.raises(RuntimeError, match=r"^BADREQUEST device "):
        stage.read(device="x" * 129)
    assert stage.read(device="x" * 128, connect=True).page.why == "new"


def test_the_page_lives_within_the_retention(stage: Stage) -> None:
    """A notification says until when it is worth delivering."""
    stage.publish()

    [notice] = stage.read().notices

    assert WEEK - 60_000 < notice.expires - stage.caller.now() <= WEEK


def test_a_full_redis_can_be_read(stage: Stage) -> None:
    """Attempts and devices are not counted then; what was accepted arrives all the same."""
    published = stage.publish_many(2)
    stage.read(connect=True, device="phone")
    stage.caller.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        found = stage.read(connect=True, device="laptop")
        again = stage.read(point=f"{epoch_in(published[0])}.0-0")
    finally:
        stage.caller.ask("CONFIG", "SET", "maxmemory", "0")
    assert found.ids == again.ids == [one.id for one in published]
