"""Withdrawing: nobody misses what was taken back, and who has it is told."""

from collections.abc import Callable

import pytest

from tests.trioserver.ledger_stage import (
    ANN,
    Stage,
    place_in,
    point_of,
)
from trioserver import ledger

META = ledger.key("meta", ANN)
INBOX = ledger.key("inbox", ANN)


def test_one_is_withdrawn(stage: Stage) -> None:
    """It is gone, nobody misses it, it does not count, and its time never comes."""
    one, two = stage.publish_many(2, fallback_after_ms=60_000)

    assert stage.cancel(one.id) == "cancelled"

    found = stage.read()
    assert (found.ids, found.gaps, found.page.unread) == ([two.id], [], 1)
    assert stage.holes() == [(1, 1)]
    life = stage.life(one.id)
    assert (life["state"], life["why"]) == ("cancelled", "cancelled")
    assert stage.told(one.id) == ["accepted", "cancelled"]
    assert stage.events()[-1]["why"] == "cancelled"
    assert stage.schedule().keys() == {f"x:{two.id}", f"f:{two.id}"}


def test_nobody_is_told_of_what_nobody_has(stage: Stage) -> None:
    """What was given to nobody leaves no update."""
    one = stage.publish()
    stage.ears.heard()

    stage.cancel(one.id)

    assert stage.ears.heard() == []
    assert stage.inbox() == []


def heard_live(stage: Stage) -> str:
    """Publish while somebody listens."""
    stage.ears.heard()
    return stage.publish().id


def handed_out(stage: Stage) -> str:
    """Publish, and let a worker read it."""
    one = stage.publish()
    stage.read(device="phone", connect=True)
    return one.id


def reported(stage: Stage) -> str:
    """Publish, and let a worker say that it was sent."""
    one = stage.publish()
    stage.report(sent=point_of(one))
    return one.id


@pytest.mark.parametrize("given", [heard_live, handed_out, reported])
def test_who_may_show_it_is_told(stage: Stage, given: Callable[[Stage], str]) -> None:
    """However it was given to a worker, its devices hear that it is withdrawn."""
    name = given(stage)
    stage.ears.heard()

    stage.cancel(name)

    [heard] = stage.ears.heard()
    assert (heard.kind, heard.unread, heard.rest) == ("u", 0, ("cancelled", [name], ""))
    found = stage.read()
    assert (found.changes, found.reached) == ([("cancelled", [name])], heard.point)


def test_too_late(stage: Stage) -> None:
    """What was read, or is over, stays as it is."""
    published = stage.publish_many(4)
    stage.mark(ids=[published[0].id])
    stage.sweep(published[1].id)
    stage.cancel(published[2].id)
    before = [stage.life(one.id) for one in published[:3]]
    unread = stage.unread()

    for one in published[:3]:
        assert stage.cancel(one.id) == "too late"

    assert [stage.life(one.id) for one in published[:3]] == before
    assert stage.unread() == unread == 1
    assert stage.holes() == [(3, 3)]


def test_after_it_was_received(stage: Stage) -> None:
    """It can be withdrawn until somebody has read it."""
    one = stage.publish()
    stage.report(received=point_of(one), acked_seq=1)

    assert stage.cancel(one.id) == "cancelled"
    assert stage.told(one.id) == ["accepted", "received", "acked", "cancelled"]
    assert stage.unread() == 0


@pytest.mark.parametrize("name", ["", "x", "p00-none", "}{", "*"])
def test_unknown_ones(stage: Stage, name: str) -> None:
    """Nothing is known of them, and nothing is made for them."""
    assert stage.cancel(name) == "unknown"
    assert stage.names() == []


def test_those_of_others(stage: Stage) -> None:
    """A user's id works for this user only."""
    one = stage.publish()
    home = ledger.partition(ANN)
    neighbour = next(f"u{n}" for n in range(10_000) if ledger.partition(f"u{n}") == home)

    assert stage.cancel(one.id, neighbour) == "unknown"
    assert stage.unread() == 1


def test_a_scheduled_one_is_withdrawn(stage: Stage) -> None:
    """It never comes, and what was kept of it goes."""
    one = stage.publish(deliver_at_ms=stage.caller.now() + 60_000, collapse_key="k")

    assert stage.cancel(one.id) == "cancelled"

    assert stage.schedule() == {}
    life = stage.life(one.id)
    assert (life["state"], life["why"]) == ("cancelled", "cancelled")
    assert not life.keys() & {"payload", "collapse"}
    assert stage.told(one.id) == ["accepted", "cancelled"]
    assert stage.cancel(one.id) == "too late"
    assert stage.holes() == []


def test_a_broadcast_is_withdrawn(stage: Stage) -> None:
    """Those who have it are told on the channel of everyone."""
    stage.ears.heard()
    one, two = stage.publish_many(2, None)
    stage.ears.heard()

    assert stage.cancel(one.id, None) == "cancelled"

    [heard] = stage.ears.heard()
    assert (heard.channel, heard.unread) == ("channels:broadcast", 0)
    assert heard.rest == ("cancelled", [one.id], "")
    found = stage.read(None)
    assert (found.ids, found.gaps) == ([two.id], [])
    assert found.changes == [("cancelled", [one.id])]


def test_an_entry_that_was_gone_already(stage: Stage) -> None:
    """A gap stays a gap: nobody can say that this was on purpose."""
    published = stage.publish_many(2)
    stage.caller.ask("XDEL", INBOX, place_in(published[0]))

    assert stage.cancel(published[0].id) == "cancelled"

    assert stage.holes() == []
    assert stage.read().gaps == [(1, 1, 1, "expired")]
    assert stage.unread() == 1


def test_bad_cancellations(stage: Stage) -> None:
    """Impossible numbers are refused."""
    stage.due()
    with pytest.raises(RuntimeError, match=r"^BADREQUEST events "):
        stage.raw("cancel", META, "id", "x", "events", "-1")
    assert stage.raw("cancel", META) == [b"unknown"]
