"""How much may be published to one user: a minute's worth at once, then one at a time."""

from typing import Final

import pytest

from tests.trioserver.ledger_stage import ANN, Stage, new_id
from trioserver import ledger
from trioserver.ledger import Rules

BOB: Final = "bob"
MINUTE: Final = 60_000_000
"""In microseconds, as `pace` in meta is."""


def limited(stage: Stage, user: str | None = ANN, **options: object) -> int:
    """Publish what is one too many, and return for how many ms."""
    with pytest.raises(RuntimeError, match=rf"^{ledger.RATE_LIMITED}\d+$") as caught:
        stage.publish(user, **options)
    return int(str(caught.value).split()[1])


def rest(stage: Stage, seconds: float) -> None:
    """Let so much time pass for Ann, which is: let what she got be so much older."""
    key = ledger.key("meta", ANN)
    stage.caller.ask("HINCRBY", key, "pace", -round(seconds * 1_000_000))


@pytest.mark.parametrize("rate", [1, 2, 7])
def test_a_minutes_worth_at_once(stage: Stage, rate: int) -> None:
    """So many are taken and no more; the answer says when the next would be."""
    stage.rules = Rules(rate=rate)
    began = stage.caller.now()

    seqs = [one.seq for one in stage.publish_many(rate)]
    before = {key: stage.caller.ask("DUMP", key) for key in stage.names()}
    wait = limited(stage)
    spent = stage.caller.now() - began

    assert list(range(1, rate + 1)) == seqs
    assert 60_000 / rate - spent - 1 <= wait <= 60_000 / rate + 1
    # Whoever is refused has changed nothing, and gets in no deeper.
    assert before == {key: stage.caller.ask("DUMP", key) for key in stage.names()}
    assert limited(stage) <= wait


def test_who_waits_as_told_is_taken(stage: Stage) -> None:
    """After the wait one is taken, and then it is the same again; an hour restores a minute."""
    stage.rules = Rules(rate=3)
    stage.publish_many(3)

    for _ in range(4):
        wait = limited(stage)
        rest(stage, wait / 1000)
        stage.publish()
        assert 10_000 < limited(stage) <= 20_000
    rest(stage, 3600)
    stage.publish_many(3)
    assert 10_000 < limited(stage) <= 20_000


def test_each_user_has_their_own(stage: Stage) -> None:
    """One user's notifications are not counted for another."""
    stage.rules = Rules(rate=1)

    stage.publish(ANN)
    stage.publish(BOB)

    assert limited(stage, ANN)
    assert limited(stage, BOB)


def test_what_has_priority_is_neither_refused_nor_counted(stage: Stage) -> None:
    """It comes through, and leaves the others as many as before."""
    stage.rules = Rules(rate=2)

    stage.publish(priority=True)
    stage.publish_many(2)
    wait = limited(stage)

    assert "accepted" == stage.publish(priority=True).outcome
    assert wait - 5000 < limited(stage) <= wait


def test_everyone_is_not_limited(stage: Stage) -> None:
    """What is for everyone is no more to one user than to another."""
    stage.rules = Rules(rate=1)

    assert [1, 2, 3] == [one.seq for one in stage.publish_many(3, None)]


def test_repetitions_get_their_answer_and_are_not_counted(stage: Stage) -> None:
    """The same id, or the same idempotency key, is answered as the first time."""
    stage.rules = Rules(rate=2)
    one = stage.publish(idempotency_key="k")

    for _ in range(3):
        assert "duplicate" == stage.publish(id=one.id).outcome
        again = stage.publish(idempotency_key="k")
        assert (one.id, "duplicate") == (again.id, again.outcome)
    stage.publish()
    limited(stage)
    assert "duplicate" == stage.publish(id=one.id).outcome
    assert "duplicate" == stage.publish(idempotency_key="k").outcome


def test_wrong_ones_are_not_counted(stage: Stage) -> None:
    """Neither what cannot be published, nor a key that was used for something else."""
    stage.rules = Rules(rate=2)
    stage.publish(idempotency_key="k")

    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
            stage.publish(payload=b"{")
        with pytest.raises(RuntimeError, match=r"^IDEMPOTENCY "):
            stage.publish(payload=b"2", idempotency_key="k")
    assert "accepted" == stage.publish().outcome


def test_a_refused_one_leaves_its_keys_free(stage: Stage) -> None:
    """What was one too many can be published later under the same id and idempotency key."""
    stage.rules = Rules(rate=1)
    stage.publish()
    name = new_id(ANN)

    limited(stage, id=name, idempotency_key="k", collapse_key="c")
    rest(stage, 60)

    accepted = stage.publish(id=name, idempotency_key="k", collapse_key="c")
    assert (name, 2, "accepted") == (accepted.id, accepted.seq, accepted.outcome)


def test_what_is_scheduled_counts_when_it_is_accepted(stage: Stage) -> None:
    """Now, and not when it is due."""
    stage.rules = Rules(rate=2)
    at = stage.caller.now() + 3_600_000

    stage.publish(deliver_at_ms=at)
    stage.publish(deliver_at_ms=at)

    assert limited(stage, deliver_at_ms=at)


def test_publishers_with_other_rates_share_what_is_left(stage: Stage) -> None:
    """A third of a minute that one has used is gone for all; who knows no rate is not counted."""
    stage.rules = Rules(rate=3)
    stage.publish_many(2)
    stage.rules = Rules()
    stage.publish_many(5)

    stage.rules = Rules(rate=6)
    stage.publish_many(2)
    assert limited(stage) <= 10_000
    stage.rules = Rules(rate=1)
    assert 50_000 < limited(stage) <= 60_000


def test_a_clock_that_goes_back_locks_nobody_out(stage: Stage) -> None:
    """After a failover to a Redis whose clock is an hour behind, the user has a new minute."""
    stage.rules = Rules(rate=2)
    stage.publish_many(2)
    rest(stage, -3600)

    stage.publish_many(2)

    assert limited(stage) <= 30_000


@pytest.mark.parametrize("step", [0.001, 1.2, 30])
def test_a_clock_that_goes_back_a_little_gives_nothing_away(stage: Stage, step: float) -> None:
    """Whoever had used up the minute has nothing new, and is told how long that takes."""
    stage.rules = Rules(rate=2)
    stage.publish_many(2)
    wait = limited(stage)
    rest(stage, -step)

    later = limited(stage)

    assert wait < later + 30_000
    assert later <= 30_001 + step * 1000
    rest(stage, later / 1000)
    stage.publish()
    assert limited(stage)


@pytest.mark.parametrize("pace", ["", "x", "-1", "1e99", "9" * 400])
def test_nonsense_limits_nobody(stage: Stage, pace: str) -> None:
    """Whatever a stranger has written where the pace is kept, publishing goes on."""
    stage.rules = Rules(rate=1)
    stage.publish()
    stage.caller.ask("HSET", ledger.key("meta", ANN), "pace", pace)

    assert 2 == stage.publish().seq
    assert limited(stage)


def test_a_new_epoch_gives_nothing_away(stage: Stage) -> None:
    """If the inbox turns out to be ahead of what is known, the count goes on."""
    stage.rules = Rules(rate=2)
    stage.publish()
    ahead = f"{stage.caller.now() + 1000}-{1 << 40}"
    stage.caller.ask("XADD", ledger.key("inbox", ANN), ahead, "i", "x")

    first = stage.meta()["epoch"]
    stage.publish()

    assert first != stage.meta()["epoch"]
    assert limited(stage)


def test_a_plain_caller_decides(stage: Stage) -> None:
    """Called without a rate, or with 0, the script limits nothing and keeps nothing about it."""
    for index in range(60):
        rate = ("rate", 0) if index % 2 else ()
        stage.raw("publish", ledger.key("meta", ANN), "id", new_id(ANN), "payload", "1", *rate)

    assert "pace" not in stage.meta()
    assert "60" == stage.meta()["seq"]


def test_so_many_that_each_costs_less_than_a_microsecond(stage: Stage) -> None:
    """The greatest rate there may be is as good as none."""
    stage.rules = Rules(rate=1_000_000_000)

    stage.publish_many(100)

    now = stage.caller.now() * 1000
    assert int(stage.meta()["pace"]) <= now + 1000


@pytest.mark.parametrize("rate", [60_000_001, 1_000_000_000])
def test_each_one_costs_something(stage: Stage, rate: int) -> None:
    """Also at a rate at which a notification is made up for in less than a microsecond."""
    stage.rules = Rules(rate=rate)
    ahead = stage.caller.now() * 1000 + 30_000_000
    stage.publish()
    stage.caller.ask("HSET", ledger.key("meta", ANN), "pace", ahead)

    stage.publish()

    assert ahead + 1 == int(stage.meta()["pace"])
