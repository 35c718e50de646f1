"""The protocol state of one connection: a client's message in, one action out. Pure.

A `Session` decides, the connection performs. It knows neither sockets nor Redis, has no clock
(`now` and `timestamp` are passed in) and no randomness, so the same messages always give the
same actions.

States
    waiting for credentials  →  authenticated  →  closed
    A session begins in either of the first two, depending on whether the handshake brought a
    credential. Before it is authenticated nothing but ``auth`` is processed.

A chat session (`ChatSession`) may be anonymous: then it has no user and waits for none, and gets
nothing but answers. On it any text that is no JSON object is a message.

Each message yields exactly one action; after `Close` there are none.
"""

import math
from typing import Final

import msgspec

from trioserver import messages, wish
from trioserver.buckets import Buckets, Rate
from trioserver.errors import ClientError, CloseReason
from trioserver.wish import Wish

MAX_STRIKES: Final = 20
STRIKE_SECONDS: Final = 10.0
"""So many messages that are malformed, or too many, within so long end the connection: it is
broken or hostile."""

UNLIMITED: Final[Buckets[str]] = Buckets(Rate(count=0))


class Send(msgspec.Struct, frozen=True, gc=False):
    """Send this JSON."""

    data: bytes


class Answer(msgspec.Struct, frozen=True, gc=False):
    """Send this JSON; it was a request, and no message that counts."""

    data: bytes


class SendError(msgspec.Struct, frozen=True, gc=False):
    """Send this ``error``; its code is for metrics."""

    data: bytes
    code: str


class Authenticate(msgspec.Struct, frozen=True, gc=False):
    """Verify this token, then call `Session.authenticated` or end the connection."""

    token: str
    wish: Wish


class Refresh(msgspec.Struct, frozen=True, gc=False):
    """Verify this token; if it is the same user's, the connection lives as long as it."""

    token: str
    ref: str | None


class Acknowledge(msgspec.Struct, frozen=True, gc=False):
    """Tell the ledger that all up to this one has been handled; answer if there is a ref."""

    seq: int
    """0 if it was named by its id."""
    id: str
    ref: str | None


class MarkRead(msgspec.Struct, frozen=True, gc=False):
    """Tell the ledger, and with it the other devices, what was read; answer if there is a ref."""

    ids: list[str]
    up_to: int | str
    """The newest of all that were read, by seq or id; 0 if they were named one by one."""
    ref: str | None


class Count(msgspec.Struct, frozen=True, gc=False):
    """Count this message on the stored chat session, then answer it."""

    payload: msgspec.Raw
    ref: str | None
    id: str | None


class Ask(msgspec.Struct, frozen=True, gc=False):
    """Do what it asks of a topic, and answer."""

    message: messages.TopicMessage


class Close(msgspec.Struct, frozen=True, gc=False):
    """End the connection."""

    reason: CloseReason


Action = (
    Send
    | Answer
    | SendError
    | Authenticate
    | Refresh
    | Acknowledge
    | MarkRead
    | Count
    | Ask
    | Close
)


class Session:
    """What one connection has said so far.

    Args:
        user: Who the handshake's credential named, or None while there is none.
    """

    __slots__ = ("_strikes", "closed", "count", "user")

    def __init__(self, user: str | None = None) -> None:
        self.user = user
        self.count = 0
        """Messages counted on this connection."""
        self.closed = False
        self._strikes: tuple[float, ...] = ()
        """When the latest malformed messages came; at most `MAX_STRIKES`."""

    @property
    def nameless(self) -> bool:
        """Whether a credential must come before anything else."""
        return self.user is None

    @property
    def payer(self) -> str:
        """Whose rates count for this connection; empty while that is nobody's."""
        return self.user or ""

    def needs_user(self) -> None:
        """Demand a credential of who could do without until now."""

    def authenticated(self, user: str) -> None:
        """Enter the authenticated state as ``user``."""
        self.user = user

    def receive(
        self, text: bytes, now: float, timestamp: str, rates: Buckets[str] = UNLIMITED
    ) -> Action | None:
        """Return what to do about one text message; None once closed.

        Args:
            text: The payload of a text frame, valid UTF-8.
            now: Monotonic seconds.
            timestamp: The wall clock as RFC 3339, for the answer.
            rates: How many messages each user may send.
        """
        if self.closed:
            return None
        try:
            message = messages.decode(text)
            user = self.user
            if type(message) is messages.Message and user is not None:
                wait = rates.take(user, now)
                if wait:
                    return self._too_fast(message.ref, wait, now)
                self.count += 1
                return Send(
                    messages.encode(
                        messages.MessageResponse(
                            self.count, message.payload, timestamp, message.ref
                        )
                    )
                )
            return self._other(message, now, rates)
        except ClientError as error:
            return self._strike(error, now)

    def _other(self, message: messages.ClientMessage, now: float, rates: Buckets[str]) -> Action:
        if isinstance(message, messages.Auth):
            if self.user is not None:
                raise ClientError(
                    "already_authenticated", "this connection has a user already", message.ref
                )
            return Authenticate(message.token, wish.of_auth(message))
        if isinstance(message, messages.Ping) and not self.nameless:
            return Answer(messages.encode(messages.Pong(message.ref)))
        if self.user is None:
            raise self._not_for_strangers(message.ref)
        if isinstance(message, messages.TopicMessage):
            wait = rates.take(self.user, now) if isinstance(message, messages.Publish) else 0.0
            return self._too_fast(message.ref, wait, now) if wait else Ask(message)
        return self._request(message)

    def _not_for_strangers(self, ref: str | None) -> ClientError:
        return ClientError("unauthenticated", "the first message must be auth", ref)

    def _request(
        self,
        message: messages.Message | messages.Ping | messages.Refresh | messages.Ack | messages.Read,
    ) -> Action:
        if isinstance(message, messages.Refresh):
            return Refresh(message.token, message.ref)
        if isinstance(message, messages.Ack):
            if (message.seq is None) == (message.id is None):
                raise ClientError("bad_message", "ack says either seq or id", message.ref)
            return Acknowledge(message.seq or 0, message.id or "", message.ref)
        if isinstance(message, messages.Read):
            if bool(message.ids) == (message.up_to is not None):
                raise ClientError("bad_message", "read says either ids or up_to", message.ref)
            return MarkRead(message.ids, message.up_to or 0, message.ref)
        return Answer(messages.encode(messages.Pong(message.ref)))

    def _strike(self, error: ClientError, now: float) -> Action:
        """Answer a malformed message, or close after too many of them."""
        if self._is_out(now):
            return self.close(CloseReason.POLICY)
        answer = messages.Error(error.code, error.message, ref=error.ref)
        return SendError(messages.encode(answer), error.code)

    def _too_fast(self, ref: str | None, wait: float, now: float) -> Action:
        """Refuse a message that comes too soon, or close who does not stop."""
        if self._is_out(now):
            return self.close(CloseReason.RATE)
        answer = messages.Error("rate_limited", "too many messages", math.ceil(wait * 1000), ref)
        return SendError(messages.encode(answer), "rate_limited")

    def _is_out(self, now: float) -> bool:
        """Note one more strike; return whether it is one too many."""
        strikes = [moment for moment in self._strikes if now - moment <= STRIKE_SECONDS]
        self._strikes = (*strikes, now)
        return len(self._strikes) >= MAX_STRIKES

    def close(self, reason: CloseReason) -> Close:
        """Enter the closed state, from which nothing returns."""
        self.closed = True
        return Close(reason)


class ChatSession(Session):
    """The protocol state of a connection on a chat path.

    Args:
        user: Who the handshake's credential named, or None while there is none.
        stranger: Whose rates count while it has no user and needs none; empty if it needs one.
    """

    __slots__ = ("_stranger",)

    def __init__(self, user: str | None, stranger: str) -> None:
        super().__init__(user)
        self._stranger = stranger

    @property
    def nameless(self) -> bool:
        """Whether a credential must come before anything else."""
        return self.user is None and not self._stranger

    def needs_user(self) -> None:
        """Demand a credential of who could do without until now."""
        self._stranger = ""

    @property
    def payer(self) -> str:
        """Whose rates count for this connection."""
        return self.user or self._stranger

    def receive(
        self,
        text: bytes,
        now: float,
        timestamp: str,  # noqa: ARG002 - the answer comes when the count is stored
        rates: Buckets[str] = UNLIMITED,
    ) -> Action | None:
        """Return what to do about one text message; None once closed. See `Session.receive`."""
        if self.closed:
            return None
        try:
            message = _decode_leniently(text)
            payer = self.payer
            if type(message) is messages.Message and payer:
                wait = rates.take(payer, now)
                if wait:
                    return self._too_fast(message.ref, wait, now)
                return Count(message.payload, message.ref, message.id)
            return self._other(message, now, rates)
        except ClientError as error:
            return self._strike(error, now)

    def _not_for_strangers(self, ref: str | None) -> ClientError:
        if self.nameless:
            return super()._not_for_strangers(ref)
        return ClientError("forbidden", "only who has a token may ask for this", ref)


def _decode_leniently(text: bytes) -> messages.ClientMessage:
    """Return a message; text that is no JSON object is the payload of one."""
    try:
        return messages.decode(text)
    except ClientError as error:
        if error.code != "bad_json":
            raise
    return messages.Message(msgspec.Raw(messages.encode(text.decode())))
