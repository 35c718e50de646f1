"""The auditor: logs in, verdict out. Pure.

It follows each client through its connections and keeps, for its own stream and for that of
everyone, where the client stands. From that come the findings:

    lost      accepted, the client was there to get it, and it neither came nor was announced
    silent    seqs were skipped (or the epoch changed) without a gap that says so
    inverted  on one connection a seq came that is not beyond the one before
    twin      one seq, id or number with two of the others: a duplicate that clients cannot see
    phantom   something came that was refused, never published, or for somebody else
    miscount  a gap whose number of missing notifications is not the length of its range

Duplicates with the same id are no finding: they are counted, and bounded by who asks. So are
publishes of unknown outcome, which may have arrived or not.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import attrs

from tests.ledger.records import (
    ALL,
    EVERYONE,
    NOWHERE,
    OWN,
    Connection,
    Ended,
    Established,
    Gap,
    Life,
    Outcome,
    Place,
    Publish,
    Receipt,
    places,
)

EXACT_REASONS = frozenset({"trimmed", "expired"})
"""Gaps that know exactly how many are missing."""

EPOCH = "epoch"
FAILOVER = "failover"

SHOWN = 20
"""Findings of one kind that are printed."""


@attrs.define(kw_only=True)
class Verdict:
    """What the logs show."""

    lost: list[str] = attrs.Factory(list)
    silent: list[str] = attrs.Factory(list)
    inverted: list[str] = attrs.Factory(list)
    twins: list[str] = attrs.Factory(list)
    phantoms: list[str] = attrs.Factory(list)
    miscounts: list[str] = attrs.Factory(list)
    outcomes: Counter[Outcome] = attrs.Factory(Counter)
    unknown_arrived: int = 0
    """Publishes of unknown outcome that somebody received."""
    receipts: int = 0
    duplicates: int = 0
    doubled: Counter[str] = attrs.Factory(Counter)
    """Duplicates, by client."""
    announced: Counter[str] = attrs.Factory(Counter)
    """Gaps by reason, as clients saw them."""
    missing: int = 0
    """How many notifications they said are missing."""

    @property
    def findings(self) -> dict[str, list[str]]:
        """What must not be, by kind; empty if all is well."""
        kinds = ("lost", "silent", "inverted", "twins", "phantoms", "miscounts")
        return {kind: found for kind in kinds if (found := getattr(self, kind))}

    @property
    def duplicate_share(self) -> float:
        """Which part of all receipts had come before to the same client."""
        return self.duplicates / self.receipts if self.receipts else 0.0

    def __str__(self) -> str:
        counts = {outcome.value: self.outcomes[outcome] for outcome in Outcome}
        lines = [
            f"published {counts}, of the unknown {self.unknown_arrived} arrived",
            f"{self.receipts} receipts, {self.duplicates} duplicates ({self.duplicate_share:.2%})",
            f"gaps {dict(self.announced)}",
        ]
        for kind, found in self.findings.items():
            lines.append(f"{kind}: {len(found)}")
            lines += [f"  {one}" for one in found[:SHOWN]]
        return "\n".join(lines)


def audit(publishes: Iterable[Publish], lives: Iterable[Life]) -> Verdict:
    """Judge the logs of one run that has come to rest."""
    verdict = Verdict()
    published = {one.number: one for one in publishes}
    verdict.outcomes.update(one.outcome for one in published.values())
    identities = _Identities(verdict.twins)
    for one in published.values():
        if one.outcome is Outcome.ACCEPTED:
            identities.accept(one)
    due: dict[str, list[Publish]] = defaultdict(list)
    for one in published.values():
        if one.outcome is Outcome.ACCEPTED:
            due[one.user].append(one)
    arrived: set[int] = set()
    for life in lives:
        chains = {OWN: _Chain(life, OWN, verdict), ALL: _Chain(life, ALL, verdict)}
        for connection in life.connections:
            _follow(connection, chains)
        for receipt in (event for event in life.events if isinstance(event, Receipt)):
            identities.receive(life, receipt)
            arrived.add(receipt.number)
            _expect(life, receipt, published, verdict)
        chains[OWN].settle(due[life.user])
        chains[ALL].settle(due[EVERYONE])
    verdict.unknown_arrived = sum(
        one.outcome is Outcome.UNKNOWN and one.number in arrived for one in published.values()
    )
    return verdict


def _expect(
    life: Life, receipt: Receipt, published: Mapping[int, Publish], verdict: Verdict
) -> None:
    """Whoever receives something must be the one it was published for."""
    publish = published.get(receipt.number)
    owner = EVERYONE if receipt.stream == ALL else life.user
    if publish is None or publish.user != owner:
        verdict.phantoms.append(f"{life.name} got {receipt}, published as {publish}")
    elif publish.outcome is Outcome.REFUSED:
        verdict.phantoms.append(f"{life.name} got {receipt}, refused as {publish}")


def _follow(connection: Connection, chains: Mapping[str, "_Chain"]) -> None:
    for chain in chains.values():
        chain.reconnect()
    for event in connection:
        match event:
            case Established():
                for stream, chain in chains.items():
                    chain.begin(places(event.position).get(stream, NOWHERE))
            case Receipt():
                chains[event.stream].receive(event)
            case Gap():
                chains[event.stream].announce(event)
            case Ended():
                pass


class _Chain:
    """One client in one stream."""

    def __init__(self, life: Life, stream: str, verdict: Verdict) -> None:
        self._life = life
        self._name = f"{life.name}/{stream}"
        self._verdict = verdict
        self._since: Place | None = None
        """From where on this client is owed what is accepted; None before its first message."""
        self._epoch = ""
        self._reached: int | None = None
        """Highest seq that came or was announced in this epoch; None: the next may be any."""
        self._seen: set[str] = set()
        self._announced: list[tuple[str, range]] = []
        self._renewed: float | None = None
        """When a change of the epoch was announced, the last time."""
        self._newest = 0
        """On this connection."""
        self._here: set[str] = set()
        """Ids that came on this connection."""

    def reconnect(self) -> None:
        self._newest = 0
        self._here = set()

    def begin(self, place: Place) -> None:
        """Take the position that a connection is served from."""
        if self._since is None:
            self._since = place
            self._reached = place.seq if place.epoch else None
        if not self._epoch:
            self._name_epoch(place.epoch)

    def receive(self, receipt: Receipt) -> None:
        place, verdict = receipt.place, self._verdict
        verdict.receipts += 1
        self._enter(place, receipt)
        if self._reached is not None and place.seq > self._reached + 1:
            verdict.silent.append(f"{self._name}: {self._reached} is followed by {receipt}")
        self._reached = max(self._reached or 0, place.seq)
        # On a connection that has asked for it, what is not acknowledged comes again.
        again = self._life.acks and receipt.attempt > 1 and receipt.id in self._here
        if place.seq <= self._newest and not again:
            verdict.inverted.append(f"{self._name}: {self._newest} is followed by {receipt}")
        self._newest = max(self._newest, place.seq)
        if receipt.id in self._seen:
            verdict.duplicates += 1
            verdict.doubled[self._life.name] += 1
        self._seen.add(receipt.id)
        self._here.add(receipt.id)

    def announce(self, gap: Gap) -> None:
        self._verdict.announced[gap.reason] += 1
        self._verdict.missing += gap.missing
        length = gap.last - gap.first + 1
        if gap.reason in EXACT_REASONS and gap.missing != length:
            self._verdict.miscounts.append(f"{self._name}: {gap}")
        if gap.reason == EPOCH:
            # What is retained of the new epoch follows, from wherever it begins.
            self._renewed = gap.at
            self._epoch, self._reached, self._newest = "", None, 0
            return
        if self._reached is not None and gap.first > self._reached + 1:
            self._verdict.silent.append(f"{self._name}: {self._reached} is followed by {gap}")
        # After a failover seqs begin again before where they were.
        self._reached = None if gap.reason == FAILOVER else max(self._reached or 0, gap.last)
        self._newest = 0 if gap.reason == FAILOVER else self._newest
        self._announced.append((self._epoch, range(gap.first, gap.last + 1)))

    def settle(self, accepted: Iterable[Publish]) -> None:
        """Look for what is owed and has not come."""
        for publish in accepted:
            if self._owed(publish) and not self._accounted(publish):
                self._verdict.lost.append(f"{self._name}: {publish}")

    def _enter(self, place: Place, receipt: Receipt) -> None:
        """Notice a change of the epoch."""
        if place.epoch == self._epoch:
            return
        if self._epoch:
            self._verdict.silent.append(f"{self._name}: epoch {self._epoch}, then {receipt}")
            self._reached, self._newest = None, 0
        self._name_epoch(place.epoch)

    def _name_epoch(self, epoch: str) -> None:
        """Learn the epoch; what was announced since the last one ended belongs to it."""
        self._epoch = epoch
        self._announced = [(one or epoch, covered) for one, covered in self._announced]

    def _owed(self, publish: Publish) -> bool:
        since = self._since or NOWHERE
        return publish.place.epoch != since.epoch or publish.place.seq > since.seq

    def _accounted(self, publish: Publish) -> bool:
        if publish.id in self._seen:
            return True
        epoch, seq = publish.place.epoch, publish.place.seq
        if self._renewed is not None and epoch != self._epoch:
            # With no word from the new epoch yet, only the time tells what was before it.
            return bool(self._epoch) or publish.ended < self._renewed
        return any(epoch == other and seq in covered for other, covered in self._announced)


class _Identities:
    """Number, id and place of a notification belong together, wherever it is seen.

    In a new epoch, what is retained may have another place.
    """

    def __init__(self, twins: list[str]) -> None:
        self._twins = twins
        self._known: dict[object, object] = {}

    def accept(self, publish: Publish) -> None:
        self._note(publish.number, publish.id, publish.user, publish.place, str(publish))

    def receive(self, life: Life, receipt: Receipt) -> None:
        owner = EVERYONE if receipt.stream == ALL else life.user
        where = f"{life.name}: {receipt}"
        self._note(receipt.number, receipt.id, owner, receipt.place, where)

    def _note(self, number: int, name: str, owner: str, place: Place, where: str) -> None:
        facts: dict[object, object] = {
            ("id of number", number): name,
            ("number of id", name): number,
            ("id at", owner, place): name,
            ("seq in", place.epoch, name): place.seq,
        }
        for question, answer in facts.items():
            known = self._known.setdefault(question, answer)
            if known != answer:
                self._twins.append(f"{where}, but before it was {known}")
                return
