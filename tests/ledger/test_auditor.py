"""The auditor finds what is wrong with a log, and only that."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ledger.auditor import audit
from tests.ledger.records import (
    ALL,
    EVERYONE,
    NOWHERE,
    OWN,
    Ended,
    Established,
    Event,
    Gap,
    Life,
    Outcome,
    Place,
    Publish,
    Receipt,
    places,
)

EPOCH = "k3x9"
START = Established(position=f"1.{EPOCH}.0-0")


def accepted(number: int, *, user: str = "ann", epoch: str = EPOCH, seq: int = 0) -> Publish:
    """Return an accepted publish; its seq is its number unless said otherwise."""
    return Publish(
        number=number,
        user=user,
        outcome=Outcome.ACCEPTED,
        by="test",
        id=f"id-{number}",
        place=Place(epoch, seq or number),
        ended=float(number),
    )


def without(number: int, outcome: Outcome) -> Publish:
    """Return a publish that was not accepted."""
    return Publish(number=number, user="ann", outcome=outcome, by="test")


def receipt(number: int, *, epoch: str = EPOCH, seq: int = 0, **others: object) -> Receipt:
    """Return the receipt of `accepted` of the same number."""
    fields: dict[str, object] = {"id": f"id-{number}", "place": Place(epoch, seq or number)}
    return Receipt(number=number, **(fields | others))  # type: ignore[arg-type]


def gap(first: int, last: int, reason: str = "trimmed", **others: object) -> Gap:
    """Return a gap over a range; it counts right unless told otherwise."""
    fields: dict[str, object] = {"missing": last - first + 1, "reason": reason}
    return Gap(first=first, last=last, **(fields | others))  # type: ignore[arg-type]


def ann(*connections: Sequence[Event], acks: bool = False) -> Life:
    """Return the life of a client of ann's."""
    return Life(name="a", user="ann", acks=acks, connections=[list(one) for one in connections])


THREE = [accepted(1), accepted(2), accepted(3)]


def test_nothing_is_found_where_all_is_well() -> None:
    """Received in order, over two connections, with one duplicate: no finding, and counted."""
    life = ann([START, receipt(1), receipt(2), Ended(why="cut")], [START, receipt(2), receipt(3)])

    verdict = audit(THREE, [life])

    assert {} == verdict.findings, verdict
    assert (4, 1, 0.25) == (verdict.receipts, verdict.duplicates, verdict.duplicate_share)
    assert 3 == verdict.outcomes[Outcome.ACCEPTED]


@pytest.mark.parametrize(
    ("kind", "publishes", "life"),
    [
        pytest.param("lost", THREE, ann([START, receipt(1), receipt(2)]), id="at the end"),
        pytest.param("lost", THREE, ann([START]), id="everything"),
        pytest.param("lost", THREE, ann(), id="never connected"),
        pytest.param("lost", THREE, ann([START, receipt(1), gap(2, 2)]), id="gap too short"),
        pytest.param("lost", THREE, ann([START, receipt(1), receipt(3)]), id="in the middle"),
        pytest.param("silent", THREE, ann([START, receipt(2), receipt(3)]), id="first"),
        pytest.param("silent", THREE[::2], ann([START, receipt(1), receipt(3)]), id="not ours"),
        pytest.param(
            "silent", THREE, ann([START, receipt(1)], [START, receipt(3)]), id="between connections"
        ),
        pytest.param("silent", THREE, ann([START, receipt(1), gap(3, 3)]), id="before a gap"),
        pytest.param(
            "silent",
            [accepted(1), accepted(2, epoch="new", seq=1)],
            ann([START, receipt(1), receipt(2, epoch="new", seq=1)]),
            id="epoch",
        ),
        pytest.param(
            "inverted", THREE, ann([START, receipt(1), receipt(2), receipt(1)]), id="backwards"
        ),
        pytest.param(
            "inverted", THREE, ann([START, receipt(1), receipt(1, attempt=2)]), id="did not ask"
        ),
        pytest.param(
            "inverted", THREE, ann([START, receipt(1), receipt(1)], acks=True), id="same attempt"
        ),
        pytest.param(
            "inverted",
            THREE,
            ann(
                [START, receipt(1), receipt(2)],
                [START, receipt(2), receipt(1, attempt=2)],
                acks=True,
            ),
            id="redelivery of what this connection had not",
        ),
        pytest.param("twins", THREE, ann([START, receipt(1, id="other")]), id="another id"),
        pytest.param(
            "twins", THREE, ann([START, receipt(1)], [START, receipt(1, seq=2)]), id="another seq"
        ),
        pytest.param(
            "twins",
            [without(7, Outcome.UNKNOWN)],
            ann([START, receipt(7, seq=1)], [START, receipt(7, seq=1, id="other")]),
            id="another id of an unknown one",
        ),
        pytest.param("twins", [*THREE, accepted(4, seq=3)], ann(), id="one seq accepted twice"),
        pytest.param(
            "phantoms", [without(1, Outcome.REFUSED)], ann([START, receipt(1)]), id="refused"
        ),
        pytest.param("phantoms", [], ann([START, receipt(1)]), id="never published"),
        pytest.param(
            "phantoms", [accepted(1, user="bob")], ann([START, receipt(1)]), id="for another"
        ),
        pytest.param(
            "phantoms", [accepted(1)], ann([START, receipt(1, stream=ALL)]), id="to everyone"
        ),
        pytest.param(
            "miscounts", [], ann([START, gap(1, 3, missing=2)]), id="gap with another number"
        ),
    ],
)
def test_each_defect_is_found(kind: str, publishes: list[Publish], life: Life) -> None:
    """A log with one thing wrong has a finding of that kind."""
    assert kind in audit(publishes, [life]).findings


@pytest.mark.parametrize(
    ("publishes", "life"),
    [
        pytest.param(THREE, ann([START, gap(1, 2), receipt(3)]), id="announced"),
        pytest.param(
            THREE,
            ann([Established(position=f"1.{EPOCH}.17-8195"), receipt(3)]),
            id="not there before",
        ),
        pytest.param(
            [without(2, Outcome.UNKNOWN), accepted(1), accepted(3)],
            ann([START, receipt(1), receipt(2), receipt(3)]),
            id="an unknown one came",
        ),
        pytest.param(
            [without(8, Outcome.UNKNOWN), without(9, Outcome.REFUSED), *THREE],
            ann([START, receipt(1), receipt(2), receipt(3)]),
            id="an unknown one did not come",
        ),
        pytest.param(
            THREE,
            ann(
                [START, receipt(1), receipt(2), receipt(1, attempt=2), receipt(2, attempt=2)],
                [START, receipt(3)],
                acks=True,
            ),
            id="redelivery to whoever asked",
        ),
        pytest.param(
            [accepted(1), accepted(2), accepted(3, epoch="new", seq=1)],
            ann(
                [START, receipt(1), Ended(why="cut")],
                [START, gap(2, 2, "epoch", missing=1), receipt(3, epoch="new", seq=1)],
            ),
            id="a new epoch, announced",
        ),
        pytest.param(
            [accepted(1), accepted(2, epoch="new", seq=1), accepted(3, epoch="new", seq=2)],
            ann([START, gap(1, 1, "epoch"), gap(1, 1), receipt(3, epoch="new", seq=2)]),
            id="a new epoch, and trimmed",
        ),
        pytest.param(
            [accepted(1)], ann([START, gap(1, 1, "epoch", at=2.0)]), id="a new epoch, still empty"
        ),
        pytest.param(
            [accepted(1)],
            ann([START, receipt(1)], [START, gap(0, 0, "epoch"), receipt(1, epoch="new", seq=1)]),
            id="a new epoch with what was retained",
        ),
        pytest.param(
            THREE,
            ann(
                [Established(position="", reason="unavailable"), receipt(1), receipt(2), receipt(3)]
            ),
            id="first connected without Redis",
        ),
    ],
)
def test_what_is_promised_is_no_finding(publishes: list[Publish], life: Life) -> None:
    """Announced gaps, asked redelivery and late beginnings are as they should be."""
    verdict = audit(publishes, [life])
    assert {} == verdict.findings, verdict


def test_a_new_epoch_excuses_nothing_that_was_published_in_it() -> None:
    """What was accepted after a wipe and never came is lost, also if no receipt names the epoch."""
    after = [accepted(5, epoch="new", seq=1), accepted(6, epoch="new", seq=2)]
    announced = gap(1, 1, "epoch", at=4.0)

    named = audit(after, [ann([START, announced, receipt(5, epoch="new", seq=1)])])
    unnamed = audit(after, [ann([START, announced])])

    assert (1, 2) == (len(named.lost), len(unnamed.lost))


def test_everyone_is_owed_broadcasts() -> None:
    """A broadcast that one of two clients missed is lost once; its seqs are its own."""
    broadcast = [accepted(4, user=EVERYONE, epoch="b7", seq=1), accepted(1)]
    came = receipt(4, epoch="b7", seq=1, stream=ALL)
    there = ann([START, came, receipt(1)])
    away = Life(name="b", user="bob", connections=[[START]])

    verdict = audit(broadcast, [there, away])

    assert ["lost"] == list(verdict.findings)
    assert 1 == len(verdict.lost)
    assert verdict.lost[0].startswith("b/all")


def test_unknown_outcomes_are_reported_apart() -> None:
    """Each is counted, and of those that came it is said that they came."""
    publishes = [without(1, Outcome.UNKNOWN), without(2, Outcome.UNKNOWN)]
    verdict = audit(publishes, [ann([START, receipt(1)])])
    assert (2, 1) == (verdict.outcomes[Outcome.UNKNOWN], verdict.unknown_arrived)
    assert "of the unknown 1 arrived" in str(verdict)


def test_positions_are_understood() -> None:
    """Each stream's epoch and seq; an unknown part is nowhere."""
    both = places("1.k3x9.1763630000000-61440.b7.1763-4097")
    assert {OWN: Place("k3x9", 15), ALL: Place("b7", 1)} == both
    assert {OWN: Place("k3x9", 0)} == places("1.k3x9.0-0")
    assert {OWN: NOWHERE, ALL: Place("b7", 1)} == places("1.0.0-0.b7.1763-4096")
    assert {} == places("")


Damage = Callable[[list[Event], int], list[Event]]

DAMAGES: dict[str, Damage] = {
    "lost": lambda events, at: events[:at] + events[at + 1 :],
    "inverted": lambda events, at: [*events[: at + 1], *events[at - 1 :]],
    "twins": lambda events, at: [
        receipt(one.number, id="other") if index == at and isinstance(one, Receipt) else one
        for index, one in enumerate(events)
    ],
}


@settings(max_examples=200)
@given(
    count=st.integers(3, 40),
    cuts=st.lists(st.integers(1, 40), max_size=5),
    where=st.integers(0, 10_000),
    kind=st.sampled_from(sorted(DAMAGES)),
)
def test_one_defect_in_any_good_log_is_found(
    count: int, cuts: list[int], where: int, kind: str
) -> None:
    """Cut anywhere a log is good; take out, repeat or rename one receipt and it is not."""
    events: list[Event] = [receipt(number) for number in range(1, count + 1)]
    publishes = [accepted(number) for number in range(1, count + 1)]

    def life(log: list[Event]) -> Life:
        edges = sorted({0, len(log), *(cut for cut in cuts if cut < len(log))})
        pieces = itertools.pairwise(edges)
        return ann(*([START, *log[a:b]] for a, b in pieces))

    assert {} == audit(publishes, [life(events)]).findings

    damaged = DAMAGES[kind](events, 1 + where % (count - 1))
    uncut = kind == "inverted"  # across a cut it would be a duplicate
    verdict = audit(publishes, [ann([START, *damaged]) if uncut else life(damaged)])
    assert kind in verdict.findings
