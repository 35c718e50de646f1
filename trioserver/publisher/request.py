"""What a caller asks for, checked: a draft, and the notifications made from it. Pure.

A mistake that holds for every recipient is found here, before anything is sent. What only Redis
can know (whether an idempotency key was used for something else) is refused there.
"""

import datetime as dt
import math
import re
from typing import Final, TypedDict

import attrs
import msgspec

from trioserver import ledger, messages
from trioserver.auth import check_user
from trioserver.errors import AuthError, TrioserverError
from trioserver.ledger import Notification, Owner, Topic, TopicRules
from trioserver.payload_schemas import Misfit
from trioserver.settings import Settings
from trioserver.topics import NAME_IN_WORDS, is_name

_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class PublishRefused(TrioserverError):  # noqa: N818 - a verdict
    """The request is not acceptable: nothing was published.

    It never would be, unless the error is one of the kinds below that say otherwise.
    """


class IdempotencyConflict(PublishRefused):
    """The idempotency key was used a short time ago, for something else."""


class RateLimited(PublishRefused):
    """The user gets NOTIFICATIONS_PER_MINUTE_PER_USER already.

    Publishers do not wait and try again: whether this notification is worth waiting for, or is to
    go to nobody, only the back end knows.
    """

    def __init__(self, retry_after: float) -> None:
        """Remember how long to wait.

        Args:
            retry_after: Seconds.
        """
        super().__init__(
            f"the user gets too many notifications; one more would be taken in {retry_after:.1f} s"
        )
        self.retry_after = retry_after
        """Seconds until one more would be taken, if nobody else publishes to this user."""


class PayloadMisfit(PublishRefused):
    """The payload does not fit the schema that PAYLOAD_SCHEMAS has for its type."""

    def __init__(self, misfit: Misfit) -> None:
        """Say where it does not fit, and why."""
        super().__init__(str(misfit))
        self.path = misfit.path
        """JSON Pointer to what does not fit; empty if it is the payload as a whole."""
        self.reason = misfit.reason


class Options(TypedDict, total=False):
    """How a notification is published. Each may be left out."""

    type: str
    """What kind of thing it is: 1 to 64 bytes, ``notification`` if left out."""
    ttl: float | dt.timedelta | None
    """Seconds that it is kept for devices that are away, at most 30 days; NOTIFICATION_TTL (7 days)
    if left out. 0 is ephemeral: whoever is connected now gets it, nobody else ever."""
    idempotency_key: str | None
    """The same key for the same user within IDEMPOTENCY_TTL (5 minutes) publishes once."""
    collapse_key: str | None
    """Replaces the one before with this key, if no device has received that yet."""
    deliver_at: dt.datetime | float | None
    """When to publish it, at most 30 days from now: with a time zone, or seconds since 1970."""
    fallback_after: float | dt.timedelta | None
    """Seconds after which an ``undelivered`` event says that no device has received it."""
    traceparent: str | None
    """Trace context (W3C) that travels along; one that is malformed is ignored."""
    priority: bool
    """Whether it comes through, and is not counted, when the user has already got
    NOTIFICATIONS_PER_MINUTE_PER_USER."""
    key: str | None
    """For live topics: what it is about. For a client that is slow, only the newest with one key
    has to be kept."""


@attrs.frozen(kw_only=True)
class Draft:
    """A notification without its recipient."""

    settings: Settings
    topics: TopicRules
    payload: bytes
    """JSON."""
    type: str = "notification"
    ttl_ms: int | None = None
    """None is what the settings say, 0 is ephemeral."""
    idempotency_key: str | None = None
    collapse_key: str | None = None
    deliver_at_ms: int | None = None
    fallback_after_ms: int | None = None
    traceparent: str | None = None
    priority: bool = False
    key: str | None = None

    @property
    def ephemeral(self) -> bool:
        """Whether it is for those who are connected now, and nothing is kept."""
        return self.ttl_ms == 0

    def kept_for(self, owner: Owner) -> bool:
        """Return whether it goes to the ledger; else to whoever listens now.

        Raises:
            PublishRefused: There is no such recipient, or an option means nothing for this one.
        """
        if isinstance(owner, Topic):
            return self._kept_for_topic(checked_topic(owner.name))
        if self.key is not None:
            raise PublishRefused("key is for live topics")
        return not self.ephemeral

    def addressed(self, owner: Owner, now: float, *, name_channel: bool) -> Notification:
        """Return the notification for a user, for a topic or, if that is None, for everyone.

        Args:
            owner: The recipient.
            now: Seconds since 1970, for the id.
            name_channel: Whether the settings are the server's own, so that we know on which
                channel it listens. Else the server's record of it counts.

        Raises:
            PublishRefused: That is no user's id, or no name of a topic.
        """
        channel = self.channel(owner)
        ttl_ms = self.ttl_ms
        if ttl_ms is None:
            of_users = round(self.settings.notification_ttl * 1000)
            ttl_ms = self.topics.ttl_ms if isinstance(owner, Topic) else of_users
        return Notification(
            user=owner,
            payload=self.payload,
            type=self.type,
            ttl_ms=ttl_ms,
            id=ledger.new_id(ledger.partition(owner), round(now * 1000)),
            idempotency_key=self.idempotency_key,
            collapse_key=self.collapse_key,
            deliver_at_ms=self.deliver_at_ms,
            fallback_after_ms=self.fallback_after_ms,
            traceparent=self.traceparent,
            channel=channel if name_channel else None,
            priority=self.priority,
        )

    def channel(self, owner: Owner) -> str:
        """Return where the server listens for a user, a topic or, if that is None, for everyone.

        Raises:
            PublishRefused: That is no user's id, or no name of a topic.
        """
        prefix = self.settings.channel_prefix
        if owner is None:
            return prefix + self.settings.broadcast_channel
        if isinstance(owner, Topic):
            return ledger.topic_channel(prefix, checked_topic(owner.name))
        return prefix + self.settings.user_channel.replace("{user}", checked_user(owner))

    def raw(self) -> bytes:
        """Return what a plain PUBLISH carries."""
        if self.key is None:
            return messages.raw_publish(self.type, self.payload)
        payload = msgspec.Raw(self.payload)
        return messages.encode(messages.RawPublication(payload, self.type, self.key))

    def _kept_for_topic(self, name: str) -> bool:
        if self.fallback_after_ms is not None:
            raise PublishRefused("fallback_after means nothing for a topic: it is nobody's own")
        if self.priority:
            raise PublishRefused("priority means nothing for a topic, which has no limit")
        if self.ephemeral:
            return False
        if self.topics.durable.matches(name):
            if self.key is not None:
                raise PublishRefused(f"key is for live topics, and {name} is durable")
            return True
        lasting = "ttl" if self.ttl_ms is not None else _lasting(self)
        if lasting:
            raise PublishRefused(f"{lasting} means nothing for {name}, which is a live topic")
        return False


def draft(
    payload: object,
    options: Options,
    settings: Settings,
    now: float,
    topics: TopicRules | None = None,
) -> Draft:
    """Return a draft of what a caller said.

    Args:
        payload: Anything that can be JSON; bytes and `msgspec.Raw` are JSON already.
        options: As the caller gave them.
        settings: Limits and defaults.
        now: Seconds since 1970.
        topics: Which topics are durable; without it, what the settings say.

    Raises:
        PublishRefused: Something of it cannot be.
    """
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    if unknown:
        raise PublishRefused(f"there is no option {unknown[0]}")
    made = Draft(
        settings=settings,
        payload=_json(payload),
        type=_text("type", options.get("type", "notification"), messages.MAX_TYPE_LENGTH),
        ttl_ms=_ttl(options.get("ttl")),
        idempotency_key=_key("idempotency_key", options.get("idempotency_key")),
        collapse_key=_key("collapse_key", options.get("collapse_key")),
        deliver_at_ms=_moment(options.get("deliver_at"), now),
        fallback_after_ms=_milliseconds("fallback_after", options.get("fallback_after")),
        traceparent=_traceparent(options.get("traceparent")),
        priority=_flag("priority", options.get("priority", False)),
        key=_key("key", options.get("key"), messages.MAX_KEY),
        topics=TopicRules.of(settings) if topics is None else topics,
    )
    try:
        # What the workers would drop is better refused here, where somebody hears of it.
        messages.publication(made.raw(), settings.notification_max_size)
    except messages.BadPublish as problem:
        raise PublishRefused(str(problem)) from None
    if made.ephemeral and (lasting := _lasting(made)):
        raise PublishRefused(f"{lasting} means nothing with ttl 0, which keeps nothing")
    return made


def checked_user(user: object) -> str:
    """Return ``user`` if it may be one.

    Raises:
        PublishRefused: It may not.
    """
    if not isinstance(user, str):
        raise PublishRefused("a user is a string")
    try:
        return check_user(user)
    except AuthError:
        raise PublishRefused("a user has 1 to 128 bytes of printable text") from None


def checked_topic(name: object) -> str:
    """Return ``name`` if a topic may have it.

    Raises:
        PublishRefused: None may.
    """
    if not isinstance(name, str):
        raise PublishRefused("a topic is a string")
    if not is_name(name):
        raise PublishRefused(f"a topic has {NAME_IN_WORDS}")
    return name


def _json(payload: object) -> bytes:
    try:
        if isinstance(payload, bytes | bytearray | memoryview | msgspec.Raw):
            text = bytes(payload)
            msgspec.json.decode(text)
            return text
        return msgspec.json.encode(payload)
    except UnicodeError:
        raise PublishRefused("the payload has text that is not Unicode") from None
    except RecursionError:
        raise PublishRefused("the payload is nested too deeply") from None
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as problem:
        raise PublishRefused(f"the payload is not JSON: {problem}") from None


def _ttl(value: object) -> int | None:
    ttl_ms = _milliseconds("ttl", value)
    if ttl_ms is not None and 0 < ttl_ms < ledger.MIN_TTL_MS:
        raise PublishRefused(f"ttl is less than {ledger.MIN_TTL_MS / 1000:g} s, and not 0")
    return ttl_ms


def _milliseconds(name: str, value: object) -> int | None:
    if value is None:
        return None
    seconds = value.total_seconds() if isinstance(value, dt.timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise PublishRefused(f"{name} is a number of seconds")
    most = ledger.MAX_TTL_MS / 1000
    if not 0 <= seconds <= most:
        raise PublishRefused(f"{name} is not from 0 to {most:g} seconds")
    return math.ceil(seconds * 1000)  # half a millisecond is not 0


def _moment(value: object, now: float) -> int | None:
    if value is None:
        return None
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            raise PublishRefused("deliver_at has no time zone")
        seconds = value.timestamp()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    else:
        raise PublishRefused("deliver_at is a datetime or a number of seconds since 1970")
    if not 0 <= seconds <= now + ledger.MAX_DELAY_MS / 1000:
        raise PublishRefused("deliver_at is more than 30 days from now")
    return round(seconds * 1000)


def _key(name: str, value: object, most: int = ledger.MAX_KEY_BYTES) -> str | None:
    return None if value is None else _text(name, value, most)


def _text(name: str, value: object, most: int) -> str:
    if not isinstance(value, str):
        raise PublishRefused(f"{name} is a string")
    try:
        length = len(value.encode())
    except UnicodeError:
        raise PublishRefused(f"{name} is not Unicode") from None
    if not 1 <= length <= most:
        raise PublishRefused(f"{name} has 1 to {most} bytes")
    return value


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise PublishRefused(f"{name} is True or False")
    return value


def _traceparent(value: object) -> str | None:
    # It may come from strangers, through several services. One that is malformed is as good as
    # none, says its specification; nothing else of the request has to suffer.
    return value if isinstance(value, str) and _TRACEPARENT.fullmatch(value) else None


def _lasting(made: Draft) -> str:
    """Return the name of an option that needs a memory; empty if there is none."""
    for name in ("idempotency_key", "collapse_key", "deliver_at_ms", "fallback_after_ms"):
        if getattr(made, name) is not None:
            return name.removesuffix("_ms")
    return ""
