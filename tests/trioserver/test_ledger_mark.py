"""Reading on one device: what counts no more, and what the others are told."""

import pytest

from tests.redis_server import RedisServer
from tests.trioserver.ledger_stage import (
    ANN,
    Stage,
    epoch_in,
    place_in,
    point_of,
)
from trioserver import ledger
from trioserver.position import order, seq_of

META = ledger.key("meta", ANN)
INBOX = ledger.key("inbox", ANN)


def test_one_is_read(stage: Stage) -> None:
    """It is noted where and when, it does not count any more, and others are told."""
    one, two = stage.publish_many(2)
    stage.ears.heard()
    before = stage.caller.now()

    assert stage.mark(ids=[one.id], by="c-17") == (1, 1)

    life = stage.life(one.id)
    assert life["state"] == "read"
    assert before <= int(life["d:phone"]) <= stage.caller.now()
    assert stage.told(one.id) == ["accepted", "received", "read"]
    assert stage.events()[-1]["device"] == "phone"
    [heard] = stage.ears.heard()
    assert (heard.channel, heard.kind, heard.unread) == ("user_noti:ann", "u", 1)
    assert heard.prev == point_of(two)
    assert heard.rest == ("read", [one.id], "c-17")
    found = stage.read()
    assert found.changes == [("read", [one.id])]
    assert (found.page.unread, found.reached) == (1, heard.point)


def test_reading_again(stage: Stage) -> None:
    """Only the first time changes anything, and nobody hears of the others."""
    one = stage.publish()
    stage.mark(ids=[one.id])
    before = stage.inbox()
    stage.ears.heard()

    assert stage.mark(ids=[one.id, one.id], device="laptop") == (0, 0)
    assert stage.mark(up_to=1) == (0, 0)

    assert stage.inbox() == before
    assert stage.ears.heard() == []
    assert stage.told(one.id).count("read") == 1


def test_up_to_a_seq(stage: Stage) -> None:
    """Everything up to there is read, what was read before does not count twice."""
    published = stage.publish_many(5)
    stage.mark(ids=[published[1].id])

    assert stage.mark(up_to=3) == (2, 2)
    assert stage.mark(up_to=2) == (2, 0)
    assert stage.mark(up_to=4) == (1, 1)
    assert stage.mark(up_to=1 << 40) == (0, 1)

    published += stage.publish_many(2)
    assert stage.mark(up_to=6) == (1, 1)
    states = [stage.life(one.id)["state"] for one in published]
    assert states == ["read"] * 6 + ["accepted"]


def test_up_to_a_seq_that_is_gone(stage: Stage) -> None:
    """What was withdrawn is passed over."""
    published = stage.publish_many(4)
    stage.cancel(published[1].id)

    assert stage.mark(up_to=2) == (2, 1)
    assert stage.mark(up_to=3) == (1, 1)


def test_up_to_an_id(stage: Stage) -> None:
    """It means the same as the seq; an unknown one means nothing."""
    published = stage.publish_many(3)

    assert stage.mark(up_to_id=published[1].id) == (1, 2)
    assert stage.mark(up_to_id="p00-none") == (1, 0)
    assert stage.mark(up_to_id=published[2].id, ids=[published[0].id]) == (0, 1)


def test_up_to_costs_what_is_new(redis: RedisServer, stage: Stage) -> None:
    """What was marked before is not looked at again."""
    stage.publish_many(200)
    stage.mark(up_to=199)
    redis.command("CONFIG", "RESETSTAT")

    stage.mark(up_to=200)

    assert redis.commands_seen("hmget") < 5


def test_strange_ids(stage: Stage) -> None:
    """What is not of this user is ignored, whatever it looks like."""
    one = stage.publish()
    home = ledger.partition(ANN)
    neighbour = next(f"u{n}" for n in range(10_000) if ledger.partition(f"u{n}") == home)
    other = stage.publish(neighbour)
    everyone = stage.publish(None)
    scheduled = stage.publish(deliver_at_ms=stage.caller.now() + 60_000)

    ids = [other.id, everyone.id, scheduled.id, "x", "}{", "p99-nothing", one.id]

    assert stage.mark(ids=ids) == (0, 1)
    assert stage.unread(neighbour) == 1
    assert stage.life(scheduled.id)["state"] == "accepted"


def test_nothing_to_mark(stage: Stage) -> None:
    """It changes nothing, and nobody hears of it."""
    stage.publish()
    before = stage.meta()
    stage.ears.heard()

    assert stage.mark() == (1, 0)
    assert stage.mark("bob") == (0, 0)
    assert stage.mark("bob", up_to=5) == (0, 0)

    assert stage.meta() == before
    assert stage.ears.heard() == []


def test_what_is_over_is_not_read(stage: Stage) -> None:
    """It went before anybody looked."""
    one, two = stage.publish_many(2)
    stage.cancel(one.id)
    stage.sweep(two.id)

    assert stage.mark(ids=[one.id, two.id], up_to=2) == (0, 0)
    assert stage.told(one.id) == ["accepted", "cancelled"]


def test_bad_marks(stage: Stage) -> None:
    """Too much at once is refused, and everyone has no unread."""
    stage.publish()
    with pytest.raises(RuntimeError, match=r"^BADREQUEST there are more than 100 ids"):
        stage.mark(ids=["x"] * 101)
    with pytest.raises(RuntimeError, match=r"^BADREQUEST device "):
        stage.mark(device="x" * 129)
    for arguments in (("up_to", "-1"), ("events", "x")):
        with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
            stage.raw("mark", ledger.key("meta", ANN), *arguments)
    with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
        stage.raw("mark", ledger.key("meta", None), "up_to", 1)
    assert stage.mark(ids=["x"] * 100, device="x" * 128) == (1, 0)


def test_who_asked_may_be_called_anything(stage: Stage) -> None:
    """The envelope stays JSON."""
    one = stage.publish()
    stage.ears.heard()

    stage.mark(ids=[one.id], by='a"b\\c\n')

    [heard] = stage.ears.heard()
    assert heard.rest[2] == 'a"b\\c\n'


def test_forty_devices(stage: Stage) -> None:
    """Each reads something; all are told of all, and a life stays bounded."""
    published = stage.publish_many(40)
    for number, one in enumerate(published):
        assert stage.mark(device=f"d{number}", ids=[one.id]) == (39 - number, 1)
    for number in range(250):
        stage.read(device=f"e{number}", point=f"{epoch_in(published[0])}.0-0", limit=1)
    assert stage.mark(ids=[published[0].id]) == (0, 0)
    assert len(stage.life(published[0].id)) < 200


def test_a_device_too_many(stage: Stage) -> None:
    """A notification is read though there is no room to note where."""
    one = stage.publish()
    for number in range(250):
        stage.read(device=f"e{number}", point=f"{epoch_in(one)}.0-0")

    assert stage.mark(device="late", ids=[one.id]) == (0, 1)

    assert stage.life(one.id)["state"] == "read"
    assert "d:late" not in stage.life(one.id)


# --- update entries


def updates(stage: Stage) -> list[tuple[str, list[str]]]:
    """Return the update entries of the inbox."""
    return [(fields["u"], fields["i"].split()) for _, fields in stage.inbox() if "u" in fields]


def test_updates_are_merged(stage: Stage) -> None:
    """Readings in a row are one entry; the envelopes tell each alone."""
    published = stage.publish_many(4)
    stage.ears.heard()
    for one in published[:3]:
        stage.mark(ids=[one.id])

    assert updates(stage) == [("read", [one.id for one in published[:3]])]
    heard = stage.ears.heard()
    assert [one.rest[1] for one in heard] == [[one.id] for one in published[:3]]
    assert [one.prev for one in heard] == [point_of(published[3]), heard[0].point, heard[1].point]
    assert stage.read(point=heard[0].point).changes == [("read", [one.id for one in published[:3]])]


def test_other_updates_are_not_merged(stage: Stage) -> None:
    """Another state, or a notification between them, begins an entry of its own."""
    published = stage.publish_many(4)
    stage.read(connect=True)  # so that a cancellation concerns somebody
    stage.mark(ids=[published[0].id])
    stage.cancel(published[1].id)
    stage.mark(ids=[published[2].id])
    stage.publish()
    stage.mark(ids=[published[3].id])

    ids = [one.id for one in published]
    assert updates(stage) == [
        ("read", [ids[0]]),
        ("cancelled", [ids[1]]),
        ("read", [ids[2]]),
        ("read", [ids[3]]),
    ]


def test_an_update_has_at_most_64_ids(stage: Stage) -> None:
    """What is more comes in further entries and envelopes, in order."""
    published = stage.publish_many(150)
    ids = [one.id for one in published]
    stage.mark(ids=ids[:10])
    stage.ears.heard()

    assert stage.mark(up_to=150) == (0, 140)

    assert [len(some) for _, some in updates(stage)] == [10, 64, 64, 12]
    assert [one for _, some in updates(stage) for one in some] == ids
    heard = stage.ears.heard()
    assert [len(one.rest[1]) for one in heard] == [64, 64, 12]
    assert heard[0].point == heard[1].prev
    stage.cancel(stage.publish().id)
    stage.publish()


def test_an_update_that_is_just_full(stage: Stage) -> None:
    """The 64th id is added to an entry, the 65th is not."""
    published = stage.publish_many(65)
    for one in published[:64]:
        stage.mark(ids=[one.id])
    assert [len(some) for _, some in updates(stage)] == [64]

    stage.mark(ids=[published[64].id])

    assert [len(some) for _, some in updates(stage)] == [64, 1]


def test_places_of_updates(stage: Stage) -> None:
    """They ascend, and carry the seq of the newest notification."""
    published = stage.publish_many(3)
    for one in published:
        stage.mark(ids=[one.id])
        stage.publish()

    places = [place for place, _ in stage.inbox()]
    assert places == sorted(places, key=order)
    assert [seq_of(place) for place in places] == [1, 2, 3, 3, 4, 4, 5, 5, 6]
    assert place_in(published[2]) in places


def test_many_updates_in_one_millisecond(stage: Stage) -> None:
    """If the numbers of a millisecond are used up, the next one begins."""
    one, two = stage.publish_many(2)
    future = stage.caller.now() + 60_000
    stage.caller.ask("HSET", META, "last", f"{future}-{3 * 4096 - 2}")

    stage.mark(ids=[one.id])
    assert stage.meta()["last"] == f"{future}-{3 * 4096 - 1}"
    stage.mark(ids=[two.id])
    assert stage.meta()["last"] == f"{future + 1}-{2 * 4096 + 1}"
    assert stage.publish().seq == 3
    assert stage.meta()["last"] == f"{future + 1}-{3 * 4096}"


def test_an_update_alone_does_not_live_for_ever(stage: Stage) -> None:
    """An inbox that is made for it anew has a lifetime, too."""
    one = stage.publish()
    stage.caller.ask("DEL", INBOX)
    stage.caller.ask("HSET", META, "ends", "5")

    stage.mark(ids=[one.id])

    assert 0 < stage.lifetime(INBOX) <= ledger.DAY_MS


@pytest.mark.parametrize("entry", [("u", "read"), ("x", "y"), ("u", "cancelled", "i", "z")])
def test_garbage_where_the_newest_update_was(stage: Stage, entry: tuple[str, ...]) -> None:
    """What nobody wrote is not added to."""
    one = stage.publish()
    place = f"{stage.caller.now() + 1000}-4097"
    stage.caller.ask("XADD", INBOX, place, *entry)
    stage.caller.ask("HSET", META, "last", place, "update", place)

    stage.mark(ids=[one.id])

    assert stage.read(point=f"{epoch_in(one)}.{place}").changes == [("read", [one.id])]
