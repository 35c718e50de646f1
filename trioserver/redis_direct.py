"""Commands to Redis for callers without Trio: threads that block, and asyncio.

Here is also how one connection of redis-py is made and what its errors mean, which
`trioserver.redis_link` shares. This module must not know Trio: importing trio-asyncio replaces
functions of asyncio in the whole process, and a back end that only publishes has asyncio, or
Django, for itself.

Theory
    A link lends connections. A caller takes the one that was given back last, or makes one, sends
    its commands, reads exactly their replies and gives it back. Whatever else happens to it
    meanwhile (an error, a timeout, a cancellation, Ctrl-C) closes it: a connection with a reply
    outstanding is never used again, so no caller can ever get the reply to somebody else's
    command.

    Nothing is repeated here. Who may repeat a command is the caller, who knows whether it is safe.

Replies are as Redis sent them (RESP2): bytes, int, None, and lists of these.
"""

import asyncio
import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import ModuleType, TracebackType
from typing import Any, Final, Self, TypeAlias

import attrs
import redis.asyncio.connection as redis_asyncio
import redis.connection as redis_sync
import redis.exceptions

from trioserver.endpoint import Endpoint
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.resp import Argument, pack

Reply: TypeAlias = bytes | int | list["Reply"] | None

CONNECT_SECONDS: Final = 1.0
"""For a connection, TLS and AUTH; less if the caller has less."""

CONNECTIONS: Final = 10
"""With asyncio the most at a time, with threads the most that are kept: as REDIS_POOL_SIZE."""


def make_connection(module: ModuleType, where: Endpoint, **options: Any) -> Any:
    """Make a connection to ``where``, not connected yet.

    Args:
        module: `redis.connection` or its asyncio twin: the classes have the same names.
        where: The Redis.
        options: Further arguments of the class.
    """
    options |= {"db": where.db, "username": where.username, "password": where.password}
    # Said explicitly, so that replies do not change their form with the version of redis-py.
    options["protocol"] = 2
    if where.path is not None:
        return module.UnixDomainSocketConnection(path=where.path, **options)
    options |= {"host": where.host, "port": where.port}
    if where.tls is None:
        return module.Connection(**options)
    return module.SSLConnection(
        ssl_cert_reqs="required" if where.tls.verify else "none",
        ssl_check_hostname=where.tls.check_hostname,
        ssl_ca_certs=where.tls.ca_file,
        ssl_certfile=where.tls.cert_file,
        ssl_keyfile=where.tls.key_file,
        **options,
    )


def describe(error: BaseException) -> str:
    """Return Redis's own error, with the code that redis-py cuts off; else what happened."""
    code = getattr(error, "status_code", None) or getattr(error.__cause__, "status_code", None)
    text = str(error) or type(error).__name__
    return f"{code} {text}" if code else text


@attrs.frozen
class _Errand:
    """Commands on their way over one connection: bytes out, replies in; no I/O of its own."""

    where: Endpoint
    packed: bytes
    name: str
    """The first command's, for messages."""
    commands: int

    @classmethod
    def of(cls, where: Endpoint, commands: Sequence[tuple[Argument, ...]]) -> "_Errand":
        first = commands[0][0]
        return cls(
            where,
            b"".join([pack(*command) for command in commands]),
            first.decode(errors="replace") if isinstance(first, bytes) else str(first),
            len(commands),
        )

    def refused(self, error: redis.exceptions.ResponseError) -> RedisRefused:
        return RedisRefused(self.where.masked(describe(error)))

    def failed(self, error: BaseException) -> RedisUnavailable:
        problem = self.where.masked(describe(error))
        return RedisUnavailable(f"{self.name}: {problem} ({self.where.target})")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


class BlockingLink:
    """Commands to one Redis for callers that may block; for any number of threads.

    Nothing is connected before the first command. After a fork each process has connections of
    its own.
    """

    def __init__(self, where: Endpoint, *, client_name: str = "trioserver") -> None:
        self._where = where
        self._set_name = pack("CLIENT", "SETNAME", client_name)
        self._idle: deque[Any] = deque()

    def pipeline(
        self, commands: Iterable[tuple[Argument, ...]], *, timeout: float
    ) -> list[Reply | RedisRefused]:
        """Run several commands, in order, in one round trip; not a transaction.

        Args:
            commands: Name and arguments of each.
            timeout: Seconds for everything: a connection, all replies. The system's resolver has
                limits of its own.

        Returns:
            One reply per command; `RedisRefused`, as a value, for those that Redis refused.

        Raises:
            RedisUnavailable: Not all replies came. Which commands had an effect is unknown.
        """
        listed = list(commands)
        if not listed:
            return []
        errand = _Errand.of(self._where, listed)
        connection = self._take()
        try:
            replies = self._carry(connection, errand, time.monotonic() + timeout)
        except (redis.exceptions.RedisError, OSError) as error:
            connection.disconnect()
            raise errand.failed(error) from None
        except BaseException:
            connection.disconnect()
            raise
        self._give_back(connection)
        return replies

    def close(self) -> None:
        """Close what is idle. The link may be used again. Idempotent."""
        for connection in self._drain():
            connection.disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _drain(self) -> Iterator[Any]:
        # Other threads take and give meanwhile: a deque's operations are atomic, a loop is not.
        with suppress(IndexError):
            while True:
                yield self._idle.pop()

    def _take(self) -> Any:
        for idle in self._drain():
            # Of another process since a fork: closing is all that this one may do with it.
            with suppress(redis.exceptions.RedisError, OSError):
                if idle.pid == os.getpid() and not idle.can_read():
                    return idle
            # Bytes or the end of the stream while nothing was asked: closed, or confused.
            idle.disconnect()
        return make_connection(redis_sync, self._where)

    def _give_back(self, connection: Any) -> None:
        if len(self._idle) < CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.disconnect()

    def _carry(
        self, connection: Any, errand: _Errand, deadline: float
    ) -> list[Reply | RedisRefused]:
        greeting = b""
        if not connection.is_connected:
            connection.socket_connect_timeout = min(CONNECT_SECONDS, _left(deadline))
            connection.socket_timeout = connection.socket_connect_timeout
            connection.connect()
            greeting = self._set_name
        connection.send_packed_command([greeting + errand.packed], check_health=False)
        if greeting:
            # Not redis-py's "client_name": there, a user who may not use CLIENT has no connection.
            with suppress(redis.exceptions.ResponseError):
                connection.read_response(timeout=_left(deadline))
        replies: list[Reply | RedisRefused] = []
        for _ in range(errand.commands):
            try:
                replies.append(connection.read_response(timeout=_left(deadline)))
            except redis.exceptions.ResponseError as error:
                replies.append(errand.refused(error))
        return replies


@attrs.define(eq=False)
class _Pool:
    """The connections of one event loop."""

    places: asyncio.Semaphore = attrs.field(factory=lambda: asyncio.Semaphore(CONNECTIONS))
    idle: list[redis_asyncio.AbstractConnection] = attrs.field(factory=list)


class AsyncioLink:
    """Commands to one Redis for asyncio; at most `CONNECTIONS` at a time, others wait.

    Nothing is connected before the first command. Each event loop has connections of its own.
    """

    def __init__(self, where: Endpoint, *, client_name: str = "trioserver") -> None:
        self._where = where
        self._set_name = pack("CLIENT", "SETNAME", client_name)
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = (
            weakref.WeakKeyDictionary()
        )

    async def pipeline(
        self,
        commands: Iterable[tuple[Argument, ...]],
        *,
        timeout: float,  # noqa: ASYNC109 - part of the message if it runs out
    ) -> list[Reply | RedisRefused]:
        """Run several commands, in order, in one round trip; not a transaction.

        Args:
            commands: Name and arguments of each.
            timeout: Seconds for everything: a place, a connection, all replies.

        Returns:
            One reply per command; `RedisRefused`, as a value, for those that Redis refused.

        Raises:
            RedisUnavailable: Not all replies came. Which commands had an effect is unknown.

        Cancellation:
            Safe for everybody else; which commands had an effect is unknown.
        """
        listed = list(commands)
        if not listed:
            return []
        errand = _Errand.of(self._where, listed)
        try:
            async with asyncio.timeout(timeout):
                pool = self._pool()
                async with pool.places:
                    return await self._lend(pool, errand)
        except TimeoutError:
            raise errand.failed(TimeoutError(f"no answer within {timeout:g} s")) from None
        except (redis.exceptions.RedisError, OSError) as error:
            raise errand.failed(error) from None

    async def aclose(self) -> None:
        """Close what is idle in the running loop. The link may be used again. Idempotent."""
        pool = self._pool()
        while pool.idle:
            # Not "nowait": a TLS transport that has not said goodbye would outlive its loop.
            with suppress(redis.exceptions.RedisError, OSError):
                await pool.idle.pop().disconnect()

    def _pool(self) -> _Pool:
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            pool = self._pools[loop] = _Pool()
        return pool

    async def _lend(self, pool: _Pool, errand: _Errand) -> list[Reply | RedisRefused]:
        connection = await self._take(pool)
        try:
            replies = await self._carry(connection, errand)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        pool.idle.append(connection)
        return replies

    async def _take(self, pool: _Pool) -> Any:
        while pool.idle:
            idle = pool.idle.pop()
            if idle.is_connected and not await idle.can_read():
                return idle
            await idle.disconnect(nowait=True)
        return make_connection(
            redis_asyncio, self._where, socket_connect_timeout=None, socket_timeout=None
        )

    async def _carry(self, connection: Any, errand: _Errand) -> list[Reply | RedisRefused]:
        greeting = b""
        if not connection.is_connected:
            async with asyncio.timeout(CONNECT_SECONDS):
                await connection.connect()
            greeting = self._set_name
        await connection.send_packed_command(greeting + errand.packed, check_health=False)
        if greeting:
            with suppress(redis.exceptions.ResponseError):
                await connection.read_response()
        replies: list[Reply | RedisRefused] = []
        for _ in range(errand.commands):
            try:
                replies.append(await connection.read_response())
            except redis.exceptions.ResponseError as error:
                replies.append(errand.refused(error))
        return replies
