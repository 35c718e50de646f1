"""Tells the ledger what clients were sent, have received, acknowledged and read.

Nobody waits for it, so it is told late and together: what a pong has proved within
`SOON_SECONDS`, what was only sent within `LATE_SECONDS`, in the hope that the pong comes meanwhile
and both go as one. All of it is cumulative, so only the latest counts, and a report that got lost
is made good by the next. What a client has *asked* for (to mark something as read, or to be told
that its ack has arrived) is answered, one way or the other.

A `Progress` outlives its connection until it has been reported. During an outage of Redis they
collect, up to `MAX_PENDING`; beyond that the oldest are dropped and counted. A lost report costs a
duplicate when the device comes back, never a loss.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Final, NoReturn, Protocol

import attrs
import trio

from trioserver import ledger, scripting
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.ledger import Command, Rules
from trioserver.pauses import Pauses
from trioserver.redis_link import RedisLink, Reply
from trioserver.tally import Tally

SOON_SECONDS: Final = 0.03
LATE_SECONDS: Final = 4.0

MAX_PENDING: Final = 20_000
"""Reports that wait; a kilobyte each."""

MAX_ACKED_IDS: Final = 64
"""Acks by id that wait on one connection; of more the oldest are forgotten, and come again."""

BATCH: Final = 500

INFINITY: Final = float("inf")

MARK_SECONDS: Final = 3.0
"""For how long it is tried to mark something as read, while its client waits."""

_FOR_GOOD: Final = ("BADREQUEST", "ERR", "WRONGTYPE")
"""Codes of refusals that do not pass by themselves..."""

_FOR_NOW: Final = ("-READONLY", "-OOM", "-LOADING", "-MASTERDOWN", "-NOREPLICAS", "-MISCONF")
"""... unless a script has met one of these: an older Redis says ERR, and then what it was."""

PAUSE_FIRST: Final = 0.1
PAUSE_CAP: Final = 2.0


class Urgency(IntEnum):
    """Where a progress waits to be reported."""

    NONE = 0
    LATE = 1
    SOON = 2


class Progress:
    """What one client was sent, and what is known to have arrived. Points are newest ones.

    Attributes:
        sent: Of the user's own stream; empty if nothing was.
        received: What a pong has proved.
        everyone_sent: The same for the stream of everyone...
        everyone_received: ...
        acked_seq: The newest that the client has acknowledged, as far as is known here.
        acked_ids: Those it has acknowledged by their ids since the last report.
        pinged: Newest of its own stream when the ping went out whose pong is awaited...
        everyone_pinged: ... and of everyone's.
        pinged_at: When that was; on the pump's clock, as what follows.
        redeliver_at: When what is not acknowledged goes out again; infinity for never.
        redeliveries: How often in a row that has happened.
        rewinding: Whether the next read shall begin where the acknowledged ends.
        urgency: Written by `Receipts` only.
    """

    __slots__ = (
        "acked_ids",
        "acked_seq",
        "device",
        "everyone_pinged",
        "everyone_received",
        "everyone_sent",
        "pinged",
        "pinged_at",
        "received",
        "redeliver_at",
        "redeliveries",
        "rewinding",
        "sent",
        "urgency",
        "user",
    )

    def __init__(self, user: str, device: str) -> None:
        self.user = user
        self.device = device
        self.sent = self.received = self.everyone_sent = self.everyone_received = ""
        self.acked_seq = 0
        self.acked_ids: list[str] = []
        self.pinged = self.everyone_pinged = ""
        self.pinged_at = -INFINITY
        self.redeliver_at = INFINITY
        self.redeliveries = 0
        self.rewinding = False
        self.urgency = Urgency.NONE

    def new_epoch(self) -> None:
        """Forget what was acknowledged: these numbers will be given to others."""
        self.acked_seq = 0
        self.acked_ids = []

    @property
    def unconfirmed(self) -> bool:
        """Whether something was sent that nothing proves received."""
        return self.sent != self.received or self.everyone_sent != self.everyone_received

    def commands(self, acked_ids: list[str], rules: Rules) -> list[Command]:
        """Return what tells the ledger all of it, and of these acks by id."""
        first, *others = acked_ids or [""]
        commands = [
            ledger.report(
                self.user,
                device=self.device,
                sent=self.sent,
                received=self.received,
                acked_seq=self.acked_seq,
                acked_id=first,
                all_point=self.everyone_received,
                rules=rules,
            )
        ]
        commands.extend(
            ledger.report(self.user, device=self.device, acked_id=one, rules=rules)
            for one in others
        )
        return commands


class Asker(Protocol):
    """Who gets an answer. Must not raise."""

    def acked(self, seq: int, ref: str | None) -> None:
        """All up to ``seq`` is acknowledged now."""

    def marked(self, unread: int, ref: str | None) -> None:
        """It is marked as read; so many are unread now."""

    def untold(self, ref: str | None) -> None:
        """It could not be told to the ledger."""


@attrs.define(eq=False, kw_only=True)
class _Mark:
    """A client's wish to have something marked as read."""

    commands: list[Command]
    """One."""
    asker: Asker
    ref: str | None
    asked_at: float = attrs.field(factory=trio.current_time)

    def told(self, reply: Reply) -> None:
        self.asker.marked(ledger.marked(reply)[0], self.ref)

    def missed(self, receipts: "Receipts", *, final: bool) -> None:
        if final or trio.current_time() - self.asked_at >= MARK_SECONDS:
            self.asker.untold(self.ref)
        else:
            receipts.retry(self)


@attrs.define(eq=False, kw_only=True)
class _Report:
    """A progress on its way to the ledger."""

    progress: Progress
    acked_ids: list[str]
    askers: list[tuple[Asker, str | None]]
    """Who wants to hear that its ack has arrived."""
    commands: list[Command]

    def told(self, reply: Reply) -> None:
        for asker, ref in self.askers:
            asker.acked(ledger.acked(reply), ref)

    def missed(self, receipts: "Receipts", *, final: bool) -> None:
        for asker, ref in self.askers:
            asker.untold(ref)
        if not final:
            self.progress.acked_ids[:0] = self.acked_ids
            receipts.late(self.progress)


class Receipts:
    """One worker's reports.

    Args:
        rules: Of the ledger.
        tally: Where dropped reports are counted.
        log_bug: Called with what was being done, and the bug.
        log_trouble: Called with what Redis said; limits its own rate.
    """

    def __init__(
        self,
        rules: Rules,
        tally: Tally,
        log_bug: Callable[[str, BaseException], None],
        log_trouble: Callable[[str], None],
    ) -> None:
        self._rules = rules
        self._tally = tally
        self._log_bug = log_bug
        self._log_trouble = log_trouble
        self._soon: dict[Progress, list[tuple[Asker, str | None]]] = {}
        """To be reported next, and who wants to hear that its ack has arrived."""
        self._late: dict[Progress, None] = {}
        """A set that keeps its order."""
        self._marks: list[_Mark] = []
        self._soon_at = self._late_at = INFINITY
        self._news = trio.Event()
        """Set when one of these two moments has come nearer."""
        self._away = False
        """Whether the latest batch was not answered."""
        self._pauses = Pauses(PAUSE_FIRST, PAUSE_CAP)

    def late(self, progress: Progress) -> None:
        """Report ``progress`` within `LATE_SECONDS`. What changes until then is in it."""
        if progress.urgency:
            return
        progress.urgency = Urgency.LATE
        self._make_room()
        if not self._late:
            self._late_at = trio.current_time() + LATE_SECONDS
            self._news.set()
        self._late[progress] = None

    def soon(self, progress: Progress) -> None:
        """Report ``progress`` within `SOON_SECONDS`."""
        if progress.urgency is Urgency.SOON:
            return
        if progress.urgency:
            del self._late[progress]
        else:
            self._make_room()
        progress.urgency = Urgency.SOON
        self._soon[progress] = []
        self._hurry()

    def acked(
        self, progress: Progress, asker: Asker, seq: int, which: str, ref: str | None
    ) -> None:
        """Report that all up to ``seq``, or up to the notification ``which``, was handled.

        Args:
            progress: Of the connection that says so.
            asker: Hears of it.
            seq: 0 if it was named by its id.
            which: Its id, or empty.
            ref: Of the client's message, if it has one.
        """
        progress.acked_seq = max(progress.acked_seq, seq)
        if which:
            progress.acked_ids.append(which)
            del progress.acked_ids[:-MAX_ACKED_IDS]
        self.soon(progress)
        self._soon[progress].append((asker, ref))

    def mark(self, command: Command, asker: Asker, ref: str | None) -> None:
        """Run ``command``, which marks notifications as read, and answer ``asker``."""
        self.retry(_Mark(commands=[command], asker=asker, ref=ref))

    def retry(self, mark: _Mark) -> None:
        """Do it with the next round."""
        self._marks.append(mark)
        self._hurry()

    async def run(self, link: RedisLink) -> NoReturn:
        """Report until cancelled; what is unreported then is kept for another `run`."""
        while True:
            self._news = trio.Event()
            with trio.move_on_at(min(self._soon_at, self._late_at)):
                await self._news.wait()
            now = trio.current_time()
            if now >= min(self._soon_at, self._late_at) and not await self._flush(link, now):
                await trio.sleep(self._pauses.take())

    async def finish(self, link: RedisLink) -> None:
        """Report everything at once, as far as Redis takes it; for the end of a worker."""
        await self._flush(link, INFINITY)

    def _hurry(self) -> None:
        if self._soon_at == INFINITY:
            self._soon_at = trio.current_time() + SOON_SECONDS
            self._news.set()

    def _make_room(self) -> None:
        while len(self._late) + len(self._soon) >= MAX_PENDING:
            if self._late:
                oldest = next(iter(self._late))
                del self._late[oldest]
            else:
                oldest = next(iter(self._soon))
                for asker, ref in self._soon.pop(oldest):
                    asker.untold(ref)
            oldest.urgency = Urgency.NONE
            self._tally.receipts_dropped += 1

    async def _flush(self, link: RedisLink, now: float) -> bool:
        """Tell what is due; return whether Redis took it."""
        soon, self._soon, self._soon_at = self._soon, {}, INFINITY
        if now >= self._late_at:
            soon.update((progress, []) for progress in self._late)
            self._late, self._late_at = {}, INFINITY
        work: list[_Mark | _Report] = []
        for progress, askers in soon.items():
            progress.urgency = Urgency.NONE
            ids, progress.acked_ids = progress.acked_ids, []
            commands = progress.commands(ids, self._rules)
            work.append(_Report(progress=progress, acked_ids=ids, askers=askers, commands=commands))
        marks, self._marks = self._marks, []
        work.extend(marks)
        tried, well = 0, True
        try:
            while tried < len(work):
                batch = work[tried : tried + BATCH]
                tried += len(batch)
                well &= await self._tell(link, batch)
                if self._away:
                    return False
        finally:
            # The first that fails speaks for all: nobody waits for a silent Redis again and again.
            for one in work[tried:]:
                one.missed(self, final=False)
        if well:
            self._pauses.reset()
        return well

    async def _tell(self, link: RedisLink, work: list[_Mark | _Report]) -> bool:
        commands = [command for one in work for command in one.commands]
        replies: list[Reply | RedisRefused] | None = None
        try:
            replies = await scripting.run(link, commands)
        except RedisUnavailable as problem:
            self._log_trouble(str(problem))
        finally:
            if replies is None:
                # Also if we are being stopped: nothing is forgotten before it is told.
                for one in work:
                    one.missed(self, final=False)
        self._away = replies is None
        if replies is None:
            return False
        refusals: list[str] = []
        at = 0
        for one in work:
            mine = replies[at : at + len(one.commands)]
            at += len(one.commands)
            if refusal := self._settle(one, mine):
                refusals.append(refusal)
        if refusals:
            self._log_trouble(refusals[0])
        return all(_is_final(one) for one in refusals)

    def _settle(self, one: _Mark | _Report, replies: list[Reply | RedisRefused]) -> str:
        """Take note of how it went; return what Redis said if it refused."""
        refusal = next((str(reply) for reply in replies if isinstance(reply, RedisRefused)), "")
        last = replies[-1]
        try:
            if refusal or isinstance(last, RedisRefused):
                one.missed(self, final=_is_final(refusal))
            else:
                one.told(last)
        except Exception as bug:  # noqa: BLE001 - the others are not to blame
            self._log_bug("reporting to the ledger", bug)
        return refusal


def _is_final(refusal: str) -> bool:
    """Return whether it is no use to try again."""
    return refusal.startswith(_FOR_GOOD) and not any(code in refusal for code in _FOR_NOW)
