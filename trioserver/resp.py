"""How the hot connection speaks to Redis: bytes and values, no I/O.

The connection that carries the subscription is ours from the first byte (redis-py costs ten
times as much per message), so its few words are here:

    greeting      HELLO 3 with credentials and a name, in one round trip. Servers and proxies that
                  do not know HELLO (Redis < 6), do not speak RESP3 or forbid it get AUTH and
                  CLIENT SETNAME instead; the connection then stays on RESP2.
    SUBSCRIBE,    many channels per command. Redis answers once per channel and in the order of
    UNSUBSCRIBE   the commands, which is what `trioserver.roster` relies on.
    PING          answered by ``+PONG``, or by the list ``["pong", ""]`` on RESP2 once subscribed.

Messages and confirmations are lists of the same form in both versions (a push in RESP3, an
ordinary array in RESP2), so after the greeting nobody needs to know which one it is.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import attrs
import hiredis

from trioserver.endpoint import Endpoint
from trioserver.errors import RedisRefused, RedisUnavailable

Argument = bytes | str | int | float
"""What may be part of a command; text is encoded as UTF-8."""

PING: Final = b"*1\r\n$4\r\nPING\r\n"
MESSAGE: Final = b"message"
"""First element of a published message: ``[b"message", channel, payload]``."""

CHANNELS_PER_COMMAND: Final = 512
"""So that one command stays near 20 KiB and Redis serves others between two of them."""

_SUBSCRIBED: Final = b"subscribe"
_UNSUBSCRIBED: Final = b"unsubscribe"
_PONG: Final = b"pong"


def pack(*command: Argument) -> bytes:
    """Return one command as Redis wants it.

    Raises:
        TypeError: An argument is neither bytes, text nor a number.
    """
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type] # stub: one item only
    return packed


def subscribe(channels: Sequence[bytes]) -> Iterator[bytes]:
    """Yield SUBSCRIBE commands for ``channels``, `CHANNELS_PER_COMMAND` in each."""
    return _chunks(b"SUBSCRIBE", channels)


def unsubscribe(channels: Sequence[bytes]) -> Iterator[bytes]:
    """Yield UNSUBSCRIBE commands for ``channels``, `CHANNELS_PER_COMMAND` in each."""
    return _chunks(b"UNSUBSCRIBE", channels)


def _chunks(verb: bytes, channels: Sequence[bytes]) -> Iterator[bytes]:
    for start in range(0, len(channels), CHANNELS_PER_COMMAND):
        yield pack(verb, *channels[start : start + CHANNELS_PER_COMMAND])


class Pong:
    """The answer to a PING."""


PONG: Final = Pong()


@attrs.frozen
class Confirmation:
    """Redis says that a channel was subscribed or unsubscribed."""

    channel: bytes
    subscribed: bool


def interpret(reply: object) -> Confirmation | Pong | None:
    """Return what a reply other than a message means; None is for unknown pushes.

    Raises:
        RedisRefused: It is an error; the text is Redis's own.
        RedisUnavailable: It is nothing that a subscribed connection may receive.
    """
    match reply:
        case [b"subscribe", bytes() as channel, _]:
            return Confirmation(channel, subscribed=True)
        case [b"unsubscribe", bytes() as channel, _]:
            return Confirmation(channel, subscribed=False)
        case b"PONG" | [b"pong", *_]:
            return PONG
        case hiredis.ReplyError():
            raise RedisRefused(str(reply))
        case hiredis.PushNotification() if reply and reply[0] != b"unsubscribe":
            # RESP3 wants unknown kinds to be ignored: a newer server may announce anything.
            return None
        case _:
            raise RedisUnavailable(f"protocol error: unexpected reply {reply!r:.80}")


@attrs.define(eq=False, kw_only=True)
class Greeting:
    """The first exchange on a new connection, without I/O.

    Send `hello`; give each reply to `receive` and send what it returns, until `done`.
    """

    where: Endpoint
    """Whose credentials are given."""
    client_name: str
    """Shown by CLIENT LIST; no spaces."""
    done: bool = attrs.field(default=False, init=False)
    """Whether the connection may be used."""
    _awaiting: list[str] = attrs.field(factory=list, init=False)
    """Commands sent whose replies are outstanding, in order."""

    def hello(self) -> bytes:
        """Return the first bytes to send."""
        credentials: tuple[str, ...] = ()
        if self.where.username or self.where.password:
            # HELLO wants both. "default" is who a bare password belongs to, and a user without a
            # password is one who needs none: any will do.
            user, password = self.where.username or "default", self.where.password or ""
            credentials = ("AUTH", user, password)
        self._awaiting.append("HELLO")
        return pack("HELLO", "3", *credentials, "SETNAME", self.client_name)

    def receive(self, reply: object) -> bytes:
        """Take the next reply; return what to send now, which may be nothing.

        Raises:
            RedisRefused: The server does not want us; the text is its own.
        """
        answered = self._awaiting.pop(0)
        more = b""
        if isinstance(reply, hiredis.ReplyError):
            more = self._refused(answered, str(reply))
        self.done = not self._awaiting
        return more

    def _refused(self, answered: str, error: str) -> bytes:
        """Decide what an error means: not the end, if there is another way to say it."""
        if answered == "HELLO" and error.startswith(_NO_HELLO):
            return self._old_greeting()
        if answered == "AUTH" and error.lower().startswith(_AUTH_TAKES_ONE):
            # Redis < 6 knows no users, but URLs written for it often carry a made-up one.
            self._awaiting.append("AUTH only")
            return pack("AUTH", self.where.password or "")
        if answered == "CLIENT":
            return b""  # a nameless connection is as good
        raise RedisRefused(self.where.masked(error))

    def _old_greeting(self) -> bytes:
        """AUTH and CLIENT SETNAME, as before HELLO existed."""
        greeting = b""
        if self.where.username or self.where.password:
            users = (self.where.username,) if self.where.username else ()
            self._awaiting.append("AUTH")
            greeting += pack("AUTH", *users, self.where.password or "")
        self._awaiting.append("CLIENT")
        return greeting + pack("CLIENT", "SETNAME", self.client_name)


_NO_HELLO: Final = ("ERR unknown command", "ERR unsupported", "NOPROTO", "NOPERM")
_AUTH_TAKES_ONE: Final = "err wrong number of arguments for 'auth'"
