"""What tests of chat sessions stand on: connections, and workers on a real Redis."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import trio

from tests.redis_server import RedisServer, wait_until
from trioserver import chat_store
from trioserver.chat import Chat
from trioserver.chats import Chats
from trioserver.endpoint import Endpoint
from trioserver.errors import CloseReason
from trioserver.redis_link import RedisLink, open_link
from trioserver.subscription import Subscription

SECONDS: Final = 15.0
"""For what takes a moment."""

TTL: Final = 3600.0
ANY: Final = "8f14e45f-ceea-467f-a0e6-25c0a5a5d5c5"
NOW: Final = "2026-08-01T12:00:00.000Z"


class Answer(msgspec.Struct, frozen=True):
    """What a client is told about one message."""

    type: str
    count: int = 0
    payload: object = None
    timestamp: str = ""
    ref: str | None = None
    id: str | None = None
    repeated: bool = False
    code: str = ""


def split(frames: bytes) -> Iterator[bytes]:
    """Yield the payloads of text frames."""
    while frames:
        assert 0x81 == frames[0]
        size, start = frames[1], 2
        if size == 126:
            size, start = int.from_bytes(frames[2:4], "big"), 4
        elif size == 127:
            size, start = int.from_bytes(frames[2:10], "big"), 10
        yield frames[start : start + size]
        frames = frames[start + size :]


class Guest:
    """A connection, as far as its chat session knows it."""

    def __init__(self, connection_id: str) -> None:
        self.connection_id = connection_id
        self.reason: CloseReason | None = None
        self.answers: list[Answer] = []
        self.batches: list[int] = []
        self.seats: list[str] = []
        self.pieces: list[int] = []
        self.denials = 0
        self.resumed = self.awaited = 0
        self.on_answer: Callable[[Answer], object] | None = None
        self.on_seat: Callable[[], object] | None = None
        self.early = False
        """Whether it may be told something before it has its session, as without Redis."""
        self.chat: Chat

    def seated(self, why: str) -> None:
        """Take note."""
        self.seats.append(why)
        if self.on_seat is not None:
            self.on_seat()

    def end(self, reason: CloseReason) -> None:
        """Take note, and leave as a connection does."""
        self.reason = reason
        self.chat.leave()

    def not_yours(self) -> None:
        """Take note."""
        self.denials += 1

    def answer_chat(self, frames: bytes, messages: int) -> None:
        """Take them apart."""
        assert self.early or self.seats, "something was said before the first message"
        found = [msgspec.json.decode(one, type=Answer) for one in split(frames)]
        assert messages == len(found)
        self.batches.append(messages)
        self.pieces.append(len(frames))
        self.answers += found
        for one in found:
            if self.on_answer is not None:
                self.on_answer(one)

    def resume(self) -> None:
        """Take note."""
        self.resumed += 1

    def say(self, *texts: str, which: str | None = None) -> None:
        """Send messages."""
        for text in texts:
            ref = text if len(text) <= 64 else None
            self.chat.message(msgspec.Raw(msgspec.json.encode(text)), ref, which, NOW)

    @property
    def complete(self) -> bool:
        """Whether it has got as many answers as are awaited."""
        return len(self.answers) >= self.awaited

    @property
    def counts(self) -> list[int]:
        """The counts it was told; 0 for each refusal."""
        return [one.count for one in self.answers]

    async def ended(self) -> None:
        """Wait until it has been ended."""
        await wait_until(lambda: self.reason is not None, SECONDS)

    async def told(self, number: int) -> None:
        """Wait for so many answers in all."""
        await wait_until(lambda: len(self.answers) >= number, SECONDS)


class Worker:
    """The sessions of one worker, with links of its own, and what they complain of."""

    def __init__(
        self, redis: RedisServer, life: str = "aa.1.1", *, ttl: float = TTL, together: bool = True
    ) -> None:
        self.redis = redis
        self.life = life
        self.bugs: list[tuple[str, BaseException]] = []
        self.troubles: list[str] = []
        self.trips = 0
        self.guests = 0
        self.chats = Chats(
            life=life,
            ttl=ttl,
            prefix="test:",
            log_bug=lambda what, bug: self.bugs.append((what, bug)),
            log_trouble=self.troubles.append,
            together=together,
        )
        self.where = Endpoint(path=str(redis.path))
        self.hints = Subscription(self.where, self._receive, self._link_changed)

    @asynccontextmanager
    async def linked(self) -> AsyncIterator[RedisLink]:
        """Have a link, but run nothing."""
        async with open_link(self.where, observe=self._observe) as link:
            yield link

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Worker"]:
        """Run it for the time of the block; in the end it ends in order."""
        self.hints.follow(self.chats.channel)
        async with self.linked() as link, trio.open_nursery() as nursery:
            nursery.start_soon(self.hints.run)
            nursery.start_soon(self.chats.run, link)
            await wait_until(lambda: self.redis.subscribers(self.chats.channel), SECONDS)
            yield self
            await self.chats.finish(link)
            nursery.cancel_scope.cancel()

    def _observe(self, _seconds: float) -> None:
        self.trips += 1

    def _receive(self, _channel: bytes, payload: bytes) -> None:
        self.chats.hinted(payload)

    def _link_changed(self) -> None:
        if not self.hints.up:
            self.chats.link_lost()

    def open(self, session_id: str = "", user: str | None = None) -> Guest:
        """Let a connection come."""
        self.guests += 1
        guest = Guest(f"{self.life}-{self.guests:x}")
        guest.chat = self.chats.open(guest, session_id, user)
        return guest

    async def seat(self, session_id: str = "", user: str | None = None) -> Guest:
        """Let a connection come, and wait for its session."""
        guest = self.open(session_id, user)
        await wait_until(lambda: guest.seats, SECONDS)
        return guest


def stored(redis: RedisServer, session_id: str, field: str = "n") -> str | None:
    """Return a field of a session."""
    reply = redis.command("HGET", chat_store.key(session_id), field)
    assert reply is None or isinstance(reply, bytes)
    return None if reply is None else reply.decode()
