"""What a publisher asks Redis, step by step, and what the answers mean; no I/O.

Each question is a generator of steps (see `trioserver.publisher.attempts`), performed by a front.
The id of a notification is made before the first attempt, so an attempt whose outcome is unknown
may be repeated: Redis answers to an id that it has with what it said the first time.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias, cast

import attrs
import msgspec

from trioserver import endpoint as endpoints
from trioserver import kept_topics, ledger, life, payload_schemas
from trioserver.endpoint import Endpoint
from trioserver.errors import RedisError, RedisRefused, RedisUnavailable
from trioserver.ledger import Accepted, Command, Owner, Rules, Topic, TopicRules
from trioserver.life import Standing, Trace
from trioserver.payload_schemas import PayloadSchemas
from trioserver.publisher.attempts import PAUSES, Steps, exchange
from trioserver.publisher.request import (
    Draft,
    IdempotencyConflict,
    Options,
    PayloadMisfit,
    PublishRefused,
    RateLimited,
    checked_user,
    draft,
)
from trioserver.redis_direct import Reply
from trioserver.setting_kinds import quoted
from trioserver.settings import Settings

BATCH_COMMANDS: Final = 200
BATCH_BYTES: Final = 1 << 20
"""Notifications to many users go in batches of at most so much; some 20 ms of Redis each."""

HEARD_SECONDS: Final = 5.0
"""For how long it is remembered what the servers say of topics."""


class Ephemeral(Accepted, frozen=True, gc=False):
    """A notification that was handed to whoever listened; it has no id and no position."""

    receivers: int
    """Processes of the server that were listening on the channel. That is no receipt."""


class PublishInterrupted(RedisUnavailable):
    """Redis went away while notifications to many recipients were being published."""

    def __init__(self, problem: RedisError, results: "Sequence[Result]") -> None:
        good = sum(isinstance(result, Accepted) for result in results)
        super().__init__(f"{good} of {len(results)} recipients are served, then: {problem}")
        self.results = results
        """One per recipient, in order: `Accepted`, `PublishRefused` (`RateLimited`, perhaps),
        `RedisRefused` (not published) or `RedisUnavailable` (unknown)."""


Result: TypeAlias = Accepted | PublishRefused | RedisError
"""Of one recipient among many."""


@attrs.define(eq=False)
class _Memory:
    """What the servers have said of topics, when they were asked last."""

    rules: TopicRules | None = None
    good_until: float = -math.inf


@attrs.frozen(kw_only=True)
class Asking:
    """Makes the questions."""

    settings: Settings
    servers_own: bool
    """Whether the settings are the server's and not just defaults."""
    seconds: float
    """For one question, repetitions included."""
    schemas: PayloadSchemas | None
    """What payloads have to fit; None is no schemas."""
    topics: TopicRules
    """Which topics are durable, if no server knows better."""
    asks_servers: bool
    """Whether a server may know better: nobody here has said that any topic is durable."""
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    _memory: _Memory = attrs.field(factory=_Memory, init=False, repr=False)

    @classmethod
    def of(
        cls, settings: Settings | None, seconds: float, topics: TopicRules | None = None
    ) -> "Asking":
        """Return what asks with these settings or, without any, with the defaults.

        Args:
            settings: The server's own.
            seconds: For one question, repetitions included.
            topics: Which topics are durable; None is what the settings say and, if they say of
                none that it is, what the servers say.

        Raises:
            SettingsError: PAYLOAD_SCHEMAS is set, and cannot be used.
        """
        # No state is kept here, and the default place of it would want a home directory.
        chosen = Settings(data_dir=Path("/")) if settings is None else settings
        where = chosen.payload_schemas
        return cls(
            settings=chosen,
            servers_own=settings is not None,
            seconds=seconds,
            schemas=None if where is None else payload_schemas.load(where),
            topics=TopicRules.of(chosen) if topics is None else topics,
            asks_servers=topics is None and not chosen.durable_topics,
        )

    def endpoint(self, where: str | Endpoint) -> Endpoint:
        """Return where Redis is.

        Raises:
            SettingsError: That is no REDIS_URL.
        """
        if isinstance(where, Endpoint):
            return where
        return endpoints.endpoint(attrs.evolve(self.settings, redis_url=where), None)

    def publish(
        self,
        payload: object,
        user: str | None,
        users: Iterable[str] | None,
        options: Options,
        *,
        everyone: bool = False,
        topic: str | None = None,
        topics: Iterable[str] | None = None,
    ) -> Steps[Accepted | list[Result]]:
        """Publish to one user or topic, to many, or to everyone."""
        whom = (user, users, topic, topics)
        if len([one for one in whom if one is not None]) + bool(everyone) != 1:
            raise PublishRefused("say one of user, users, topic, topics and everyone=True")
        if isinstance(users, str | bytes):
            raise PublishRefused("users are several strings, not one")
        if isinstance(topics, str | bytes):
            raise PublishRefused("topics are several strings, not one")
        made = self._draft(payload, options)
        listed: list[Owner]
        if users is None and topics is None:
            owner = user if topic is None else Topic(topic)
            result = (yield from self._publish_all(made, [owner]))[owner]
            if isinstance(result, Exception):
                raise result
            return result
        listed = [Topic(name) for name in topics] if topics is not None else list(users or ())
        results = yield from self._publish_all(made, dict.fromkeys(listed))
        in_order = [results[one] for one in listed]
        for one in in_order:
            if isinstance(one, RedisError):
                raise PublishInterrupted(one, in_order)
        return in_order

    def topic_rules(self) -> Steps[TopicRules | None]:
        """Say which topics are durable; None if nobody has said it, so that none is."""
        if not self.asks_servers:
            return self.topics
        rules = yield from self._heard(self._until())
        if isinstance(rules, RedisError):
            raise rules
        return rules

    def cancel(self, notification: str) -> Steps[str]:
        """Withdraw a notification."""
        until = self._until()
        trace = yield from self._trace(notification, until)
        if trace is None:
            return "unknown"
        command = ledger.cancel(trace.owner, notification, rules=self._rules)
        (reply,), repeated = yield from self._ask([command], until)
        outcome = ledger.cancelled(_good(reply))
        if repeated and outcome == "too late":
            # Too late for ourselves, perhaps: an attempt that was not answered may have done it.
            trace = yield from self._trace(notification, until)
            if trace is not None and trace.state == "cancelled":
                return "cancelled"
        return outcome

    def why(self, user: str) -> Steps[Standing]:
        """Say how a user stands."""
        return (yield from self._look(life.Look(checked_user(user)), self._until()))

    def notification(self, notification: str) -> Steps[Trace | None]:
        """Return the life of a notification."""
        until = self._until()
        trace = yield from self._trace(notification, until)
        if trace is None or trace.user is None:
            return trace
        standing = yield from self._look(life.Look(trace.user, counting=False), until)
        return life.explained(trace, standing)

    def _draft(self, payload: object, options: Options) -> Draft:
        made = draft(payload, options, self.settings, self.wall(), self.topics)
        misfit = self.schemas.misfit(made.type, made.payload) if self.schemas else None
        if misfit is not None:
            raise PayloadMisfit(misfit)
        return made

    def _trace(self, notification: str, until: float) -> Steps[Trace | None]:
        key = ledger.notification_key(notification)
        if key is None:
            raise PublishRefused(f"{quoted(notification)} is no notification's id")
        (reply,), _ = yield from self._ask([("HGETALL", key)], until)
        return life.trace(notification, _good(reply))

    def _look(self, look: life.Look, until: float) -> Steps[Standing]:
        while commands := look.questions():
            replies, _ = yield from self._ask(commands, until)
            look.answered([_good(reply) for reply in replies])
        return look.standing()

    def _heard(self, until: float) -> Steps[TopicRules | RedisError | None]:
        """Return what the servers say of topics, or why that cannot be had."""
        memory = self._memory
        if self.clock() < memory.good_until:
            return memory.rules
        (reply,), _ = yield from self._ask([kept_topics.asked()], until)
        if isinstance(reply, RedisError) and not str(reply).startswith("NOPERM"):
            return reply
        memory.rules = kept_topics.heard(reply, self.topics)
        memory.good_until = self.clock() + HEARD_SECONDS
        return memory.rules

    def _until(self) -> float:
        """Return when a question that begins now has to be answered."""
        return self.clock() + self.seconds

    @property
    def _rules(self) -> Rules:
        return Rules.of(self.settings)

    def _ask(
        self, commands: Sequence[Command], until: float, pauses: Sequence[float] = PAUSES
    ) -> Steps[tuple[list[Reply | RedisError], bool]]:
        answered = yield from exchange(commands, self.clock, until, pauses)
        return answered.replies, answered.repeated

    def _publish_all(self, made: Draft, owners: Iterable[Owner]) -> Steps[dict[Owner, Result]]:
        """Publish to each of ``owners``; None is everyone. Raises nothing."""
        results: dict[Owner, Result] = {}
        letters: list[_Letter] = []
        until = self._until()
        whom = list(owners)
        if self.asks_servers and not made.ephemeral and any(isinstance(one, Topic) for one in whom):
            rules = yield from self._heard(until)
            if isinstance(rules, RedisError):
                return dict.fromkeys(whom, rules)
            made = attrs.evolve(made, topics=rules or self.topics)
        for owner in whom:
            try:
                letters.append(self._letter(made, owner))
            except PublishRefused as refusal:
                results[owner] = refusal
        trouble: RedisError | None = None
        for batch in _batches(letters, len(made.payload)):
            if trouble is not None:
                untried = RedisRefused(f"not tried: {trouble}")
                results |= dict.fromkeys([letter.owner for letter in batch], untried)
                continue
            # What is not kept is not worth a repetition, which might make it arrive twice.
            pauses = PAUSES if batch[0].id else ()
            replies, _ = yield from self._ask([letter.command for letter in batch], until, pauses)
            for letter, reply in zip(batch, replies, strict=True):
                result = letter.result(reply)
                results[letter.owner] = result
                if isinstance(result, RedisError):
                    trouble = result
        return results

    def _letter(self, made: Draft, owner: Owner) -> "_Letter":
        if not made.kept_for(owner):
            return _Letter(owner, "", ("PUBLISH", made.channel(owner), made.raw()))
        notification = made.addressed(owner, self.wall(), name_channel=self.servers_own)
        rules = made.topics if isinstance(owner, Topic) else self._rules
        return _Letter(owner, notification.id, ledger.publish(notification, rules=rules))


@attrs.frozen
class _Letter:
    """One notification on its way to one user or topic, or to everyone."""

    owner: Owner
    id: str
    """Empty if it is not kept."""
    command: Command

    def result(self, reply: Reply | RedisError) -> Result:
        """Return what the reply means."""
        if isinstance(reply, RedisUnavailable):
            return RedisUnavailable(f"whether it was published is unknown: {reply}")
        if isinstance(reply, RedisRefused):
            return _refusal(reply)
        if not self.id:
            outcome = "accepted" if isinstance(self.owner, Topic) else "ephemeral"
            return Ephemeral("", "", 0, outcome, cast("int", reply))
        accepted = ledger.accepted(reply)
        if accepted.outcome == "duplicate" and accepted.id == self.id:
            # Of ourselves: the attempt that was not answered has done it.
            outcome = "accepted" if accepted.position else "scheduled"
            return msgspec.structs.replace(accepted, outcome=outcome)
        return accepted


def _refusal(refused: RedisRefused) -> PublishRefused | RedisRefused:
    text = str(refused)
    wait = ledger.wait_of(text)
    if wait is not None:
        return RateLimited(wait)
    if text.startswith(ledger.REUSED_KEY):
        return IdempotencyConflict(text.removeprefix(ledger.REUSED_KEY))
    if text.startswith(ledger.BAD_REQUEST):
        return PublishRefused(text.removeprefix(ledger.BAD_REQUEST))
    return refused


def _good(reply: Reply | RedisError) -> Reply:
    if isinstance(reply, RedisRefused):
        raise _refusal(reply)
    if isinstance(reply, RedisError):
        raise reply
    return reply


def _batches(letters: Sequence[_Letter], size: int) -> Iterator[Sequence[_Letter]]:
    """Yield parts of ``letters``, each of which carries a payload of ``size`` bytes.

    What is kept and what is not, as of topics, is never in one part.
    """
    count = max(1, min(BATCH_COMMANDS, BATCH_BYTES // max(size, 1)))
    kept = [letter for letter in letters if letter.id]
    for some in (kept, [letter for letter in letters if not letter.id]):
        for start in range(0, len(some), count):
            yield some[start : start + count]
