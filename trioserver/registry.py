"""One worker's part of the fleet: keeps its lease, and enters its connections.

Entering and leaving are synchronous and cost nothing but a place in a dictionary; what came
within `GATHER_SECONDS` goes out as one pipeline. One at a time, so what is said of a connection
keeps its order. Nobody waits for the answer: a connection lives while it is being entered, and is
ended if its user turns out to have too many.

Without Redis everybody is let in. What it has of this worker is not known any more then: when it is
back, the worker goes on under a new life, see `trioserver.fleet`, and enters those who are there
without a limit, because nobody is thrown out for an outage. So it does when its lease was lost, be
it that the worker was paused or that Redis has lost its memory, and when a link to Redis was cut,
as by a failover: the new master may lack what was written last. The workers of a fleet do that
at different moments, and each in portions.

The limit is exact over all workers, as long as Redis answers: the script that enters also counts.
But nobody is ended before it is certain that those in his way are there, as his client will not
come back:

    of other workers     Their lives have renewed their leases since he came; all are asked to.
                         Those that do not turn out to be dead when their lease ends, or when
                         somebody says so.
    of this worker       It holds their connections. Other entries of its life are removed: they
                         are those of who has just gone, or what a lost write has left behind.

So somebody who is too many stays for about a second, or for as long as a lease lasts if one of the
others was killed. The exceptions: who was let in without Redis stays; and an entry that was lost
with no trace of an outage is not counted until it is written again (`fleet.REFRESH_SECONDS`).

With the entries and the renewals goes what is written down for the number of users (`users`). Who
else keeps entries that count with the lives of workers is told of both (`Watcher`).
"""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import trio

from trioserver import fleet, scripting, users
from trioserver.errors import CloseReason, RedisRefused, RedisUnavailable
from trioserver.fleet import Card, Doubt, InTheWay, Lease, Lives, Whereabouts
from trioserver.ledger import Command
from trioserver.pauses import Pauses
from trioserver.redis_link import RedisLink, Reply
from trioserver.users import Users

GATHER_SECONDS: Final = 0.02
"""How long comings and goings are gathered: reaching Redis costs 80 us, however many go."""

BATCH: Final = 500
"""Comings in one pipeline, and as many goings: two milliseconds of Redis each."""

SPREAD_SECONDS: Final = 2.0
"""Within which the workers begin to enter everybody anew."""

SPARE_LEAVES: Final = 1000
"""Goings that may wait beside as many as there are connections."""

HINT_SECONDS: Final = 0.5
"""Between two renewals, however many hints come."""

ENDS_PER_TURN: Final = 32
"""Connections that are ended between two checkpoints."""

PAUSE_FIRST: Final = 0.1
PAUSE_CAP: Final = 2.0

INFINITY: Final = float("inf")

_LOADS: Final = (*fleet.LOADS, *users.LOADS)

_NO_DOUBT: Final = Doubt()
"""Of those who have just come."""


class Describes(Protocol):
    """What a client is, beside a user."""

    @property
    def client_type(self) -> str:
        """What kind it says it is."""

    @property
    def agent(self) -> str:
        """Its program, bounded."""

    @property
    def address(self) -> str:
        """Its address, for people."""


class Member(Protocol):
    """A connection, as far as it matters here. Its user does not change while it is entered."""

    @property
    def user(self) -> str | None:
        """Whose it is; None if nobody's, then it is not entered."""

    @property
    def connection_id(self) -> str:
        """Its id, unique in the fleet."""

    @property
    def device(self) -> str:
        """The device's name; empty if it has none."""

    @property
    def caller(self) -> Describes:
        """Who is on the other side."""

    @property
    def since(self) -> float:
        """When it came, in seconds since 1970."""

    def end(self, reason: CloseReason) -> object:
        """End it; synchronous."""


class Watcher(Protocol):
    """Somebody else whose entries count with the lives of workers. Both are synchronous."""

    def renewed(self, life: str, lives: Lives, *, changed: bool) -> None:
        """Take note that the lease was renewed.

        Args:
            life: Whose it is. If it is another one than the last time, none of this worker's
                entries count, and all are to be written again, under this life.
            lives: Who lives now.
            changed: Whether others live now than the last time.
        """

    def lost(self) -> None:
        """Take note that Redis may lack what was written, and that `renewed` will say more.

        Nothing is to be written until then. It may be said several times.
        """


class Registry:
    """One worker's entries and lease.

    Args:
        life: The worker's.
        after: Lives that ended before it began, and that nobody has told the fleet of.
        limit: Connections of one user in the whole fleet; 0 is no limit.
        prefix: Put before the channel's name, as before every other.
        log_bug: Called with what was being done, and the bug.
        log_trouble: Called with what is wrong; limits its own rate.

    Attributes:
        life: Under which it enters now; another one after a lease was lost.
        lives: Who lives, as of the last renewal.
        channel: Where hints arrive; give them to `hinted`.
    """

    def __init__(
        self,
        life: str,
        after: Iterable[str],
        limit: int,
        *,
        prefix: str = "",
        log_bug: Callable[[str, BaseException], None],
        log_trouble: Callable[[str], None],
    ) -> None:
        self.life = life
        self.lives = Lives()
        self.channel = f"{prefix}fleet".encode()
        self._over = tuple(name for name in after if name)
        """To be told with the next renewal."""
        self._limit = limit
        self._log_bug = log_bug
        self._log_trouble = log_trouble
        self._new: dict[Member, Doubt] = {}
        """Those who are to be entered, with what is known of those in their way."""
        self._present: dict[Member, float] = {}
        """Those who may be in Redis, and since when; the oldest first."""
        self._by_id: dict[str, Member] = {}
        """The same."""
        self._again: dict[Member, None] = {}
        """Of these, those to be entered anew, without a limit."""
        self._again_at = 0.0
        self._refused: dict[Member, None] = {}
        """Of these, those whom Redis did not take; they wait for the next renewal, apart."""
        self._doubted: dict[Member, Doubt] = {}
        """Those who are too many, unless it turns out that somebody is dead."""
        self._surprised: dict[Member, Doubt] = {}
        """Those of whom it seems so since the latest renewal began: it may have seen too little."""
        self._gone: list[tuple[str, str]] = []
        """Users and entries that are to be removed."""
        self._stuck: list[tuple[str, str]] = []
        """Of these, those that Redis did not remove; they wait for the next renewal, apart."""
        self._replaced: list[str] = []
        """Entries that made way, whose workers are to be told."""
        self._wonder = False
        """Whether all workers are to be asked to renew their leases."""
        self._ends_ms = 0
        """When the lease ends, as far as is known."""
        self._read_at = 0.0
        """When `lives` was read, by Trio's clock."""
        self._holding = False
        """Whether there is a lease, and Redis has answered everything since."""
        self._away = False
        """Whether Redis has not answered since the last renewal."""
        self._finished = False
        self._users = Users(life)
        self._watchers: list[Watcher] = []
        self._news = trio.Event()
        self._hint = trio.Event()
        self._rng = random.Random()  # noqa: S311 - spreads load, guards nothing

    def watch(self, watcher: Watcher) -> None:
        """Have somebody told of every renewal and every loss from now on; before `run`."""
        self._watchers.append(watcher)

    @property
    def holds(self) -> bool:
        """Whether entries may be written: the lease is held, as far as is known."""
        return self._holding

    def enter(self, member: Member) -> None:
        """Take note that a connection has come, and belongs to a user. Idempotent until then."""
        if member.user is not None:
            self._new[member] = _NO_DOUBT
            self._news.set()

    def leave(self, member: Member) -> None:
        """Take note that it is gone; of those who were never entered, nothing."""
        self._new.pop(member, None)
        if self._present.pop(member, None) is not None:
            self._by_id.pop(member.connection_id, None)
            self._again.pop(member, None)
            self._refused.pop(member, None)
            self._gone.append(self._entry(member))
            self._users.left = True
            if not self._holding or self._stuck:
                self._bound()
            self._news.set()
        if self._doubted or self._surprised:
            self._doubted.pop(member, None)
            self._surprised.pop(member, None)

    def hinted(self, payload: bytes = b"") -> None:
        """Take note of what came through the channel.

        Args:
            payload: Empty if the lives in Redis have changed, or somebody wants to see who renews
                his lease; else an entry that made way for another connection of its device.
        """
        if not payload:
            self._hint.set()
            return
        life, _, connection_id = payload.decode(errors="replace").partition("/")
        if life == self.life:
            self._supersede(connection_id)

    def link_lost(self) -> None:
        """Take note that a link to Redis was cut: what answers next may be another Redis."""
        self._lose()
        self._hint.set()

    async def run(self, link: RedisLink) -> None:
        """Keep the lease and enter connections until `finish` was called.

        Cancellation:
            What is not in Redis then is kept for another `run`.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_lease, link)
            nursery.start_soon(self._keep_entries, link)

    async def finish(self, link: RedisLink) -> None:
        """Say that this life is over, and remove its entries; for the end of a worker.

        Cancellation:
            As soon as the first is said, the rest is tidiness.
        """
        self._finished = True
        self._news.set()
        self._hint.set()
        # What has not gone out yet came from connections that are gone as well.
        entries = self._gone + [self._entry(one) for one in self._present]
        self._gone, self._stuck, self._present, self._by_id = [], [], {}, {}
        self._new, self._again, self._doubted, self._surprised = {}, {}, {}, {}
        try:
            last = [fleet.renew("", over=[self.life]), self._publish(), self._users.end()]
            await self._run(link, last)
            for at in range(0, len(entries), BATCH):
                await self._run(link, [fleet.leave(*one) for one in entries[at : at + BATCH]])
        except RedisUnavailable as problem:
            self._log_trouble(str(problem))

    # The lease.

    async def _keep_lease(self, link: RedisLink) -> None:
        pauses = Pauses(PAUSE_FIRST, PAUSE_CAP, self._rng)
        while not self._finished:
            self._hint = trio.Event()
            if await self._renew(link):
                pauses.reset()
                await trio.sleep(HINT_SECONDS)
                with trio.move_on_after(fleet.RENEW_SECONDS - HINT_SECONDS):
                    await self._hint.wait()
            else:
                self._lose()
                await trio.sleep(pauses.take())

    async def _renew(self, link: RedisLink) -> bool:
        """Renew the lease, and see who lives; return whether that went well."""
        if self._finished:
            return False
        over, self._over = self._over, ()
        wonder, self._wonder = self._wonder, False
        self._doubted.update(self._surprised)
        self._surprised = {}
        now = trio.current_time()
        commands = [
            fleet.renew(self.life, ends_ms=self._ends_ms, over=over),
            self._users.renewed(self._present, len(self._present), now),
        ]
        if over or wonder:
            commands.append(self._publish())
        told = False
        try:
            reply, counted, *_ = await self._run(link, commands)
            self._complain((reply, counted))
            if not isinstance(reply, RedisRefused):
                self._renewed(fleet.lease(reply))
                if counted != 1 and self._present and not (self._again or self._users.is_making):
                    self._users.lacking()
                told = True
        except RedisUnavailable as problem:
            self._log_trouble(str(problem))
        finally:
            if not told:
                self._over, self._wonder = over, wonder
        return told

    def _renewed(self, lease: Lease) -> None:
        if self._finished:
            return
        self._read_at = trio.current_time()
        before, self.lives = self.lives, lease.lives
        if self._ends_ms != fleet.LOST or lease.life != self.life:
            self._ends_ms = lease.ends_ms
        if lease.life != self.life:
            self._begin_anew(lease.life)
        elif self._ends_ms == fleet.LOST:
            # Lost while we were asking: the next one begins another life.
            self._hint.set()
            return
        elif self._away:
            self._without_limit(self._new)
            self._new = {}
        self._away, self._holding = False, True
        old = self._read_at - fleet.REFRESH_SECONDS
        for member, at in self._present.items():
            if at > old or len(self._again) >= BATCH:
                break
            self._again[member] = None
        self._again.update(self._refused)
        self._refused = {}
        self._gone[:0] = self._stuck
        self._stuck = []
        self._reconsider()
        self._news.set()
        changed = before.living != self.lives.living
        self._tell(lambda one: one.renewed(self.life, self.lives, changed=changed))

    def _reconsider(self) -> None:
        """Have those asked for once more of whom more is known now."""
        waiting: dict[Member, Doubt] = {}
        for member, before in self._doubted.items():
            doubt = before.after(self.lives)
            (self._new if doubt.over or doubt.settled else waiting)[member] = doubt
        self._doubted = waiting
        if waiting:
            self._hint.set()

    def _begin_anew(self, life: str) -> None:
        """Go on under another life: everybody is to be entered anew."""
        self._log_trouble(f"the lease of {self.life} was lost")
        # They count no more, but others would have to find that out.
        self._gone += [self._entry(one) for one in self._present]
        self.life = life
        self._users.go_on(life)
        for queue in (self._new, self._doubted, self._surprised):
            self._without_limit(queue)
            queue.clear()
        self._again = dict.fromkeys(self._present)
        self._again_at = trio.current_time() + self._rng.uniform(0.0, SPREAD_SECONDS)

    def _lose(self) -> None:
        """Take note that it is not known any more what Redis has of us."""
        self._holding, self._away = False, True
        if self._ends_ms:
            self._ends_ms = fleet.LOST
        self._tell(lambda one: one.lost())

    def _tell(self, word: Callable[[Watcher], None]) -> None:
        for watcher in self._watchers:
            try:
                word(watcher)
            except Exception as bug:  # noqa: BLE001 - the lease goes on
                self._log_bug("telling of leases", bug)

    # The entries.

    async def _keep_entries(self, link: RedisLink) -> None:
        while not self._finished:
            self._news = trio.Event()
            waiting = bool(self._again) and trio.current_time() >= self._again_at
            due = self._new or self._gone or self._replaced or self._users.is_making
            if self._holding and (due or waiting):
                await trio.sleep(GATHER_SECONDS)
                await self._flush(link)
                continue
            again_at = self._again_at if self._again and self._holding else INFINITY
            with trio.move_on_at(again_at):
                await self._news.wait()

    async def _flush(self, link: RedisLink) -> None:
        """Say who has gone and who has come, as far as it fits."""
        life = self.life
        gone, self._gone = self._gone[:BATCH], self._gone[BATCH:]
        # Those are told once: if it gets lost, the others' connection ends when it is found dead.
        told, self._replaced = self._replaced, []
        # Nobody is to be in the way who has gone before.
        asked, commands, doubts = ([], [], {}) if self._gone else self._take()
        counts, settled = self._counts(asked), 0
        try:
            goings = [fleet.leave(*one) for one in gone]
            words = [self._publish(entry) for entry in told]
            replies = await self._run(link, goings + words + commands + counts)
            self._complain(replies)
            self._keep_stuck(gone, replies)
            if not any(isinstance(one, RedisRefused) for one in replies[-len(counts) :]):
                counts = []
            gone, ended = [], 0
            if life != self.life:
                return
            # The replies to `counts` are behind theirs.
            for member, reply in zip(asked, replies[len(goings + words) :], strict=False):
                settled += 1
                if reply.__class__ is int:
                    continue
                if self._settle(member, reply, doubts.get(member, _NO_DOUBT)):
                    ended += 1
                    if ended % ENDS_PER_TURN == 0:
                        await trio.lowlevel.checkpoint()
        except RedisUnavailable as problem:
            self._log_trouble(str(problem))
            self._lose()
            # Not to wait for the next renewal, which is what comes next.
            self._hint.set()
        finally:
            # Also if we are being stopped.
            if counts:
                self._users.lacking()
            self._gone[:0] = gone
            self._without_limit(one for one in asked[settled:] if one in self._present)

    def _counts(self, asked: list[Member]) -> list[Command]:
        """Return what is to be said of the users who have come, and of all who are counted."""
        counts = [self._users.portion()] if self._users.is_making else []
        # Behind it: the first portion begins with nobody.
        return [*counts, self._users.came(asked)] if asked else counts

    def _keep_stuck(self, gone: list[tuple[str, str]], replies: list[Reply | RedisRefused]) -> None:
        """Keep those for later whom Redis has refused to remove."""
        refused = [
            one
            for one, reply in zip(gone, replies, strict=False)
            if isinstance(reply, RedisRefused)
        ]
        if refused:
            self._stuck += refused
            self._bound()

    def _take(self) -> tuple[list[Member], list[Command], dict[Member, Doubt]]:
        """Return who is next, how they are entered, and the doubts about some of them."""
        now = trio.current_time()
        seen = self._wall(now)
        asked: list[Member] = []
        commands: list[Command] = []
        doubts: dict[Member, Doubt] = {}
        limit, new = self._limit, self._new
        for queue in (new, self._again if now >= self._again_at else {}):
            for member in list(itertools.islice(queue, BATCH - len(asked))):
                # They are where the latest are.
                self._present.pop(member, None)
                doubt = new.pop(member, _NO_DOUBT)
                try:
                    command = self._enters(member, seen, limit, doubt)
                except Exception as bug:  # noqa: BLE001 - the others are not to blame
                    self._by_id.pop(member.connection_id, None)
                    self._log_bug("entering a connection", bug)
                    continue
                finally:
                    self._again.pop(member, None)
                self._present[member] = now
                self._by_id[member.connection_id] = member
                if doubt is not _NO_DOUBT:
                    doubts[member] = doubt
                asked.append(member)
                commands.append(command)
            limit = 0
        return asked, commands, doubts

    def _enters(self, member: Member, seen: int, limit: int, doubt: Doubt) -> Command:
        caller = member.caller
        card = Card(
            member.device,
            caller.client_type,
            caller.agent,
            caller.address,
            int(member.since),
            seen,
        )
        return fleet.enter(
            member.user or "",
            self._entry(member)[1],
            fleet.encode(card),
            limit,
            doubt.over,
            settled=doubt.settled,
        )

    def _settle(self, member: Member, reply: Reply | RedisRefused, doubt: Doubt) -> bool:
        """Take note of an answer that is not the usual one; return whether somebody was ended."""
        if isinstance(reply, RedisRefused):
            if member in self._present:
                self._refused[member] = None
            return False
        came = fleet.answer(reply)
        if isinstance(came, str):
            return self._make_way(came)
        if came is None or self._present.pop(member, None) is None:
            return False
        self._users.left = True
        self._by_id.pop(member.connection_id, None)
        self._again.pop(member, None)
        if self._is_too_many(member, came, doubt):
            return self._end(member)
        return False

    def _is_too_many(self, member: Member, others: InTheWay, doubt: Doubt) -> bool:
        """Return whether others are certainly there instead; if not, see to it that it is seen."""
        ghosts = [one for one in others.own if one not in self._by_id]
        self._gone += [(member.user or "", f"{self.life}/{one}") for one in ghosts]
        certain = doubt.settled and all(
            self.lives.renewed_since(life, doubt.since_ms) for life in others.lives
        )
        if certain and not ghosts:
            return True
        self._surprised[member] = doubt.again(others.lives)
        if not certain:
            self._wonder = self._wonder or bool(others.lives)
            self._hint.set()
        return False

    def _entry(self, member: Member) -> tuple[str, str]:
        return member.user or "", f"{self.life}/{member.connection_id}"

    def _make_way(self, entry: str) -> bool:
        """End the connection that made way for another one; return whether it was here."""
        life, _, connection_id = entry.partition("/")
        if life == self.life:
            return self._supersede(connection_id)
        self._replaced.append(entry)
        self._news.set()
        return False

    def _supersede(self, connection_id: str) -> bool:
        member = self._by_id.get(connection_id)
        return member is not None and self._end(member)

    def _end(self, member: Member) -> bool:
        try:
            member.end(CloseReason.SUPERSEDED)
        except Exception as bug:  # noqa: BLE001 - the others are not to blame
            self._log_bug("ending a connection", bug)
        return True

    def _without_limit(self, members: Iterable[Member]) -> None:
        """Have them entered, however many their users have."""
        for member in members:
            self._present.setdefault(member, 0.0)
            self._by_id[member.connection_id] = member
            self._again[member] = None

    def _bound(self) -> None:
        """Keep no more goings than there are connections: a new life does without.

        Twice as many, as it begins with removing the old entries of all.
        """
        if len(self._gone) + len(self._stuck) > 2 * len(self._present) + SPARE_LEAVES:
            self._gone, self._stuck = [], []
            self._ends_ms = fleet.LOST
            self._hint.set()

    def _wall(self, now: float) -> int:
        """Return the seconds since 1970 by Redis' clock: the workers' own may differ."""
        return int(self.lives.now_ms / 1000 + now - self._read_at)

    def _complain(self, replies: Iterable[Reply | RedisRefused]) -> None:
        refusal = next((str(one) for one in replies if isinstance(one, RedisRefused)), "")
        if refusal:
            self._log_trouble(refusal)

    def _publish(self, payload: str = "") -> Command:
        return ("PUBLISH", self.channel, payload)

    async def _run(self, link: RedisLink, commands: list[Command]) -> list[Reply | RedisRefused]:
        return await scripting.run(link, commands, loads=lambda: _LOADS)


async def connections(link: RedisLink, user: str) -> Whereabouts:
    """Return where a user is connected, in the whole fleet.

    Raises:
        RedisUnavailable: No reply.
        RedisRefused: Redis does not let us look.
    """
    clock, lives, page = await _ask(link, fleet.whereabouts_reads(user))
    where = fleet.whereabouts([clock, lives, page])
    for _ in range(fleet.MOST_PAGES):
        more = fleet.whereabouts_more(user, page)
        if not more or len(where.connections) >= fleet.MOST_CONNECTIONS:
            break
        # What the dead have left behind may fill a whole page.
        (page,) = await _ask(link, more)
        where = where.joined(fleet.whereabouts([clock, lives, page]))
    return where


async def unique_users(link: RedisLink) -> int | None:
    """Return how many different users are connected to the whole fleet, about; see `users`.

    Returns:
        None if no worker has a lease: there is none, or Redis has just come back.

    Raises:
        RedisUnavailable: No reply.
        RedisRefused: Redis does not let us look.
    """
    (reply,) = await _ask(link, (users.kept(),))
    known = users.number(reply)
    if known is not None:
        return known
    command = users.counts(await _ask(link, users.lives()))
    if command is None:
        return None
    (counted,) = await link.pipeline((command,))
    if isinstance(counted, RedisRefused):
        raise counted
    known = counted if isinstance(counted, int) else 0
    await link.pipeline((users.keep(known),))
    return known


async def _ask(link: RedisLink, commands: tuple[Command, ...]) -> list[Reply | RedisRefused]:
    replies = await link.pipeline(commands)
    for reply in replies:
        # A user's key of the wrong type is a key that is not there.
        if isinstance(reply, RedisRefused) and not str(reply).startswith("WRONGTYPE"):
            raise reply
    return replies
