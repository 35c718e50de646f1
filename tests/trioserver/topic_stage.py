"""A worker with topics, for tests.

Connections are real; what Redis would confirm and the ledger would give is made here.
"""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio

from tests.trioserver.wire import LIMIT, SETTINGS, Attended, Client, Worker, head, running, text
from trioserver import frames, position
from trioserver.auth import sign
from trioserver.desk import Asking, Desk
from trioserver.ledger import Notice, TopicRules
from trioserver.outbox import OutboxLimits
from trioserver.slow_policies import Policies
from trioserver.speaker import Speaker
from trioserver.topics import Patterns

ALL: Final = {"subscribe": ["**"], "publish": ["**"]}
"""A claim that allows everything."""

RULES: Final = TopicRules(durable=Patterns.of(["kept.**"]), max_length=1000)

Claim = Sequence[str] | Mapping[str, Sequence[str]]


class Presences(Attended):
    """Answers who is there."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Asking, str, str | None, str | None]] = []

    def ask(self, waiter: Asking, name: str, after: str | None, ref: str | None) -> None:
        """Note who asks."""
        self.asked.append((waiter, name, after, ref))


@attrs.frozen(kw_only=True)
class Stage:
    """A worker, and what its topics share."""

    worker: Worker
    desk: Desk
    presences: Presences

    async def come(self, claim: Claim = ALL, *, user: str = "ann", small: bool = False) -> Client:
        """Connect; return after ``connection_established``."""
        client = await self.worker.dial(4096 if small else 0)
        await client.send(head(credential=credential(claim, user)))
        status, _ = await client.response()
        assert 101 == status
        assert "connection_established" == (await client.message())["type"]
        return client

    async def subscribed(self, name: str) -> Client:
        """Connect and subscribe to a topic of which nothing was missed."""
        client = await self.come()
        await client.send(subscribe(name))
        await client.until("subscribed")
        return client

    async def enter(self, name: str, data: bytes) -> None:
        """Do what the subscription does with an envelope."""
        remaining = self.worker.delivery.receive(channel(name), data)
        self.worker.delivery.turn_over()
        if remaining is not None:
            await remaining

    def questions(self) -> list[dict[str, object]]:
        """Return what those who wait for a page would ask the ledger, by argument."""
        found: list[dict[str, object]] = []
        for waiter, everyone in self.worker.reading.wanted:
            command = waiter.question(everyone=everyone)
            assert command is not None
            _, _, _, key, *rest = command
            arguments = zip(map(str, rest[::2]), rest[1::2], strict=True)
            found.append({"key": key, **dict(arguments)})
        return found


@asynccontextmanager
async def staged(
    *,
    send_buffer: int = 0,
    max_topics: int = 0,
    max_bytes: int = 200_000,
    policies: Policies | None = None,
) -> AsyncIterator[Stage]:
    """Run a worker with topics."""
    presences = Presences()
    desk = Desk(
        prefix="",
        rules=RULES,
        public=Patterns.of(["public.*"]),
        max_topics=max_topics,
        presence=Patterns.of(["room.**", "kept.**"]),
        speaker=Speaker(RULES, log_bug=lambda _what, _bug: None, log_trouble=print),
        attendance=presences,
    )
    with trio.fail_after(LIMIT):
        async with running(
            send_buffer=send_buffer, limits=OutboxLimits(max_bytes=max_bytes)
        ) as worker:
            worker.shared.desk = desk
            if policies is not None:
                worker.shared.policies = policies
            yield Stage(worker=worker, desk=desk, presences=presences)


def credential(claim: Claim, user: str = "ann") -> str:
    """Return a token that allows this."""
    return sign(SETTINGS, user, time.time() + 3600, topics=claim)


def channel(name: str) -> bytes:
    """Return the channel of a topic."""
    return b"topic:" + name.encode()


def subscribe(name: str, ref: str | None = None, **more: object) -> bytes:
    """Return a client's wish."""
    return text({"type": "subscribe", "topic": name, "ref": ref, **more})


def unsubscribe(name: str, ref: str | None = None) -> bytes:
    """Return a client's wish to have no more."""
    return text({"type": "unsubscribe", "topic": name, "ref": ref})


def place(seq: int) -> str:
    """Return the place of a notification."""
    return f"{1_763_630_000_000 + seq}-{seq * position.SEQ_SPAN}"


def point(seq: int) -> str:
    """Return the point of a notification."""
    return f"e0.{place(seq)}" if seq else "e0.0-0"


def where(seq: int) -> str:
    """Return the position of a client that has got everything up to a notification."""
    return position.join("", point(seq))


def notice(seq: int, size: int = 1) -> Notice:
    """Return a notification as a page has it."""
    payload = b'"%s"' % (b"x" * size)
    return Notice(place(seq), f"t00-{seq}", "order", payload, 0, 1, "accepted", None, "bob")


def entry(seq: int) -> bytes:
    """Return what is published for a notification."""
    fields = [point(seq - 1), point(seq), 0, f"t00-{seq}", "order", {"n": seq}, 0, None, "bob"]
    return b"\x01n" + json.dumps(fields).encode()


async def told(client: Client, *names: str) -> list[object]:
    """Return these fields of the next message; None where it has none."""
    message = await client.message()
    return [message.get(name) for name in names]


async def seqs(client: Client, count: int) -> list[object]:
    """Return the seqs of the next so many messages."""
    return [(await client.message())["seq"] for _ in range(count)]


async def quiet(client: Client) -> None:
    """Check that nothing was sent to a client that it has not read."""
    await client.send(text({"type": "ping", "ref": "quiet"}))
    assert {"type": "pong", "ref": "quiet"} == await client.message()


def decoded(data: bytes) -> list[dict[str, object]]:
    """Return the messages in a server's frames."""
    found = []
    while data:
        size = data[1] if data[1] < 126 else int.from_bytes(data[2:4], "big")
        start = 2 if data[1] < 126 else 4
        found.append(json.loads(frames.payload_of(data[: start + size])))
        data = data[start + size :]
    return found
