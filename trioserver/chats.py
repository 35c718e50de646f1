"""Chat sessions of one worker: what has been counted is stored, many sessions in one write.

Each connection's `chat.Chat` counts; here it is attached to its session, written down, and told
what has come of it. What came within `GATHER_SECONDS` goes out as one pipeline; the first after a
pause goes at once. One pipeline at a time, so what is said of a session keeps its order. What is
said is absolute, see `trioserver.chat_store`: each session needs one write, however many of its
messages wait, and what was said in a pipeline whose outcome is unknown is said once more.

Redis away
    After the last of `RETRIES` everything that waits for an answer is refused with ``unavailable``,
    and so are further messages at once. Counts in memory go back to what was confirmed, and that is
    what goes on being told to Redis, with growing pauses. The first answer ends it.

    A message that was refused is not counted. What Redis has not read by then it passes over, as
    each command says until when it is waited for. If Redis has counted it, and could not say so, it
    is taken back as soon as Redis is there again. Only a client that is at another worker before
    that, or whose worker has died, finds it counted.

    Connections that come meanwhile get their sessions when Redis is back. Their messages wait for
    that, at most `EARLY_SECONDS`.

What Redis refuses is not its being away: the sessions of that command are refused in the same way,
and each is tried again by itself, so that one is not the others' trouble. The same holds for those
that come.

Sessions whose connections are silent are written again now and then (`KEEP_SECONDS`, or a quarter
of their lives), and all of them soon when a link to Redis was cut: then they live on, come back if
Redis has lost them, and who was superseded without having been told finds out. Those that were let
go shortly before are written first: Redis may have lost what it was told last, and their clients
are about to come back.
"""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Final, TypeVarTuple

import attrs
import trio

from trioserver import chat_store, scripting
from trioserver.chat import Chat, Host
from trioserver.chat_store import Commit
from trioserver.errors import CloseReason, RedisRefused, RedisUnavailable
from trioserver.ledger import Command
from trioserver.redis_link import RedisLink, Reply

GATHER_SECONDS: Final = 0.0015
"""Between the beginnings of two pipelines: reaching Redis costs 80 us, however many go."""

BATCH: Final = 500
"""Sessions that are written in one pipeline, and as many that are attached."""

APART: Final = 50
"""Of those that are tried by themselves, so many in one pipeline."""

ATTEMPT_SECONDS: Final = 0.5
"""For one pipeline; what Redis reads of it later is void."""

RETRIES: Final = (0.1, 0.2, 0.4)
"""Pauses before a pipeline is sent once more, while those who wait for it hear nothing."""

EARLY_SECONDS: Final = 2.0
"""How long a message may wait for its session to be attached."""

PAUSE_FIRST: Final = 0.1
PAUSE_CAP: Final = 0.5
"""Shorter than refused clients wait before they say it again: what Redis has counted unheard should
be taken back before that."""

ASIDE_SECONDS: Final = 2.0
"""Between two attempts to attach those that Redis has refused."""

CLOCK_SECONDS: Final = 60.0
"""How long the greatest distance from Redis' clock is believed. It is the best: what is measured is
too small by the time that the reply took; and the nodes of a cluster have a clock each."""

KEEP_SECONDS: Final = 60.0
SPREAD_SECONDS: Final = 2.0
"""Within which the workers begin to write everything anew after a link was cut."""

LATELY_SECONDS: Final = 5.0
MOST_LATELY: Final = 10_000
"""Sessions that were let go in this time, at most so many, are written anew as well, and first."""

SPARE_LEAVES: Final = 1000
"""Sessions to be let go that may wait beside as many as there are connections."""

INFINITY: Final = float("inf")

_PASSING: Final = (
    *("LOADING", "BUSY", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOSCRIPT"),
)
"""What Redis says when it is as good as away. Older ones put it behind an ERR."""

Given = TypeVarTuple("Given")


@attrs.frozen(eq=False, kw_only=True)
class _Round:
    """What goes to Redis as one pipeline."""

    groups: list[list[Chat]]
    """Those that one command writes, for each of these."""
    said: list[list[Commit]]
    """What is said of them."""
    arrivals: list[tuple[Chat, str]]
    """Those that are attached, behind them, and for whom."""

    def __bool__(self) -> bool:
        return bool(self.groups or self.arrivals)


class Chats:
    """All chat sessions of one worker.

    Args:
        life: The worker's; ids of connections and of holders begin with it.
        ttl: Seconds for which a session lives without a connection.
        prefix: Put before the channels' names, as before every other.
        log_bug: Called with what was being done, and the bug.
        log_trouble: Called with what is wrong; limits its own rate.
        together: Whether one command may write many sessions: not on a cluster.

    Attributes:
        channel: Where hints arrive; give them to `hinted`.
        away: Whether Redis does not answer: messages are refused at once.
        counted: Messages that were counted, and answered...
        repeated: ... those of them that had been counted before...
        refused: ... and those that were refused.
        superseded: Connections that have lost their session to another one.
    """

    def __init__(
        self,
        *,
        life: str,
        ttl: float,
        prefix: str,
        log_bug: Callable[[str, BaseException], None],
        log_trouble: Callable[[str], None],
        together: bool = True,
    ) -> None:
        self.channel = f"{prefix}chat:{life}".encode()
        self.away = False
        self.counted = self.repeated = self.refused = self.superseded = 0
        self._life = life
        self._channels = f"{prefix}chat:"
        self._ttl_ms = round(ttl * 1000)
        self._keep = min(ttl / 4, KEEP_SECONDS)
        self._log_bug = log_bug
        self._log_trouble = log_trouble
        self._together = together
        self._holders = itertools.count(1)
        self._by_id: dict[str, Chat] = {}
        """Those whose connections are there, by holder."""
        self._arrivals: dict[Chat, None] = {}
        """Of these, those to be attached."""
        self._aside: dict[Chat, None] = {}
        """The same, but those that Redis has refused."""
        self._aside_at = INFINITY
        """When that may be tried."""
        self._written: dict[Chat, float] = {}
        """Those that are attached, and when they were written; the oldest first."""
        self._lately: dict[Chat, float] = {}
        """Those that were let go, and when that was written; the oldest first."""
        self._pending: list[Chat] = []
        """Those to be written."""
        self._apart: list[Chat] = []
        """The same, but by themselves."""
        self._apart_at = INFINITY
        self._lost_at = -INFINITY
        """Who was written before that moment is written anew..."""
        self._anew_at = INFINITY
        """... from this one on."""
        self._next_at = -INFINITY
        """When the next pipeline may go."""
        self._pause = self._apart_pause = PAUSE_FIRST
        self._ahead: float | None = None
        """Of Trio's clock, the clock of Redis, ms; None while that is not known..."""
        self._ahead_until = -INFINITY
        """... and when a smaller distance is believed as well."""
        self._finished = False
        self._way = trio.Lock()
        """Held while a pipeline is under way: one at a time."""
        self._news = trio.Event()
        self._rng = random.Random()  # noqa: S311 - spreads load, guards nothing

    def open(self, host: Host, session_id: str, user: str | None) -> Chat:
        """Return a session for a connection, to be attached soon; synchronous.

        Args:
            host: The connection. It may have had another session, and has let go of that.
            session_id: Which; empty for a new one.
            user: Whose, or None for an anonymous client.
        """
        # Not the connection's id: holders never come back, and it may have held this one before.
        holder = f"{host.connection_id}.{next(self._holders):x}"
        chat = Chat(self, host, holder, session_id, user)
        self._by_id[holder] = chat
        self._arrivals[chat] = None
        self._news.set()
        return chat

    def hinted(self, payload: bytes) -> None:
        """Take note of what came through the channel: a holder whose session was taken."""
        self._supersede(payload.decode(errors="replace"))

    def link_lost(self) -> None:
        """Take note that a link to Redis was cut: it may have lost what it knew of sessions."""
        self._lost_at = trio.current_time()
        self._anew_at = self._lost_at + self._rng.uniform(0.0, SPREAD_SECONDS)
        since = self._lost_at - LATELY_SECONDS
        again = [chat for chat, at in self._lately.items() if at >= since]
        for chat in again:
            chat.due = True
        self._lately = {}
        self._pending[:0] = again
        self._news.set()

    def put(self, chat: Chat) -> None:
        """Have a session written. For `Chat`."""
        chat.due = True
        self._pending.append(chat)
        if len(self._pending) == 1:
            self._news.set()

    def left(self, chat: Chat) -> None:
        """Forget a connection, and let go of its session. For `Chat`."""
        self._forget(chat)
        if not chat.turn or chat.over or chat.due:
            return
        if self.away and len(self._pending) > 2 * len(self._by_id) + SPARE_LEAVES:
            return  # Nobody who lives holds it, and Redis has all of it: it ends by itself.
        self.put(chat)

    async def run(self, link: RedisLink) -> None:
        """Attach and count until `finish` was called.

        Cancellation:
            What is not in Redis then is kept for another `run`, or for `finish`.
        """
        while True:
            await self._rest()
            async with self._way:
                if self._finished:
                    return
                self._next_at = trio.current_time() + GATHER_SECONDS
                one = self._take()
                if one or self.away:
                    await self._carry(link, one)

    async def finish(self, link: RedisLink) -> None:
        """Write what is pending and let go of all sessions; for the end of a worker.

        Cancellation:
            What was not written is lost, and was not answered.
        """
        self._finished = True
        self._news.set()
        async with self._way:
            self._arrivals, self._aside = {}, {}
            self._pending += self._apart
            self._apart = []
            # First what can be answered: their connections may still be there.
            if await self._write_out(link):
                for chat in list(self._by_id.values()):
                    chat.leave()
                await self._write_out(link)

    # The way of a pipeline.

    async def _rest(self) -> None:
        """Wait until something is to be said, and may be."""
        if self.away:
            await trio.sleep(self._pause * self._rng.uniform(0.5, 1.5))
            return
        while not self._finished:
            self._news = trio.Event()
            now = trio.current_time()
            moment = self._moment(now)
            if moment <= now:
                break
            with trio.move_on_at(moment):
                await self._news.wait()
        await trio.sleep_until(self._next_at)

    def _moment(self, now: float) -> float:
        """Return when there is something to say; in the past if there is."""
        if self._pending:
            return -INFINITY
        moment = self._apart_at if self._apart else INFINITY
        if self._arrivals:
            return -INFINITY
        if self._aside:
            moment = min(moment, self._aside_at)
        if self._written:
            oldest = next(iter(self._written.values()))
            anew = self._anew_at if oldest <= self._lost_at else INFINITY
            moment = min(moment, oldest + self._keep, anew)
        return moment if moment > now else -INFINITY

    def _take(self) -> _Round:
        """Return what is to be said next, as far as it fits."""
        now = trio.current_time()
        taken, self._pending = self._pending[:BATCH], self._pending[BATCH:]
        taken = [chat for chat in taken if not chat.over]
        taken += self._stale(now, BATCH - len(taken))
        size = chat_store.per_command(together=self._together)
        groups = [taken[at : at + size] for at in range(0, len(taken), size)]
        if self._apart and (now >= self._apart_at or self.away):
            alone, self._apart = self._apart[:APART], self._apart[APART:]
            alone = [chat for chat in alone if not chat.over]
            groups += [[chat] for chat in alone]
        arrivals = list(itertools.islice(self._arrivals, BATCH))
        for chat in arrivals:
            del self._arrivals[chat]
        if now >= self._aside_at:
            again = list(itertools.islice(self._aside, APART))
            for chat in again:
                del self._aside[chat]
            arrivals += again
        return _Round(
            groups=groups,
            said=[[chat.says() for chat in group] for group in groups],
            arrivals=[(chat, chat.owner) for chat in arrivals],
        )

    def _stale(self, now: float, room: int) -> list[Chat]:
        """Return sessions that have not been written for long."""
        before = now - self._keep
        if now >= self._anew_at:
            before = max(before, self._lost_at)
        found: list[Chat] = []
        for chat, at in self._written.items():
            if at > before:
                if before >= self._lost_at:
                    self._anew_at = INFINITY
                break
            if len(found) >= room:
                break
            if not chat.due:
                found.append(chat)
        return found

    def _commands(self, one: _Round) -> list[Command]:
        """Return what is said to Redis now; void as soon as nobody waits for it any more."""
        until = chat_store.ALWAYS
        if self._ahead is not None:
            until = int((trio.current_time() + ATTEMPT_SECONDS) * 1000 + self._ahead)
        # Who has gone since must not take his session from who may have come.
        one.arrivals[:] = [(chat, owner) for chat, owner in one.arrivals if chat.host is not None]
        commands = [chat_store.commit(said, self._ttl_ms, until=until) for said in one.said]
        commands += [self._attach(chat, owner, until) for chat, owner in one.arrivals]
        return commands or [("PING",)]

    def _attach(self, chat: Chat, owner: str, until: int) -> Command:
        return chat_store.attach(
            chat.session_id,
            until=until,
            holder=chat.holder,
            user=owner,
            may_create=chat.fresh or owner != "",
            ttl_ms=self._ttl_ms,
            channels=self._channels,
            life=self._life,
        )

    async def _carry(self, link: RedisLink, one: _Round) -> None:
        """Get a pipeline answered, or give up."""
        told = False
        try:
            replies = await self._ask(link, one)
            for pause in () if self.away else RETRIES:
                if replies is not None:
                    break
                self._refuse_early(EARLY_SECONDS - pause - ATTEMPT_SECONDS)
                await trio.sleep(pause)
                replies = await self._ask(link, one)
            told = True
            if replies is None:
                self._give_up(one)
            else:
                self._settle(one, replies)
        finally:
            if not told:
                self._put_back(one)

    async def _ask(self, link: RedisLink, one: _Round) -> list[Reply | RedisRefused] | None:
        """Return the replies; None if Redis is as good as away."""
        problem = f"chat sessions: no answer within {ATTEMPT_SECONDS:g} s"
        commands = self._commands(one)
        try:
            with trio.move_on_after(ATTEMPT_SECONDS):
                replies = await scripting.run(
                    link, commands, loads=lambda: chat_store.LOADS, timeout=ATTEMPT_SECONDS
                )
                problem = _passing(replies) or self._look_at_clock(replies)
                if not problem:
                    return replies
        except RedisUnavailable as unavailable:
            problem = str(unavailable)
        self._log_trouble(problem)
        return None

    def _look_at_clock(self, replies: list[Reply | RedisRefused]) -> str:
        """Take note of the time that Redis has; return what is wrong if something was void."""
        told = [reply for reply in replies if isinstance(reply, list)]
        if not told:
            return ""
        now = trio.current_time()
        ahead = max(map(chat_store.clock, told)) - now * 1000
        if self._ahead is None or ahead > self._ahead or now > self._ahead_until:
            self._ahead, self._ahead_until = ahead, now + CLOCK_SECONDS
        late = any(map(chat_store.was_late, told))
        return "chat sessions: Redis has read too late what it was told" if late else ""

    async def _write_out(self, link: RedisLink) -> bool:
        """Write all that is pending; return whether Redis took it."""
        while self._pending:
            one = self._take()
            replies = await self._ask(link, one)
            if replies is None:
                return False
            self._settle(one, replies)
        return True

    def _put_back(self, one: _Round) -> None:
        """Have all of it said once more, before everything else."""
        again: list[Chat] = []
        for chat in itertools.chain.from_iterable(one.groups):
            if chat.over:
                continue
            if chat.apart:
                self._apart.append(chat)
            elif not chat.due:
                again.append(chat)
            chat.due = True
        self._pending[:0] = again
        arrivals = [chat for chat, _ in one.arrivals if chat.host is not None and not chat.over]
        for chat in arrivals:
            if chat.apart:
                self._aside[chat] = None
        first = [chat for chat in arrivals if not chat.apart]
        self._arrivals = dict.fromkeys(first) | self._arrivals

    def _give_up(self, one: _Round) -> None:
        """Refuse everything that waits; from now on it is only found out whether Redis is back."""
        self._put_back(one)
        if self.away:
            self._pause = min(PAUSE_CAP, self._pause * 2)
            return
        self.away, self._pause = True, PAUSE_FIRST
        for chat in (*self._pending, *self._arrivals):
            self._safely(chat.refuse)

    def _refuse_early(self, patience: float) -> None:
        """Refuse what would wait too long for a session if Redis were asked once more."""
        since = trio.current_time() - patience
        for chat in list(self._by_id.values()):
            if chat.why is not None:
                chat.refuse_early(since)

    # What Redis has said.

    def _settle(self, one: _Round, replies: list[Reply | RedisRefused]) -> None:
        self.away, self._pause = False, PAUSE_FIRST
        now = trio.current_time()
        for group, reply in zip(one.groups, replies, strict=False):
            if isinstance(reply, RedisRefused):
                self._try_apart(group, str(reply), now)
                continue
            faults = chat_store.faults(reply)
            for number, chat in enumerate(group):
                if chat.over:
                    continue
                if number in faults:
                    self._safely(self._lose, chat, faults[number])
                else:
                    self._safely(self._written_down, chat, now)
        for (chat, owner), reply in zip(one.arrivals, replies[len(one.groups) :], strict=False):
            self._safely(self._arrived, chat, owner, reply)

    def _written_down(self, chat: Chat, now: float) -> None:
        self._written.pop(chat, None)
        if chat.host is not None:
            self._written[chat] = now
        elif not chat.due:
            self._lately.pop(chat, None)
            self._lately[chat] = now
            oldest = next(iter(self._lately))
            if len(self._lately) > MOST_LATELY or self._lately[oldest] < now - LATELY_SECONDS:
                del self._lately[oldest]
        if chat.apart:
            self._apart_pause = PAUSE_FIRST
        chat.confirmed()

    def _arrived(self, chat: Chat, owner: str, reply: Reply | RedisRefused) -> None:
        if chat.over:
            return
        if isinstance(reply, RedisRefused):
            self._log_trouble(str(reply))
            chat.tried_apart()
            self._await(chat)
            self._aside_at = trio.current_time() + ASIDE_SECONDS
            chat.refuse()
            return
        chat.apart = False
        came = chat_store.attached(reply)
        self._supersede(came.before)
        if came.outcome == chat_store.UNKNOWN:
            if chat.owner == owner:  # else its client has logged in, and may have it made
                chat.replaced()
            self._await(chat)
        elif came.outcome == chat_store.FORBIDDEN and chat.owner != owner:
            self._await(chat)  # its client has logged in meanwhile
        elif came.outcome in {chat_store.FORBIDDEN, chat_store.SUPERSEDED}:
            self._lose(chat, came.outcome)
        else:
            if chat.host is not None:
                self._written[chat] = trio.current_time()
            chat.attached(came, owner)
            if chat.host is None and not chat.due:
                self.put(chat)

    def _await(self, chat: Chat) -> None:
        if chat.host is not None:
            (self._aside if chat.apart else self._arrivals)[chat] = None

    def _try_apart(self, group: list[Chat], problem: str, now: float) -> None:
        """Refuse what Redis has refused, and have it tried again, each session by itself."""
        self._log_trouble(problem)
        if self._finished:
            return
        if any(chat.apart for chat in group):
            self._apart_pause = min(PAUSE_CAP, self._apart_pause * 2)
        self._apart_at = now + self._apart_pause
        for chat in group:
            if chat.over:
                continue
            if chat in self._pending:
                self._pending.remove(chat)
            # Not stale either, while it is.
            self._written.pop(chat, None)
            chat.due = True
            chat.tried_apart()
            self._apart.append(chat)
            self._safely(chat.refuse)

    def _lose(self, chat: Chat, fault: str) -> None:
        self._forget(chat)
        if fault == chat_store.FORBIDDEN:
            chat.denied()
        else:
            self.superseded += chat.host is not None
            chat.lost(CloseReason.SUPERSEDED)

    def _forget(self, chat: Chat) -> None:
        self._by_id.pop(chat.holder, None)
        self._arrivals.pop(chat, None)
        self._aside.pop(chat, None)
        self._written.pop(chat, None)

    def _supersede(self, holder: str) -> None:
        chat = self._by_id.get(holder)
        if chat is not None:
            self._safely(self._lose, chat, chat_store.SUPERSEDED)

    def _safely(self, do: Callable[[*Given], None], *given: *Given) -> None:
        """Do something to one session: a bug in its connection is not the others' trouble."""
        try:
            do(*given)
        except Exception as bug:  # noqa: BLE001 - the others are not to blame
            self._log_bug("a chat session", bug)


def _passing(replies: Iterable[Reply | RedisRefused]) -> str:
    """Return what Redis says if it says that it cannot do anything at all now."""
    refusals = (str(reply) for reply in replies if isinstance(reply, RedisRefused))
    return next((one for one in refusals if any(word in one for word in _PASSING)), "")
