"""A failover that loses what was last: nobody goes on as if nothing had happened."""

import pytest

from tests.trioserver.ledger_keys import Copy
from tests.trioserver.ledger_stage import ANN, Stage, epoch_in, place_in, point_of
from trioserver import ledger
from trioserver.ledger import Accepted, Gap, Rules
from trioserver.position import order

META = ledger.key("meta", ANN)
INBOX = ledger.key("inbox", ANN)
HOLES = ledger.key("holes", ANN)


def rewound(stage: Stage, kept: int, lost: int) -> tuple[list[Accepted], list[Accepted]]:
    """Publish some, of which the last are lost in a failover; return both parts."""
    first = stage.publish_many(kept)
    copy = Copy(stage.caller)
    stage.caller.wait_past(stage.caller.now())
    second = stage.publish_many(lost)
    copy.restore(stage.caller)
    # No failover is so fast that time would not tell before and after apart.
    stage.caller.wait_past(stage.caller.now())
    return first, second


def test_a_reader_from_the_future(stage: Stage) -> None:
    """Who has seen more than there is hears of it, and gets once more what is young."""
    kept, lost = rewound(stage, 3, 2)

    found = stage.read(point=point_of(lost[1]))

    assert found.page.items[0] == Gap(4, 5, 2, "failover")
    assert found.page.why == "failover"
    assert found.ids == [one.id for one in kept]
    assert found.reached == point_of(kept[2])
    assert stage.read(point=found.reached).page.items == []
    assert stage.read(point=found.start).ids == found.ids


@pytest.mark.parametrize("count", [1, 2, 3])
def test_seqs_that_were_given_twice(stage: Stage, count: int) -> None:
    """However many there are again: nobody goes on as if nothing had happened."""
    _, lost = rewound(stage, 3, 2)
    new = stage.publish_many(count)

    found = stage.read(point=point_of(lost[1]), device="phone", connect=True)

    assert [one.seq for one in new] == [4, 5, 6][:count]
    assert found.page.items[0] == Gap(4, 5, 2, "failover")
    assert {one.id for one in new} <= set(found.ids)
    assert stage.read(device="phone").start == found.start


def test_seqs_that_were_given_twice_and_trimmed(stage: Stage) -> None:
    """Also if the seq behind the reader's place looks like the next one."""
    _, lost = rewound(stage, 3, 2)
    stage.rules = Rules(max_length=1)
    new = stage.publish_many(3)

    found = stage.read(point=point_of(lost[1]))

    assert found.gaps[0] == (5, 5, 1, "failover")
    assert found.ids == [new[2].id]


def test_seqs_that_were_given_twice_and_expired(stage: Stage) -> None:
    """The same for those that went because their time was over."""
    _, lost = rewound(stage, 3, 2)
    new = stage.publish_many(3)
    stage.sweep(new[0].id)
    stage.sweep(new[1].id)

    found = stage.read(point=point_of(lost[1]))

    assert found.gaps[0] == (5, 5, 1, "failover")
    assert found.ids[-1] == new[2].id


def test_an_update_behind_a_lost_place(stage: Stage) -> None:
    """An update tells by its seq, too, that the reader knows another history."""
    kept, lost = rewound(stage, 3, 2)
    stage.mark(ids=[kept[0].id])

    found = stage.read(point=point_of(lost[1]))

    assert found.gaps == [(3, 5, 3, "failover")]
    assert found.changes == [("read", [kept[0].id])]


def test_clocks_that_differ(stage: Stage) -> None:
    """The new master's clock may be behind: what it accepts is not overlooked."""
    _, lost = rewound(stage, 1, 2)
    new = stage.publish()
    milliseconds, number = order(place_in(lost[1]))
    ahead = f"{epoch_in(new)}.{milliseconds + 30_000}-{number}"

    found = stage.read(point=ahead)

    assert found.gaps[0][3] == "failover"
    assert new.id in found.ids


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_pages_after_a_failover(stage: Stage, limit: int) -> None:
    """However small the pages, all that is young comes again."""
    kept, lost = rewound(stage, 3, 2)
    new = stage.publish_many(2)
    point, more, ids = point_of(lost[1]), True, list[str]()
    while more:
        found = stage.read(point=point, limit=limit)
        ids += found.ids
        point, more = found.reached, found.page.more

    assert ids == [one.id for one in kept + new]


def test_a_reader_from_far_ahead(stage: Stage) -> None:
    """However far ahead: what is young here is not overlooked."""
    one = stage.publish()
    milliseconds, number = order(place_in(one))

    found = stage.read(point=f"{epoch_in(one)}.{milliseconds + 3_600_000}-{number}")

    assert found.gaps == [(1, 1, 1, "failover")]
    assert found.ids == [one.id]


def test_a_seq_that_was_never_given(stage: Stage) -> None:
    """It is of another history, also where nothing in the inbox contradicts it."""
    stage.publish()
    future = stage.caller.now() + 60_000
    stage.caller.ask("HSET", META, "last", f"{future}-4096")

    found = stage.read(point=f"{stage.meta()['epoch']}.{future - 1}-{3 * 4096}")

    assert found.gaps == [(2, 3, 2, "failover")]


def test_only_what_is_young_comes_again(stage: Stage) -> None:
    """After a failover a full inbox is not sent to everybody once more."""
    stage.publish()
    old = stage.inbox()[0][1]
    stage.caller.ask("DEL", INBOX)
    # The same one, an hour ago.
    flat = [part for pair in old.items() for part in pair]
    place = f"{stage.caller.now() - 3_600_000}-4096"
    stage.caller.ask("XADD", INBOX, place, *flat)
    stage.caller.ask("HSET", META, "last", place)
    new = stage.publish()
    milliseconds, number = order(place_in(new))

    found = stage.read(point=f"{epoch_in(new)}.{milliseconds + 1}-{number + 4096}")

    assert found.gaps == [(3, 3, 1, "failover")]
    assert found.ids == [new.id]
    assert stage.read(point=found.start).seqs == [2]


def test_a_failover_that_left_nothing_young(stage: Stage) -> None:
    """Then there is only the announcement, and the reader goes on from the end."""
    one = stage.publish()
    stage.sweep(one.id)
    stage.caller.ask("DEL", INBOX)
    milliseconds, number = order(place_in(one))

    found = stage.read(point=f"{epoch_in(one)}.{milliseconds + 10_000}-{number * 3}")

    assert (found.gaps, found.ids) == ([(2, 3, 2, "failover")], [])
    assert stage.read(point=found.reached).page.items == []


def test_a_cursor_from_the_future(stage: Stage) -> None:
    """A device whose cursor contradicts its inbox begins where it was served from."""
    _, lost = rewound(stage, 3, 2)
    stage.read(device="phone", connect=True)
    new = stage.publish()
    # A worker still has the old place in mind, and by now it looks possible.
    milliseconds, _ = order(place_in(lost[0]))
    stage.report(received=f"{epoch_in(new)}.{milliseconds}-{6 * 4096}")

    found = stage.read(device="phone", connect=True)

    assert found.page.why == "failover"
    assert new.id in found.ids
    stage.report(received=found.reached)
    assert stage.read(device="phone", connect=True).page.items == []
