"""Gaps: whatever cannot come any more is announced, with exact numbers, and nothing else is."""

import random

import pytest

from tests.trioserver.ledger_stage import ANN, Found, Stage, epoch_in, place_in, point_of
from trioserver import ledger
from trioserver.ledger import Accepted, Change, Gap, Notice, Rules
from trioserver.position import epoch_of, seq_of

META = ledger.key("meta", ANN)
INBOX = ledger.key("inbox", ANN)
HOLES = ledger.key("holes", ANN)


def beginning_of(one: Accepted) -> str:
    """Return the point where the epoch of ``one`` begins."""
    return f"{epoch_in(one)}.0-0"


def accounted(found: Found) -> list[int]:
    """Return the seqs that were delivered or announced, in this order."""
    seqs: list[int] = []
    for item in found.page.items:
        if isinstance(item, Notice):
            seqs.append(item.seq)
        elif isinstance(item, Gap):
            seqs.extend(range(item.from_seq, item.to_seq + 1))
    return seqs


# --- trimmed, expired, withdrawn


def test_trimmed_before_the_place(stage: Stage) -> None:
    """Only what lies behind the reader's place is missing to it."""
    stage.rules = Rules(max_length=4)
    published = stage.publish_many(10)

    assert stage.read(point=point_of(published[2])).gaps == [(4, 6, 3, "trimmed")]
    assert stage.read(point=point_of(published[5])).gaps == []
    assert stage.read(point=point_of(published[2])).page.why == "trimmed"
    assert stage.read().page.why == "new"


def test_expired_in_the_middle(stage: Stage) -> None:
    """Each hole is announced where it is, in the order of the seqs."""
    published = stage.publish_many(8)
    stage.sweep(*(published[i].id for i in (1, 2, 5, 7)))

    found = stage.read()

    assert found.gaps == [(2, 3, 2, "expired"), (6, 6, 1, "expired"), (8, 8, 1, "expired")]
    assert accounted(found) == list(range(1, 9))
    assert found.page.why == "new"


def test_a_gap_before_an_update(stage: Stage) -> None:
    """What is missing is told before what happened afterwards, and once."""
    published = stage.publish_many(3)
    stage.read(connect=True)
    stage.sweep(published[1].id, published[2].id)
    stage.publish()

    found = stage.read(point=point_of(published[0]))

    assert [type(item) for item in found.page.items] == [Gap, Change, Notice]
    assert found.gaps == [(2, 3, 2, "expired")]
    assert found.seqs == [4]


def test_everything_has_expired(stage: Stage) -> None:
    """The gap is announced though nothing else is there, and only once."""
    published = stage.publish_many(3)
    stage.sweep(*(one.id for one in published))

    found = stage.read(point=point_of(published[0]))

    assert found.gaps == [(2, 3, 2, "expired")]
    assert found.page.why == "expired"
    assert stage.read(point=found.reached).page.items == []


def test_an_inbox_that_is_gone(stage: Stage) -> None:
    """Without its stream Redis still knows how many there were."""
    published = stage.publish_many(3)
    stage.caller.ask("DEL", INBOX)

    assert stage.read(point=point_of(published[0])).gaps == [(2, 3, 2, "expired")]
    assert stage.publish().seq == 4
    assert stage.read().gaps == [(1, 3, 3, "expired")]


def test_withdrawn_is_no_gap(stage: Stage) -> None:
    """What was taken back on purpose is missed by nobody."""
    published = stage.publish_many(5)
    for i in (0, 2, 3, 4):
        assert stage.cancel(published[i].id) == "cancelled"

    found = stage.read()

    assert (found.seqs, found.gaps) == ([2], [])
    assert stage.read(point=point_of(published[2])).gaps == []


def test_an_entry_that_somebody_deleted(stage: Stage) -> None:
    """Who deletes past the scripts causes a gap, not silence."""
    published = stage.publish_many(3)
    stage.caller.ask("XDEL", INBOX, place_in(published[1]))

    assert stage.read().gaps == [(2, 2, 1, "expired")]


@pytest.mark.parametrize("seed", range(12))
def test_exact_numbers_from_every_place(stage: Stage, seed: int) -> None:
    """However trimming, expiry and withdrawal overlap: each lost one counts once, no other does."""
    rng = random.Random(seed)
    stage.rules = Rules(max_length=rng.choice([6, 15, 40]))
    points, ids, lost, withdrawn = [""], [""], set[int](), set[int]()
    for _ in range(40):
        one = stage.publish()
        points.append(point_of(one))
        ids.append(one.id)
        chosen = rng.randrange(1, len(ids))
        if rng.random() < 0.4 and stage.cancel(ids[chosen]) == "cancelled":
            withdrawn.add(chosen)
        elif rng.random() < 0.3:
            stage.sweep(ids[rng.randrange(1, len(ids))])
    points[0] = f"{epoch_of(points[1])}.0-0"
    there = {seq_of(place) for place, fields in stage.inbox() if "p" in fields}
    lost = set(range(1, 41)) - there - withdrawn
    trimmed = seq_of(stage.meta().get("trimmed", "0-0"))

    for seq, point in enumerate(points):
        found = stage.read(point=point, limit=1000)
        assert found.seqs == sorted(one for one in there if one > seq)
        announced: set[int] = set()
        for first, last, missing, reason in found.gaps:
            inside = lost & set(range(first, last + 1))
            assert len(inside) == missing > 0
            assert reason == ("trimmed" if last <= trimmed else "expired")
            assert not announced & inside
            announced |= inside
        assert announced == {one for one in lost if one > seq}
        assert accounted(found) == sorted(accounted(found))


def test_a_gap_at_the_end_of_a_page(stage: Stage) -> None:
    """What is missing between two pages is announced on one of them."""
    published = stage.publish_many(9)
    stage.sweep(*(published[i].id for i in (2, 5, 8)))
    stage.expire(published[3].id)
    for limit in (1, 2, 3, 5):
        point, seen, more = beginning_of(published[0]), list[int](), True
        while more:
            found = stage.read(point=point, limit=limit)
            seen += accounted(found)
            point, more = found.reached, found.page.more
        assert seen == list(range(1, 10))


def test_a_place_within_a_hole(stage: Stage) -> None:
    """A reader may have got what was withdrawn afterwards."""
    published = stage.publish_many(6)
    for one in published[1:5]:
        stage.cancel(one.id)

    for i in range(6):
        assert stage.read(point=point_of(published[i])).gaps == []


# --- holes


def test_holes_are_ranges(stage: Stage) -> None:
    """Neighbours grow together, in whatever order they come."""
    published = stage.publish_many(9)
    expected = [[(3, 3)], [(3, 3), (5, 5)], [(3, 5)], [(2, 5)], [(2, 5), (7, 7)], [(2, 7)]]

    for seq, ranges in zip((3, 5, 4, 2, 7, 6), expected, strict=True):
        stage.cancel(published[seq - 1].id)
        assert stage.holes() == ranges
    assert 44 * ledger.DAY_MS < stage.lifetime(HOLES) <= 45 * ledger.DAY_MS


def test_holes_are_bounded(stage: Stage) -> None:
    """Of far too many the lowest are forgotten: then a gap counts too much, never too little."""
    published = stage.publish_many(4)
    ranges = [part for n in range(10, 10 + 2048, 2) for part in (f"s{n}", n, f"e{n}", n)]
    stage.caller.ask("HSET", HOLES, *ranges)

    stage.cancel(published[1].id)

    assert len(stage.holes()) == 1025 - 128
    assert stage.holes()[0][0] > 2
    assert stage.read().gaps == [(2, 2, 1, "expired")]


def test_garbage_among_the_holes(stage: Stage) -> None:
    """What is no range hides nothing."""
    published = stage.publish_many(4)
    stage.caller.ask("HSET", HOLES, "e2", "x", "sx", "5", "s1", "-1", "e", "", "what", "ever")
    stage.sweep(published[1].id)

    assert stage.read().gaps == [(2, 2, 1, "expired")]
    assert stage.cancel(published[2].id) == "cancelled"


# --- another epoch


def test_everything_was_lost(stage: Stage) -> None:
    """A reader from before gets a gap of nobody knows how many, then all there is."""
    old = stage.publish_many(3)
    stage.caller.ask("FLUSHALL")
    assert stage.read(point=point_of(old[1])).gaps == [(0, 0, 0, "epoch")]

    new = stage.publish()

    found = stage.read(point=point_of(old[1]), device="phone", connect=True)
    assert epoch_in(new) != epoch_in(old[0])
    assert found.page.items[0] == Gap(0, 0, 0, "epoch")
    assert (found.ids, found.page.why) == ([new.id], "epoch")
    assert found.start == beginning_of(new)


def test_meta_was_lost(stage: Stage) -> None:
    """Nothing is silent: a new epoch, a gap, and again all that is still there."""
    stage.rules = Rules(max_length=3)
    old = stage.publish_many(5)
    stage.mark(ids=[old[3].id])
    stage.caller.ask("DEL", META)

    found = stage.read(point=point_of(old[4]))

    assert found.page.items[0] == Gap(0, 0, 0, "epoch")
    assert found.page.unread == 2
    assert found.page.epoch != epoch_in(old[0])
    # What was trimmed in the epoch before is covered by its gap, and counts for nobody.
    assert (found.seqs, len(found.gaps)) == ([3, 4, 5], 1)
    assert stage.publish().seq == 6
    assert stage.read(point=found.reached).seqs == [6]
    assert stage.meta()["base"] == "2"
    stage.sweep(old[2].id)
    assert stage.unread() == 2


def test_meta_was_lost_with_an_empty_inbox(stage: Stage) -> None:
    """The seq goes on where it was, as long as the stream remembers."""
    old = stage.publish_many(2)
    for one in old:
        stage.cancel(one.id)
    stage.caller.ask("DEL", META)

    new = stage.publish()

    assert new.seq == 3
    assert stage.read(point=beginning_of(new)).seqs == [3]
    assert stage.read(point=beginning_of(new)).gaps == []
    assert stage.unread() == 1


def test_unread_after_a_loss(stage: Stage) -> None:
    """What was lost with its inbox does not count any more, also when its time comes."""
    old = stage.publish_many(3, collapse_key="k")
    held = stage.publish()
    stage.caller.ask("DEL", META, INBOX)
    stage.caller.wait_past(stage.caller.now())
    new = stage.publish(collapse_key="k")
    assert stage.unread() == 1

    stage.fall_due(f"x:{held.id}")
    stage.due()
    assert stage.life(held.id)["state"] == "expired"
    stage.cancel(old[2].id)

    assert stage.unread() == 1
    assert stage.read().ids == [new.id]
    assert stage.holes() == []


def test_devices_lose_their_places(stage: Stage) -> None:
    """Each is told once, when it comes; what it knows of the stream for everyone stays."""
    old = stage.publish()
    for device in ("phone", "laptop"):
        stage.read(device=device, connect=True)
        stage.report(device=device, received=point_of(old), all_point="b7.5-4096")
    stage.caller.ask("DEL", META)
    assert stage.read(device="phone").page.why == "epoch"
    assert stage.fields(ledger.key("cursors", ANN))["epoch"] == stage.meta()["epoch"]

    for device in ("phone", "laptop"):
        found = stage.read(device=device, connect=True)
        assert (found.gaps, found.page.why) == ([(0, 0, 0, "epoch")], "epoch")
        assert found.ids == [old.id]
        assert found.page.all_point == "b7.5-4096"
        stage.report(device=device, received=found.reached)
        assert stage.read(device=device, connect=True).page.items == []


@pytest.mark.parametrize(
    "point", ["", "x", "zz.1-1", "{epoch}.1", "{epoch}.x-y", "{epoch}.1-99999999999999999", "0.0-0"]
)
def test_a_point_that_is_none(stage: Stage, point: str) -> None:
    """What nobody understands is a gap, and everything that is there."""
    one = stage.publish()
    text = point.format(epoch=epoch_in(one))

    found = stage.read(point=text, garbage=not text)

    assert (found.gaps, found.ids) == ([(0, 0, 0, "epoch")], [one.id])
