"""The ledger's scripts on a real Redis under any history at all, against a model of lists."""

from collections.abc import Callable, Iterator
from typing import Final

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.trioserver.ledger_comparison import DAY, home
from tests.trioserver.ledger_promises import PER_SEQ, Note, Owner, seq_of
from tests.trioserver.ledger_twins import DEVICES, FAR, OWNERS, USERS, Reader, Stage, Twins

# Much for few: what is promised is about what meets.
SOME_USER: Final = st.sampled_from([*USERS[:1] * 3, *USERS[1:2] * 2, USERS[2]])
SOME_OWNER: Final = st.sampled_from([*USERS[:1] * 3, *USERS[1:2] * 2, USERS[2], None, None])
SOME_DEVICE: Final = st.sampled_from(DEVICES)
SOME_ROOM: Final = st.sampled_from([1, 2, 3, 3, 4, 5, 6, 100])
RARELY: Final = st.sampled_from([False, False, False, True])
SOME_RATE: Final = st.sampled_from([0, 0, 0, 1, 2, 3, 1000])

ACCIDENTS: Final[dict[str, Callable[[Twins, Owner], None]]] = {
    "all have expired long ago": lambda twins, owner: twins.vanish(owner, evicted=False),
    "eviction": lambda twins, owner: twins.vanish(owner, evicted=True),
    "lost meta": lambda twins, owner: twins.lose(owner, inbox=False),
    "lost user": lambda twins, owner: twins.lose(owner, inbox=True),
    "FLUSHALL": lambda twins, _: twins.flush(),
    "replication ends": lambda twins, _: twins.replicate(),
    "failover": lambda twins, _: twins.fail_over(),
    "kill": lambda twins, _: twins.kill(),
    "clock goes back": lambda twins, owner: twins.turn_clock_back(owner),
    "holidays": lambda twins, owner: twins.stay_away(owner or USERS[0]),
    "crowd": lambda twins, owner: twins.crowd(owner or USERS[0]),
    "flood": lambda twins, owner: twins.flood(owner or USERS[0]),
}


class AnyHistory(RuleBasedStateMachine):
    """Publishers, devices, the scheduler and accidents, in any order."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.twins = Twins(stage)

    @initialize(count=st.integers(0, 6), device=SOME_DEVICE)
    def begin(self, *, count: int, device: str) -> None:
        """Begin in the middle of things."""
        for number in range(count):
            owner = [*USERS[:2], USERS[0], None][number % 4]
            self.twins.publish(self.twins.note(owner))
            if number == count // 2:
                self.visit(user=USERS[0], device=device, received=True)

    # --- publishers ------------------------------------------------------------------------------

    @rule(
        owner=SOME_OWNER,
        payload=st.sampled_from([b"1", b'{"a":"\xc3\xbc"}', b'"' + b"x" * 300 + b'"']),
        kind=st.sampled_from(["notification", "order.paid"]),
        ttl=st.sampled_from([DAY, 7 * DAY, 30 * DAY]),
        trace=st.sampled_from([None, f"00-{'a' * 32}-{'b' * 16}-01"]),
        collapse=st.sampled_from([None, "k", "k", "ü:{}"]),
        repeat=st.sampled_from([None, None, None, "i", "ü:{}"]),
        later=st.sampled_from([0, 0, 0, 0, FAR]),
        fallback=st.sampled_from([0, 0, FAR]),
        room=SOME_ROOM,
        rate=SOME_RATE,
        priority=RARELY,
    )
    def publish(
        self,
        *,
        owner: Owner,
        payload: bytes,
        kind: str,
        ttl: int,
        trace: str | None,
        collapse: str | None,
        repeat: str | None,
        later: int,
        fallback: int,
        room: int,
        rate: int,
        priority: bool,
    ) -> None:
        """Publish something, perhaps once more, perhaps for later, perhaps too much."""
        note = self.twins.note(
            owner,
            payload=payload,
            type=kind,
            ttl=ttl,
            traceparent=trace,
            collapse_key=collapse,
            fallback_after=fallback,
            later=later,
        )
        self.twins.publish(note, repeat=repeat, room=room, rate=rate, priority=priority)

    @rule(
        owner=SOME_OWNER,
        count=st.integers(2, 5),
        fallback=st.sampled_from([0, FAR]),
        room=SOME_ROOM,
        rate=SOME_RATE,
    )
    def publish_many(
        self, *, owner: Owner, count: int, fallback: int, room: int, rate: int
    ) -> None:
        """Publish more than there may be room for, or than may be published in a minute."""
        for _ in range(count):
            note = self.twins.note(owner, fallback_after=fallback)
            self.twins.publish(note, room=room, rate=rate)

    @precondition(lambda self: self.twins.world.notes)
    @rule(data=st.data())
    def publish_again(self, *, data: st.DataObject) -> None:
        """The outcome of the first attempt was unknown, so the same is published again."""
        self.twins.publish_again(self.draw_note(data))

    @precondition(lambda self: self.twins.world.notes)
    @rule(data=st.data(), stranger=RARELY)
    def cancel(self, *, data: st.DataObject, stranger: bool) -> None:
        """Withdraw something, in whatever state it is; nobody else's can be withdrawn."""
        note = self.draw_note(data)
        owner = note.owner
        if stranger and owner in USERS[:2]:
            owner = USERS[1] if owner == USERS[0] else USERS[0]
        self.twins.withdraw(note, owner)

    # --- devices ---------------------------------------------------------------------------------

    @rule(
        owner=SOME_OWNER,
        device=SOME_DEVICE,
        ack=st.booleans(),
        head=st.booleans(),
        where=st.sampled_from(
            ["", "", "", "seen", "seen", "latest", "future", "odd", "epoch", "garbage"]
        ),
        which=st.integers(0, 50),
        limit=st.integers(1, 5),
        size=st.sampled_from([1, 1000, 10_000]),
        pages=st.integers(1, 4),
        usual=st.booleans(),
    )
    def connect(
        self,
        *,
        owner: Owner,
        device: str,
        ack: bool,
        head: bool,
        where: str,
        which: int,
        limit: int,
        size: int,
        pages: int,
        usual: bool,
    ) -> None:
        """A device comes from wherever it thinks it is and gets what it missed, page by page."""
        reader = Reader(
            owner=owner,
            device=device,
            point=self.some_point(owner, where, which),
            garbage=where == "garbage",
            ack=ack,
            head=head,
            limit=limit,
            size=size,
            pages=pages,
            usual=usual,
        )
        self.twins.come(reader)

    @rule(
        user=SOME_USER,
        device=SOME_DEVICE,
        ack=st.booleans(),
        limit=st.integers(1, 5),
        pages=st.integers(1, 3),
        received=st.booleans(),
        acked=st.integers(0, 3),
    )
    def visit(
        self,
        *,
        user: str,
        device: str,
        received: bool,
        ack: bool = False,
        limit: int = 3,
        pages: int = 3,
        acked: int = 0,
    ) -> None:
        """A device comes back and gets some of what it missed, which is reported as it should."""
        reader = Reader(owner=user, device=device, ack=ack, limit=limit, pages=pages)
        reached = self.twins.come(reader)
        point = self.twins.history(user).point(reached)
        self.twins.report(
            user,
            device,
            sent=point,
            received=point if received else "",
            acked_seq=max(0, seq_of(reached) + 1 - acked) if acked else 0,
        )

    @rule(
        user=SOME_USER,
        device=SOME_DEVICE,
        collapse=st.sampled_from([None, "k"]),
        count=st.integers(1, 3),
        received=st.booleans(),
    )
    def stay(
        self, *, user: str, device: str, collapse: str | None, count: int, received: bool
    ) -> None:
        """A device that is connected is sent what is published at once; then it comes anew."""
        before = self.twins.seen[user][-1:]
        for _ in range(count):
            self.twins.publish(self.twins.note(user, collapse_key=collapse))
            point = self.twins.seen[user][-1]
            self.twins.report(user, device, sent=point, received=point if received else "")
        for point in before:
            self.twins.come(Reader(owner=user, device=device, point=point))

    @rule(
        user=SOME_USER,
        device=SOME_DEVICE,
        sent=st.integers(-3, 3),
        received=st.integers(-3, 3),
        behind=st.integers(-3, 3),
        by_id=st.booleans(),
        everyone=st.booleans(),
        data=st.data(),
    )
    def report(
        self,
        *,
        user: str,
        device: str,
        sent: int,
        received: int,
        behind: int,
        by_id: bool,
        everyone: bool,
        data: st.DataObject,
    ) -> None:
        """A worker says how far a device is, or what it believes, or what a client claims."""
        points, all_points = self.twins.seen[user], self.twins.seen[None]
        seq = self.twins.history(user).seq
        self.twins.report(
            user,
            device,
            sent=points[-sent] if 0 < sent <= len(points) else "",
            received=points[-received] if 0 < received <= len(points) else "",
            acked_seq=max(0, seq + 1 - behind) if behind > 0 else 0,
            acked=self.draw_note(data) if by_id and self.twins.world.notes else None,
            everyone=all_points[-1] if everyone and all_points else "",
        )

    @precondition(lambda self: self.twins.world.notes)
    @rule(
        user=SOME_USER,
        device=SOME_DEVICE,
        count=st.integers(0, 3),
        beyond=st.integers(-4, 3),
        by_id=st.booleans(),
        data=st.data(),
    )
    def mark(
        self,
        *,
        user: str,
        device: str,
        count: int,
        beyond: int,
        by_id: bool,
        data: st.DataObject,
    ) -> None:
        """Somebody has read some, or all up to one; others' notifications stay as they are."""
        seq = self.twins.history(user).seq
        self.twins.read(
            user,
            device,
            notes=[self.draw_note(data) for _ in range(count)],
            up_to=max(0, seq + beyond) if beyond > -4 else 0,
            last=self.draw_note(data) if by_id else None,
        )

    @rule()
    def listen(self) -> None:
        """Workers come or go: somebody hears what is published, or nobody does."""
        self.twins.listen()

    # --- time and accidents ----------------------------------------------------------------------

    @rule(user=SOME_USER, seconds=st.sampled_from([1, 20, 30, 60]))
    def rest(self, *, user: str, seconds: int) -> None:
        """For a while nobody publishes to a user."""
        self.twins.rest(user, seconds)

    @precondition(lambda self: self.unexpired())
    @rule(data=st.data(), count=st.integers(1, 3))
    def expire(self, *, data: st.DataObject, count: int) -> None:
        """The time of a few notifications is over; nobody has noticed yet."""
        before = self.twins.caller.now()
        for _ in range(min(count, len(self.unexpired()))):
            self.twins.age(data.draw(st.sampled_from(self.unexpired()), label="note"))
        self.twins.compare(before)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), too_late=RARELY)
    def fall_due(self, *, data: st.DataObject, too_late: bool) -> None:
        """The moment comes for which something was scheduled."""
        note = data.draw(st.sampled_from(self.waiting()), label="note")
        self.twins.fall_due(note, too_late=too_late)

    @precondition(lambda self: self.busy())
    @rule(data=st.data(), limit=st.sampled_from([1, 2, 50]), room=SOME_ROOM)
    def settle(self, *, data: st.DataObject, limit: int, room: int) -> None:
        """A scheduler does what is due."""
        where = data.draw(st.sampled_from(self.busy()), label="partition")
        self.twins.settle(where, limit=limit, room=room)

    @rule(
        what=st.sampled_from(list(ACCIDENTS)),
        owner=SOME_OWNER,
        count=st.integers(0, 4),
        room=SOME_ROOM,
        which=st.integers(-3, -1),
        late=st.booleans(),
    )
    def accident(
        self, *, what: str, owner: Owner, count: int, room: int, which: int, late: bool
    ) -> None:
        """Something happens to Redis that nobody has asked for, and life goes on."""
        twins = self.twins
        if what == "failover" and twins.copy is None:
            twins.replicate()
            twins.publish(twins.note(owner), room=room)
        points = twins.seen[owner][which:][:1]
        notes = [note for note in twins.world.notes.values() if note.owner == owner][which:][:1]
        ACCIDENTS[what](twins, owner)
        for _ in range(count):
            twins.publish(twins.note(owner), room=room)
        for point in points:
            twins.come(Reader(owner=owner, point=point))
        for note in notes if late else []:
            if note.id in twins.world.notes:
                twins.withdraw(twins.world.notes[note.id], owner)

    # --- choices ---------------------------------------------------------------------------------

    def draw_note(self, data: st.DataObject) -> Note:
        """Return any notification, preferably one that is there."""
        notes = list(self.twins.world.notes.values())
        notes += [note for note in notes if note.seq and not note.gone] * 3
        return data.draw(st.sampled_from(notes), label="note")

    def some_point(self, owner: Owner, where: str, which: int) -> str:
        """Return a point that a reader may come with."""
        seen, history = self.twins.seen[owner], self.twins.history(owner)
        milliseconds, number = history.last
        epoch = history.epoch or "zzz"
        points = {
            "seen": seen[which % len(seen)] if seen else "",
            "latest": seen[-1] if seen else "",
            "future": f"{epoch}.{milliseconds + 5000}-{number + which * PER_SEQ}",
            "odd": f"{epoch}.{max(0, milliseconds - which)}-{max(0, number + 20 - which) * 99}",
            "epoch": f"other.{milliseconds}-{number}",
        }
        return points.get(where, "")

    def unexpired(self) -> list[Note]:
        """Return those that are there and whose time is not over."""
        boxes = [history.box for history in self.twins.world.histories.values()]
        notes = [entry for box in boxes for entry in box if isinstance(entry, Note)]
        return [note for note in notes if note.expires > self.twins.soon]

    def waiting(self) -> list[Note]:
        """Return those for which something is to be done later."""
        notes = self.twins.world.notes.values()
        return [n for n in notes if max(n.deliver_at, n.fallback_at) > self.twins.soon]

    def busy(self) -> list[str]:
        """Return the partitions where something is due."""
        homes = sorted({home(owner) for owner in OWNERS})
        soon = self.twins.soon
        return [one for one in homes if any(at < soon for at in self.twins.schedule(one).values())]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One Redis for all runs."""
    stage = Stage(tmp_path_factory.mktemp("redis"))
    yield stage
    stage.end()


FRESH: Final = 10
"""Runs of Hypothesis without variations of earlier ones: after these, five of six repeat steps of
the one before, and here new histories find more than varied ones."""


def explore(stage: Stage, runs: int, steps: int, *, anew: bool) -> None:
    """Live through many histories.

    Args:
        stage: Where.
        runs: How many.
        steps: Of each.
        anew: Whether they are others each time; else a push would fail for what it has not changed.
    """
    profile = settings(
        max_examples=FRESH,
        stateful_step_count=steps,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        database=DirectoryBasedExampleDatabase(".hypothesis/examples") if anew else None,
        # No explanations: they trace each line, and faulthandler's dump does not survive that.
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    def machine() -> AnyHistory:
        return AnyHistory(stage)

    for number in range(runs // FRESH):
        # Any callable does; only its type says otherwise.
        factory = machine if anew else seed(number)(machine)
        run_state_machine_as_test(factory, settings=profile)  # type: ignore[arg-type]


@pytest.mark.timeout(300)  # shrinking a failure takes longer than success
def test_any_history(stage: Stage) -> None:
    """Whatever happens in whichever order, Redis and the model agree on every promise."""
    explore(stage, 100, 30, anew=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("batch", range(50))
def test_long_histories(stage: Stage, batch: int) -> None:
    """The same, for longer: 500 histories of 50 steps."""
    explore(stage, FRESH, 50, anew=True)
