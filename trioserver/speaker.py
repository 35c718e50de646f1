"""Publishes to topics what clients say, many at a time, and answers each of them.

    live topic      ``PUBLISH`` of an envelope. If nobody knows whether Redis has done it, the
                    client is told ``unavailable``: to say it twice would be worse
    durable topic   the ledger's script, with an id that is made here: it is repeated until Redis
                    has answered, for `TRIED_SECONDS`

What Redis refuses has not happened, and is not tried again: the client may.

One pipeline is under way at a time, and what comes meanwhile goes with the next one. So what
clients of this worker say to a topic is published in that order, and as long as Redis answers,
answered in that order.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn, Protocol

import attrs
import msgspec
import trio

from trioserver import envelope, ledger, messages, scripting
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.ledger import Command, Topic, TopicRules
from trioserver.pauses import Pauses
from trioserver.redis_link import RedisLink, Reply

MAX_WAITING: Final = 20_000
MAX_WAITING_BYTES: Final = 32 << 20
"""Publications that wait in one worker, and their payloads: the first bound is for small ones,
which cost a kilobyte each."""

BATCH: Final = 200
BATCH_BYTES: Final = 1 << 20
"""What goes as one pipeline: 40 ms of a busy Redis, if all of it is for durable topics."""

TRIED_SECONDS: Final = 3.0
"""For how long a publication to a durable topic is tried, while its client waits."""

PAUSE_FIRST: Final = 0.05
PAUSE_CAP: Final = 0.5
"""Seconds between two attempts while Redis is away: clients wait for their answers."""

RETRY_AFTER_MS: Final = 1000
"""What who could not be served is told."""

TYPE: Final = "notification"
"""Of all that clients publish."""


class Asker(Protocol):
    """Who gets the answer."""

    def published(self, answer: messages.Published | messages.Error | None) -> None:
        """Take note of how it went. May be called before `Speaker.say` has returned.

        Args:
            answer: For the client; None if it is published and nobody wants to hear of it.
        """


@attrs.frozen(kw_only=True)
class Saying:
    """What a client publishes, and who it is."""

    topic: str
    durable: bool
    payload: msgspec.Raw
    user: str
    connection_id: str
    key: str | None = None
    """See `messages.Key`; not for durable topics."""
    exclude: bool = False
    """Whether that connection does not want to get it from a live topic."""
    ref: str | None = None


@attrs.frozen(kw_only=True)
class _Waiting:
    """A publication that is not answered."""

    topic: str
    durable: bool
    ref: str | None
    asker: Asker
    command: Command
    size: int
    give_up_at: float
    """From when on it is not tried again."""


class Speaker:
    """One worker's clients, as far as they publish.

    Args:
        rules: Of durable topics, and how large a payload may be.
        prefix: Of all channels.
        log_bug: Called with what was being done, and the bug.
        log_trouble: Called with what Redis said; limits its own rate.
    """

    def __init__(
        self,
        rules: TopicRules,
        *,
        prefix: str = "",
        log_bug: Callable[[str, BaseException], None],
        log_trouble: Callable[[str], None],
    ) -> None:
        self._rules = rules
        self._prefix = prefix
        self._log_bug = log_bug
        self._log_trouble = log_trouble
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._news = trio.Event()
        """Set when something waits."""
        self._line = trio.Lock()
        """Held while a pipeline is under way."""
        self._portion = BATCH
        """Publications in the next pipeline: fewer while they are not answered in time."""
        self._pauses = Pauses(PAUSE_FIRST, PAUSE_CAP)

    def __len__(self) -> int:
        """Return how many publications wait, those under way not counted."""
        return len(self._waiting)

    def say(self, saying: Saying, asker: Asker, now_ms: int) -> str:
        """Publish, and have ``asker`` told how it went; at once if it cannot be tried.

        Args:
            saying: What.
            asker: Hears of it once.
            now_ms: Since 1970.

        Returns:
            The id of the notification, before anybody gets to see it; empty for a live topic.
        """
        problem = self._problem_with(saying)
        if problem is not None:
            asker.published(problem)
            return ""
        which = ""
        if saying.durable:
            which = ledger.new_id(ledger.partition(Topic(saying.topic)), now_ms)
        self._waiting.append(
            _Waiting(
                topic=saying.topic,
                durable=saying.durable,
                ref=saying.ref,
                asker=asker,
                command=self._command(saying, which),
                size=len(saying.payload),
                give_up_at=trio.current_time() + TRIED_SECONDS,
            )
        )
        self._waiting_bytes += len(saying.payload)
        self._news.set()
        return which

    def _problem_with(self, saying: Saying) -> messages.Error | None:
        most = self._rules.max_payload
        if 0 < most < len(saying.payload):
            problem = f"the payload is larger than {most} bytes"
            return messages.Error("bad_message", problem, ref=saying.ref)
        if messages.is_too_deep(saying.payload):
            problem = f"the payload is nested more than {messages.MAX_DEPTH} deep"
            return messages.Error("bad_message", problem, ref=saying.ref)
        if saying.durable and saying.key is not None:
            problem = "a key is for live topics; this one is durable"
            return messages.Error("bad_message", problem, ref=saying.ref)
        if len(self._waiting) >= MAX_WAITING or self._waiting_bytes >= MAX_WAITING_BYTES:
            return _unavailable("too much is being published", saying.ref)
        return None

    def _command(self, saying: Saying, which: str) -> Command:
        channel = ledger.topic_channel(self._prefix, saying.topic)
        if not saying.durable:
            said = envelope.said(
                bytes(saying.payload),
                type=TYPE,
                connection=saying.connection_id,
                user=saying.user,
                key=saying.key,
                exclude=saying.exclude,
            )
            return ("PUBLISH", channel, said)
        notification = ledger.Notification(
            user=Topic(saying.topic),
            payload=bytes(saying.payload),
            type=TYPE,
            ttl_ms=self._rules.ttl_ms,
            id=which,
            channel=channel,
            sender=saying.user,
        )
        return ledger.publish(notification, rules=self._rules)

    async def run(self, link: RedisLink) -> NoReturn:
        """Publish until cancelled.

        Cancellation:
            What was under way to a durable topic is kept for another `run`; what was under way to
            a live one is answered ``unavailable``.
        """
        while True:
            while not self._waiting:
                self._news = trio.Event()
                await self._news.wait()
            if await self._publish_some(link):
                self._pauses.reset()
                self._portion = min(BATCH, self._portion * 2)
            else:
                self._portion = max(1, self._portion // 2)
                await trio.sleep(self._pauses.take())

    async def finish(self, link: RedisLink) -> None:
        """Publish all that waits, as far as Redis takes it; for the end of a worker."""
        async with self._line:
            pass  # what `run` has under way
        while self._waiting:
            if not await self._publish_some(link):
                return

    async def _publish_some(self, link: RedisLink) -> bool:
        """Publish what comes next; return whether Redis took it."""
        async with self._line:
            batch = self._take()
            replies: list[Reply | RedisRefused] | None = None
            try:
                replies = await scripting.run(link, [one.command for one in batch])
            except RedisUnavailable as problem:
                self._log_trouble(str(problem))
            finally:
                if replies is None:
                    # Also if we are being stopped: nobody knows what has become of it.
                    self._try_again([one for one in batch if not self._is_given_up(one)])
            if replies is None:
                return False
            for one, reply in zip(batch, replies, strict=True):
                self._settle(one, reply)
            return True

    def _take(self) -> list[_Waiting]:
        """Return what comes next."""
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and len(batch) < self._portion and size < BATCH_BYTES:
            one = self._waiting.popleft()
            batch.append(one)
            size += one.size
        self._waiting_bytes -= size
        return batch

    def _is_given_up(self, one: _Waiting) -> bool:
        """Answer what has not been published for certain, unless it may be tried again."""
        if one.durable and trio.current_time() < one.give_up_at:
            return False
        self._tell(one, _unavailable("it cannot be published now", one.ref))
        return True

    def _try_again(self, batch: list[_Waiting]) -> None:
        """Put back what is tried again: before what was said later."""
        self._waiting.extendleft(reversed(batch))
        self._waiting_bytes += sum([one.size for one in batch])

    def _settle(self, one: _Waiting, reply: Reply | RedisRefused) -> None:
        """Answer what Redis has answered."""
        refusal = str(reply) if isinstance(reply, RedisRefused) else ""
        if refusal.startswith(ledger.BAD_REQUEST):
            problem = refusal.removeprefix(ledger.BAD_REQUEST)
            self._tell(one, messages.Error("bad_message", problem, ref=one.ref))
        elif refusal:
            self._log_trouble(refusal)
            self._tell(one, _unavailable("it cannot be published now", one.ref))
        elif one.ref is None:
            self._tell(one, None)
        elif one.durable:
            accepted = ledger.accepted(reply)
            answer = messages.Published(one.topic, one.ref, accepted.id, accepted.position)
            self._tell(one, answer)
        else:
            self._tell(one, messages.Published(one.topic, one.ref))

    def _tell(self, one: _Waiting, answer: messages.Published | messages.Error | None) -> None:
        try:
            one.asker.published(answer)
        except Exception as bug:  # noqa: BLE001 - the others are not to blame
            self._log_bug("publishing to a topic", bug)


def _unavailable(why: str, ref: str | None) -> messages.Error:
    return messages.Error("unavailable", f"{why}; try again", RETRY_AFTER_MS, ref)
