"""One worker's part of who is there: enters its connections under their topics, and answers.

Entering and leaving are synchronous and cost nothing but a place in a dictionary; what came within
`GATHER_SECONDS` goes out as one pipeline, all of one topic as one command. One pipeline at a time,
so what is said of a connection keeps its order. Nobody waits for it.

Entries are written under the worker's life (`trioserver.presence`, `trioserver.fleet`). When that
has changed, because a lease was lost, Redis has lost its memory or a link was cut, all are written
anew, in portions. So they are if a pipeline got no answer: to repeat it is harmless, but it may
have its effect later than what is said after it. Under another life it does not matter then.

Who comes back at once has never been away for those who are told of comings and goings. So goings
from announced topics wait for `LEAVE_SECONDS`, and at the end of a worker its entries under them
are left to the others, as those of the dead are (`trioserver.presence_sweeper`).
"""

import random
from collections.abc import Callable, Iterable
from itertools import islice
from time import time
from typing import Final

import attrs
import msgspec
import trio

from trioserver import fleet, presence
from trioserver.desk import Asking, Member
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.fleet import Lives
from trioserver.ledger import Command
from trioserver.messages import Error, Presence
from trioserver.pauses import Pauses
from trioserver.presence_page import look, run
from trioserver.presence_sweeper import Sweeper
from trioserver.redis_link import RedisLink, Reply
from trioserver.topics import Patterns

LEAVE_SECONDS: Final = 2.0
"""After so long a going from an announced topic is said: who comes back meanwhile has not gone."""

GATHER_SECONDS: Final = 0.02
"""How long comings and goings are gathered: reaching Redis costs 80 us, however many go."""

BATCH: Final = 500
"""Comings in one pipeline, and as many goings: three milliseconds of Redis each."""

SPREAD_SECONDS: Final = 1.5
"""Within which the workers begin to enter everybody anew."""

SPARE_LEAVES: Final = 1000
"""Goings that may wait beside twice as many as there are entries."""

ANSWERED: Final = 16
"""Different questions that are answered at the same time."""

MOST_WAITING: Final = 20_000
"""Who may wait for an answer."""

ANSWER_SECONDS: Final = 3.0
"""From the question; after that it is not known."""

MOST_EARLIER: Final = 4
"""Older entries that are remembered of a connection, one for each life that was given up before it
was known what became of the entry. Any more are left to the sweeper."""

ANSWERS_PER_TURN: Final = 32
"""Answers between two checkpoints."""

PAUSE_FIRST: Final = 0.1
PAUSE_CAP: Final = 2.0
RETRY_SECONDS: Final = 1.0

INFINITY: Final = float("inf")


Question = tuple[str, str | None]
"""A topic, and behind which entry to begin."""


@attrs.define(eq=False)
class _Asked:
    """Who waits for the same answer."""

    due: float
    """When the first of them is to have it, by Trio's clock."""
    waiters: list[tuple[Asking, str | None]] = attrs.field(factory=list)


class _Room:
    """One topic, as far as this worker has somebody there."""

    __slots__ = ("channel", "name", "stays")

    def __init__(self, name: str, channel: str) -> None:
        self.name = name
        self.channel = channel
        """Where comings and goings are told; empty if they are not."""
        self.stays: dict[str, _Stay] = {}
        """By connection."""


class _Stay:
    """One connection under one topic, from its coming until Redis has no entry of it."""

    __slots__ = ("connection_id", "life", "room", "wanted", "was", "what", "who")

    def __init__(self, room: _Room, member: Member, user: str) -> None:
        self.room = room
        self.who = presence.who(user)
        self.connection_id = member.connection_id
        self.what = presence.about(member.device, member.caller.client_type, int(time()))
        self.wanted = True
        """Whether it is to be in Redis."""
        self.life = ""
        """Under which it may be in Redis; empty if it was never written."""
        self.was: tuple[str, ...] = ()
        """Older entries that this one stands for, and that may still be there."""

    def entry(self) -> str:
        return presence.entry(self.who, self.life, self.connection_id, self.what)

    def write(self, life: str) -> list[tuple[str, str]]:
        """Return the entry under this life, with each that it stands for."""
        if self.life and self.life != life:
            self.was = (*self.was, self.entry())[-MOST_EARLIER:]
        self.life = life
        return [(self.entry(), one) for one in self.was or ("",)]

    def remains(self) -> tuple[str, ...]:
        """Return what there may be of it in Redis."""
        return (self.entry(), *self.was)

    def is_behind(self, life: str) -> bool:
        """Return whether there may be anything of it under another life."""
        return bool(self.was) or self.life not in {"", life}


@attrs.frozen
class _Step:
    """A command, and whom it is about."""

    stays: list[_Stay]
    comes: bool
    command: Command


class Attendance:
    """Who of this worker is subscribed to what, as the fleet is told. A `registry.Watcher`.

    Wiring: ``registry.watch(attendance)`` before `registry.run`.

    Args:
        announced: Topics whose subscribers are told of comings and goings.
        prefix: Put before the channel's name, as before every other.
        give_up: Called to have the worker go on under another life (``registry.link_lost``).
        log_bug: Called with what was being done, and the bug.
        log_trouble: Called with what is wrong; limits its own rate.
    """

    def __init__(
        self,
        *,
        announced: Patterns,
        prefix: str = "",
        give_up: Callable[[], object],
        log_bug: Callable[[str, BaseException], None],
        log_trouble: Callable[[str], None],
    ) -> None:
        self._sweeper = Sweeper(announced=announced, prefix=prefix, log_trouble=log_trouble)
        self._give_up = give_up
        self._log_bug = log_bug
        self._log_trouble = log_trouble
        self._rooms: dict[str, _Room] = {}
        self._wanted = 0
        """How many stays are."""
        self._coming: dict[_Stay, None] = {}
        """To be written."""
        self._again: dict[_Stay, None] = {}
        """To be written once more, with less haste."""
        self._again_at = 0.0
        self._going: dict[_Stay, None] = {}
        """To be removed."""
        self._later: dict[_Stay, float] = {}
        """To be removed, and when; the earliest first."""
        self._stuck: dict[_Stay, None] = {}
        """Those of whom Redis did not want to hear; they wait for the next renewal."""
        self._refresh_at = INFINITY
        self._life = ""
        self._living: frozenset[str] = frozenset()
        self._holding = False
        """Whether entries may be written: the life has a lease."""
        self._behind = False
        """Whether there may be entries of ours under an earlier life."""
        self._asked: dict[Question, _Asked] = {}
        """The oldest first."""
        self._waiting = 0
        self._finished = False
        self._news = trio.Event()
        self._question = trio.Event()
        self._rng = random.Random()  # noqa: S311 - spreads load, guards nothing

    def enter(self, member: Member, topic: str) -> None:
        """Take note that a connection has subscribed to a topic; synchronous, idempotent."""
        if member.user is None or self._finished:
            return
        room = self._rooms.get(topic)
        if room is None:
            room = self._rooms[topic] = _Room(topic, self._sweeper.channel(topic))
            self._sweeper.came(topic, announced=bool(room.channel))
        stay = room.stays.get(member.connection_id)
        if stay is None:
            stay = room.stays[member.connection_id] = _Stay(room, member, member.user)
        elif stay.wanted:
            return
        else:
            stay.wanted = True
            self._unqueue(stay)
        self._wanted += 1
        # Also who has only just left: his removal may be under way.
        self._coming[stay] = None
        self._news.set()

    def leave(self, member: Member, topic: str) -> None:
        """Take note that it has not any more; synchronous, idempotent."""
        room = self._rooms.get(topic)
        stay = room.stays.get(member.connection_id) if room is not None else None
        if room is None or stay is None or not stay.wanted:
            return
        stay.wanted = False
        self._wanted -= 1
        self._unqueue(stay)
        if not stay.life:
            self._forget(stay)
            return
        if room.channel:
            self._later[stay] = trio.current_time() + LEAVE_SECONDS
        else:
            self._going[stay] = None
        if not self._holding or self._stuck:
            self._bound()
        self._news.set()

    def ask(self, waiter: Asking, topic: str, after: str | None, ref: str | None) -> None:
        """Have ``waiter`` told who is there; synchronous.

        Answered exactly once, within `ANSWER_SECONDS` however Redis is.

        Args:
            waiter: Gets the answer; within this call only if too many are waiting.
            topic: Which.
            after: ``next`` of the page before; None for the first. Garbage is the first page.
            ref: Of the client's message; goes into the answer.
        """
        if self._finished or self._waiting >= MOST_WAITING:
            self._tell(waiter, _unavailable(), ref)
            return
        self._waiting += 1
        asked = self._asked.get((topic, after))
        if asked is None:
            asked = self._asked[topic, after] = _Asked(trio.current_time() + ANSWER_SECONDS)
        asked.waiters.append((waiter, ref))
        self._question.set()

    def renewed(self, life: str, lives: Lives, *, changed: bool) -> None:
        """See `registry.Watcher`."""
        now = trio.current_time()
        before, self._living = self._living, lives.living
        anew = self._life not in {"", life}
        self._sweeper.see(life, lives, anew=anew)
        self._life = life
        if anew:
            self._behind = True
            self._write_all_again(now + self._rng.uniform(0.0, SPREAD_SECONDS))
        elif now >= self._refresh_at:
            self._write_all_again(now)
        if self._refresh_at == INFINITY:
            self._refresh_at = now + fleet.REFRESH_SECONDS * self._rng.uniform(0.5, 1.0)
        self._holding = True
        for stay in self._stuck:
            (self._coming if stay.wanted else self._going)[stay] = None
        self._stuck = {}
        if changed and not before <= lives.living:
            announced = [name for name, room in self._rooms.items() if room.channel]
            others = [name for name, room in self._rooms.items() if not room.channel]
            self._sweeper.over(announced, others)
        self._sweeper.resume()
        self._news.set()

    def lost(self) -> None:
        """See `registry.Watcher`."""
        self._holding = False
        self._sweeper.pause()

    async def run(self, link: RedisLink) -> None:
        """Tell Redis, look after what the dead have left behind, and answer, until `finish`.

        Cancellation:
            What is not in Redis then, and who was not answered, is kept for another `run`.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_entries, link)
            nursery.start_soon(self._sweeper.run, link)
            nursery.start_soon(self._keep_answering, link)

    async def finish(self, link: RedisLink) -> None:
        """Remove this worker's entries; for the end of a worker, beside `registry.finish`.

        Those under announced topics are left to others, who say so if their users do not come
        back. Who waits for an answer hears that there is none.

        Cancellation:
            What is not removed then does not count once the life is over.
        """
        self._finished = True
        rooms, self._rooms = self._rooms, {}
        for queue in (self._coming, self._again, self._going, self._later, self._stuck):
            queue.clear()
        self._sweeper.finish()
        self._news.set()
        self._question.set()
        for asked in self._asked.values():
            for waiter, ref in asked.waiters:
                self._tell(waiter, _unavailable(), ref)
        self._asked, self._waiting = {}, 0
        left = [
            stay
            for room in rooms.values()
            if not room.channel
            for stay in room.stays.values()
            if stay.life
        ]
        try:
            for at in range(0, len(left), BATCH):
                await run(link, [one.command for one in _goings(left[at : at + BATCH])])
        except RedisUnavailable as problem:
            self._log_trouble(str(problem))

    # The entries.

    async def _keep_entries(self, link: RedisLink) -> None:
        pauses = Pauses(PAUSE_FIRST, PAUSE_CAP, self._rng)
        while not self._finished:
            self._news = trio.Event()
            self._catch_up()
            due = self._due()
            if due > trio.current_time():
                with trio.move_on_at(due):
                    await self._news.wait()
                continue
            await trio.sleep(GATHER_SECONDS)
            if await self._flush(link):
                pauses.reset()
            else:
                await trio.sleep(pauses.take())

    def _due(self) -> float:
        """Return when there is something to tell Redis."""
        if not self._holding:
            return INFINITY
        if self._coming or self._going:
            return -INFINITY
        again = self._again_at if self._again else INFINITY
        return min(again, next(iter(self._later.values()), INFINITY))

    async def _flush(self, link: RedisLink) -> bool:
        """Say who has come and who has gone, as far as it fits; return whether Redis answered."""
        steps = self._take()
        if not steps:
            return True
        replies: list[Reply | RedisRefused] | None = None
        try:
            replies = await run(link, [one.command for one in steps])
        except RedisUnavailable as problem:
            self._log_trouble(str(problem))
        finally:
            if replies is None:
                # Also if we are being stopped: nothing is forgotten before it is told.
                self._put_back(steps)
        if replies is None:
            return False
        for step, reply in zip(steps, replies, strict=True):
            self._settle(step, reply)
        return True

    def _take(self) -> list[_Step]:
        """Return what is next. Comings are said before goings."""
        now = trio.current_time()
        coming = _first(self._coming, BATCH)
        if now >= self._again_at:
            coming += _first(self._again, BATCH - len(coming))
        while self._later and len(self._going) < BATCH:
            stay, due = next(iter(self._later.items()))
            if due > now:
                break
            del self._later[stay]
            self._going[stay] = None
        going = _first(self._going, BATCH)
        return [*_comings(coming, self._life), *_goings(going)]

    def _settle(self, step: _Step, reply: Reply | RedisRefused) -> None:
        if isinstance(reply, RedisRefused):
            self._log_trouble(str(reply))
            self._stuck.update((one, None) for one in step.stays if self._is_due(one, step))
            self._bound()
        elif step.comes:
            for stay in step.stays:
                stay.was = ()
        else:
            for stay in step.stays:
                # Who has come back and gone once more meanwhile waits again.
                if not (stay.wanted or stay in self._going or stay in self._later):
                    self._forget(stay)

    def _put_back(self, steps: Iterable[_Step]) -> None:
        """Have it said again, under another life: nobody knows whether or when it has an effect."""
        for step in steps:
            queue = self._coming if step.comes else self._going
            queue.update((one, None) for one in step.stays if self._is_due(one, step))
        if not self._finished:
            self._sweeper.doubt(one.room.name for step in steps for one in step.stays)
            self._give_up()

    def _is_due(self, stay: _Stay, step: _Step) -> bool:
        """Return whether this is still to be said; if not, the contrary is waiting already."""
        return not self._finished and stay.wanted is step.comes

    def _write_all_again(self, when: float) -> None:
        """Have everybody written once more; first where it matters most that he is there."""
        self._again = {
            stay: None
            for room in sorted(self._rooms.values(), key=lambda room: not room.channel)
            for stay in room.stays.values()
            if stay.wanted and stay not in self._coming
        }
        self._again_at = when
        self._refresh_at = when + fleet.REFRESH_SECONDS * self._rng.uniform(0.9, 1.0)

    def _catch_up(self) -> None:
        """Take note if nothing is needed any more that was written under an earlier life.

        Only for the task that tells Redis, while it does not: what is under way is in no queue.
        """
        queues = (self._coming, self._again, self._going, self._later, self._stuck)
        if not self._behind or not self._holding:
            return
        if not any(stay.is_behind(self._life) for queue in queues for stay in queue):
            self._behind = False
            self._sweeper.written()

    def _unqueue(self, stay: _Stay) -> None:
        for queue in (self._coming, self._again, self._going, self._later, self._stuck):
            queue.pop(stay, None)

    def _forget(self, stay: _Stay) -> None:
        room = stay.room
        if room.stays.get(stay.connection_id) is not stay:
            # Forgotten before, and meanwhile its connection has come once more.
            return
        del room.stays[stay.connection_id]
        if not room.stays and self._rooms.get(room.name) is room:
            del self._rooms[room.name]

    def _bound(self) -> None:
        """Keep no more goings than there are entries, about: another life does without."""
        queues = (self._going, self._later, self._stuck)
        if sum(len(queue) for queue in queues) <= 2 * self._wanted + SPARE_LEAVES:
            return
        for queue in queues:
            for stay in [one for one in queue if not one.wanted]:
                del queue[stay]
                self._sweeper.doubt((stay.room.name,))
                self._forget(stay)
        self._give_up()

    # Questions.

    async def _keep_answering(self, link: RedisLink) -> None:
        while not self._finished:
            self._question = trio.Event()
            if not self._asked:
                await self._question.wait()
                continue
            async with trio.open_nursery() as nursery:
                for question in list(islice(self._asked, ANSWERED)):
                    nursery.start_soon(self._answer, link, question)

    async def _answer(self, link: RedisLink, question: Question) -> None:
        """Answer everybody who has asked this so far."""
        asked = self._asked.pop(question, None)
        if asked is None:
            return
        waiters = asked.waiters
        try:
            answer = await self._look(link, question, asked.due)
            while waiters:
                for waiter, ref in waiters[-ANSWERS_PER_TURN:]:
                    self._tell(waiter, answer, ref)
                self._waiting -= len(waiters[-ANSWERS_PER_TURN:])
                del waiters[-ANSWERS_PER_TURN:]
                await trio.lowlevel.checkpoint()
        finally:
            if waiters:
                later = self._asked.get(question)
                asked.waiters += later.waiters if later is not None else []
                self._asked[question] = asked

    async def _look(self, link: RedisLink, question: Question, due: float) -> Presence | Error:
        """Return the answer, without anybody's ``ref``."""
        topic, after = question
        if trio.current_time() >= due:
            # Those before have used up the time of all who wait.
            return _unavailable()
        try:
            with trio.move_on_at(due):
                page, left_behind = await look(link, topic, after)
                if left_behind:
                    self._sweeper.found(topic)
                return page
        except (RedisUnavailable, RedisRefused) as problem:
            self._log_trouble(str(problem))
        except Exception as bug:  # noqa: BLE001 - the others are not to blame
            self._log_bug("reading who is there", bug)
        return _unavailable()

    def _tell(self, waiter: Asking, answer: Presence | Error, ref: str | None) -> None:
        try:
            waiter.attended(answer if ref is None else msgspec.structs.replace(answer, ref=ref))
        except Exception as bug:  # noqa: BLE001 - the others are not to blame
            self._log_bug("answering who is there", bug)


def _comings(stays: Iterable[_Stay], life: str) -> list[_Step]:
    return [
        _Step(
            some,
            True,
            presence.come(
                room.name, room.channel, (pair for one in some for pair in one.write(life))
            ),
        )
        for room, some in _by_room(stays).items()
    ]


def _goings(stays: Iterable[_Stay]) -> list[_Step]:
    return [
        _Step(
            some,
            False,
            presence.go(room.name, room.channel, (text for one in some for text in one.remains())),
        )
        for room, some in _by_room(stays).items()
    ]


def _by_room(stays: Iterable[_Stay]) -> dict[_Room, list[_Stay]]:
    rooms: dict[_Room, list[_Stay]] = {}
    for stay in stays:
        rooms.setdefault(stay.room, []).append(stay)
    return rooms


def _first(queue: dict[_Stay, None], most: int) -> list[_Stay]:
    """Return the first of a queue, and remove them from it."""
    taken = list(islice(queue, most))
    for stay in taken:
        del queue[stay]
    return taken


def _unavailable() -> Error:
    return Error(
        "unavailable", "it is not known now who is there; try again", int(RETRY_SECONDS * 1000)
    )
