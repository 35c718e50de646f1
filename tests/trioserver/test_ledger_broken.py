"""What the scripts find may be garbage or gone: they go on, and nothing is lost silently."""

import pytest

from tests.trioserver.ledger_stage import (
    ANN,
    Stage,
    epoch_in,
    point_of,
)
from trioserver import ledger
from trioserver.ledger import Rules

# --- what is found broken


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("v", "2"), ("v", ""), ("epoch", ""), ("epoch", "A b"), ("epoch", "x" * 17)),
        *(
            ("seq", "-1"),
            ("seq", "many"),
            ("seq", "7"),
            ("last", ""),
            ("last", "5"),
            ("last", "x-y"),
        ),
        *(("last", "99999999999999999999-4096"), ("unread", "-3"), ("unread", "")),
    ],
)
def test_garbage_in_meta(stage: Stage, field: str, value: str) -> None:
    """What makes no sense begins a new epoch, in which all that is still there goes on."""
    first, second = stage.publish_many(2)
    stage.mark(ids=[first.id])
    stage.caller.ask("HSET", ledger.key("meta", ANN), field, value)

    third = stage.publish()

    assert epoch_in(third) != epoch_in(second)
    assert third.seq == 3
    assert stage.read().ids == [first.id, second.id, third.id]
    assert stage.unread() == 2
    found = stage.read(point=point_of(second))
    assert found.gaps == [(0, 0, 0, "epoch")]


def test_other_garbage_in_meta_is_ignored(stage: Stage) -> None:
    """Details that cannot be read count as not there."""
    stage.publish()
    key = ledger.key("meta", ANN)
    for field in ("trimmed", "expired", "update", "received", "read_to", "ends", "base", "since"):
        stage.caller.ask("HSET", key, field, "garbage")

    one = stage.publish()

    assert one.seq == 2
    assert stage.read().seqs == [1, 2]
    stage.report(received=point_of(one))
    assert stage.mark(up_to=2) == (0, 2)


def test_an_inbox_that_is_ahead_of_meta(stage: Stage) -> None:
    """Nobody can tell what lies between: a new epoch, in which everything is still there."""
    first = stage.publish()
    meta = stage.meta()
    future = stage.caller.now() + 60_000
    stage.caller.ask("HSET", ledger.key("meta", ANN), "last", f"{future}-4096")
    second = stage.publish()
    stage.caller.ask("HSET", ledger.key("meta", ANN), "last", meta["last"], "seq", 1)

    third = stage.publish()

    assert epoch_in(third) != epoch_in(first)
    assert stage.read().ids == [first.id, second.id, third.id]
    assert stage.unread() == third.seq == 3


def test_a_strangers_inbox(stage: Stage) -> None:
    """A stream that nothing can be added to is none of ours."""
    stage.caller.ask("XADD", ledger.key("inbox", ANN), "18446744073709551615-1", "a", "b")

    one = stage.publish()

    assert one.seq == 1
    assert stage.read().ids == [one.id]


def test_strangers_in_an_inbox_are_trimmed(stage: Stage) -> None:
    """Entries of somebody else count as entries, and as nothing else."""
    stage.rules = Rules(max_length=3)
    inbox = ledger.key("inbox", ANN)
    stage.caller.ask("XADD", inbox, "1-1", "what", "ever")
    stage.caller.ask("XADD", inbox, "1-2", "i", "none", "u", "none", "i", "x")
    stage.caller.ask("XADD", inbox, "1-3", "u", "read", "i", "none")

    stage.publish_many(3)

    assert stage.read().seqs == [1, 2, 3]
    assert stage.unread() == 3
