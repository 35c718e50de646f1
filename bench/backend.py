"""What a back end does with the ledger: the client publishes with this, a scenario asks with it.

The client makes one command per notification and knows neither Lua nor the names of arguments. So
the command is written down for it once, by those who know: see `template`.
"""

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Final

import attrs
import hiredis

from bench.client import BenchError
from trioserver import ledger
from trioserver.ledger import Command, Notification, Rules
from trioserver.resp import pack
from trioserver.settings import Settings

KEY: Final = b"\1K"
ID: Final = b"\1I"
PAYLOAD: Final = b"\1P"

CHAT_SESSIONS: Final = "ts:session:*"
"""Keys of chat sessions; each has its count in the field ``n``."""

TIMEOUT_SECONDS: Final = 10.0
READ_BYTES: Final = 256 << 10

RATE: Final = 1_000_000
"""NOTIFICATIONS_PER_MINUTE_PER_USER of a measurement: high, and not off."""

RULES: Final = attrs.evolve(Rules.of(Settings()), rate=RATE)
_USER: Final = "u0"


def template() -> bytes:
    """Return the command that publishes a notification, as Redis reads it.

    It says what a back end says that leaves everything to the defaults. `KEY`, `ID` and `PAYLOAD`
    stand where the client puts these, each with its length before it.
    """
    notification = Notification(
        user=_USER,
        payload=PAYLOAD,
        id=ID.decode(),
        ttl_ms=round(Settings().notification_ttl * 1000),
    )
    packed = pack(*ledger.publish(notification, rules=RULES))
    key = ledger.key("meta", _USER).encode()
    packed = packed.replace(b"$%d\r\n%b" % (len(key), key), KEY)
    for mark in (ID, PAYLOAD):
        packed = packed.replace(b"$%d\r\n%b" % (len(mark), mark), mark)
    return packed


def publication(template: bytes, user: str, payload: bytes) -> bytes:
    """Return the command of a `template` for one notification; `client.c` makes the same."""
    identity = ledger.new_id(ledger.partition(user), time.time_ns() // 1_000_000)
    for mark, value in (
        (KEY, ledger.key("meta", user).encode()),
        (ID, identity.encode()),
        (PAYLOAD, payload),
    ):
        template = template.replace(mark, b"$%d\r\n%b" % (len(value), value))
    return template


class Link:
    """A connection to Redis whose replies are read when there are some."""

    def __init__(self, redis_port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", redis_port), TIMEOUT_SECONDS)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader(notEnoughData=Ellipsis)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""
        return self._sock.fileno()

    def send(self, commands: bytes) -> None:
        """Send these."""
        self._sock.sendall(commands)

    def replies(self) -> Iterator[object]:
        """Yield what has come since; waits for it if there is nothing.

        Raises:
            BenchError: Redis hung up.
        """
        part = self._sock.recv(READ_BYTES)
        if not part:
            raise BenchError("Redis hung up")
        self._reader.feed(part)
        yield from iter(self._reader.gets, Ellipsis)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def make_known(redis_port: int) -> None:
    """Give Redis the script, as every back end does before it publishes for the first time."""
    ask(redis_port, [("SCRIPT", "LOAD", ledger.SCRIPTS["publish"].text)])


def unconfirmed(redis_port: int, users: int) -> int:
    """Return of how many users the newest notification is not known to be received.

    Args:
        redis_port: Where the ledger is.
        users: Those from u0 on to look at; each with one device, which has no name.
    """
    names = [f"u{number}" for number in range(users)]
    newest = ask(redis_port, [("HGET", ledger.key("meta", user), "last") for user in names])
    device = f"d:{ledger.NAMELESS}"
    cursors = ask(redis_port, [("HGET", ledger.key("cursors", user), device) for user in names])
    return sum(
        not (place in {None, b"0-0"} or _received(cursor) == place)
        for place, cursor in zip(newest, cursors, strict=True)
    )


def _received(cursor: object) -> bytes | None:
    """Return the second word of a device's record, the place up to which it has everything."""
    return cursor.split()[1] if isinstance(cursor, bytes) else None


def chat_counts(redis_port: int) -> dict[bytes, int]:
    """Return the stored counts of all chat sessions, by their keys.

    For a Redis that nobody else uses: it looks through all that is there.
    """
    (found,) = ask(redis_port, [("KEYS", CHAT_SESSIONS)])
    names = found if isinstance(found, list) else []
    counts = ask(redis_port, [("HGET", name, "n") for name in names])
    return {
        name: int(count)
        for name, count in zip(names, counts, strict=True)
        if isinstance(count, bytes)
    }


def ask(redis_port: int, commands: Sequence[Command]) -> list[object]:
    """Return the replies to all of ``commands``, sent as one pipeline.

    Raises:
        BenchError: One of them is an error, or Redis is not there.
    """
    replies: list[object] = []
    try:
        with contextlib.closing(Link(redis_port)) as asking:
            asking.send(b"".join(pack(*command) for command in commands))
            while len(replies) < len(commands):
                replies.extend(asking.replies())
    except OSError as error:
        raise BenchError(f"Redis: {error}") from error
    for reply in replies:
        if isinstance(reply, hiredis.ReplyError):
            raise BenchError(f"Redis: {reply}")
    return replies
